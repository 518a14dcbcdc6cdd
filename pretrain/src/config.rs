//! The configuration of this stage.

use anyhow::{Context, ensure};
use common::capacity::Settings;
use common::cli::StageArgs;
use common::corpus::TextConfig;
use common::group::Share;
use common::kernels::TrunkPrecision;
use common::model::{GptConfig, ModelSection};
use common::optim::OptimizerConfig;
use common::reduce::Reduce;
use common::session::{self, Amount, RunConfig};
use common::tokenizer::TokenizerConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `pretrain.toml`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PretrainConfig {
    /// Random seed of the initial weights, the data order, dropout and samples.
    pub seed: u64,
    /// Text to train and evaluate on. Paths are relative to the folder of the configuration; `$DATA/` begins a path in the
    /// folder of `--data` or `KINDLING_DATA`.
    pub data: TextConfig,
    /// Architecture of a new model; with `--init` the checkpoint's applies.
    pub model: ModelSection,
    /// Tokenizer that `pretrain tokenizer` learns.
    pub tokenizer: TokenizerConfig,
    /// AdamW and its learning-rate schedule.
    pub optimizer: OptimizerConfig,
    /// Training length and batch sizes.
    pub train: TrainConfig,
    /// Intervals of logging, evaluation and checkpoints.
    pub run: RunConfig,
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Number of optimiser steps.
    #[schemars(range(min = 1, max = 1_000_000_000_000_u64))]
    pub steps: u64,
    /// Number of windows in one optimiser step.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub batch_size: usize,
    /// Number of windows computed at once, with gradients accumulated over the batch; divides `batch_size`, which is the
    /// default.
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
    /// Length of a window in tokens; at most `model.max_seq_len`, which is the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub seq_len: Option<usize>,
    /// Number of held-out windows in an evaluation during training; 0 takes all, as the last evaluation does.
    pub eval_windows: usize,
    /// Texts that the model continues at every evaluation; the results go to `samples.jsonl`.
    pub sample_prompts: Vec<String>,
    /// Maximum number of tokens in a sample.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub sample_tokens: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 16,
            micro_batch_size: None,
            checkpoint_activations: false,
            shard_optimizer: false,
            reduce: Reduce::default(),
            seq_len: None,
            eval_windows: 64,
            sample_prompts: vec![String::new()],
            sample_tokens: 64,
        }
    }
}

impl TrainConfig {
    /// How long to train and in what portions.
    pub const fn amount(&self) -> Amount {
        let Self { steps, batch_size, micro_batch_size, .. } = *self;
        Amount { epochs: None, steps: Some(steps), batch_size, micro_batch_size }
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

impl PretrainConfig {
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
        self.tokenizer.validate().context("invalid `[tokenizer]`")?;
        ensure!(
            !self.data.train.is_empty(),
            "`data.train` names no file\nhint: list at least one .txt, .jsonl or .parquet"
        );
        self.train.amount().validate()?;
        self.run.validate()
    }

    /// Tokens in a window of a model that reads at most `model.max_seq_len`.
    ///
    /// # Errors
    /// If `train.seq_len` is more than that.
    pub fn seq_len(&self, model: &GptConfig) -> anyhow::Result<usize> {
        let (seq_len, max_seq_len) = (self.train.seq_len.unwrap_or(model.max_seq_len), model.max_seq_len);
        ensure!(
            seq_len <= max_seq_len,
            "`train.seq_len` {seq_len} exceeds the model's context, `model.max_seq_len` {max_seq_len}\nhint: lower \
             the one or raise the other"
        );
        Ok(seq_len)
    }
}
