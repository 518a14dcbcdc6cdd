//! `chat generate --best-of`: of several answers the one that a reward model scores highest.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use common::checkpoint::{Checkpoint, Stage};
use common::model::ScalarGpt;
use common::score::{Ensemble, score_rows};

use crate::cli::GenerateArgs;
use crate::model::{ChatModel, Completion};

/// Answers sampled and scored together.
const TOGETHER: u64 = 32;

/// Reward models that read what a policy writes.
pub(crate) struct Judge {
    models: Vec<ScalarGpt>,
    /// Where they were loaded from.
    dirs: Vec<PathBuf>,
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
    /// Loads the reward models that `args` name, which have to have the tokenizer of `policy`, the model of its `--checkpoint`.
    ///
    /// # Errors
    /// If a directory holds none, or one with another tokenizer.
    pub(crate) fn load(args: &GenerateArgs, policy: &ChatModel) -> anyhow::Result<Self> {
        let GenerateArgs { checkpoint: of_policy, reward_model: dirs, ensemble, runtime, .. } = args;
        let device = runtime.open()?;
        let load = |dir: &PathBuf| -> anyhow::Result<ScalarGpt> {
            let mut checkpoint = Checkpoint::open_with(dir, runtime.opening())?.of_stage(&[Stage::RewardModel])?;
            ensure!(
                checkpoint.require_tokenizer()?.sha256() == policy.tokenizer().sha256(),
                "`{}` and `{}` have different tokenizers, so the one cannot score what the other writes\nhint: pass a reward \
                 model that was trained from the same model",
                dir.display(),
                of_policy.display()
            );
            Ok(device.take_scalar(&mut checkpoint)?)
        };
        let models = dirs.iter().map(load).collect::<anyhow::Result<_>>()?;
        Ok(Self { models, dirs: dirs.clone(), ensemble: ensemble.unwrap_or_default() })
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
        check_finite(&self.dirs, &by_member)?;
        let of_row = |i: usize| by_member.iter().map(|scores| f64::from(scores[i])).collect::<Vec<f64>>();
        // Of one member its own score, to the bit.
        Ok((0..rows.len()).map(|i| self.ensemble.combine(&of_row(i)) as f32).collect())
    }
}

/// Every score of every member is a number.
fn check_finite(dirs: &[PathBuf], by_member: &[Vec<f32>]) -> anyhow::Result<()> {
    for (dir, scores) in dirs.iter().zip(by_member) {
        ensure!(
            scores.iter().all(|score| score.is_finite()),
            "a score is not finite: the weights of the reward model `{}` have diverged",
            dir.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_that_is_not_finite_names_its_reward_model() {
        let dirs = ["rm-1", "rm-2"].map(PathBuf::from);
        check_finite(&dirs, &[vec![0.5, -1.0], vec![0.0, 2.0]]).unwrap();
        let error = check_finite(&dirs, &[vec![0.5, -1.0], vec![0.0, f32::NAN]]).unwrap_err().to_string();
        assert_eq!(error, "a score is not finite: the weights of the reward model `rm-2` have diverged");
    }
}
