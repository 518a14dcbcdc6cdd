//! The results of one backend, as its process leaves them: a line of JSON for every tensor, the numbers in a file beside.
//!
//! Lines are written as soon as they are known, so that a process that crashes leaves what it had.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use common::checkpoint::Stage;
use common::files::read_if_there;
use common::model::HostTensor;
use serde::{Deserialize, Serialize};

const LINES: &str = "records.jsonl";
const NUMBERS: &str = "records.f32";

/// A level of the comparison, from the smallest part to the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Inputs of operations, which the first backend hands to the others; not compared.
    Activations,
    /// Weights before the first step.
    InitialWeights,
    /// Each operation's output, on the same activations.
    Operations,
    /// Each operation's gradients, for the same gradient of its output.
    OperationGradients,
    /// The model's output.
    Logits,
    /// Cross-entropy.
    Loss,
    /// The gradient of every parameter.
    Gradients,
    /// The change of one optimiser step.
    OneStep,
    /// The change of ten optimiser steps.
    TenSteps,
    /// Greedy and seeded continuations.
    Tokens,
    /// How near each token of the first backend was to another choice; not compared.
    Margins,
    /// The reward model's scores.
    Scores,
    /// One PPO iteration up to its updates.
    PpoIteration,
    /// Means over the iteration's updates.
    PpoUpdates,
    /// Probability ratios after the updates.
    PpoRatios,
    /// Losses of a training run by the stage's own loop.
    Curve,
}

impl Level {
    /// As tables call it.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Activations => "activations",
            Self::InitialWeights => "initial weights",
            Self::Operations => "operations",
            Self::OperationGradients => "operations, backward",
            Self::Logits => "logits",
            Self::Loss => "loss",
            Self::Gradients => "gradients",
            Self::OneStep => "1 optimiser step",
            Self::TenSteps => "10 optimiser steps",
            Self::Tokens => "tokens",
            Self::Margins => "margins",
            Self::Scores => "scores",
            Self::PpoIteration => "PPO, before updates",
            Self::PpoUpdates => "PPO, losses",
            Self::PpoRatios => "PPO, ratios after",
            Self::Curve => "loss curve",
        }
    }
}

/// A tensor under its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The stage it was computed in.
    pub stage: Stage,
    /// The level it belongs to.
    pub level: Level,
    /// Its name in the level.
    pub name: String,
    /// The numbers.
    pub tensor: HostTensor,
}

/// One line of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    /// The backend with its adapter.
    Backend(String),
    Tensor {
        stage: Stage,
        level: Level,
        name: String,
        shape: Vec<usize>,
        /// In the file of numbers, counted in numbers.
        at: usize,
    },
    /// Speed or memory.
    Measure { stage: Stage, name: String, value: f64 },
    /// The last line of a process that came to its end.
    Done,
}

/// Writes records.
pub struct RecordWriter {
    lines: File,
    numbers: File,
    at: usize,
}

impl RecordWriter {
    /// Begins the records of `backend` in `dir`.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub fn create(dir: &Path, backend: String) -> Result<Self> {
        let create = |name: &str| {
            let path = dir.join(name);
            File::create(&path).with_context(|| format!("failed to write `{}`", path.display()))
        };
        let mut recorder = Self { lines: create(LINES)?, numbers: create(NUMBERS)?, at: 0 };
        recorder.line(&Line::Backend(backend))?;
        Ok(recorder)
    }

    fn line(&mut self, line: &Line) -> Result<()> {
        let text = format!("{}\n", serde_json::to_string(line)?);
        self.lines.write_all(text.as_bytes()).context("failed to write a record")
    }

    /// Records a tensor.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn tensor(&mut self, stage: Stage, level: Level, name: &str, tensor: &HostTensor) -> Result<()> {
        let bytes: Vec<u8> = tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.numbers.write_all(&bytes).context("failed to write a record")?;
        let (name, shape) = (name.to_owned(), tensor.shape.clone());
        self.line(&Line::Tensor { stage, level, name, shape, at: self.at })?;
        self.at += tensor.data.len();
        Ok(())
    }

    /// Records flat numbers.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn numbers(&mut self, stage: Stage, level: Level, name: &str, data: Vec<f32>) -> Result<()> {
        self.tensor(stage, level, name, &HostTensor { shape: vec![data.len()], data })
    }

    /// Records a measurement of speed or memory.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn measure(&mut self, stage: Stage, name: &str, value: f64) -> Result<()> {
        self.line(&Line::Measure { stage, name: name.to_owned(), value })
    }

    /// Records that everything was done.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn done(mut self) -> Result<()> {
        self.line(&Line::Done)
    }
}

/// The records that a process left.
#[derive(Debug, Default)]
pub struct Records {
    /// The backend with its adapter; empty if the process did not come that far.
    pub backend: String,
    /// In the order of their computation.
    pub entries: Vec<Entry>,
    /// Stage, name and value.
    pub measures: Vec<(Stage, String, f64)>,
    /// Whether the process came to its end.
    pub is_done: bool,
}

impl Records {
    /// Reads the records in `dir`; none at all if there is no file.
    ///
    /// # Errors
    /// If a file cannot be read, or a line other than the last, which a crash may have cut, is not a record.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut records = Self::default();
        let path = dir.join(LINES);
        let Some(text) = read_if_there(&path)? else { return Ok(records) };
        let numbers = std::fs::read(dir.join(NUMBERS)).context("failed to read the numbers of a backend")?;
        let numbers: Vec<f32> = numbers.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let n_lines = text.lines().count();
        for (i, line) in text.lines().enumerate() {
            let line: Line = match serde_json::from_str(line) {
                Ok(line) => line,
                Err(_) if i + 1 == n_lines => break,
                Err(error) => return Err(error).with_context(|| format!("`{}` line {}", path.display(), i + 1)),
            };
            match line {
                Line::Backend(backend) => records.backend = backend,
                Line::Measure { stage, name, value } => records.measures.push((stage, name, value)),
                Line::Done => records.is_done = true,
                Line::Tensor { stage, level, name, shape, at } => {
                    let len = shape.iter().product::<usize>();
                    let data = numbers.get(at..at + len).context("the numbers of a backend are cut short")?.to_vec();
                    records.entries.push(Entry { stage, level, name, tensor: HostTensor { shape, data } });
                }
            }
        }
        Ok(records)
    }

    /// The tensor at a place.
    pub fn find(&self, stage: Stage, level: Level, name: &str) -> Option<&HostTensor> {
        let at = |entry: &&Entry| entry.stage == stage && entry.level == level && entry.name == name;
        self.entries.iter().find(at).map(|entry| &entry.tensor)
    }

    /// A measurement.
    pub fn measured(&self, stage: Stage, name: &str) -> Option<f64> {
        self.measures.iter().find(|(s, n, _)| *s == stage && n == name).map(|(.., value)| *value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_a_crash_up_to_the_last_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = RecordWriter::create(dir.path(), "flex".to_owned()).unwrap();
        let tensor = HostTensor { shape: vec![2, 2], data: vec![1.0, f32::NAN, 3.0, 4.0] };
        writer.tensor(Stage::Pretrain, Level::Logits, "logits", &tensor).unwrap();
        writer.numbers(Stage::Pretrain, Level::Loss, "loss", vec![5.0]).unwrap();
        writer.measure(Stage::Pretrain, "tokens_per_s", 7.5).unwrap();
        writer.lines.write_all(b"{\"tensor\":{\"st").unwrap();
        let records = Records::read(dir.path()).unwrap();
        assert_eq!((records.backend.as_str(), records.is_done, records.entries.len()), ("flex", false, 2));
        assert!(records.entries[0].tensor.data[1].is_nan());
        assert_eq!(records.find(Stage::Pretrain, Level::Loss, "loss").unwrap().data, [5.0]);
        assert_eq!(records.measured(Stage::Pretrain, "tokens_per_s"), Some(7.5));
        assert!(!Records::read(&dir.path().join("nowhere")).unwrap().is_done);
    }
}
