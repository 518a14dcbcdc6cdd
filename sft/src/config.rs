//! The TOML of this stage.

use std::path::PathBuf;

use anyhow::ensure;
use common::data::records::OnBadRecord;
use common::optim::OptimizerConfig;
use common::session::Cadence;
use serde::{Deserialize, Serialize};

/// `sft.toml`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SftConfig {
    /// Seed of order, dropout and samples.
    pub seed: u64,
    /// The conversations.
    pub data: DataConfig,
    /// AdamW and its schedule.
    pub optimizer: OptimizerConfig,
    /// How much.
    pub train: TrainConfig,
    /// How often to log, evaluate and save.
    pub run: Cadence,
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Conversations to train on (.jsonl, also .gz).
    pub train: Vec<PathBuf>,
    /// Conversations to evaluate on.
    pub val: Vec<PathBuf>,
    /// What to do with a record that is malformed: `fail` or `skip`.
    pub on_bad_record: OnBadRecord,
    /// What to do with a conversation that exceeds the context.
    pub on_too_long: TooLong,
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

impl SftConfig {
    /// Checks what the types cannot.
    ///
    /// # Errors
    /// Naming the key that is out of range.
    pub fn validate(&self) -> anyhow::Result<()> {
        self.optimizer.validate()?;
        ensure!(
            !self.data.train.is_empty(),
            "`data.train` names no file\nhint: list at least one .jsonl of conversations"
        );
        ensure!(!self.data.val.is_empty(), "`data.val` names no file\nhint: list at least one .jsonl of conversations");
        let TrainConfig { epochs, steps, batch_size, micro_batch_size, .. } = self.train;
        ensure!(
            steps.unwrap_or(epochs) > 0 && batch_size > 0,
            "`train.epochs`, `train.steps` and `train.batch_size` must be at least 1"
        );
        let micro = micro_batch_size.unwrap_or(batch_size);
        ensure!(
            micro > 0 && batch_size % micro == 0,
            "`train.micro_batch_size` {micro} does not divide `train.batch_size` {batch_size}"
        );
        Ok(())
    }

    /// Optimiser steps for `n` conversations.
    pub fn n_steps(&self, n: usize) -> u64 {
        self.train.steps.unwrap_or_else(|| (self.train.epochs * n as u64).div_ceil(self.train.batch_size as u64))
    }
}
