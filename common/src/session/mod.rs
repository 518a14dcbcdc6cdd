//! A training run, the same in every stage: how it is opened, driven, saved, stopped and resumed.
//!
//! A stage gives its configuration ([`load_config`]), what it starts from ([`Plan`]) and one step with an evaluation
//! ([`Training`]); [`Session::start`] opens the run and [`Session::drive`] is the loop.

mod config;
mod contents;
mod resume;
mod together;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use config::{Amount, DataConfig, ModelOverrides, RunConfig, load_config};
pub use contents::{Contents, Exported};
pub use resume::{Restored, gpt_and_optimizer};
pub use together::{run, settings};

use crate::checkpoint::{self, Checkpoint, Manifest, Parent, Snapshot, Stage, State};
use crate::cli::StageArgs;
use crate::config::{Configuration, to_toml};
use crate::data::file_sha256;
use crate::files::write_whole;
use crate::group::{Group, GroupError};
use crate::interrupt::Interrupt;
use crate::metrics::{Recorder, ResumePoint, names};
use crate::model::NamedTensors;
use crate::optim::GradNorm;
use crate::out_dir::{self, OutLock};
use crate::reduce::in_order;
use crate::runtime::Runtime;
use crate::tokenizer::Tokenizer;

/// Steps between two comparisons of the ranks' weights, which are also compared at each save.
const WEIGHTS_CHECKED_EVERY: u64 = 100;

/// Where a run stands, as it is saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Wall time in seconds.
    pub seconds: f64,
    /// Whether the run reached its end.
    pub finished: bool,
    /// The best evaluation so far: its step and value, lower being better.
    pub best: Option<(u64, f64)>,
    /// Evaluations since the best one.
    pub evals_since_best: u64,
    /// Updates made by each optimiser, by the name of its file.
    pub updates: BTreeMap<String, u64>,
    /// The `--set` flags of all calls, which a resumed run goes by too.
    #[serde(default)]
    pub overrides: Vec<String>,
    /// The stage's own state.
    #[serde(default)]
    pub stage: Value,
}

/// The starting point of a run.
#[derive(Debug)]
pub struct Plan<'a, C> {
    /// The stage that is running.
    pub stage: Stage,
    /// The checkpoints it starts from, each with the flag that names it.
    pub parents: &'a [(&'static str, &'a Checkpoint)],
    /// The data files, by their key in the configuration.
    pub data: Vec<(&'static str, &'a [PathBuf])>,
    /// The tokenizer that every model of the run shares.
    pub tokenizer: &'a Tokenizer,
    /// Where the tokenizer was read, unless a parent brought it.
    pub tokenizer_dir: Option<&'a Path>,
    /// The resolved configuration.
    pub config: &'a C,
    /// Its section `[run]`.
    pub run: &'a RunConfig,
    /// The device.
    pub runtime: &'a Runtime,
    /// Optimiser steps in all (PPO: iterations).
    pub total_steps: u64,
    /// The processes that train.
    pub group: &'a Group,
}

/// A model in training, as [`Session::drive`] drives it.
pub trait Training: Sized {
    /// Makes optimiser step `step`; the first is 0.
    ///
    /// # Errors
    /// If the data or the device cannot be read.
    fn step(self, step: u64, recorder: &Recorder) -> anyhow::Result<(Self, Step)>;

    /// Measures the model on held-out data, logs it and calls [`Session::note_evaluation`].
    ///
    /// # Errors
    /// If a number is not finite or cannot be written.
    fn evaluate(&self, session: &mut Session) -> anyhow::Result<()>;

    /// Contents of its checkpoint.
    fn contents(&self) -> Contents<'_>;

    /// Work before the first step of a run that is not resumed.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate).
    fn begin(&self, _session: &mut Session) -> anyhow::Result<()> {
        Ok(())
    }

    /// Looks at the metrics of a step or an evaluation once they are logged; a message ends the run, saved, with that error.
    fn watch(&mut self, _step: u64, _logged: &[(&str, f64)]) -> Option<String> {
        None
    }

    /// Whether [`complete`](Self::complete) does something: then the trained weights are saved before it.
    fn is_incomplete(&self) -> bool {
        false
    }

    /// Work on the model after the last step, such as the normalisation of scores. What was trained is saved, and where
    /// this is interrupted `--resume` goes on from there.
    ///
    /// # Errors
    /// If it cannot be done.
    fn complete(&mut self, _session: &Session) -> anyhow::Result<Outcome> {
        Ok(Outcome::Finished)
    }
}

/// Reads a step's metrics.
pub type ReadMetrics = dyn FnOnce() -> anyhow::Result<Vec<(&'static str, f64)>>;

/// An optimiser step that was made.
pub struct Step {
    /// Tokens it trained on.
    pub tokens: u64,
    /// The norm of its gradient.
    pub grad_norm: GradNorm,
    /// Its metrics. They are asked for where a line is logged: to read them may mean to wait for a GPU.
    pub metrics: Box<ReadMetrics>,
}

impl Step {
    /// Of a language model: `losses` are this rank's parts of the batch's mean loss, each `[1]`.
    pub fn of_lm(group: &Group, tokens: u64, losses: Vec<Tensor<1>>, lr: f64, grad_norm: GradNorm) -> Self {
        let (norm, group) = (grad_norm.clone(), group.clone());
        let metrics = move || {
            let loss = Tensor::cat(in_order(&group, losses)?, 0).sum().into_scalar::<f32>();
            Ok(vec![
                (names::TRAIN_LOSS, f64::from(loss)),
                (names::TRAIN_LR, lr),
                (names::TRAIN_GRAD_NORM, norm.value()),
            ])
        };
        Self { tokens, grad_norm, metrics: Box::new(metrics) }
    }
}

/// A running stage.
#[derive(Debug)]
pub struct Session {
    out: PathBuf,
    run: RunConfig,
    total_steps: u64,
    group: Group,
    interrupt: Interrupt,
    /// The signal that asked to stop, of whichever rank, since the ranks last agreed.
    stops: bool,
    /// Where metrics go.
    pub recorder: Recorder,
    progress: Progress,
    /// Origin of the run, for each of its checkpoints.
    manifest: Manifest,
    /// What adapters stand beside: of the model, and of a value model.
    bases: [Parent; 2],
    tokenizer: Tokenizer,
    config_toml: String,
    /// Of the last step.
    grad_norm: Option<GradNorm>,
    best_weights: Option<NamedTensors>,
    /// Step and time of the last checkpoint, or of the start.
    last_save: (Option<u64>, Instant),
    resumed: bool,
    /// Held until the run ends, by the rank that writes.
    _lock: Option<OutLock>,
}

impl Session {
    /// Prepares `--out`, writes the resolved configuration and, with `--resume`, reads where the run stood.
    ///
    /// Returns the session and, when resuming, what to go on with.
    ///
    /// # Errors
    /// If `--out` is not usable, there is nothing to resume, or the run to resume did not begin as `plan` says.
    pub fn start<C: Configuration>(
        args: &StageArgs,
        plan: &Plan<'_, C>,
        interrupt: Interrupt,
    ) -> anyhow::Result<(Self, Option<Restored>)> {
        let group = plan.group;
        group.set_patience(plan.run.patience());
        let lock = if group.is_first() {
            out_dir::check_exchangeable(&args.out)?;
            Some(OutLock::take(&args.out)?)
        } else {
            None
        };
        let files = plan.data.iter().flat_map(|(_, files)| *files).map(PathBuf::as_path);
        let parents = plan.parents.iter().map(|(_, parent)| parent.dir());
        let inputs: Vec<&Path> = parents.chain(plan.tokenizer_dir).chain(files).collect();
        for (flag, parent) in plan.parents {
            resume::warn_of_unfinished(flag, parent)?;
        }
        let mut data = BTreeMap::new();
        for file in plan.data.iter().flat_map(|(_, files)| *files) {
            data.insert(file.display().to_string(), file_sha256(file)?);
        }
        group.check_same(&together::facts(args, plan, &data)?)?;
        // The others read the checkpoint to resume, and nothing else of what is there.
        if group.is_first() || args.resume {
            args.prepare_out(&inputs)?;
        }
        let config_toml = to_toml(plan.config)?;
        let mut best_weights = None;
        let restored = if args.resume { Some(resume::restore(args, plan, &data)?) } else { None };
        let resumed = restored.is_some();
        let (progress, restored) = if let Some((progress, restored)) = restored {
            together::check_resumed(group, progress.step, restored.checkpoint.manifest())?;
            if plan.run.keep_best && progress.best.is_some() {
                best_weights = Some(restored.checkpoint.named().clone());
            }
            (progress, Some(restored))
        } else {
            if group.is_first() {
                write_whole(&args.out.join(checkpoint::CONFIG_FILE), &config_toml)?;
            }
            (Progress::new(resume::overrides(args)?), None)
        };
        let point = resumed.then_some(ResumePoint { step: progress.step, seconds: progress.seconds });
        let session = Self {
            out: args.out.clone(),
            run: plan.run.clone(),
            total_steps: plan.total_steps,
            group: group.clone(),
            interrupt,
            stops: false,
            recorder: group.first_alone(|| -> anyhow::Result<_> {
                let (steps, tensorboard) = (plan.total_steps, plan.run.tensorboard);
                Ok(Recorder::open_on(group.is_first(), &args.out, steps, point, tensorboard)?)
            })?,
            last_save: (resumed.then_some(progress.step), Instant::now()),
            progress,
            manifest: Manifest {
                parents: plan.parents.iter().map(|(_, parent)| parent.as_parent()).collect(),
                data,
                backend: plan.runtime.label.clone(),
                total_steps: Some(plan.total_steps),
                ..Manifest::new(plan.stage)
            },
            bases: [plan.parents.first(), plan.parents.get(1).or(plan.parents.first())]
                .map(|parent| parent.map(|(_, parent)| parent.base()).unwrap_or_default()),
            tokenizer: plan.tokenizer.clone(),
            config_toml,
            grad_norm: None,
            best_weights,
            resumed,
            _lock: lock,
        };
        Ok((session, restored))
    }

    /// Where the run stands.
    pub const fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The tokenizer of the run.
    pub const fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The processes that train.
    pub const fn group(&self) -> &Group {
        &self.group
    }

    /// Where the run writes to.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Whether the last step is done: the evaluation after it is over all held-out data.
    pub const fn is_last(&self) -> bool {
        self.progress.step == self.total_steps
    }

    /// Trains to the end, or until the user asks to stop; saves along the way and at the end.
    ///
    /// # Errors
    /// If a step fails or its numbers are not finite, or something cannot be written.
    pub fn drive<T: Training>(mut self, mut training: T) -> anyhow::Result<Outcome> {
        if self.progress.finished {
            tracing::info!("`{}` is finished: nothing is left to do", self.out.display());
            return Ok(Outcome::Finished);
        }
        if self.is_to_begin()? {
            training.begin(&mut self)?;
            self.watched(&mut training, &[], true)?;
        }
        self.recorder.begin();
        while self.goes_on()? {
            let step;
            (training, step) = training.step(self.progress.step, &self.recorder)?;
            self.count(step.tokens, step.grad_norm)?;
            if !self.group.is_alone() && self.progress.step.is_multiple_of(WEIGHTS_CHECKED_EVERY) {
                let weights = training.contents().weights.to_trained();
                together::check_weights(&self.group, self.progress.step, &weights)?;
            }
            let logged = if self.logs() { (step.metrics)()? } else { Vec::new() };
            if !logged.is_empty() {
                self.log(&logged)?;
            }
            let evaluates = self.evaluates();
            if evaluates {
                training.evaluate(&mut self)?;
            }
            self.watched(&mut training, &logged, evaluates)?;
            if self.saves()? {
                self.save(training.contents())?;
            }
        }
        if self.was_interrupted() || !training.is_incomplete() {
            let outcome = if self.was_interrupted() { Outcome::Interrupted } else { Outcome::Finished };
            return self.finish(training.contents(), outcome);
        }
        // The rest may fail, and nothing trained is to be lost by that.
        if self.last_save.0 != Some(self.progress.step) {
            self.save(training.contents())?;
        }
        let outcome = if self.stops { Outcome::Interrupted } else { training.complete(&self)? };
        self.finish(training.contents(), outcome)
    }

    /// Whether the work before the first step is to be done: in a run that is not resumed, or was stopped before it.
    fn is_to_begin(&mut self) -> anyhow::Result<bool> {
        let has_begun = self.resumed && (self.progress.step > 0 || !self.recorder.last().is_empty());
        self.stops = self.is_asked_to_stop()?;
        Ok(!has_begun && !self.stops)
    }

    /// Whether the user asked a process of the run to stop. Every process asks.
    ///
    /// # Errors
    /// If one has ended.
    pub fn is_asked_to_stop(&self) -> Result<bool, GroupError> {
        self.interrupt.requested_in(&self.group)
    }

    /// Whether the user asks this process to stop.
    pub const fn interrupt(&self) -> Interrupt {
        self.interrupt
    }

    /// Shows the training what was logged of a step, and of an evaluation after it; saves where that ends the run.
    fn watched<T: Training>(
        &mut self,
        training: &mut T,
        logged: &[(&'static str, f64)],
        evaluated: bool,
    ) -> anyhow::Result<()> {
        let mut seen: Vec<(&str, f64)> = logged.to_vec();
        if evaluated {
            let held_out = self.recorder.last().iter().filter(|(name, _)| name.starts_with("val/"));
            seen.extend(held_out.map(|(name, &value)| (name.as_str(), value)));
        }
        if seen.is_empty() {
            return Ok(());
        }
        let Some(message) = training.watch(self.progress.step, &seen) else { return Ok(()) };
        self.save(training.contents())?;
        bail!(message)
    }

    /// Whether another step should be made. A signal to one rank is a request to all.
    fn goes_on(&mut self) -> anyhow::Result<bool> {
        self.stops = self.is_asked_to_stop()?;
        let stale = self.run.is_stale(self.progress.evals_since_best);
        Ok(self.progress.step < self.total_steps && !stale && !self.stops)
    }

    /// Whether the loop ended because the user asked for it, before all steps were made.
    const fn was_interrupted(&self) -> bool {
        self.stops && self.progress.step < self.total_steps
    }

    /// Counts a step that was made. Where its gradient can only be known by waiting for a GPU, the next line of metrics
    /// or checkpoint looks at it.
    fn count(&mut self, tokens: u64, grad_norm: GradNorm) -> anyhow::Result<()> {
        self.progress.step += 1;
        self.progress.tokens += tokens;
        let is_known = grad_norm.known().is_some();
        self.grad_norm = Some(grad_norm);
        if is_known {
            self.check_gradient()?;
        }
        self.recorder.advance(self.progress.step);
        Ok(())
    }

    /// Checks the last step's gradient; a number that is not finite stays in the weights, so that none is missed.
    fn check_gradient(&self) -> anyhow::Result<()> {
        let norm = self.grad_norm.as_ref().map_or(0.0, GradNorm::value);
        ensure!(
            norm.is_finite(),
            "the gradient became {norm} at step {}; any checkpoint saved before is kept\nhint: lower `optimizer.lr`, lengthen \
             `optimizer.warmup_steps` or lower `optimizer.grad_clip`, and start again",
            self.progress.step
        );
        Ok(())
    }

    /// Whether this step's numbers should be logged.
    const fn logs(&self) -> bool {
        let step = self.progress.step;
        step == 1 || step == self.total_steps || step.is_multiple_of(max_1(self.run.log_every))
    }

    /// Appends a line of metrics for this step.
    ///
    /// # Errors
    /// If the loss among `values` or the gradient is not finite, or the file cannot be written.
    pub fn log(&mut self, values: &[(&str, f64)]) -> anyhow::Result<()> {
        self.check_gradient()?;
        let (step, tokens) = (self.progress.step, self.progress.tokens);
        if let Some((name, value)) = values.iter().find(|(name, value)| name.ends_with("loss") && !value.is_finite()) {
            bail!(
                "`{name}` became {value} at step {step}; any checkpoint saved before is kept\nhint: lower `optimizer.lr` or \
                 lengthen `optimizer.warmup_steps`"
            );
        }
        let mut values = values.to_vec();
        if values.iter().any(|(name, _)| *name == names::TRAIN_LOSS)
            && let Some(rate) = self.recorder.tokens_per_second(tokens)
        {
            values.push((names::TRAIN_TOKENS_PER_SECOND, rate));
        }
        Ok(self.recorder.record(step, tokens, &values)?)
    }

    /// Whether to evaluate after this step.
    const fn evaluates(&self) -> bool {
        let (step, every) = (self.progress.step, self.run.eval_every);
        step == self.total_steps || (every > 0 && step.is_multiple_of(every))
    }

    /// Notes an evaluation; `value` is better when lower. Returns whether it is the best so far.
    pub fn note_evaluation(&mut self, value: f64, weights: Exported<'_>) -> bool {
        self.recorder.restart_clock(self.progress.tokens);
        let better = self.progress.best.is_none_or(|(_, best)| value < best);
        if better {
            self.progress.best = Some((self.progress.step, value));
            self.progress.evals_since_best = 0;
            if self.run.keep_best {
                self.best_weights = Some(weights.to_trained());
            }
        } else {
            self.progress.evals_since_best += 1;
        }
        better
    }

    /// The weights of the best evaluation, where they are kept.
    pub const fn best_weights(&self) -> Option<&NamedTensors> {
        self.best_weights.as_ref()
    }

    /// Whether to save after this step. By the clock of the first rank, where it is a matter of time.
    fn saves(&self) -> anyhow::Result<bool> {
        let (step, every) = (self.progress.step, self.run.save_every);
        let limit = Duration::try_from_secs_f64(self.run.save_every_minutes * 60.0).unwrap_or(Duration::MAX);
        let is_due = self.run.save_every_minutes > 0.0 && self.group.gather(self.last_save.1.elapsed() >= limit)?[0];
        Ok(step < self.total_steps && (is_due || every > 0 && step.is_multiple_of(every)))
    }

    /// Saves everything a resume needs.
    fn save(&mut self, contents: Contents<'_>) -> anyhow::Result<()> {
        self.check_gradient()?;
        let Contents { weights, optimizers, value, stage, average, exported } = contents;
        self.progress.seconds = self.recorder.seconds();
        self.progress.stage = stage;
        self.progress.updates = optimizers.iter().map(|(name, o)| ((*name).to_owned(), o.n_updates())).collect();
        let current = weights.to_trained();
        together::check_weights(&self.group, self.progress.step, &current)?;
        let mut tensors: BTreeMap<String, NamedTensors> = BTreeMap::new();
        for (name, optimizer) in optimizers {
            tensors.insert(name.to_owned(), optimizer.to_named_on_first(&self.group)?);
        }
        self.last_save = (Some(self.progress.step), Instant::now());
        if !self.group.is_first() {
            return Ok(());
        }
        tensors.insert("weights".into(), current.clone());
        tensors.extend(average.map(|average| ("average".into(), average.clone())));
        let current = average.cloned().unwrap_or(current);
        let [base, value_base] = &self.bases;
        let exported = match exported {
            Some(exported) => exported.with(exported.to_trained(), base),
            None => weights.with(self.best_weights.clone().filter(|_| self.run.keep_best).unwrap_or(current), base),
        };
        let snapshot = Snapshot {
            weights: exported,
            manifest: self.manifest(),
            tokenizer: Some(&self.tokenizer),
            config_toml: &self.config_toml,
            value: value.map(|value| Exported::Scalar(value).with(value.to_trained(), value_base)),
            state: Some(State { json: json!(self.progress), tensors }),
        };
        checkpoint::save(&self.out, &snapshot)
            .with_context(|| format!("failed to save the checkpoint of step {}", self.progress.step))?;
        self.recorder.restart_clock(self.progress.tokens);
        self.last_save.1 = Instant::now();
        Ok(())
    }

    /// Saves a last time, as finished or as interrupted, and says so.
    fn finish(mut self, contents: Contents<'_>, outcome: Outcome) -> anyhow::Result<Outcome> {
        let interrupted = outcome == Outcome::Interrupted;
        self.progress.finished = !interrupted;
        self.save(contents)?;
        // What follows the run on another rank finds the checkpoint.
        self.group.wait_for_all()?;
        let (step, out) = (self.progress.step, self.out.display());
        if interrupted {
            tracing::info!("stopped at step {step} of {}; saved in `{out}`", self.total_steps);
        } else {
            tracing::info!("done at step {step}; the checkpoint is in `{out}`");
        }
        self.recorder.finish();
        if !self.group.is_alone() {
            tracing::debug!("{} bytes sent by this process of {}", self.group.bytes_sent(), self.group.size());
        }
        let of_all = self.group.gather(crate::kernels::memory::usage().peak_bytes >> 20)?;
        let of_all: Vec<String> = of_all.iter().map(ToString::to_string).collect();
        tracing::debug!("{} MiB of memory at most", of_all.join(", "));
        Ok(outcome)
    }

    fn manifest(&self) -> Manifest {
        let mut metrics: BTreeMap<String, f64> = self.recorder.last().clone();
        if let Some((step, value)) = self.progress.best {
            metrics.insert("best/step".into(), step as f64);
            metrics.insert("best/value".into(), value);
        }
        Manifest {
            step: self.progress.step,
            tokens: self.progress.tokens,
            finished: Some(self.progress.finished),
            metrics,
            ..self.manifest.clone()
        }
    }
}

impl Progress {
    /// Of a run that has not begun.
    fn new(overrides: Vec<String>) -> Self {
        Self {
            step: 0,
            tokens: 0,
            seconds: 0.0,
            finished: false,
            best: None,
            evals_since_best: 0,
            updates: BTreeMap::new(),
            overrides,
            stage: Value::Null,
        }
    }
}

/// How a stage ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were made, or training stopped early as configured.
    Finished,
    /// The user asked to stop; `--resume` goes on.
    Interrupted,
}

const fn max_1(n: u64) -> u64 {
    if n == 0 { 1 } else { n }
}
