//! The configuration of this stage.

use common::capacity::Settings;
use common::cli::StageArgs;
use common::group::Share;
use common::kernels::TrunkPrecision;
use common::model::LoraConfig;
use common::optim::OptimizerConfig;
use common::reduce::Reduce;
use common::session::{self, Amount, DataConfig, ModelOverrides, RunConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `sft.toml`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SftConfig {
    /// Random seed of the data order, dropout and samples.
    pub seed: u64,
    /// Conversations to train and evaluate on. Paths are relative to the folder of the configuration; `$DATA/` begins a path
    /// in the folder of `--data` or `KINDLING_DATA`.
    pub data: DataConfig<TooLong>,
    /// Changes to the architecture of the initial model.
    pub model: ModelOverrides,
    /// Train low-rank adapters beside the frozen weights of the initial model; without this section all weights are trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// AdamW and its learning-rate schedule.
    pub optimizer: OptimizerConfig,
    /// Training length and batch sizes.
    pub train: TrainConfig,
    /// Intervals of logging, evaluation and checkpoints.
    pub run: RunConfig,
}

/// Treatment of a conversation that is longer than the model's context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TooLong {
    /// Cut off the end of the conversation; its last answer then lacks the token that ends answers, such as `<|end|>`
    /// or `<|im_end|>`, and no end is learned from it.
    #[default]
    Truncate,
    /// Leave the conversation out.
    Skip,
    /// Stop with an error.
    Fail,
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Number of passes over the training conversations; ignored if `steps` is given.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub epochs: u64,
    /// Number of optimiser steps; takes precedence over `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000_000_u64))]
    pub steps: Option<u64>,
    /// Number of conversations in one optimiser step.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub batch_size: usize,
    /// Number of conversations computed at once, with gradients accumulated over the batch; divides `batch_size`, which is
    /// the default.
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
    /// Number of held-out conversations in an evaluation during training; 0 takes all, as the last evaluation does.
    pub eval_conversations: usize,
    /// Number of held-out prompts that the model answers at every evaluation; the results go to `samples.jsonl`.
    pub n_samples: usize,
    /// Maximum number of tokens in a sample.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub sample_tokens: usize,
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
            eval_conversations: 256,
            n_samples: 4,
            sample_tokens: 128,
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

impl SftConfig {
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
        self.data.validate("conversations")?;
        self.model.validate()?;
        self.lora.as_ref().map_or(Ok(()), LoraConfig::validate)?;
        self.train.amount().validate()?;
        self.run.validate()
    }
}
