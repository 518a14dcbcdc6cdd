//! The TOML of this stage.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use common::cli::StageArgs;
use common::data::files::one_or_many;
use common::data::records::{OnBadRecord, ReadOptions, RecordLimit, Separator};
use common::model::{GptConfig, ModelSection};
use common::optim::OptimizerConfig;
use common::session::{self, Amount, RunConfig};
use common::tokenizer::TokenizerConfig;
use serde::{Deserialize, Serialize};

/// `pretrain.toml`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PretrainConfig {
    /// Seed of weights, order and dropout.
    pub seed: u64,
    /// The text.
    pub data: DataConfig,
    /// The architecture.
    pub model: ModelSection,
    /// The tokenizer, for `pretrain tokenizer`.
    pub tokenizer: TokenizerConfig,
    /// AdamW and its schedule.
    pub optimizer: OptimizerConfig,
    /// Training length and batch sizes.
    pub train: TrainConfig,
    /// How often to log, evaluate and save.
    pub run: RunConfig,
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Files to train on (.txt, .jsonl, .json or .parquet, all but the last also .gz): a path, a list of paths, or
    /// patterns such as `data/*.txt`.
    #[serde(deserialize_with = "one_or_many")]
    pub train: Vec<PathBuf>,
    /// Files to evaluate on; empty to hold out the end of the training text instead.
    #[serde(deserialize_with = "one_or_many")]
    pub val: Vec<PathBuf>,
    /// The part of the training text that is held out where there are no `val` files.
    pub val_fraction: f64,
    /// What separates the documents of a `.txt`: `blank-line`, `line`, `none` or a text of one's own.
    pub separator: Separator,
    /// What to do with a record that is malformed: `fail` or `skip`.
    pub on_bad_record: OnBadRecord,
    /// The longest record or document that is read, in bytes.
    pub max_record_bytes: RecordLimit,
    /// Whether each document begins with `<|bos|>`; without, the text is one stream.
    pub document_bos: bool,
    /// Whether a token may attend to the documents before its own in the same window.
    pub attend_across_documents: bool,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            val: Vec::new(),
            val_fraction: 0.1,
            separator: Separator::default(),
            on_bad_record: OnBadRecord::default(),
            max_record_bytes: RecordLimit::default(),
            document_bos: true,
            attend_across_documents: false,
        }
    }
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimiser steps.
    pub steps: u64,
    /// Windows in one optimiser step.
    pub batch_size: usize,
    /// Windows computed at a time; divides `batch_size`, which is also the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<usize>,
    /// Tokens in a window; `model.max_seq_len` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<usize>,
    /// Windows of an evaluation along the way; 0 for all held-out text.
    pub eval_windows: usize,
    /// Beginnings that samples along the way continue.
    pub sample_prompts: Vec<String>,
    /// Tokens of each sample.
    pub sample_tokens: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 16,
            micro_batch_size: None,
            seq_len: None,
            eval_windows: 64,
            sample_prompts: vec![String::new()],
            sample_tokens: 64,
        }
    }
}

impl DataConfig {
    /// The files by their key.
    pub fn sources(&self) -> [(&'static str, &[PathBuf]); 2] {
        [("train", &self.train), ("val", &self.val)]
    }

    /// The files by their key in the configuration.
    pub fn sources_mut(&mut self) -> session::Sources<'_> {
        [("data.train", &mut self.train), ("data.val", &mut self.val)]
    }

    /// How the documents of the files are read.
    pub fn read_options(&self) -> ReadOptions {
        ReadOptions { on_bad_record: self.on_bad_record, max_record_bytes: self.max_record_bytes, configured: true }
    }
}

impl TrainConfig {
    /// How long to train and in what portions.
    pub const fn amount(&self) -> Amount {
        let Self { steps, batch_size, micro_batch_size, .. } = *self;
        Amount { epochs: None, steps: Some(steps), batch_size, micro_batch_size }
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

    /// Checks what the types cannot.
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
        ensure!(
            self.data.val_fraction > 0.0 && self.data.val_fraction < 1.0,
            "`data.val_fraction` must lie in (0, 1), found {}",
            self.data.val_fraction
        );
        self.train.amount().validate()?;
        ensure!(self.train.seq_len != Some(0), "`train.seq_len` must be at least 1");
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
