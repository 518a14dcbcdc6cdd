//! `chat generate --best-of`: of several answers the one that a reward model scores highest.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use common::checkpoint::{Checkpoint, Stage};
use common::cli::RuntimeArgs;
use common::model::ScalarGpt;
use common::score::{Ensemble, score_rows};

use crate::model::{ChatModel, Completion};

/// Answers sampled and scored together.
const TOGETHER: u64 = 32;

/// Reward models that read what a policy writes.
pub(crate) struct Judge {
    models: Vec<ScalarGpt>,
    /// How the scores of several become one.
    ensemble: Ensemble,
}

/// The answer that was chosen.
pub(crate) struct Best {
    /// Its number among the answers, from 0.
    pub(crate) sample: u64,
    pub(crate) completion: Completion,
    /// The score of it, by the reward model or the ensemble.
    pub(crate) score: f32,
}

impl Judge {
    /// Loads the reward models in `dirs`, which have to have the tokenizer of `policy`.
    ///
    /// # Errors
    /// If a directory holds none, or one with another tokenizer.
    pub(crate) fn load(
        dirs: &[PathBuf],
        ensemble: Ensemble,
        policy: &ChatModel,
        runtime: &RuntimeArgs,
    ) -> anyhow::Result<Self> {
        let device = runtime.open()?;
        let load = |dir: &Path| -> anyhow::Result<ScalarGpt> {
            let checkpoint = Checkpoint::open_with(dir, runtime.opening())?.of_stage(&[Stage::RewardModel])?;
            ensure!(
                checkpoint.require_tokenizer()?.sha256() == policy.tokenizer().sha256(),
                "`{}` has another tokenizer than {}\nhint: pass a reward model that was trained from the same model",
                dir.display(),
                policy.description()
            );
            Ok(device.scalar(&checkpoint)?)
        };
        Ok(Self { models: dirs.iter().map(|dir| load(dir)).collect::<anyhow::Result<_>>()?, ensemble })
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
        let context = self.models.iter().map(|model| model.config().max_seq_len).min().unwrap_or(0);
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        ensure!(
            longest <= context,
            "prompt and answer have {longest} tokens, the reward model's context {context}\nhint: lower `--max-tokens`"
        );
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let scores: Result<Vec<Vec<f32>>, _> =
            self.models.iter().map(|model| score_rows(model, &rows, rows.len())).collect();
        let by_member = scores.context("failed to read the scores")?;
        ensure!(
            by_member.iter().flatten().all(|score| score.is_finite()),
            "a score is not finite: the reward model's weights have diverged"
        );
        let of_row = |i: usize| by_member.iter().map(|scores| f64::from(scores[i])).collect::<Vec<f64>>();
        // Of one member its own score, to the bit.
        Ok((0..rows.len()).map(|i| self.ensemble.combine(&of_row(i)) as f32).collect())
    }
}
