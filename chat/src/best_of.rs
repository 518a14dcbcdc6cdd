//! `chat generate --best-of`: of several answers the one that a reward model scores highest.

use std::path::Path;

use anyhow::{Context, ensure};
use common::checkpoint::{Checkpoint, Stage};
use common::cli::RuntimeArgs;
use common::model::ScalarGpt;
use common::score::score_rows;

use crate::model::{ChatModel, Completion};

/// Answers sampled and scored together.
const TOGETHER: u64 = 32;

/// A reward model that reads what a policy writes.
pub(crate) struct Judge {
    model: ScalarGpt,
}

/// The answer that was chosen.
pub(crate) struct Best {
    /// Its number among the answers, from 0.
    pub(crate) sample: u64,
    pub(crate) completion: Completion,
    /// The reward model's score of it.
    pub(crate) score: f32,
}

impl Judge {
    /// Loads the reward model in `dir`, which has to have the tokenizer of `policy`.
    ///
    /// # Errors
    /// If the directory holds none, or one with another tokenizer.
    pub(crate) fn load(dir: &Path, policy: &ChatModel, runtime: &RuntimeArgs) -> anyhow::Result<Self> {
        let checkpoint = Checkpoint::open_with(dir, runtime.opening())?.of_stage(&[Stage::RewardModel])?;
        ensure!(
            checkpoint.require_tokenizer()?.sha256() == policy.tokenizer().sha256(),
            "`{}` has another tokenizer than {}\nhint: pass a reward model that was trained from the same model",
            dir.display(),
            policy.description()
        );
        Ok(Self { model: runtime.open()?.scalar(&checkpoint)? })
    }

    /// Samples `n` answers to `prompt` and returns the one with the highest score, the first of equal ones. Scored are the very
    /// tokens that were sampled, as PPO scores them.
    ///
    /// # Errors
    /// If answers cannot be sampled, do not fit the reward model's context, or have no finite score.
    pub(crate) fn best(&self, policy: &ChatModel, prompt: &[u32], n: u64) -> anyhow::Result<Best> {
        let mut best: Option<Best> = None;
        for first in (0..n).step_by(TOGETHER as usize) {
            let numbers = first..n.min(first + TOGETHER);
            let completions = policy.samples(prompt, numbers.clone())?;
            let scores = self.scores(prompt, &completions)?;
            for ((sample, completion), score) in numbers.zip(completions).zip(scores) {
                if best.as_ref().is_none_or(|best| score > best.score) {
                    best = Some(Best { sample, completion, score });
                }
            }
        }
        best.context("no answer was sampled")
    }

    fn scores(&self, prompt: &[u32], completions: &[Completion]) -> anyhow::Result<Vec<f32>> {
        let rows: Vec<Vec<u32>> = completions.iter().map(|answer| [prompt, &answer.token_ids].concat()).collect();
        let (longest, context) = (rows.iter().map(Vec::len).max().unwrap_or(0), self.model.config().max_seq_len);
        ensure!(
            longest <= context,
            "prompt and answer have {longest} tokens, the reward model's context {context}\nhint: lower `--max-tokens`"
        );
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let scores = score_rows(&self.model, &rows, rows.len()).context("failed to read the scores")?;
        ensure!(
            scores.iter().all(|score| score.is_finite()),
            "a score is not finite: the reward model's weights have diverged"
        );
        Ok(scores)
    }
}
