//! The parts of a configuration that every stage has, and how a stage reads its own.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::resume;
use crate::cli::StageArgs;
use crate::config::{self, Configuration, PathResolver, Sources};
use crate::data::files::one_or_many;
use crate::data::records::{OnBadRecord, ReadOptions, RecordLimit};

/// Seconds: signs of life come every second, and a busy machine may be late.
const MIN_GROUP_TIMEOUT: u64 = 5;

/// The `[run]` section: how often a run logs, evaluates and saves, and when it stops early.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Steps between two lines of training metrics; 0 counts as 1.
    pub log_every: u64,
    /// Steps between two evaluations on held-out data; 0 evaluates at the end only.
    pub eval_every: u64,
    /// Steps between two checkpoints; 0 sets no such interval.
    pub save_every: u64,
    /// Minutes between two checkpoints at most, so that a killed run loses no more than that; 0 sets no such limit.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub save_every_minutes: f64,
    /// Whether the checkpoint holds the weights of the best evaluation instead of the last step's.
    pub keep_best: bool,
    /// Number of evaluations without a new best after which training stops early; 0 never stops early.
    pub patience: u64,
    /// Seconds without a sign of life from one of several processes after which all end; 0 waits for ever. A process gives
    /// signs of life whatever it does, so that a slow one does not end the run.
    #[schemars(range(max = 1_000_000_000))]
    pub group_timeout: u64,
    /// Whether a run that needs more memory than there is stops before it begins.
    pub check_memory: bool,
    /// Whether the metrics are also written to an event file, for TensorBoard.
    pub tensorboard: bool,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            log_every: 10,
            eval_every: 100,
            save_every: 500,
            save_every_minutes: 5.0,
            keep_best: false,
            patience: 0,
            group_timeout: 20,
            check_memory: true,
            tensorboard: false,
        }
    }
}

impl RunConfig {
    /// Reads the section of a stage whose defaults are `self`, where a key that is left out has that default: for
    /// `deserialize_with`.
    ///
    /// # Errors
    /// If a key is unknown or its value has another type.
    pub fn or_given<'de, D: Deserializer<'de>>(self, deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Given {
            log_every: Option<u64>,
            eval_every: Option<u64>,
            save_every: Option<u64>,
            save_every_minutes: Option<f64>,
            keep_best: Option<bool>,
            patience: Option<u64>,
            group_timeout: Option<u64>,
            check_memory: Option<bool>,
            tensorboard: Option<bool>,
        }
        let given = Given::deserialize(deserializer)?;
        Ok(Self {
            log_every: given.log_every.unwrap_or(self.log_every),
            eval_every: given.eval_every.unwrap_or(self.eval_every),
            save_every: given.save_every.unwrap_or(self.save_every),
            save_every_minutes: given.save_every_minutes.unwrap_or(self.save_every_minutes),
            keep_best: given.keep_best.unwrap_or(self.keep_best),
            patience: given.patience.unwrap_or(self.patience),
            group_timeout: given.group_timeout.unwrap_or(self.group_timeout),
            check_memory: given.check_memory.unwrap_or(self.check_memory),
            tensorboard: given.tensorboard.unwrap_or(self.tensorboard),
        })
    }

    /// Checks the constraints that the types do not express.
    ///
    /// # Errors
    /// Naming the key that is out of range.
    pub fn validate(&self) -> anyhow::Result<()> {
        ensure!(
            self.save_every_minutes >= 0.0 && self.save_every_minutes.is_finite(),
            "`run.save_every_minutes` must be 0 or more, found {}",
            self.save_every_minutes
        );
        ensure!(
            self.group_timeout == 0 || self.group_timeout >= MIN_GROUP_TIMEOUT,
            "`run.group_timeout` must be 0 or at least {MIN_GROUP_TIMEOUT}, found {}",
            self.group_timeout
        );
        Ok(())
    }

    /// How long another process may be silent.
    pub(super) fn patience(&self) -> Option<Duration> {
        (self.group_timeout > 0).then(|| Duration::from_secs(self.group_timeout))
    }

    /// Whether training has stopped early, `evals_since_best` evaluations after the best one.
    pub(super) const fn is_stale(&self, evals_since_best: u64) -> bool {
        self.patience > 0 && evals_since_best >= self.patience
    }
}

/// The `[data]` section of a stage that reads records; `L` says what to do with one that is too long.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(bound = "L: Default + Serialize + JsonSchema")]
pub struct DataConfig<L> {
    /// Training files (`.jsonl` or `.json`, also `.gz`): a path, a list of paths, or patterns such as `data/*.jsonl`. Required.
    #[serde(deserialize_with = "one_or_many")]
    pub train: Vec<PathBuf>,
    /// Validation files in the same formats. Required.
    #[serde(deserialize_with = "one_or_many")]
    pub val: Vec<PathBuf>,
    /// Treatment of a malformed record.
    pub on_bad_record: OnBadRecord,
    /// Largest size of a record in bytes; a longer one is malformed.
    pub max_record_bytes: RecordLimit,
    /// Treatment of a record that is longer than the model's context.
    pub on_too_long: L,
}

impl<L> DataConfig<L> {
    /// Checks that there are files of `records` to train and to evaluate on.
    ///
    /// # Errors
    /// Naming the key that is empty.
    pub fn validate(&self, records: &str) -> anyhow::Result<()> {
        for (key, files) in self.sources() {
            ensure!(!files.is_empty(), "`{key}` names no file\nhint: list at least one .jsonl of {records}");
        }
        Ok(())
    }

    /// The files by their key in the configuration.
    pub fn sources(&self) -> Vec<(&'static str, &[PathBuf])> {
        vec![("data.train", &self.train), ("data.val", &self.val)]
    }

    /// [`sources`](Self::sources), to be resolved.
    pub fn sources_mut(&mut self) -> Sources<'_> {
        vec![("data.train", &mut self.train), ("data.val", &mut self.val)]
    }

    /// How the records of the files are read.
    pub fn read_options(&self) -> ReadOptions {
        ReadOptions {
            on_bad_record: self.on_bad_record,
            max_record_bytes: self.max_record_bytes,
            section: Some("data"),
        }
    }
}

/// The `[model]` section of a stage that trains a model of another's: what may differ from the architecture it has.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelOverrides {
    /// Probability with which dropout zeroes an activation in training; that of the initial model by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub dropout: Option<f64>,
}

impl ModelOverrides {
    /// Checks the probability's range.
    ///
    /// # Errors
    /// If it does not lie in `[0, 1)`.
    pub fn validate(self) -> anyhow::Result<()> {
        let dropout = self.dropout.unwrap_or(0.0);
        ensure!((0.0..1.0).contains(&dropout), "`model.dropout` must lie in [0, 1), found {dropout}");
        Ok(())
    }
}

/// How long a stage trains and in what portions: the keys of `[train]` that every stage has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Amount {
    /// Passes over the data, where the stage counts them.
    pub epochs: Option<u64>,
    /// Optimiser steps; overrides `epochs`.
    pub steps: Option<u64>,
    /// Items in one optimiser step.
    pub batch_size: usize,
    /// Items computed at a time; divides `batch_size`, which is also the default.
    pub micro_batch_size: Option<usize>,
}

impl Amount {
    /// Checks that there is something to do and that micro-batches add up to batches.
    ///
    /// # Errors
    /// Naming the key that is out of range.
    pub fn validate(&self) -> anyhow::Result<()> {
        let keys = if self.epochs.is_some() { "`train.epochs`, `train.steps`" } else { "`train.steps`" };
        ensure!(
            self.steps.or(self.epochs).unwrap_or(0) > 0 && self.batch_size > 0,
            "{keys} and `train.batch_size` must be at least 1"
        );
        let (micro, batch_size) = (self.micro(), self.batch_size);
        ensure!(
            micro > 0 && batch_size.is_multiple_of(micro),
            "`train.micro_batch_size` {micro} does not divide `train.batch_size` {batch_size}"
        );
        Ok(())
    }

    /// Optimiser steps for `n` items.
    pub fn n_steps(&self, n: usize) -> u64 {
        let of_epochs = || self.epochs.unwrap_or(1).saturating_mul(n as u64).div_ceil(self.batch_size as u64);
        self.steps.unwrap_or_else(of_epochs)
    }

    /// Items computed at a time.
    pub fn micro(&self) -> usize {
        self.micro_batch_size.unwrap_or(self.batch_size)
    }
}

/// Reads a stage's configuration, the `--set` flags over it (with `--resume` those of earlier calls too), makes the
/// paths that `files` names absolute and lists the files that patterns match.
///
/// # Errors
/// If it cannot be read or is not valid.
pub fn load_config<C: Configuration>(
    args: &StageArgs,
    validate: impl Fn(&C) -> anyhow::Result<()>,
    files: impl Fn(&mut C) -> Sources<'_>,
) -> anyhow::Result<C> {
    let mut config: C = config::load(&args.config, &resume::overrides(args)?)?;
    validate(&config).with_context(|| format!("invalid config `{}`", args.config.display()))?;
    let resolver = PathResolver::new(&args.config, args.data.as_deref());
    for (key, paths) in files(&mut config) {
        resolver.resolve_files(key, paths)?;
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMOUNT: Amount = Amount { epochs: Some(2), steps: None, batch_size: 4, micro_batch_size: None };

    #[test]
    fn steps_go_before_epochs_and_a_last_batch_may_be_part_of_the_next_pass() {
        assert_eq!([8, 9].map(|n| AMOUNT.n_steps(n)), [4, 5]);
        assert_eq!(Amount { steps: Some(3), ..AMOUNT }.n_steps(9), 3);
        assert_eq!(Amount { epochs: Some(u64::MAX), ..AMOUNT }.n_steps(9), u64::MAX.div_ceil(4));
    }

    #[test]
    fn micro_batches_add_up_to_batches() {
        let check = |amount: Amount| amount.validate().map_err(|error| error.to_string());
        assert_eq!(check(AMOUNT), Ok(()));
        assert_eq!(check(Amount { micro_batch_size: Some(2), ..AMOUNT }), Ok(()));
        assert_eq!(
            check(Amount { micro_batch_size: Some(3), ..AMOUNT }),
            Err("`train.micro_batch_size` 3 does not divide `train.batch_size` 4".to_owned())
        );
        for nothing in [Amount { epochs: Some(0), ..AMOUNT }, Amount { batch_size: 0, ..AMOUNT }] {
            assert!(check(nothing).is_err(), "{nothing:?}");
        }
    }

    #[test]
    fn patience_with_other_processes_is_endless_or_some_seconds() {
        for (seconds, is_valid) in [(0, true), (1, false), (5, true), (600, true)] {
            let run = RunConfig { group_timeout: seconds, ..RunConfig::default() };
            assert_eq!(run.validate().is_ok(), is_valid, "{seconds}");
        }
        assert_eq!(RunConfig::default().patience(), Some(Duration::from_secs(20)));
        assert_eq!(RunConfig { group_timeout: 0, ..RunConfig::default() }.patience(), None);
    }

    #[test]
    fn minutes_between_saves_are_0_or_more() {
        for (minutes, is_valid) in [(0.0, true), (0.5, true), (-1.0, false), (f64::NAN, false), (f64::INFINITY, false)]
        {
            let run = RunConfig { save_every_minutes: minutes, ..RunConfig::default() };
            assert_eq!(run.validate().is_ok(), is_valid, "{minutes}");
        }
    }
}
