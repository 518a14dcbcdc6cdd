//! The configuration of this stage.

use anyhow::ensure;
use common::capacity::Settings;
use common::cli::StageArgs;
use common::group::Share;
use common::kernels::TrunkPrecision;
use common::model::LoraConfig;
use common::optim::{OptimizerConfig, RlhfDefaults};
use common::reduce::Reduce;
pub use common::score::PairTooLong as TooLong;
use common::session::{self, Amount, DataConfig, RunConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `dpo.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DpoConfig {
    /// Random seed of the data order and of new adapters.
    pub seed: u64,
    /// Preference pairs to train and evaluate on. Paths are relative to the folder of the configuration; `$DATA/` begins a
    /// path in the folder of `--data` or `KINDLING_DATA`.
    pub data: DataConfig<TooLong>,
    /// Train low-rank adapters beside the frozen weights of the initial model; without this section all weights are trained.
    /// Their dropout is off, as all dropout is in this stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// AdamW and its learning-rate schedule, which falls linearly to 0 by default.
    #[serde(with = "RlhfDefaults")]
    #[schemars(with = "OptimizerConfig")]
    pub optimizer: OptimizerConfig,
    /// Training length and batch sizes.
    pub train: TrainConfig,
    /// The objective.
    pub dpo: DpoSection,
    /// Intervals of logging, evaluation and checkpoints. The best evaluation is the one with the lowest `val/loss`.
    pub run: RunConfig,
}

impl Default for DpoConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            data: DataConfig::default(),
            lora: None,
            optimizer: OptimizerConfig::rlhf(),
            train: TrainConfig::default(),
            dpo: DpoSection::default(),
            run: RunConfig::default(),
        }
    }
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Number of passes over the training pairs; ignored if `steps` is given.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub epochs: u64,
    /// Number of optimiser steps; takes precedence over `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000_000_u64))]
    pub steps: Option<u64>,
    /// Number of records in one optimiser step: pairs, or ranked lists with all their pairs.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub batch_size: usize,
    /// Number of pairs computed at once, sorted by length to save padding, with gradients accumulated over the batch;
    /// divides `batch_size`, which is the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub micro_batch_size: Option<usize>,
    /// Whether the backward pass computes the activations inside each block again, instead of keeping them from the forward
    /// pass: the same numbers in less memory, and a third more time for a step.
    pub checkpoint_activations: bool,
    /// Whether each of several processes keeps the moments of its part of the parameters alone (ZeRO-1): the same weights to the
    /// byte, and less memory.
    pub shard_optimizer: bool,
    /// How the gradients of several processes are summed.
    pub reduce: Reduce,
    /// Number of held-out pairs in an evaluation during training; 0 takes all, as the last evaluation does.
    pub eval_pairs: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 1,
            steps: None,
            batch_size: 32,
            micro_batch_size: None,
            checkpoint_activations: false,
            shard_optimizer: false,
            reduce: Reduce::default(),
            eval_pairs: 0,
        }
    }
}

impl TrainConfig {
    /// How long to train and in what portions.
    pub const fn amount(&self) -> Amount {
        let Self { epochs, steps, batch_size, micro_batch_size, .. } = *self;
        Amount { epochs: Some(epochs), steps, batch_size, micro_batch_size }
    }

    /// The settings that decide how much memory a step needs.
    pub fn memory(&self, trunk: TrunkPrecision) -> Settings {
        let Self { checkpoint_activations, shard_optimizer, reduce, .. } = *self;
        Settings {
            micro_batch_size: self.amount().micro(),
            checkpoint_activations,
            trunk,
            shard_optimizer,
            reduce,
            share: Share::WHOLE,
        }
    }
}

/// `[dpo]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DpoSection {
    /// Loss of a pair.
    pub loss: Objective,
    /// Reward per nat away from the reference, β: the lower, the further the policy goes for the same preference. In IPO the
    /// weight of the divergence, which the paper calls τ.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub beta: f64,
    /// Share of the labels taken to be wrong, below ½; of the sigmoid loss alone.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 0.5))]
    pub label_smoothing: f64,
    /// Whether log-probabilities of an answer are averaged over its tokens instead of summed: by default they are in IPO,
    /// and not in the sigmoid loss. The logged rewards are of sums in either case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub average_log_probs: Option<bool>,
}

/// Loss of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// `−log σ(β·h)` of the difference `h` in log-ratio between chosen and rejected answer: the paper's.
    #[default]
    Sigmoid,
    /// `(h − 1/(2β))²`: it wants a margin and no more, so that certain labels do not drive the policy away without end.
    Ipo,
}

impl Default for DpoSection {
    fn default() -> Self {
        Self { loss: Objective::default(), beta: 0.1, label_smoothing: 0.0, average_log_probs: None }
    }
}

impl DpoSection {
    /// Whether log-probabilities are averaged over the tokens of an answer.
    pub fn averages(&self) -> bool {
        self.average_log_probs.unwrap_or(self.loss == Objective::Ipo)
    }
}

impl DpoConfig {
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
        self.optimizer.validate()?;
        self.data.validate("pairs")?;
        self.lora.as_ref().map_or(Ok(()), LoraConfig::validate)?;
        self.train.amount().validate()?;
        self.run.validate()?;
        ensure!(
            self.dpo.label_smoothing == 0.0 || self.dpo.loss == Objective::Sigmoid,
            "`dpo.label_smoothing` is {}, but `dpo.loss = \"ipo\"` knows none\nhint: leave it out, or set `dpo.loss = \"sigmoid\"`",
            self.dpo.label_smoothing
        );
        Ok(())
    }
}
