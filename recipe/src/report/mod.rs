//! `report.html` and `report.json`: everything a run of a recipe left behind, on one page.
//!
//! The report is a function of the output directory: `recipe.json`, each stage's `metrics.jsonl`, `samples.jsonl` and
//! `config.toml`, and what the last step measured (`evaluation.json`, `answers.jsonl`). Writing it again changes nothing.

mod json;
mod page;
mod stages;
mod text;

use std::path::{Path, PathBuf};

use anyhow::Result;
use common::files::{read_if_there, write_whole};
use common::metrics::MetricsLog;
use serde_json::Value;

use crate::doctor;
use crate::people::Summary;
use crate::record::{RunRecord, StepRecord};
use crate::results::{AnswerRow, Results};
use crate::steps::Step;

pub(crate) use page::fill;
pub use text::duration;

/// All that the two reports are made from.
struct Source {
    record: RunRecord,
    stages: Vec<StageSource>,
    /// What `doctor::run` found before PPO.
    doctor: Option<Value>,
    /// What people's labels came to.
    labels: Option<Summary>,
    results: Option<Results>,
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
    for (name, text) in [
        ("report.json", serde_json::to_string_pretty(&json::report(&source))?),
        ("report.html", page::render(&source)?),
    ] {
        let path = out.join(name);
        write_whole(&path, text)?;
    }
    Ok(())
}

impl Source {
    fn read(out: &Path) -> Result<Self> {
        let record = RunRecord::load(out)?;
        let mut stages = Vec::new();
        for step in Step::ALL.into_iter().filter(|step| step.trains()) {
            // Without a current record it stands on models that were replaced since.
            let Some(step_record) = record.current(step) else { continue };
            let dir = out.join(step.name());
            let mut log = MetricsLog::read(&dir)?;
            if !reports_gold(&record, step_record) {
                log = log.without("gold/");
            }
            let seconds = log.seconds().unwrap_or(0.0).max(step_record.seconds);
            stages.push(StageSource { step, dir, log, seconds });
        }
        let (results, answers) = if record.current(Step::Evaluate).is_some_and(|step| step.finished) {
            (Results::read(out)?, AnswerRow::read_all(out)?)
        } else {
            (None, Vec::new())
        };
        let doctor = if record.current(Step::Ppo).is_some() { doctor::read(out)? } else { None };
        let labels =
            record.current(Step::Collect).filter(|step| step.finished).map(|_| Summary::read(out)).transpose()?;
        Ok(Self { record, stages, doctor, labels: labels.flatten(), results, answers })
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

/// Whether the gold scores that a step logged are those of the recipe's scorer: it may have another one by now.
fn reports_gold(record: &RunRecord, step: &StepRecord) -> bool {
    step.gold == record.gold_fingerprint || step.inputs.is_empty()
}

impl StageSource {
    /// The stage's resolved configuration, empty if it was not saved.
    fn config(&self) -> Result<String> {
        Ok(read_if_there(&self.dir.join("config.toml"))?.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests;
