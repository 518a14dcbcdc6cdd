//! The configuration of this stage.

use anyhow::ensure;
use common::capacity::Settings;
use common::cli::StageArgs;
use common::kernels::TrunkPrecision;
use common::model::LoraConfig;
use common::optim::{OptimizerConfig, RlhfDefaults};
use common::rng::Streams;
use common::score::{Sampling, TooLong};
use common::session::{self, DataConfig, RunConfig};
use common::tokenizer::Tokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `ppo.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PpoConfig {
    /// Random seed of the prompt order, sampling and minibatches.
    pub seed: u64,
    /// Prompts to train and evaluate on. Paths are relative to the folder of the configuration; `$DATA/` begins a path in the
    /// folder of `--data` or `KINDLING_DATA`.
    pub data: DataConfig<TooLong>,
    /// Train low-rank adapters beside frozen weights, of the policy and of the value model: the reference policy, and a reward model
    /// that is an adapter on the same base, then share them. Without this section all weights are trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// AdamW of the policy and its learning-rate schedule, which falls linearly to 0 by default.
    #[serde(with = "RlhfDefaults")]
    #[schemars(with = "OptimizerConfig")]
    pub optimizer: OptimizerConfig,
    /// AdamW of the value model and its learning-rate schedule, which falls linearly to 0 by default.
    #[serde(with = "RlhfDefaults")]
    #[schemars(with = "OptimizerConfig")]
    pub value_optimizer: OptimizerConfig,
    /// Training length and batch sizes.
    pub train: TrainConfig,
    /// Rollouts, rewards, advantages and the clipped objectives.
    pub ppo: PpoSection,
    /// Intervals of logging, evaluation and checkpoints, in PPO steps. The best evaluation is the one with the highest
    /// `val/score − kl_coef·val/kl`.
    #[serde(deserialize_with = "run_section")]
    pub run: RunConfig,
}

/// The defaults of `[run]`: a step is an iteration, so they are smaller than those of other stages.
fn run_defaults() -> RunConfig {
    RunConfig { log_every: 1, eval_every: 10, save_every: 10, ..RunConfig::default() }
}

fn run_section<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<RunConfig, D::Error> {
    run_defaults().or_given(deserializer)
}

impl Default for PpoConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            data: DataConfig::default(),
            lora: None,
            optimizer: OptimizerConfig::rlhf(),
            value_optimizer: OptimizerConfig::rlhf(),
            train: TrainConfig::default(),
            ppo: PpoSection::default(),
            run: run_defaults(),
        }
    }
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Number of PPO steps; each samples a batch of responses and makes all updates on it.
    #[schemars(range(min = 1, max = 1_000_000_000_000_u64))]
    pub steps: u64,
    /// Number of prompts in a step, with one response each.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub batch_size: usize,
    /// Number of responses computed at once, sorted by length to save padding, with gradients accumulated over the
    /// minibatch; divides `batch_size / ppo.minibatches`, which is the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub micro_batch_size: Option<usize>,
    /// Whether the backward pass computes the activations inside each block again, instead of keeping them from the forward
    /// pass: the same numbers in less memory, and a third more time for a step.
    pub checkpoint_activations: bool,
    /// Number of responses decoded at once: fewer need less memory for keys and values, more are faster.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub rollout_batch_size: usize,
    /// Number of held-out prompts in an evaluation during training; 0 takes all, as the last evaluation does.
    pub eval_prompts: usize,
    /// Number of held-out answers written to `samples.jsonl` at every evaluation.
    pub n_samples: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 100,
            batch_size: 64,
            micro_batch_size: None,
            checkpoint_activations: false,
            rollout_batch_size: 256,
            eval_prompts: 64,
            n_samples: 4,
        }
    }
}

/// `[ppo]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PpoSection {
    /// Maximum number of tokens in a response, `<|end|>` included.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub response_length: usize,
    /// Sampling temperature; log-probabilities are taken at the same temperature.
    #[schemars(range(min = 0.001, max = 1000))]
    pub temperature: f64,
    /// Score of a response that was cut off before `<|end|>`, in place of the reward model's.
    #[schemars(range(min = -1_000_000, max = 1_000_000))]
    pub missing_eos_score: f64,
    /// KL coefficient: reward lost per nat of divergence from the reference policy. With `kl_target`, its initial value.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub kl_coef: f64,
    /// Target of the adaptive KL coefficient, in nats per response; without it the coefficient is fixed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1e-6, max = 1_000_000))]
    pub kl_target: Option<f64>,
    /// Time constant of the adaptive KL coefficient, in responses.
    #[schemars(range(min = 1e-3, max = 1e12))]
    pub kl_horizon: f64,
    /// Estimator of the advantages.
    pub estimator: Estimator,
    /// Discount factor γ per token; 1 because a response is one decision in many tokens.
    #[schemars(range(min = 0, max = 1))]
    pub gamma: f64,
    /// λ of generalised advantage estimation: 1 relies on the returns alone, 0 on the values.
    #[schemars(range(min = 0, max = 1))]
    pub lambda: f64,
    /// Number of passes over the responses of a step (PPO epochs).
    #[schemars(range(min = 1, max = 1_000_000))]
    pub epochs: u64,
    /// Number of minibatches, and so of optimiser steps, in a pass; divides `train.batch_size`.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub minibatches: usize,
    /// Clip range ε of the policy: probability ratios are clipped to `1 ± clip_range`.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub clip_range: f64,
    /// Clip range of the value model: values are clipped to within this distance of the old ones, in units of the score.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub value_clip_range: f64,
    /// Initial weights of the value model.
    pub value_init: ValueInit,
    /// Largest difference from 1 that probability ratios may have before the first update of a step; it should be rounding
    /// alone.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub ratio_tolerance: f64,
    /// What an alarm does: a metric beyond its limit, of those that docs/doctor.md lists.
    pub on_alarm: OnAlarm,
}

/// What an alarm does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnAlarm {
    /// Warn, and go on.
    #[default]
    Warn,
    /// Save, and end the run with an error.
    Stop,
}

/// Estimator of the advantages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Estimator {
    /// Generalised advantage estimation, with a value model.
    #[default]
    Gae,
}

impl Estimator {
    /// Whether a value model is trained beside the policy.
    pub fn has_critic(self) -> bool {
        match self {
            Self::Gae => true,
        }
    }
}

/// Initial weights of the value model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ValueInit {
    /// The reward model with its head.
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
            estimator: Estimator::default(),
            gamma: 1.0,
            lambda: 0.95,
            epochs: 4,
            minibatches: 1,
            clip_range: 0.2,
            value_clip_range: 0.2,
            value_init: ValueInit::default(),
            ratio_tolerance: 1e-3,
            on_alarm: OnAlarm::default(),
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

    /// Checks the constraints that the types do not express.
    ///
    /// # Errors
    /// Naming the key that is out of range.
    pub fn validate(&self) -> anyhow::Result<()> {
        self.lora.as_ref().map_or(Ok(()), LoraConfig::validate)?;
        self.optimizer.validate()?;
        self.value_optimizer.validate()?;
        self.data.validate("prompts")?;
        self.run.validate()?;
        let TrainConfig { batch_size, micro_batch_size, .. } = self.train;
        let minibatches = self.ppo.minibatches;
        ensure!(
            minibatches > 0 && batch_size % minibatches == 0,
            "`ppo.minibatches` {minibatches} does not divide `train.batch_size` {batch_size}"
        );
        let minibatch = batch_size / minibatches;
        let micro = micro_batch_size.unwrap_or(minibatch);
        ensure!(
            micro > 0 && minibatch.is_multiple_of(micro),
            "`train.micro_batch_size` {micro} does not divide the {minibatch} responses of a minibatch"
        );
        Ok(())
    }

    /// The settings that decide how much memory an update needs.
    pub fn memory(&self, trunk: TrunkPrecision) -> Settings {
        Settings {
            micro_batch_size: self.micro_batch_size(),
            checkpoint_activations: self.train.checkpoint_activations,
            trunk,
        }
    }

    /// Responses computed at a time.
    pub fn micro_batch_size(&self) -> usize {
        self.train.micro_batch_size.unwrap_or(self.train.batch_size / self.ppo.minibatches)
    }

    /// How the policy answers prompts.
    pub fn sampling<'a>(&self, streams: Streams, tokenizer: &'a Tokenizer) -> Sampling<'a> {
        let PpoSection { temperature, response_length, .. } = self.ppo;
        Sampling::new(temperature, response_length, streams, tokenizer, self.train.rollout_batch_size)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_key_of_a_section_leaves_the_defaults_of_its_others() {
        let parse = |text: &str| common::config::parse::<PpoConfig>(text, Path::new("ppo.toml"), &[]);
        let given = parse("[run]\nkeep_best = true\n").expect("valid").run;
        assert_eq!(given, RunConfig { keep_best: true, ..PpoConfig::default().run });
        let optimizer = parse("[optimizer]\nlr = 0.5\n").expect("valid").optimizer;
        assert_eq!(optimizer, OptimizerConfig { lr: 0.5, ..PpoConfig::default().optimizer });
        let unknown = parse("[run]\nlog_evry = 1\n").expect_err("unknown").to_string();
        assert!(unknown.contains("line 2") && unknown.contains("did you mean `log_every`?"), "{unknown}");
    }
}
