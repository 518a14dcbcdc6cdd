//! The TOML of this stage.

use common::cli::StageArgs;
use common::optim::OptimizerConfig;
use common::session::{self, Amount, DataConfig, ModelOverrides, RunConfig};
use serde::{Deserialize, Serialize};

/// `sft.toml`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SftConfig {
    /// Seed of order, dropout and samples.
    pub seed: u64,
    /// The conversations.
    pub data: DataConfig<TooLong>,
    /// What differs from the initial model.
    pub model: ModelOverrides,
    /// AdamW and its schedule.
    pub optimizer: OptimizerConfig,
    /// Training length and batch sizes.
    pub train: TrainConfig,
    /// How often to log, evaluate and save.
    pub run: RunConfig,
}

/// What to do with a conversation that exceeds the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TooLong {
    /// Cut off its end; the cut answer then has no `<|end|>` to learn.
    #[default]
    Truncate,
    /// Leave it out.
    Skip,
    /// Stop with an error.
    Fail,
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Passes over the conversations.
    pub epochs: u64,
    /// Optimiser steps; overrides `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Conversations in one optimiser step.
    pub batch_size: usize,
    /// Conversations computed at a time; divides `batch_size`, which is also the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<usize>,
    /// Conversations of an evaluation along the way; 0 for all held-out ones.
    pub eval_conversations: usize,
    /// Held-out prompts that samples along the way answer.
    pub n_samples: usize,
    /// Tokens of each sample at most.
    pub sample_tokens: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 1,
            steps: None,
            batch_size: 32,
            micro_batch_size: None,
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
}

impl SftConfig {
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
        self.data.validate("conversations")?;
        self.model.validate()?;
        self.train.amount().validate()?;
        self.run.validate()
    }
}
