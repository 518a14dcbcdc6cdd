//! Reading `metrics.jsonl` and `samples.jsonl` of a run.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use super::{METRICS_FILE, SAMPLES_FILE, read};

/// The metrics of one stage, row by row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetricsLog {
    rows: Vec<Row>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Row {
    step: f64,
    values: BTreeMap<String, f64>,
}

impl MetricsLog {
    /// Reads `metrics.jsonl` in `stage_dir`; a stage without the file has an empty log.
    ///
    /// Values that are not numbers (a NaN is written as `null`) are left out.
    ///
    /// # Errors
    /// If a line is not a JSON object with a `step`.
    pub fn read(stage_dir: &Path) -> Result<Self> {
        let rows = read(&stage_dir.join(METRICS_FILE))?
            .into_iter()
            .map(|object| {
                let values: BTreeMap<String, f64> =
                    object.iter().filter_map(|(name, value)| Some((name.clone(), value.as_f64()?))).collect();
                let step = *values.get("step").context("a line of `metrics.jsonl` has no `step`")?;
                Ok(Row { step, values })
            })
            .collect::<Result<_>>()
            .with_context(|| format!("failed to read the metrics in `{}`", stage_dir.display()))?;
        Ok(Self { rows })
    }

    /// `(step, value)` of one metric, in the order written.
    pub fn series(&self, name: &str) -> Vec<(f64, f64)> {
        self.rows.iter().filter_map(|row| Some((row.step, *row.values.get(name)?))).collect()
    }

    /// The last value of one metric.
    pub fn last(&self, name: &str) -> Option<f64> {
        self.rows.iter().rev().find_map(|row| row.values.get(name).copied())
    }

    /// The smallest value of one metric.
    pub fn min(&self, name: &str) -> Option<f64> {
        self.series(name).into_iter().map(|(_, value)| value).min_by(f64::total_cmp)
    }

    /// The last value of every metric, bookkeeping (`step`, `seconds`, `tokens`) left out.
    pub fn last_values(&self) -> BTreeMap<String, f64> {
        let mut last: BTreeMap<String, f64> =
            self.rows.iter().flat_map(|row| row.values.iter().map(|(name, value)| (name.clone(), *value))).collect();
        last.retain(|name, _| name.contains('/'));
        last
    }

    /// The log without the metrics whose names begin with `prefix`.
    #[must_use]
    pub fn without(mut self, prefix: &str) -> Self {
        self.rows.iter_mut().for_each(|row| row.values.retain(|name, _| !name.starts_with(prefix)));
        self
    }

    /// Wall seconds of the stage, over all its sittings.
    pub fn seconds(&self) -> Option<f64> {
        self.last("seconds")
    }

    /// Tokens the stage has seen.
    pub fn tokens(&self) -> Option<f64> {
        self.last("tokens")
    }
}

/// One generation made along the way.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Optimiser step at which it was made.
    pub step: u64,
    /// The prompt; empty if there is none.
    pub prompt: String,
    /// The model's text.
    pub text: String,
}

impl Sample {
    /// The sample that a stage writes as `object`.
    pub(super) fn of(step: u64, object: &Map<String, Value>) -> Self {
        let text = |keys: &[&str]| {
            keys.iter().find_map(|key| object.get(*key)?.as_str().map(str::to_owned)).unwrap_or_default()
        };
        Self { step, prompt: text(&["prompt"]), text: text(&["response", "text"]) }
    }
}

/// Reads `samples.jsonl` in `stage_dir`; none if there is no such file.
///
/// # Errors
/// If a line is not a JSON object.
pub fn read_samples(stage_dir: &Path) -> Result<Vec<Sample>> {
    let step = |object: &Map<String, Value>| object.get("step").and_then(Value::as_u64).unwrap_or(0);
    let samples = read(&stage_dir.join(SAMPLES_FILE))?;
    Ok(samples.iter().map(|object| Sample::of(step(object), object)).collect())
}

/// The first and the last step that have samples, earliest first: what a reader compares.
pub fn first_and_last(samples: &[Sample], n_each: usize) -> Vec<Sample> {
    let (Some(first), Some(last)) = (samples.iter().map(|s| s.step).min(), samples.iter().map(|s| s.step).max()) else {
        return Vec::new();
    };
    let of_step = |step: u64| samples.iter().filter(move |sample| sample.step == step).take(n_each);
    if first == last {
        return of_step(last).cloned().collect();
    }
    of_step(first).chain(of_step(last)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn series_keeps_only_rows_that_carry_the_metric() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("metrics.jsonl"),
            "{\"step\":1,\"seconds\":0.5,\"tokens\":8,\"train/loss\":3.0}\n\
             {\"step\":2,\"seconds\":0.9,\"tokens\":16,\"train/loss\":2.0,\"val/loss\":2.5}\n\
             {\"step\":3,\"seconds\":1.5,\"tokens\":24,\"train/loss\":null}\n",
        )
        .unwrap();
        let log = MetricsLog::read(dir.path()).unwrap();
        assert_eq!(log.series("train/loss"), [(1.0, 3.0), (2.0, 2.0)]);
        assert_eq!(log.series("val/loss"), [(2.0, 2.5)]);
        assert_eq!((log.seconds(), log.tokens()), (Some(1.5), Some(24.0)));
        assert_eq!(
            log.last_values().into_iter().collect::<Vec<_>>(),
            [("train/loss".to_owned(), 2.0), ("val/loss".to_owned(), 2.5)]
        );
        assert_eq!(log.min("train/loss"), Some(2.0));
        assert_eq!(log.without("train/").last("train/loss"), None);
    }

    #[test]
    fn a_broken_line_is_named_and_one_cut_short_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            fs::write(dir.path().join("metrics.jsonl"), text).unwrap();
            MetricsLog::read(dir.path())
        };
        let error = format!("{:#}", read("{\"step\":1}\n{\"step\":\n{\"step\":3}\n").unwrap_err());
        assert!(error.contains("metrics.jsonl` line 2"), "{error}");
        // A run that was killed while it wrote has a report too.
        assert_eq!(read("{\"step\":1}\n{\"step\":").unwrap().last("step"), Some(1.0));
    }

    #[test]
    fn an_absent_log_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(MetricsLog::read(dir.path()).unwrap(), MetricsLog::default());
        assert!(read_samples(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn samples_of_the_first_and_last_step_are_kept() {
        let sample = |step, text: &str| Sample { step, prompt: String::new(), text: text.to_owned() };
        let all = [sample(10, "a"), sample(10, "b"), sample(20, "c"), sample(30, "d"), sample(30, "e")];
        assert_eq!(first_and_last(&all, 1), [sample(10, "a"), sample(30, "d")]);
        assert_eq!(first_and_last(&all[..2], 1), [sample(10, "a")]);
    }
}
