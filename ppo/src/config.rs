//! The TOML of this stage.

use anyhow::ensure;
use common::cli::StageArgs;
use common::optim::{OptimizerConfig, RlhfDefaults};
use common::session::{self, DataConfig, RunConfig};
use serde::{Deserialize, Serialize};

/// `ppo.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PpoConfig {
    /// Seed of the prompts' order, sampling and minibatches.
    pub seed: u64,
    /// The prompts.
    pub data: DataConfig<TooLong>,
    /// The policy's optimiser and its schedule; linear to 0 by default.
    #[serde(with = "RlhfDefaults")]
    pub optimizer: OptimizerConfig,
    /// The value model's; linear to 0 by default.
    #[serde(with = "RlhfDefaults")]
    pub value_optimizer: OptimizerConfig,
    /// Training length and batch sizes.
    pub train: TrainConfig,
    /// The algorithm.
    pub ppo: PpoSection,
    /// How often to log, evaluate and save. An evaluation is better when `val/score − kl_coef·val/kl` is higher.
    pub run: RunConfig,
}

impl Default for PpoConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            data: DataConfig::default(),
            optimizer: OptimizerConfig::rlhf(),
            value_optimizer: OptimizerConfig::rlhf(),
            train: TrainConfig::default(),
            ppo: PpoSection::default(),
            run: RunConfig { log_every: 1, eval_every: 10, save_every: 10, ..RunConfig::default() },
        }
    }
}

/// What to do with a prompt that, with `ppo.response_length` more tokens, exceeds the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TooLong {
    /// Stop with an error.
    #[default]
    Fail,
    /// Leave it out.
    Skip,
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Steps: each samples a batch of responses and makes all updates on it.
    pub steps: u64,
    /// Prompts in one step, one response each.
    pub batch_size: usize,
    /// Responses computed at a time, sorted by length so that little is padded; `batch_size / ppo.minibatches` by
    /// default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<usize>,
    /// Held-out prompts of an evaluation along the way; 0 for all.
    pub eval_prompts: usize,
    /// Of these, how many answers go to `samples.jsonl`.
    pub n_samples: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self { steps: 100, batch_size: 64, micro_batch_size: None, eval_prompts: 64, n_samples: 4 }
    }
}

/// `[ppo]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PpoSection {
    /// Tokens of a response at most, `<|end|>` included.
    pub response_length: usize,
    /// Sampling temperature, in every log-probability too.
    pub temperature: f64,
    /// Score of a response that was cut off instead of ending, in place of the reward model's.
    pub missing_eos_score: f64,
    /// Reward per nat away from the reference; with `kl_target`, only at the start.
    pub kl_coef: f64,
    /// Nats that an adaptive coefficient steers `objective/kl` to; absent for a fixed one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_target: Option<f64>,
    /// Responses over which the adaptive coefficient moves.
    pub kl_horizon: f64,
    /// Discount γ per token; 1 because a response is one decision in many tokens.
    pub gamma: f64,
    /// λ of the advantage estimates: 1 trusts returns, 0 values.
    pub lambda: f64,
    /// Passes over the batch of responses.
    pub epochs: u64,
    /// Optimiser steps in a pass; divides `train.batch_size`.
    pub minibatches: usize,
    /// Probability ratios count within `1 ± clip_range`.
    pub clip_range: f64,
    /// Values count within `± value_clip_range` of the old ones, in units of the score.
    pub value_clip_range: f64,
    /// What the value model starts from.
    pub value_init: ValueInit,
    /// How far from 1 a ratio may be before the first update of a step; only rounding should be.
    pub ratio_tolerance: f64,
}

/// What the value model starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ValueInit {
    /// The reward model, head and all.
    #[default]
    RewardModel,
    /// The reward model's trunk with a head of zeros: no response is worth more than another at first.
    ZeroHead,
}

impl Default for PpoSection {
    fn default() -> Self {
        Self {
            response_length: 64,
            temperature: 1.0,
            missing_eos_score: -1.0,
            kl_coef: 0.05,
            kl_target: None,
            kl_horizon: 10_000.0,
            gamma: 1.0,
            lambda: 0.95,
            epochs: 4,
            minibatches: 1,
            clip_range: 0.2,
            value_clip_range: 0.2,
            value_init: ValueInit::default(),
            ratio_tolerance: 1e-3,
        }
    }
}

impl PpoConfig {
    /// Reads the configuration that `args` name, with absolute paths.
    ///
    /// # Errors
    /// If it cannot be read or is not valid.
    pub fn load(args: &StageArgs) -> anyhow::Result<Self> {
        session::load_config(args, Self::validate, |config| config.data.sources_mut())
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// Naming the key that is out of range.
    pub fn validate(&self) -> anyhow::Result<()> {
        self.optimizer.validate()?;
        self.value_optimizer.validate()?;
        self.data.validate("prompts")?;
        self.run.validate()?;
        let TrainConfig { steps, batch_size, micro_batch_size, .. } = self.train;
        ensure!(steps > 0 && batch_size > 0, "`train.steps` and `train.batch_size` must be at least 1");
        let PpoSection { epochs, minibatches, response_length, .. } = self.ppo;
        ensure!(
            epochs > 0 && minibatches > 0 && response_length > 0,
            "`ppo.epochs`, `ppo.minibatches` and `ppo.response_length` must be at least 1"
        );
        ensure!(
            batch_size % minibatches == 0,
            "`ppo.minibatches` {minibatches} does not divide `train.batch_size` {batch_size}"
        );
        let minibatch = batch_size / minibatches;
        let micro = micro_batch_size.unwrap_or(minibatch);
        ensure!(
            micro > 0 && minibatch % micro == 0,
            "`train.micro_batch_size` {micro} does not divide the {minibatch} responses of a minibatch"
        );
        let unit = |x: f64| (0.0..=1.0).contains(&x);
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let checks = [
            ("temperature", "a positive number", self.ppo.temperature, positive(self.ppo.temperature)),
            ("missing_eos_score", "a number", self.ppo.missing_eos_score, self.ppo.missing_eos_score.is_finite()),
            ("kl_coef", "0 or more", self.ppo.kl_coef, self.ppo.kl_coef >= 0.0 && self.ppo.kl_coef.is_finite()),
            (
                "kl_target",
                "a positive number",
                self.ppo.kl_target.unwrap_or(1.0),
                self.ppo.kl_target.is_none_or(positive),
            ),
            ("kl_horizon", "a positive number", self.ppo.kl_horizon, positive(self.ppo.kl_horizon)),
            ("gamma", "between 0 and 1", self.ppo.gamma, unit(self.ppo.gamma)),
            ("lambda", "between 0 and 1", self.ppo.lambda, unit(self.ppo.lambda)),
            ("clip_range", "a positive number", self.ppo.clip_range, positive(self.ppo.clip_range)),
            ("value_clip_range", "a positive number", self.ppo.value_clip_range, positive(self.ppo.value_clip_range)),
            ("ratio_tolerance", "a positive number", self.ppo.ratio_tolerance, positive(self.ppo.ratio_tolerance)),
        ];
        for (name, expected, found, ok) in checks {
            ensure!(ok, "`ppo.{name}` must be {expected}, found {found}");
        }
        Ok(())
    }

    /// Responses computed at a time.
    pub(crate) fn micro_batch_size(&self) -> usize {
        self.train.micro_batch_size.unwrap_or(self.train.batch_size / self.ppo.minibatches)
    }
}
