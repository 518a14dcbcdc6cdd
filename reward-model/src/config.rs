//! The TOML of this stage.

use anyhow::ensure;
use common::cli::StageArgs;
use common::optim::{OptimizerConfig, RlhfDefaults};
use common::session::{self, Amount, DataConfig, ModelOverrides, RunConfig};
use serde::{Deserialize, Serialize};

/// `reward-model.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardModelConfig {
    /// Seed of the head, order, dropout and the samples of the normalisation.
    pub seed: u64,
    /// The pairs.
    pub data: DataConfig<TooLong>,
    /// What differs from the initial model.
    pub model: ModelOverrides,
    /// The optimiser and its schedule; linear to 0 by default.
    #[serde(with = "RlhfDefaults")]
    pub optimizer: OptimizerConfig,
    /// Training length and batch sizes.
    pub train: TrainConfig,
    /// How scores are scaled after training.
    pub normalisation: NormalisationConfig,
    /// How often to log, evaluate and save.
    pub run: RunConfig,
}

impl Default for RewardModelConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            data: DataConfig::default(),
            model: ModelOverrides::default(),
            optimizer: OptimizerConfig::rlhf(),
            train: TrainConfig::default(),
            normalisation: NormalisationConfig::default(),
            run: RunConfig::default(),
        }
    }
}

/// What to do with a pair whose prompt and longer answer exceed the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TooLong {
    /// Cut the prompt's beginning off (but for `<|bos|>`), the same for both answers: the score is read at the
    /// answer's end, so the answer has to stay whole. A pair whose answer alone does not fit is left out.
    #[default]
    TruncatePrompt,
    /// Leave the pair out.
    Skip,
    /// Stop with an error.
    Fail,
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Passes over the pairs; more than one overfits easily.
    pub epochs: u64,
    /// Optimiser steps; overrides `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Records in one optimiser step: pairs, or ranked lists with all their pairs.
    pub batch_size: usize,
    /// Pairs computed at a time, sorted by length so that little is padded; divides `batch_size`, which is also the
    /// default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<usize>,
    /// Weight of `mean((r_c + r_r)²)`, which keeps scores near 0; 0 for none, TRL recommends 0.01.
    pub centring_coef: f64,
    /// Pairs of an evaluation along the way; 0 for all held-out ones.
    pub eval_pairs: usize,
    /// By what `run.keep_best` and `run.patience` judge an evaluation.
    pub best_by: BestBy,
}

/// What makes one evaluation better than another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BestBy {
    /// A lower `val/loss`, which notices over-confidence early.
    #[default]
    Loss,
    /// A higher `val/accuracy`.
    Accuracy,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 1,
            steps: None,
            batch_size: 32,
            micro_batch_size: None,
            centring_coef: 0.0,
            eval_pairs: 0,
            best_by: BestBy::default(),
        }
    }
}

/// `[normalisation]`: after training, answers of the initial model to training prompts get mean 0 and deviation 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NormalisationConfig {
    /// Answers sampled; 0 leaves the scores as trained.
    pub samples: usize,
    /// Sampling temperature: that of the PPO rollouts to come.
    pub temperature: f64,
    /// Tokens of an answer at most: as in the PPO rollouts to come.
    pub max_tokens: usize,
    /// Answers sampled at a time.
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
}

impl RewardModelConfig {
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
        self.data.validate("pairs")?;
        self.model.validate()?;
        self.train.amount().validate()?;
        self.run.validate()?;
        let centring_coef = self.train.centring_coef;
        ensure!(
            centring_coef >= 0.0 && centring_coef.is_finite(),
            "`train.centring_coef` must be 0 or more, found {centring_coef}"
        );
        let NormalisationConfig { samples, temperature, max_tokens, batch_size } = self.normalisation;
        ensure!(samples != 1, "`normalisation.samples` must be 0 or at least 2: one answer has no deviation");
        ensure!(
            temperature > 0.0 && temperature.is_finite(),
            "`normalisation.temperature` must be a positive number, found {temperature}"
        );
        ensure!(
            max_tokens > 0 && batch_size > 0,
            "`normalisation.max_tokens` and `normalisation.batch_size` must be at least 1"
        );
        Ok(())
    }
}
