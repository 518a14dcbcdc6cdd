//! `[overoptimise]` of a recipe.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[overoptimise]`: what `recipe overoptimise` measures. Needs `[gold]` and `[collect]` with the simulated labeller, whose
/// prompts, sampling and pairs it takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OveroptimiseConfig {
    /// Random seeds of reward models and policies; each is trained once with each.
    pub seeds: Vec<u64>,
    /// Held-out prompts (`.jsonl`) of best-of-n, and of the policies after DPO. Required.
    pub prompts: PathBuf,
    /// Number of prompts used, from the beginning of `prompts`; 0 uses all.
    pub n_prompts: usize,
    /// Number of the SFT model's answers to each prompt, of which the best of n are taken: the largest n.
    #[schemars(range(min = 2, max = 100_000))]
    pub pool: usize,
    /// Numbers of preference pairs of further reward models, besides all that were collected.
    #[schemars(inner(range(min = 1, max = 1_000_000_000)))]
    pub pairs: Vec<usize>,
    /// Share of wrong labels, the same for close and for clear pairs.
    #[schemars(range(min = 0, max = 0.5))]
    pub wrong_labels: f64,
    /// Shares of wrong labels of further reward models.
    #[schemars(inner(range(min = 0, max = 0.5)))]
    pub other_wrong_labels: Vec<f64>,
    /// Sizes of further reward models, as keys of `[model]` in `pretrain.toml` with their values: `"d_model=48 n_layers=2"`. The
    /// language model that each starts from is trained like the policy's.
    pub sizes: Vec<String>,
    /// KL coefficients of PPO. The first is that of the policies against further reward models, and of RLOO.
    #[schemars(inner(range(min = 0, max = 1_000_000)))]
    pub kl_coefs: Vec<f64>,
    /// Number of steps of PPO and RLOO.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub policy_steps: u64,
    /// Number of RLOO's answers to a prompt; 0 leaves RLOO out.
    pub rloo_samples: usize,
    /// Values of β in DPO: the reward lost per nat of divergence from the SFT model; one policy is trained with each.
    #[schemars(inner(range(min = 1e-6, max = 1_000_000)))]
    pub betas: Vec<f64>,
    /// Number of answers to each prompt by which a policy after DPO is measured.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub samples: usize,
    /// Fewest optimiser steps of a reward model: with few pairs, as many passes over them as that takes, unless
    /// `reward-model.toml` sets `train.steps`. The weights of the best evaluation are kept.
    #[schemars(range(max = 1_000_000_000))]
    pub least_steps: usize,
}

impl Default for OveroptimiseConfig {
    fn default() -> Self {
        Self {
            seeds: vec![1, 2, 3],
            prompts: PathBuf::new(),
            n_prompts: 100,
            pool: 512,
            pairs: vec![250, 1000, 2500],
            wrong_labels: 0.1,
            other_wrong_labels: vec![0.0, 0.25],
            sizes: Vec::new(),
            kl_coefs: vec![0.0, 0.02, 0.1],
            policy_steps: 60,
            rloo_samples: 4,
            betas: vec![0.02, 0.1, 0.5],
            samples: 4,
            least_steps: 100,
        }
    }
}

impl OveroptimiseConfig {
    /// Checks the constraints that the types do not express.
    ///
    /// # Errors
    /// Naming the key.
    pub(crate) fn validate(&self) -> Result<()> {
        ensure!(!self.seeds.is_empty(), "`seeds` names none");
        ensure!(self.rloo_samples != 1, "`rloo_samples` is 1, but an answer is compared with the others to its prompt");
        ensure!(
            self.rloo_samples == 0 || !self.kl_coefs.is_empty(),
            "RLOO takes the first of `kl_coefs`, which names none\nhint: set `rloo_samples` to 0 to leave RLOO out"
        );
        let mut seeds = self.seeds.clone();
        seeds.sort_unstable();
        seeds.dedup();
        ensure!(seeds.len() == self.seeds.len(), "`seeds` names one twice");
        ensure!(
            self.sizes.iter().all(|size| !size.trim().is_empty()),
            "`sizes` has an empty one\nhint: name keys of `[model]`, as in \"d_model=48 n_layers=2\""
        );
        ensure!(!self.prompts.as_os_str().is_empty(), "`prompts` names no file");
        Ok(())
    }

    /// What ten minutes are enough for: one seed, a smaller pool, the fewest and all pairs, and of every method its first setting.
    pub(crate) fn quick(mut self) -> Self {
        self.seeds.truncate(1);
        self.n_prompts = if self.n_prompts == 0 { 64 } else { self.n_prompts.min(64) };
        self.pool = self.pool.min(128);
        self.pairs = self.pairs.into_iter().min().into_iter().collect();
        self.other_wrong_labels.clear();
        self.sizes.clear();
        self.kl_coefs.truncate(1);
        self.betas.truncate(1);
        self.policy_steps = self.policy_steps.min(30);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> OveroptimiseConfig {
        OveroptimiseConfig { prompts: "p.jsonl".into(), ..OveroptimiseConfig::default() }
    }

    #[test]
    fn the_quick_form_is_a_part_of_the_whole() {
        let (whole, quick) = (config(), config().quick());
        assert_eq!((quick.seeds, quick.pairs), (vec![1], vec![250]));
        assert_eq!((quick.kl_coefs, quick.betas), (vec![whole.kl_coefs[0]], vec![whole.betas[0]]));
        assert_eq!((quick.pool, quick.n_prompts, quick.wrong_labels), (128, 64, whole.wrong_labels));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        config().validate().unwrap();
        for (bad, key) in [
            (OveroptimiseConfig::default(), "`prompts`"),
            (OveroptimiseConfig { seeds: vec![], ..config() }, "`seeds`"),
            (OveroptimiseConfig { seeds: vec![3, 1, 3], ..config() }, "twice"),
            (OveroptimiseConfig { rloo_samples: 1, ..config() }, "`rloo_samples`"),
            (OveroptimiseConfig { kl_coefs: vec![], ..config() }, "`kl_coefs`"),
            (OveroptimiseConfig { sizes: vec![String::new()], ..config() }, "`sizes`"),
        ] {
            let error = bad.validate().unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
