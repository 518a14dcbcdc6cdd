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
use common::session::{self, Amount, DataConfig, ModelOverrides, RunConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `reward-model.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RewardModelConfig {
    /// Random seed of the new head, the data order, dropout and the samples of the normalisation.
    pub seed: u64,
    /// Preference pairs to train and evaluate on. Paths are relative to the folder of the configuration; `$DATA/` begins a
    /// path in the folder of `--data` or `KINDLING_DATA`.
    pub data: DataConfig<TooLong>,
    /// Changes to the architecture of the initial model.
    pub model: ModelOverrides,
    /// Train low-rank adapters, and the head, beside the frozen weights of the initial model; without this section all weights
    /// are trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// AdamW and its learning-rate schedule, which falls linearly to 0 by default.
    #[serde(with = "RlhfDefaults")]
    #[schemars(with = "OptimizerConfig")]
    pub optimizer: OptimizerConfig,
    /// Training length and batch sizes.
    pub train: TrainConfig,
    /// Normalisation of the scores after training: answers of the initial model to training prompts get mean 0 and standard
    /// deviation 1.
    pub normalisation: NormalisationConfig,
    /// Intervals of logging, evaluation and checkpoints.
    pub run: RunConfig,
}

impl Default for RewardModelConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            data: DataConfig::default(),
            model: ModelOverrides::default(),
            lora: None,
            optimizer: OptimizerConfig::rlhf(),
            train: TrainConfig::default(),
            normalisation: NormalisationConfig::default(),
            run: RunConfig::default(),
        }
    }
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Number of passes over the training pairs; ignored if `steps` is given. More than one overfits easily.
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
    /// Weight of the auxiliary loss `mean((r_chosen + r_rejected)²)`, which keeps scores near 0; TRL recommends 0.01, 0
    /// disables it.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub centring_coef: f64,
    /// Number of held-out pairs in an evaluation during training; 0 takes all, as the last evaluation does.
    pub eval_pairs: usize,
    /// Metric by which `run.keep_best` and `run.patience` compare evaluations.
    pub best_by: BestBy,
}

/// Metric by which evaluations are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BestBy {
    /// The lower `val/loss` is better; it notices over-confidence early.
    #[default]
    Loss,
    /// The higher `val/accuracy` is better.
    Accuracy,
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
            centring_coef: 0.0,
            eval_pairs: 0,
            best_by: BestBy::default(),
        }
    }
}

/// `[normalisation]`: after training, answers of the initial model to training prompts get mean 0 and deviation 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NormalisationConfig {
    /// Number of answers sampled, at least 2; 0 leaves the scores as trained.
    #[schemars(range(min = 0, max = 10_000_000))]
    pub samples: usize,
    /// Sampling temperature; use that of the PPO rollouts to come.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1000))]
    pub temperature: f64,
    /// Maximum number of tokens in an answer; use that of the PPO rollouts to come.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_tokens: usize,
    /// Number of answers sampled at once.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub batch_size: usize,
}

impl Default for NormalisationConfig {
    fn default() -> Self {
        Self { samples: 256, temperature: 1.0, max_tokens: 128, batch_size: 64 }
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

impl RewardModelConfig {
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
        self.model.validate()?;
        self.lora.as_ref().map_or(Ok(()), LoraConfig::validate)?;
        self.train.amount().validate()?;
        self.run.validate()?;
        ensure!(
            self.normalisation.samples != 1,
            "`normalisation.samples` must be 0 or at least 2: one answer has no standard deviation"
        );
        Ok(())
    }
}
