//! `recipe run`: the steps in turn.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use common::cli::StageArgs;
use common::interrupt::Interrupt;
use common::session::Outcome;

use crate::cli::RunArgs;
use crate::collect::{PairFiles, collect};
use crate::config::{EMBEDDED_DIR, Recipe};
use crate::evaluate::Evaluator;
use crate::evaluation::{Evaluation, Policy};
use crate::gold::{GoldKind, GoldScorer};
use crate::keys::Key;
use crate::report;
use crate::steps::{RunRecord, Step, StepRecord};

/// Runs a recipe from where it stands to its end, or to where the user stops it.
///
/// # Errors
/// If the recipe is not valid or a step fails; what was finished before stays and is skipped the next time.
pub fn run(args: &RunArgs, interrupt: Interrupt) -> Result<()> {
    let recipe = Recipe::open(&args.recipe, &args.out, args.data.as_deref(), &args.overrides, args.seed)?;
    let mut run = Run::start(args, recipe, interrupt)?;
    let outcome = run.steps()?;
    if outcome == Outcome::Finished {
        tracing::info!("[{0}/{0}] report", run.n_steps());
    }
    report::write(&args.out).context("failed to write the report")?;
    match outcome {
        Outcome::Finished => run.say_result(),
        Outcome::Interrupted => {
            tracing::info!("stopped; run the same command again to go on");
            Ok(())
        }
    }
}

struct Run<'a> {
    args: &'a RunArgs,
    recipe: Recipe,
    steps: Vec<Step>,
    gold: Option<GoldScorer>,
    record: RunRecord,
    interrupt: Interrupt,
}

impl<'a> Run<'a> {
    /// Prepares the output directory and reads how far an earlier run came.
    fn start(args: &'a RunArgs, recipe: Recipe, interrupt: Interrupt) -> Result<Self> {
        let out = &args.out;
        fs::create_dir_all(out).with_context(|| format!("failed to make `{}`", out.display()))?;
        let mut entries = out.read_dir().with_context(|| format!("failed to read `{}`", out.display()))?;
        let is_empty = entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == EMBEDDED_DIR));
        if !is_empty && !out.join("recipe.json").is_file() {
            bail!(
                "output directory `{}` is not empty, and no recipe was run in it\nhint: pass another `--out`",
                out.display()
            );
        }
        let mut record = if args.overwrite { RunRecord::default() } else { RunRecord::load(out)? };
        if !record.recipe.is_empty() && record.recipe != recipe.name {
            bail!(
                "`{}` holds a run of the recipe `{}`, not of `{}`\nhint: pass another `--out`, or `--overwrite` to start over",
                out.display(),
                record.recipe,
                recipe.name
            );
        }
        let steps = recipe.config.steps();
        if let Some(step) = args.stages.iter().find(|step| !steps.contains(step)) {
            let known: Vec<&str> = steps.iter().map(|step| step.name()).collect();
            bail!(
                "`--stages` names `{step}`, which is no step of this recipe\nhint: its steps are {}",
                known.join(", ")
            );
        }
        let gold = match &recipe.config.gold {
            Some(gold) => Some(gold.open(|words| Ok(PathBuf::from(words))).context("failed to open the gold scorer")?),
            None => None,
        };
        record.recipe.clone_from(&recipe.name);
        record.title.clone_from(&recipe.config.title);
        record.seed = recipe.config.seed;
        env!("CARGO_PKG_VERSION").clone_into(&mut record.version);
        record.backend.clone_from(&args.runtime.backend);
        record.threads = rayon_threads(args);
        record.gold = recipe.config.gold.as_ref().map(|gold| describe(gold.kind).to_owned());
        record.save(out)?;
        Ok(Self { args, recipe, steps, gold, record, interrupt })
    }

    /// Steps of the recipe, the report included.
    fn n_steps(&self) -> usize {
        self.steps.len() + 1
    }

    /// Runs every step that is wanted and not finished.
    fn steps(&mut self) -> Result<Outcome> {
        let n = self.n_steps();
        for (i, step) in self.steps.clone().into_iter().enumerate() {
            let what = format!("[{}/{n}] {step}", i + 1);
            if !self.args.stages.is_empty() && !self.args.stages.contains(&step) {
                continue;
            }
            if self.interrupt.requested() {
                return Ok(Outcome::Interrupted);
            }
            let key = self.key(step).with_context(|| format!("failed to prepare the step `{step}`"))?;
            let earlier = self.record.steps.get(&step).filter(|record| record.key == key);
            if earlier.is_some_and(|record| record.finished) && self.leaves(step).iter().all(|path| path.exists()) {
                tracing::info!(
                    "{what}: finished earlier (took {}), nothing it depends on has changed",
                    report::duration(self.record.seconds(step))
                );
                continue;
            }
            let goes_on = earlier.is_some() && self.dir(step).join("manifest.json").is_file();
            tracing::info!("{what}{}", if goes_on { ": going on" } else { "" });
            let seconds_before = if goes_on { self.record.seconds(step) } else { 0.0 };
            if !goes_on {
                self.forget_later(step)?;
            }
            let mut record = StepRecord { key, finished: false, seconds: seconds_before };
            self.record.steps.insert(step, record.clone());
            self.record.save(&self.args.out)?;

            let started = Instant::now();
            let outcome = self.step(step, goes_on).with_context(|| format!("the step `{step}` failed"))?;
            record.seconds += started.elapsed().as_secs_f64();
            record.finished = outcome == Outcome::Finished;
            tracing::info!("{what}: {} after {}", ended(outcome), report::duration(record.seconds));
            self.record.steps.insert(step, record);
            self.record.save(&self.args.out)?;
            if outcome == Outcome::Interrupted {
                return Ok(outcome);
            }
        }
        Ok(Outcome::Finished)
    }

    /// Runs one step.
    fn step(&self, step: Step, goes_on: bool) -> Result<Outcome> {
        let config = &self.recipe.config;
        let runtime = &self.args.runtime;
        match step {
            Step::World => {
                let world = config.world.as_ref().context("the recipe has no `[world]`")?;
                let summary = toy::write(&self.data_dir(), world)?;
                let n: usize = summary.files.iter().map(|(_, n)| n).sum();
                tracing::info!("{n} records in {} files in `{}`", summary.files.len(), self.data_dir().display());
                Ok(Outcome::Finished)
            }
            Step::Tokenizer => {
                let learned = pretrain::train_tokenizer(&pretrain::TokenizerArgs {
                    config: self.recipe.stage_config(step),
                    out: self.dir(step),
                    overwrite: true,
                    overrides: self.recipe.stage_overrides(step),
                    data: self.recipe.data.clone(),
                    runtime: runtime.clone(),
                })?;
                tracing::info!(
                    "{} tokens, {:.2} bytes of held-out text each",
                    learned["vocab_size"],
                    learned["bytes_per_token"].as_f64().unwrap_or(f64::NAN)
                );
                Ok(Outcome::Finished)
            }
            Step::Pretrain => pretrain::train(
                &pretrain::TrainArgs {
                    tokenizer: Some(self.dir(Step::Tokenizer)),
                    init: None,
                    stage: self.stage_args(step, goes_on)?,
                },
                self.interrupt,
            ),
            Step::Sft => sft::train(
                &sft::TrainArgs { init: self.dir(Step::Pretrain), stage: self.stage_args(step, goes_on)? },
                self.interrupt,
            ),
            Step::Collect => {
                let collect_config = config.collect.as_ref().context("the recipe has no `[collect]`")?;
                let gold = self.gold.as_ref().context("the recipe has no `[gold]`")?;
                let sft = self.dir(Step::Sft);
                collect(collect_config, config.seed, &sft, gold, &self.args.out, runtime, self.interrupt)
            }
            Step::RewardModel => reward_model::train(
                &reward_model::TrainArgs { init: self.dir(Step::Sft), stage: self.stage_args(step, goes_on)? },
                self.interrupt,
            ),
            Step::Ppo => {
                let gold = self
                    .gold
                    .as_ref()
                    .map(|gold| move |prompt: &str, response: &str| gold.score(prompt, response).unwrap_or(f64::NAN));
                ppo::train(
                    &ppo::TrainArgs {
                        policy: self.dir(Step::Sft),
                        reward_model: self.dir(Step::RewardModel),
                        stage: self.stage_args(step, goes_on)?,
                    },
                    self.interrupt,
                    gold.as_ref().map(|gold| gold as &dyn Fn(&str, &str) -> f64),
                )
            }
            Step::Evaluate => Evaluator {
                config: config.evaluate.as_ref().context("the recipe has no `[evaluate]`")?,
                seed: config.seed,
                out: &self.args.out,
                stages: &config.stages,
                pairs: self.test_pairs().as_deref(),
                gold: self.gold.as_ref(),
                runtime,
                interrupt: self.interrupt,
            }
            .run(),
        }
    }

    /// The flags with which a training stage is run.
    fn stage_args(&self, step: Step, resume: bool) -> Result<StageArgs> {
        Ok(StageArgs {
            config: self.recipe.stage_config(step),
            out: self.dir(step),
            resume,
            overwrite: !resume,
            overrides: self.overrides(step)?,
            data: self.recipe.data.clone(),
            runtime: self.args.runtime.clone(),
        })
    }

    /// What the recipe changes in a stage's configuration. Collected pairs take the place of the reward model's own.
    fn overrides(&self, step: Step) -> Result<Vec<String>> {
        let mut overrides = self.recipe.stage_overrides(step);
        if step == Step::RewardModel && self.recipe.config.collect.is_some() {
            let files = PairFiles::in_out(&self.absolute_out()?);
            for (key, path) in [("data.train", files.train), ("data.val", files.val)] {
                let path = toml::Value::String(path.display().to_string());
                overrides.push(format!("{key}=[{path}]"));
            }
        }
        Ok(overrides)
    }

    /// The hash of everything the step's result depends on.
    fn key(&self, step: Step) -> Result<String> {
        let config = &self.recipe.config;
        let mut key = Key::of(step);
        match step {
            Step::World => key.config("world", &config.world)?,
            Step::Tokenizer => {
                key.stage_config::<pretrain::PretrainConfig>(&self.recipe, step, Some(&["tokenizer", "data"]))?;
            }
            Step::Pretrain => {
                key.stage_config::<pretrain::PretrainConfig>(&self.recipe, step, None)?;
                key.file(&self.dir(Step::Tokenizer).join("tokenizer.json"))?;
            }
            Step::Sft => {
                key.stage_config::<sft::SftConfig>(&self.recipe, step, None)?;
                key.checkpoint(&self.dir(Step::Pretrain))?;
            }
            Step::Collect => {
                key.config("collect", &config.collect)?;
                key.config("gold", &config.gold)?;
                key.text("seed", &config.seed.to_string());
                if let Some(collect) = &config.collect {
                    key.file(&collect.prompts)?;
                    key.file(&collect.test_prompts)?;
                }
                key.checkpoint(&self.dir(Step::Sft))?;
            }
            Step::RewardModel => {
                key.stage_config::<reward_model::RewardModelConfig>(&self.recipe, step, None)?;
                if config.collect.is_some() {
                    let files = PairFiles::in_out(&self.args.out);
                    key.file(&files.train)?;
                    key.file(&files.val)?;
                }
                key.checkpoint(&self.dir(Step::Sft))?;
            }
            Step::Ppo => {
                key.stage_config::<ppo::PpoConfig>(&self.recipe, step, None)?;
                key.checkpoint(&self.dir(Step::Sft))?;
                key.checkpoint(&self.dir(Step::RewardModel))?;
            }
            Step::Evaluate => {
                key.config("evaluate", &config.evaluate)?;
                key.config("gold", &config.gold)?;
                key.text("seed", &config.seed.to_string());
                if let Some(evaluate) = &config.evaluate {
                    key.file(&evaluate.prompts)?;
                }
                if let Some(pairs) = self.test_pairs() {
                    key.file(&pairs)?;
                }
                for &stage in &config.stages {
                    key.checkpoint(&self.dir(stage))?;
                }
            }
        }
        if let (Step::Collect | Step::Ppo | Step::Evaluate, Some(gold)) = (step, &config.gold) {
            key.config("gold", gold)?;
            if let Some(words) = &gold.words {
                key.file(Path::new(words))?;
            }
        }
        Ok(key.finish())
    }

    /// The files by which a finished step is known.
    fn leaves(&self, step: Step) -> Vec<PathBuf> {
        let out = &self.args.out;
        match step {
            Step::World => vec![self.data_dir().join("prompts.test.jsonl")],
            Step::Tokenizer => vec![self.dir(step).join("tokenizer.json")],
            Step::Collect => {
                let files = PairFiles::in_out(out);
                vec![files.train, files.val]
            }
            Step::Evaluate => vec![out.join("evaluation.json"), out.join("answers.jsonl")],
            stage => vec![self.dir(stage).join("manifest.json")],
        }
    }

    /// Test pairs for the reward model: those the recipe names, or those collected.
    fn test_pairs(&self) -> Option<PathBuf> {
        let config = &self.recipe.config;
        let collected = || {
            let test = PairFiles::in_out(&self.args.out).test;
            config.collect.as_ref().filter(|collect| !collect.test_prompts.as_os_str().is_empty()).map(|_| test)
        };
        config.evaluate.as_ref()?.pairs.clone().or_else(collected)
    }

    /// Forgets the steps after `step`, which is about to be done anew: they stand on what it replaces.
    fn forget_later(&mut self, step: Step) -> Result<()> {
        self.record.steps.retain(|&other, _| other < step);
        for name in ["evaluation.json", "answers.jsonl"] {
            let path = self.args.out.join(name);
            if path.exists() {
                fs::remove_file(&path).with_context(|| format!("failed to remove `{}`", path.display()))?;
            }
        }
        Ok(())
    }

    /// Says on stdout where the report is and how it came out.
    fn say_result(&self) -> Result<()> {
        let mut text = String::new();
        if let Some(evaluation) = Evaluation::read(&self.args.out)? {
            let scores: Vec<String> = Policy::ALL
                .into_iter()
                .filter_map(|policy| Some((policy, evaluation.gold.get(&policy)?)))
                .map(|(policy, gold)| {
                    format!("{} {:.3} (95 % {:.3} to {:.3})", policy.name(), gold.mean, gold.low, gold.high)
                })
                .collect();
            if !scores.is_empty() {
                text = format!("gold score on held-out prompts: {}\n", scores.join(", "));
            }
        }
        let report = self.args.out.join("report.html");
        writeln!(std::io::stdout(), "{text}report: {}", report.display()).context("failed to write the result")
    }

    fn dir(&self, step: Step) -> PathBuf {
        self.args.out.join(step.name())
    }

    fn data_dir(&self) -> PathBuf {
        self.args.out.join("data")
    }

    fn absolute_out(&self) -> Result<PathBuf> {
        std::path::absolute(&self.args.out).context("the working directory is unknown")
    }
}

fn ended(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Finished => "done",
        Outcome::Interrupted => "interrupted and saved",
    }
}

/// What a gold score says, for the report.
fn describe(kind: GoldKind) -> &'static str {
    match kind {
        GoldKind::World => {
            "how well a story does what its request asks, from 0 to 1: the named things appear, the ending has the mood asked \
             for, the story ends, nothing repeats; length is neutral"
        }
        GoldKind::Lexicon => "mean valence of an answer’s words by a list of word ratings",
    }
}

fn rayon_threads(args: &RunArgs) -> usize {
    args.runtime.threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, std::num::NonZeroUsize::get)
}
