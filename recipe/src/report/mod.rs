//! `report.html` and `report.json`: everything a run of a recipe left behind, on one page.
//!
//! The report is a function of the output directory: `recipe.json`, each stage's `metrics.jsonl`, `samples.jsonl` and
//! `config.toml`, and what the last step measured (`evaluation.json`, `answers.jsonl`). Writing it again changes nothing.

mod json;
pub(crate) mod log;
mod page;
pub(crate) mod plot;
mod stages;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::evaluation::{AnswerRow, Evaluation};
use crate::steps::{RunRecord, Step, write_whole};
use log::MetricsLog;

pub use page::duration;

/// All that the two reports are made from.
struct Source {
    record: RunRecord,
    stages: Vec<StageSource>,
    evaluation: Option<Evaluation>,
    answers: Vec<AnswerRow>,
}

/// One training stage that has begun.
struct StageSource {
    step: Step,
    dir: PathBuf,
    log: MetricsLog,
    /// Wall seconds: the stage's own count, or the recipe's where that is longer because it includes loading.
    seconds: f64,
}

/// Writes `report.html` and `report.json` into `out` from what is there.
///
/// # Errors
/// If a file in `out` cannot be read, or a report not written.
pub fn write(out: &Path) -> Result<()> {
    let source = Source::read(out)?;
    write_whole(&out.join("report.json"), &serde_json::to_string_pretty(&json::report(&source))?)?;
    write_whole(&out.join("report.html"), &page::render(&source)?)
}

impl Source {
    fn read(out: &Path) -> Result<Self> {
        let record = RunRecord::load(out)?;
        let mut stages = Vec::new();
        for step in Step::ALL.into_iter().filter(|step| step.trains()) {
            let dir = out.join(step.name());
            let log = MetricsLog::read(&dir)?;
            // A directory without a record stands on models that were replaced since.
            if record.steps.contains_key(&step) {
                let seconds = log.seconds().unwrap_or(0.0).max(record.seconds(step));
                stages.push(StageSource { step, dir, log, seconds });
            }
        }
        Ok(Self { record, stages, evaluation: Evaluation::read(out)?, answers: AnswerRow::read_all(out)? })
    }

    /// Wall seconds of all steps together.
    fn total_seconds(&self) -> f64 {
        let others: f64 = Step::ALL.iter().filter(|step| !step.trains()).map(|&step| self.record.seconds(step)).sum();
        others + self.stages.iter().map(|stage| stage.seconds).sum::<f64>()
    }

    fn stage(&self, step: Step) -> Option<&StageSource> {
        self.stages.iter().find(|stage| stage.step == step)
    }
}

impl StageSource {
    /// The stage's resolved configuration, empty if it was not saved.
    fn config(&self) -> Result<String> {
        let path = self.dir.join("config.toml");
        if !path.exists() {
            return Ok(String::new());
        }
        fs::read_to_string(&path).with_context(|| format!("failed to read `{}`", path.display()))
    }
}

#[cfg(test)]
mod tests;
