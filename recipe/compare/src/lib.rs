//! `recipe compare`: the same recipe on several backends, level by level, each in a process of its own.
//!
//! The first backend is the reference: it also trains the short checkpoints that the other backends' stages start from,
//! and gives the activations and answers that they compute with, so that a difference shows where it arises and not
//! everywhere after. A process that crashes is a row that says so.
//!
//! In reading order: `args`, `probe` (what one backend computes), `operations`, `tokens`, `record` (what is handed over),
//! `budget`, `output`.

#![forbid(unsafe_code)]

mod args;
mod budget;
mod operations;
mod output;
mod probe;
mod record;
mod replay;
mod tokens;

pub use args::{CompareArgs, ProbeArgs};
pub use probe::probe;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use common::backend;
use common::checkpoint::Stage;
use common::exit::UsageError;
use common::files::is_filled;
use common::kernels::{Kernels, Precision};

use serde::{Deserialize, Serialize};

use output::{Comparison, Run};
use probe::Plan;
use record::Records;

/// A recipe's contribution to the comparison: its stages' configurations, data and tokenizer, ready to be read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prepared {
    /// Name of the recipe.
    pub recipe: String,
    /// Its seed.
    pub seed: u64,
    /// The folder that `$DATA/` stands for in the stages' configurations.
    pub data: Option<PathBuf>,
    /// Directory of the tokenizer.
    pub tokenizer: PathBuf,
    /// Its stages in order, each with its configuration file and the overrides of it.
    pub stages: BTreeMap<Stage, StageConfig>,
}

/// A stage's configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StageConfig {
    /// The file.
    pub file: PathBuf,
    /// As `section.key=VALUE`.
    pub overrides: Vec<String>,
}

/// Compares the backends and writes what was found. `prepare` makes data and tokenizer in the directory that it is given.
///
/// # Errors
/// If the recipe is not valid, a backend cannot be opened, or a budget is exceeded.
pub fn compare(args: &CompareArgs, prepare: impl FnOnce(&Path) -> Result<Prepared>) -> Result<()> {
    if args.runtime.backend != backend::DEFAULT {
        return Err(UsageError("`--backend` is one backend; `--backends` takes those to compare".to_owned()).into());
    }
    if args.backends.len() < 2 {
        return Err(UsageError("`--backends` needs at least two, the reference first".to_owned()).into());
    }
    if let Some(twice) = args.backends.iter().enumerate().find(|(i, name)| args.backends[..*i].contains(name)) {
        return Err(UsageError(format!("`--backends` names `{}` twice", twice.1)).into());
    }
    // A backend that is not compiled in or has no device is refused before anything is computed.
    let precisions = args.backends.iter().map(|name| precision_of(name, args.runtime.precision));
    let precisions = precisions.collect::<Result<Vec<Precision>>>()?;
    if let Some(name) = args.backends.last().filter(|_| !precisions.contains(&args.runtime.precision)) {
        backend::check_precision(name, &backend::open(name)?, args.runtime.precision)?;
    }
    let recipe_name =
        Path::new(&args.recipe).file_name().map_or_else(|| "recipe".into(), |name| name.to_string_lossy());
    let out = args.out.clone().unwrap_or_else(|| Path::new("runs").join(format!("compare-{recipe_name}")));
    empty(&out, args.overwrite)?;
    let plan = plan(args, &out, prepare)?;
    let plan_path = out.join("plan.json");
    fs::write(&plan_path, serde_json::to_string_pretty(&plan)?).context("failed to write the plan")?;

    let mut runs: Vec<Run> = Vec::new();
    let reference = out.join(directory(&args.backends[0]));
    for (i, (name, precision)) in args.backends.iter().zip(&precisions).enumerate() {
        tracing::info!("[{}/{}] {name}", i + 1, args.backends.len());
        let dir = out.join(directory(name));
        let failure = run_probe(args, name, *precision, &plan_path, &dir, (i > 0).then_some(&reference))?;
        let records = Records::read(&dir)?;
        let log = dir.join("log.txt");
        if i == 0
            && let Some(failure) = failure
        {
            bail!("the reference `{name}` {failure}\nhint: see `{}`", log.display());
        }
        let failure = failure.map(|failure| format!("{failure}; see `{}`", log.display()));
        if let Some(failure) = &failure {
            tracing::warn!("`{name}` {failure}");
        }
        runs.push(Run { name: name.clone(), precision: *precision, records, failure });
    }
    let rows = runs[1..]
        .iter()
        .flat_map(|run| {
            // Two in 16 bits are hardly further apart than one of them is from f32.
            let coarser = if run.precision == Precision::F32 { runs[0].precision } else { run.precision };
            budget::check(&runs[0].records, &run.name, &run.records, &plan.stages, coarser)
        })
        .collect();
    let comparison =
        Comparison { recipe: recipe_name.into_owned(), steps: args.steps, stages: plan.stages, runs, rows };
    comparison.write(&out)?;
    std::io::stdout().write_all(comparison.table().as_bytes()).context("failed to write the result")?;
    tracing::info!("the tables are in `{}`", out.join("compare.md").display());
    if comparison.passed() { Ok(()) } else { Err(anyhow!("the backends differ by more than the budgets allow")) }
}

/// The precision that a backend computes in: the CPU's know one only, and are what the others are compared with.
fn precision_of(name: &str, wanted: Precision) -> Result<Precision> {
    let device = backend::open(name)?;
    if backend::is_host(name) {
        return Ok(Precision::F32);
    }
    backend::check_precision(name, &device, wanted)?;
    Ok(wanted)
}

/// Makes `out` an empty directory; an earlier comparison goes if `overwrite` says so.
fn empty(out: &Path, overwrite: bool) -> Result<()> {
    let is_filled = is_filled(out)?;
    if is_filled && !(overwrite && out.join("plan.json").is_file()) {
        bail!(
            "output directory `{}` is not empty\nhint: pass `--overwrite` to replace an earlier comparison, or another `--out`",
            out.display()
        );
    }
    if is_filled {
        fs::remove_dir_all(out).with_context(|| format!("failed to empty `{}`", out.display()))?;
    }
    fs::create_dir_all(out).with_context(|| format!("failed to make `{}`", out.display()))
}

fn plan(args: &CompareArgs, out: &Path, prepare: impl FnOnce(&Path) -> Result<Prepared>) -> Result<Plan> {
    let dir = std::path::absolute(out.join("prepared")).context("the working directory is unknown")?;
    fs::create_dir_all(&dir).with_context(|| format!("failed to make `{}`", dir.display()))?;
    let prepared = prepare(&dir)?;
    let mut stages: Vec<Stage> = prepared.stages.keys().copied().collect();
    if stages.first() != Some(&Stage::Pretrain) {
        bail!("the recipe `{}` has no stage `pretrain`, whose model and text a comparison needs", prepared.recipe);
    }
    if let Some(stage) = args.stages.iter().find(|stage| !stages.contains(stage)) {
        let known: Vec<String> = stages.iter().map(ToString::to_string).collect();
        return Err(UsageError(format!("`--stages` names `{stage}`, expected some of {}", known.join(", "))).into());
    }
    if !args.stages.is_empty() {
        stages.retain(|stage| args.stages.contains(stage));
    }
    Ok(Plan { prepared, stages, steps: args.steps })
}

/// Runs one backend to its end; returns how it ended, unless well. What it says goes to `log.txt`.
fn run_probe(
    args: &CompareArgs,
    name: &str,
    precision: Precision,
    plan: &Path,
    dir: &Path,
    reference: Option<&PathBuf>,
) -> Result<Option<String>> {
    fs::create_dir_all(dir).with_context(|| format!("failed to make `{}`", dir.display()))?;
    let log = File::create(dir.join("log.txt")).context("failed to write a log")?;
    let program = std::env::current_exe().context("this program has no path")?;
    let mut command = Command::new(program);
    command.arg("probe").arg("--plan").arg(plan).arg("--out").arg(dir).args(["--backend", name, "-v"]);
    if let Some(reference) = reference {
        command.arg("--reference").arg(reference);
    }
    if let Some(threads) = args.runtime.process.threads {
        command.arg("--threads").arg(threads.to_string());
    }
    command.args(["--precision", precision.name()]);
    if args.runtime.kernels() == Kernels::Plain {
        command.args(["--kernels", "plain"]);
    }
    if let Some((backend, operation)) = args.plant.as_ref().and_then(|plant| plant.split_once('='))
        && backend == name
    {
        command.args(["--plant", operation]);
    }
    let status =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).status().context("failed to start a probe")?;
    Ok(if status.success() { None } else { Some(format!("ended with {status}")) })
}

/// A backend's directory.
fn directory(name: &str) -> String {
    name.replace(':', "-")
}
