//! `report.html` and `report.json`: everything a run of a recipe left behind, on one page.
//!
//! `recipe report` writes such a page for a single stage's directory too, and one for several runs side by side.
//!
//! The report is a function of the output directory: `recipe.json`, each stage's `metrics.jsonl`, `samples.jsonl` and
//! `config.toml`, and what the last step measured (`evaluation.json`, `answers.jsonl`). Writing it again changes nothing.

mod json;
mod page;
mod runs;
mod stages;
mod text;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use common::checkpoint::Manifest;
use common::files::{read_if_there, write_whole};
use common::metrics::{METRICS_FILE, MetricsLog};
use serde_json::Value;

use crate::cli::ReportArgs;
use crate::doctor;
use crate::people::Summary;
use crate::record::{RunRecord, StepRecord};
use crate::results::{AnswerRow, Results};
use crate::steps::Step;

pub(crate) use page::fill;
pub use text::duration;

/// What every page of ours has in its head.
const MADE_BY_US: &str = "<meta name=\"generator\" content=\"Kindling ";

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

/// Carries out `recipe report`.
///
/// # Errors
/// If a directory holds no run, a file of it cannot be read, or the report not be written.
pub fn run(args: &ReportArgs) -> Result<()> {
    let out = &args.out;
    // A device may have no end.
    if out.metadata().is_ok_and(|is| !is.is_file()) {
        bail!("`{}` is not a file\nhint: name a file such as `report.html`", out.display());
    }
    if read_if_there(out)?.is_some_and(|text| !text.contains(MADE_BY_US)) {
        bail!("refusing to overwrite `{}`: it is not a report\nhint: pass another `--out`", out.display());
    }
    let page = match &args.dirs[..] {
        [only] => page::render(&Source::open(only)?)?,
        several => runs::render(several)?,
    };
    write_whole(out, page)?;
    writeln!(std::io::stdout(), "report: {}", out.display()).context("failed to write the result")
}

/// The directories in `dir` that hold a run, quoted and in the order of their names.
fn runs_in(dir: &Path) -> Vec<String> {
    let entries = dir.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let is_run = |path: &PathBuf| [METRICS_FILE, "recipe.json"].iter().any(|file| path.join(file).is_file());
    let mut found: Vec<String> = entries.filter(is_run).map(|path| format!("`{}`", path.display())).collect();
    found.sort();
    found
}

impl Source {
    /// What there is to report of the run of a recipe or of a stage in `dir`.
    fn open(dir: &Path) -> Result<Self> {
        if dir.join("recipe.json").is_file() { Self::read(dir) } else { Self::of_stage(dir) }
    }

    /// A single stage in a directory of its own.
    fn of_stage(dir: &Path) -> Result<Self> {
        if !dir.join(METRICS_FILE).is_file() {
            let inside = runs_in(dir);
            let hint = if inside.is_empty() {
                "pass the `--out` of a training command or of `recipe run`".to_owned()
            } else {
                format!("pass one or more of the runs in it: {}", inside.join(", "))
            };
            bail!(
                "`{}` holds no run: there is neither a stage's `{METRICS_FILE}` nor a `recipe.json`\nhint: {hint}",
                dir.display()
            );
        }
        let Some(manifest) = Manifest::read(dir)? else {
            bail!(
                "`{}` does not say yet which stage wrote it\nhint: wait for the first checkpoint of the run",
                dir.display()
            );
        };
        let step = Step::ALL.into_iter().find(|step| step.name() == manifest.stage.to_string());
        let step = step.context("a stage that trains is a step of recipes")?;
        let log = MetricsLog::read(dir)?;
        let seconds = log.seconds().unwrap_or(0.0);
        let done = StepRecord { finished: manifest.finished.unwrap_or(true), seconds, ..StepRecord::default() };
        let stage = StageSource { step, dir: dir.to_owned(), log, seconds };
        let config: toml::Table = stage.config()?.parse().with_context(|| format!("`{}` is damaged", dir.display()))?;
        let record = RunRecord {
            title: dir.display().to_string(),
            seed: config.get("seed").and_then(toml::Value::as_integer).unwrap_or(0).unsigned_abs(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            backend: manifest.backend,
            gold: stage.log.last("gold/score").map(|_| String::new()),
            steps: [(step, done)].into(),
            ..RunRecord::default()
        };
        Ok(Self { record, stages: vec![stage], doctor: None, labels: None, results: None, answers: Vec::new() })
    }

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
