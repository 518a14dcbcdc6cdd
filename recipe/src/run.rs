//! `recipe run`: the steps in turn.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use common::group::Group;
use common::interrupt::{Interrupt, Stopped};
use common::logging::counted;
use common::out_dir::{self, OutLock};
use common::session::Outcome;
use common::stats::fixed;
use common::view;

use crate::check;
use crate::cli::RunArgs;
use crate::collect::{Collector, PairFiles};
use crate::config::{CollectConfig, LabelledBy};
use crate::doctor::{self, DOCTOR_FILE};
use crate::evaluate::{Evaluator, GOLD_ORDER_FILE};
use crate::folder::Recipe;
use crate::inputs::Inputs;
use crate::people;
use crate::plan::{self, PlannedStep, State};
use crate::record::{RunRecord, StepRecord};
use crate::report;
use crate::results::{Policy, Results};
use crate::setup::Setup;
use crate::steps::{Progress, Step};
use crate::training::{self, Trainer};

/// Runs a recipe from where it stands to its end, or to where the user stops it.
///
/// Everything that can be checked is checked before the first step: configurations, overrides, data, the device, and
/// whether finished work would be lost.
///
/// # Errors
/// If the recipe is not valid or a step fails; what was finished before stays and is skipped the next time.
pub fn run(args: &RunArgs, group: &Group, interrupt: Interrupt) -> Result<Outcome> {
    if !group.is_first() {
        return training::follow(args, group, interrupt);
    }
    let outcome = lead(args, group, interrupt)?;
    training::end(group, interrupt)?;
    Ok(outcome)
}

/// [`run`] on the rank that decides and writes.
fn lead(args: &RunArgs, group: &Group, interrupt: Interrupt) -> Result<Outcome> {
    let recipe = Recipe::open(&args.recipe, &args.out, args.data.as_deref(), &args.changes.all()?, args.seed)?;
    let _lock = OutLock::take_inside(&args.out)?;
    let (record, progress) = carry_out(args, recipe, group, interrupt)?;
    match progress {
        Progress::Finished => say_result(&args.out, &record)?,
        Progress::Waiting => {}
        Progress::Interrupted => {
            tracing::info!("stopped");
            return Ok(Outcome::Interrupted);
        }
    }
    Ok(Outcome::Finished)
}

/// Carries out the steps that `args` name, and writes the report.
///
/// # Errors
/// As [`run`].
pub(crate) fn carry_out(
    args: &RunArgs,
    recipe: Recipe,
    group: &Group,
    interrupt: Interrupt,
) -> Result<(RunRecord, Progress)> {
    check_stages(args, &recipe)?;
    let earlier = earlier_record(args, &recipe)?;
    let setup = Setup::open(recipe, &args.runtime)?;
    training::agree(args, &setup, group)?;
    let mut run = Run::start(args, setup, earlier, group, interrupt)?;
    let progress = run.steps()?;
    if progress == Progress::Finished {
        tracing::info!("[{0}/{0}] report", run.n_steps());
    }
    report::write(&args.out).context("failed to write the report")?;
    Ok((run.record, progress))
}

struct Run<'a> {
    args: &'a RunArgs,
    setup: Setup,
    record: RunRecord,
    /// The steps that this command has to do, at its beginning.
    due: Vec<Step>,
    group: &'a Group,
    interrupt: Interrupt,
}

impl<'a> Run<'a> {
    /// Checks everything that is to come after what `earlier` has, or from the beginning if it is of another recipe.
    fn start(
        args: &'a RunArgs,
        setup: Setup,
        earlier: RunRecord,
        group: &'a Group,
        interrupt: Interrupt,
    ) -> Result<Self> {
        args.runtime.open()?;
        let (record, replaced) =
            if earlier.is_of(&setup.recipe.name) { (earlier, None) } else { (RunRecord::default(), Some(earlier)) };
        let planned = plan::plan(&setup, &record, &args.stages)?;
        plan::confirm(&planned, &args.out, args.overwrite)?;
        let is_due = |planned: &&PlannedStep| planned.is_wanted && planned.state != State::Done;
        let due: Vec<Step> = planned.iter().filter(is_due).map(|planned| planned.step).collect();
        training::check_ranks(&setup, &due, group.size())?;
        check::check(&setup, &due)?;
        check_inputs(&setup, &due, replaced.is_some())?;
        if let Some(replaced) = &replaced {
            for &step in replaced.steps.keys().filter(|&&step| has_directory(step)) {
                out_dir::check_replaceable(&setup.dir(step), &[])?;
            }
        }
        let mut run = Self { args, setup, record, due, group, interrupt };
        run.describe()?;
        fs::create_dir_all(&args.out).with_context(|| format!("failed to make `{}`", args.out.display()))?;
        if let Some(replaced) = replaced {
            run.remove_results(&replaced)?;
        }
        run.record.save(&args.out)?;
        run.setup.recipe.write_embedded()?;
        Ok(run)
    }

    /// Removes what the steps of another recipe's run left, so that no report takes it for this one's.
    fn remove_results(&self, replaced: &RunRecord) -> Result<()> {
        let out = &self.args.out;
        let remove = |path: &Path, removed: std::io::Result<()>| match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("failed to remove `{}`", path.display()))
            }
            _ => Ok(()),
        };
        for &step in replaced.steps.keys() {
            let dir = self.setup.dir(step);
            if has_directory(step) && dir.is_dir() {
                let _lock = OutLock::take(&dir)?;
                out_dir::prepare(&dir, false, true, &[])?;
                remove(&dir, fs::remove_dir(&dir))?;
            }
            let mut files = self.setup.results(step);
            match step {
                Step::World => files.extend(toy::FILES.map(|name| self.setup.data_dir().join(name))),
                Step::Collect => files.push(PairFiles::in_out(out).test),
                Step::Ppo => files.push(out.join(DOCTOR_FILE)),
                Step::Evaluate => files.push(out.join(GOLD_ORDER_FILE)),
                _ => {}
            }
            for path in files {
                remove(&path, fs::remove_file(&path))?;
            }
        }
        for name in ["report.html", "report.json"] {
            remove(&out.join(name), fs::remove_file(out.join(name)))?;
        }
        Ok(())
    }

    /// Notes what is run, and on what.
    fn describe(&mut self) -> Result<()> {
        let (recipe, record) = (&self.setup.recipe, &mut self.record);
        record.recipe.clone_from(&recipe.name);
        record.title.clone_from(&recipe.config.title);
        record.seed = recipe.config.seed;
        env!("CARGO_PKG_VERSION").clone_into(&mut record.version);
        record.backend.clone_from(&self.args.runtime.backend);
        record.threads = n_threads(self.args);
        record.gold = recipe.config.gold.as_ref().map(|gold| gold.kind.describe().to_owned());
        record.gold_fingerprint = self.setup.gold_fingerprint()?;
        record.samples_per_prompt = recipe.config.collect.as_ref().map(|collect| collect.samples_per_prompt);
        Ok(())
    }

    /// Steps of the recipe, the report included.
    fn n_steps(&self) -> usize {
        self.setup.recipe.config.steps().len() + 1
    }

    /// Runs every step that is wanted and not finished.
    fn steps(&mut self) -> Result<Progress> {
        let n = self.n_steps();
        for (i, step) in self.setup.recipe.config.steps().into_iter().enumerate() {
            if !self.args.stages.is_empty() && !self.args.stages.contains(&step) {
                continue;
            }
            if self.interrupt.requested() {
                return Ok(Progress::Interrupted);
            }
            let title = format!("[{}/{n}] {step}", i + 1);
            let inputs = self.setup.inputs(step).with_context(|| format!("failed to prepare the step `{step}`"))?;
            let progress = self.step(step, &title, inputs)?;
            if progress != Progress::Finished {
                return Ok(progress);
            }
            if step == Step::Tokenizer && self.due.contains(&step) {
                let rest: Vec<Step> = self.due.iter().copied().filter(|&later| later > step).collect();
                check::check_lengths(&self.setup, &rest)?;
            }
        }
        Ok(Progress::Finished)
    }

    /// Runs one step unless it is done, and records how far it came.
    fn step(&mut self, step: Step, title: &str, inputs: Inputs) -> Result<Progress> {
        let state = match self.record.steps.get(&step) {
            Some(old) => plan::state_of(&self.setup, step, old, &inputs)?.0,
            None => State::Due,
        };
        if state == State::Done {
            tracing::info!(
                "{title}: finished earlier (took {}), nothing it depends on has changed",
                report::duration(self.record.seconds(step))
            );
            if let Some(record) = self.record.steps.get_mut(&step) {
                if record.inputs.is_empty() && step.follows_scores() {
                    // An earlier version did PPO anew for another gold score.
                    record.gold = self.setup.gold_fingerprint()?;
                }
                (record.inputs, record.stale) = (inputs, false);
            }
            self.record.save(&self.args.out)?;
            let asks_people = |collect: &CollectConfig| collect.labels == LabelledBy::People;
            if step == Step::Collect && self.setup.recipe.config.collect.as_ref().is_some_and(asks_people) {
                people::say_unused(&self.args.out)?;
            }
            return Ok(Progress::Finished);
        }
        let goes_on = state == State::GoesOn;
        tracing::info!("{title}{}", if goes_on { ": resuming" } else { "" });
        let seconds = if goes_on { self.record.seconds(step) } else { 0.0 };
        if !goes_on {
            self.clear(step)?;
        }
        // Results made from the earlier result of this step no longer belong to it.
        self.record.steps.range_mut(step..).for_each(|(_, record)| record.stale = true);
        let gold = if step.follows_scores() { self.setup.gold_fingerprint()? } else { None };
        let mut record = StepRecord { inputs, finished: false, seconds, stale: false, gold };
        self.record.steps.insert(step, record.clone());
        self.record.save(&self.args.out)?;

        let started = Instant::now();
        let progress = match self.carry_out(step, goes_on) {
            Err(error) if error.is::<Stopped>() => Progress::Interrupted,
            progress => progress.with_context(|| format!("the step `{step}` failed"))?,
        };
        record.seconds += started.elapsed().as_secs_f64();
        record.finished = progress == Progress::Finished;
        let ended = match progress {
            Progress::Finished => "done",
            Progress::Interrupted => "interrupted and saved",
            Progress::Waiting => "waiting for labels",
        };
        tracing::info!("{title}: {ended} after {}", report::duration(record.seconds));
        self.record.steps.insert(step, record);
        self.record.save(&self.args.out)?;
        Ok(progress)
    }

    /// Removes what a step left that is about to be done anew, before its new inputs are recorded: a checkpoint beside a
    /// record always comes from the inputs recorded there.
    fn clear(&mut self, step: Step) -> Result<()> {
        if self.record.steps.remove(&step).is_some() {
            self.record.save(&self.args.out)?;
        }
        let dir = self.setup.dir(step);
        if has_directory(step) && dir.is_dir() {
            let _lock = OutLock::take(&dir)?;
            out_dir::prepare(&dir, false, true, &[])?;
        }
        Ok(())
    }

    fn carry_out(&self, step: Step, goes_on: bool) -> Result<Progress> {
        let config = &self.setup.recipe.config;
        match step {
            Step::World => {
                let world = config.world.as_ref().context("the recipe has no `[world]`")?;
                let summary = toy::write(&self.setup.data_dir(), world)?;
                let n: usize = summary.files.iter().map(|(_, n)| n).sum();
                let (records, n_files) = (counted(n, "record", "records"), summary.files.len());
                tracing::info!("{records} in {n_files} files in `{}`", self.setup.data_dir().display());
                Ok(Progress::Finished)
            }
            Step::Tokenizer => self.tokenizer().map(Progress::from),
            Step::Collect => Collector {
                config: config.collect.as_ref().context("the recipe has no `[collect]`")?,
                gold: self.setup.gold.as_ref(),
                setup: &self.setup,
                runtime: &self.args.runtime,
                interrupt: self.interrupt,
            }
            .run(),
            Step::Evaluate => Evaluator {
                config: config.evaluate.as_ref().context("the recipe has no `[evaluate]`")?,
                setup: &self.setup,
                runtime: &self.args.runtime,
                interrupt: self.interrupt,
            }
            .run()
            .map(Progress::from),
            stage => {
                if stage == Step::Ppo && !goes_on {
                    doctor::run(&self.setup, &self.args.runtime, self.interrupt)?;
                }
                let Self { args, setup, group, interrupt, .. } = self;
                training::announce(group, stage, goes_on)?;
                Trainer { args, setup, group, interrupt: *interrupt }.train(stage, goes_on).map(Progress::from)
            }
        }
    }

    fn tokenizer(&self) -> Result<Outcome> {
        let learned = pretrain::train_tokenizer(&pretrain::TokenizerArgs {
            config: self.setup.recipe.stage_config(Step::Tokenizer),
            out: self.setup.dir(Step::Tokenizer),
            overwrite: true,
            overrides: self.setup.recipe.stage_overrides(Step::Tokenizer),
            data: self.setup.recipe.data.clone(),
            process: self.args.runtime.process.clone(),
        })?;
        tracing::info!("{} tokens, {:.2} bytes of held-out text each", learned.vocab_size, learned.bytes_per_token);
        Ok(Outcome::Finished)
    }
}

/// Says on stdout where the report is and how it came out.
fn say_result(out: &Path, record: &RunRecord) -> Result<()> {
    let mut text = String::new();
    let evaluated = record.current(Step::Evaluate).is_some_and(|record| record.finished);
    if let Some(results) = Results::read(out)?.filter(|_| evaluated) {
        let (name, scores) = if results.gold.is_empty() {
            ("reward model's score", &results.score)
        } else {
            ("gold score", &results.gold)
        };
        let scores: Vec<String> = Policy::ALL
            .into_iter()
            .filter_map(|policy| Some((policy, scores.get(&policy)?)))
            .map(|(policy, score)| {
                let bounds = if score.has_width() {
                    format!("95 % {} to {}", fixed(score.low, 3), fixed(score.high, 3))
                } else {
                    "one prompt".to_owned()
                };
                format!("{} {} ({bounds})", policy.name(), fixed(score.mean, 3))
            })
            .collect();
        if !scores.is_empty() {
            text = format!("{name} on held-out prompts: {}\n", scores.join(", "));
        }
    }
    let report = out.join("report.html");
    view::leave();
    writeln!(std::io::stdout(), "{text}report: {}", report.display()).context("failed to write the result")
}

/// Whether the step's results are a directory of their own.
fn has_directory(step: Step) -> bool {
    step.trains() || matches!(step, Step::Tokenizer)
}

/// Refuses to delete what the recipe reads: its initial model and its own data may lie in the output directory, but not in
/// what a step `due` writes anew, nor anywhere there if an earlier run is `replaced`.
fn check_inputs(setup: &Setup, due: &[Step], is_replaced: bool) -> Result<()> {
    let generated = setup.recipe.config.world.is_some().then(|| setup.data_dir());
    for input in setup.files_read() {
        let Ok(input) = input.canonicalize() else { continue };
        let lies_in = |dir: &Path| dir.canonicalize().is_ok_and(|dir| input.starts_with(dir));
        if generated.as_deref().is_some_and(lies_in) {
            continue;
        }
        let is_lost = due.iter().any(|&step| has_directory(step) && lies_in(&setup.dir(step)));
        if is_lost || is_replaced && lies_in(&setup.out) {
            bail!(
                "the recipe reads `{}`, which this command would delete\nhint: pass another `--out`",
                input.display()
            );
        }
    }
    Ok(())
}

/// `--stages` names steps of the recipe.
fn check_stages(args: &RunArgs, recipe: &Recipe) -> Result<()> {
    let steps = recipe.config.steps();
    let Some(step) = args.stages.iter().find(|step| !steps.contains(step)) else { return Ok(()) };
    let known: Vec<&str> = steps.iter().map(|step| step.name()).collect();
    bail!("`--stages` names `{step}`, which is not a step of this recipe\nhint: its steps are {}", known.join(", "));
}

/// The record of an earlier run in the output directory; of another recipe only if it may be replaced.
fn earlier_record(args: &RunArgs, recipe: &Recipe) -> Result<RunRecord> {
    let out = &args.out;
    if !out_dir::is_empty(out)? && !out.join("recipe.json").is_file() {
        bail!(
            "output directory `{}` is not empty, and no recipe was run in it\nhint: pass another `--out`",
            out.display()
        );
    }
    let record = RunRecord::load(out)?;
    if !record.is_of(&recipe.name) && !args.overwrite {
        bail!(
            "`{}` holds a run of the recipe `{}`, not of `{}`\nhint: pass another `--out`, or `--overwrite` to replace it",
            out.display(),
            record.recipe,
            recipe.name
        );
    }
    Ok(record)
}

fn n_threads(args: &RunArgs) -> usize {
    args.runtime
        .process
        .threads
        .or_else(|| std::thread::available_parallelism().ok())
        .map_or(1, std::num::NonZeroUsize::get)
}
