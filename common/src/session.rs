//! One training run's bookkeeping, the same in every stage: when to log, evaluate, save and stop; the best weights so
//! far; what a checkpoint of this run holds.
//!
//! A stage's `train.rs` keeps the loop itself; this module keeps what would otherwise be four copies of everything
//! around it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint::{self, Checkpoint, Manifest, Parent, Snapshot, Stage, State, Weights};
use crate::cli::StageArgs;
use crate::interrupt::Interrupt;
use crate::metrics::{Recorder, ResumePoint, names};
use crate::model::{Gpt, NamedTensors, ScalarGpt};
use crate::optim::{AdamW, GradNorm, OptimizerConfig};
use crate::runtime::Runtime;
use crate::tokenizer::Tokenizer;

/// The part of a stage's `[train]` section that says how often things happen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cadence {
    /// Steps between lines of metrics.
    pub log_every: u64,
    /// Steps between evaluations on held-out data; 0 for none but the last.
    pub eval_every: u64,
    /// Steps between checkpoints; 0 for none but the last.
    pub save_every: u64,
    /// Whether the exported weights are those of the best evaluation, not the last.
    pub keep_best: bool,
    /// Evaluations without a new best after which training stops; 0 for never.
    pub patience: u64,
}

impl Default for Cadence {
    fn default() -> Self {
        Self { log_every: 10, eval_every: 100, save_every: 500, keep_best: false, patience: 0 }
    }
}

/// Where an interrupted run stood.
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
    /// What the stage itself has to remember.
    #[serde(default)]
    pub stage: Value,
}

/// What a checkpoint says about where it came from.
#[derive(Debug)]
pub struct Origin {
    /// The stage that is running.
    pub stage: Stage,
    /// The checkpoints it started from.
    pub parents: Vec<Parent>,
    /// SHA-256 of each data file, by its name in the configuration.
    pub data: BTreeMap<String, String>,
    /// The tokenizer that every model of the run shares.
    pub tokenizer: Tokenizer,
    /// The resolved configuration.
    pub config_toml: String,
    /// The device, as given and found.
    pub backend: String,
}

/// The model whose weights a checkpoint exports.
#[derive(Debug, Clone, Copy)]
pub enum Exported<'a> {
    /// A language model.
    Lm(&'a Gpt),
    /// A reward model.
    Scalar(&'a ScalarGpt),
}

/// What else goes into a checkpoint.
#[derive(Debug, Default)]
pub struct Extras<'a> {
    /// The value model, saved beside the policy.
    pub value: Option<&'a ScalarGpt>,
    /// What the stage itself has to remember.
    pub stage: Value,
    /// What to export in place of the trained weights, such as a reward model whose scores were normalised.
    pub exported: Option<Exported<'a>>,
}

/// What a resumed run goes on with.
#[derive(Debug)]
pub struct Restored {
    /// The checkpoint itself.
    pub checkpoint: Checkpoint,
    tensors: BTreeMap<String, NamedTensors>,
    updates: BTreeMap<String, u64>,
}

impl Restored {
    /// Takes the tensors saved as `state/<name>.safetensors`; the trained weights are `weights`.
    ///
    /// # Errors
    /// If the checkpoint has none of that name.
    pub fn tensors(&mut self, name: &str) -> anyhow::Result<NamedTensors> {
        self.tensors.remove(name).with_context(|| format!("the checkpoint lacks `state/{name}.safetensors`"))
    }

    /// The optimiser saved under `name`.
    ///
    /// # Errors
    /// If the checkpoint has no such optimiser or its moments do not pair up.
    pub fn optimizer(&mut self, name: &str, config: &OptimizerConfig, runtime: &Runtime) -> anyhow::Result<AdamW> {
        let n_updates = *self.updates.get(name).with_context(|| format!("the checkpoint lacks optimiser `{name}`"))?;
        let device = runtime.device.clone().inner();
        let optimizer = AdamW::from_named(config, runtime.kernels, n_updates, self.tensors(name)?, &device)?;
        Ok(optimizer.with_precision(runtime.precision))
    }
}

/// A running stage.
#[derive(Debug)]
pub struct Session {
    out: PathBuf,
    origin: Origin,
    cadence: Cadence,
    total_steps: u64,
    interrupt: Interrupt,
    /// Where metrics go.
    pub recorder: Recorder,
    progress: Progress,
    /// Of the last step.
    grad_norm: Option<GradNorm>,
    best_weights: Option<NamedTensors>,
}

impl Session {
    /// Prepares `--out`, writes the resolved configuration and, with `--resume`, reads where the run stood.
    ///
    /// Returns the session and, when resuming, what to go on with.
    ///
    /// # Errors
    /// If `--out` is not usable, or there is nothing to resume.
    pub fn start(
        args: &StageArgs,
        origin: Origin,
        cadence: &Cadence,
        total_steps: u64,
        interrupt: Interrupt,
    ) -> anyhow::Result<(Self, Option<Restored>)> {
        let inputs: Vec<&Path> = origin.parents.iter().map(|parent| parent.path.as_path()).collect();
        args.prepare_out(&inputs)?;
        let resumed = if args.resume { Some(open_own(&args.out, &origin)?) } else { None };
        let mut progress = Progress {
            step: 0,
            tokens: 0,
            seconds: 0.0,
            finished: false,
            best: None,
            evals_since_best: 0,
            updates: BTreeMap::new(),
            stage: Value::Null,
        };
        let mut best_weights = None;
        let mut restored = None;
        if let Some(checkpoint) = resumed {
            let state = checkpoint.state().context("failed to read what `--resume` needs")?;
            progress = serde_json::from_value(state.json).context("`state/state.json` does not fit this program")?;
            // A longer schedule than the saved one makes a finished run go on.
            progress.finished &= progress.step >= total_steps;
            if cadence.keep_best && progress.best.is_some() {
                best_weights = Some(checkpoint.named().clone());
            }
            tracing::info!("going on from step {} of {total_steps}", progress.step);
            let updates = progress.updates.clone();
            restored = Some(Restored { checkpoint, tensors: state.tensors, updates });
        }
        let config_path = args.out.join("config.toml");
        std::fs::write(&config_path, &origin.config_toml)
            .with_context(|| format!("failed to write `{}`", config_path.display()))?;
        let point = restored.as_ref().map(|_| ResumePoint { step: progress.step, seconds: progress.seconds });
        let recorder = Recorder::open(&args.out, total_steps, point)?;
        let session = Self {
            out: args.out.clone(),
            origin,
            cadence: cadence.clone(),
            total_steps,
            interrupt,
            recorder,
            progress,
            grad_norm: None,
            best_weights,
        };
        Ok((session, restored))
    }

    /// Where the run stands.
    pub const fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The tokenizer of the run.
    pub const fn tokenizer(&self) -> &Tokenizer {
        &self.origin.tokenizer
    }

    /// Where the run writes to.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Number of steps the run is planned for.
    pub const fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Whether another step should be made.
    pub fn goes_on(&self) -> bool {
        let patience = self.cadence.patience;
        let stale = patience > 0 && self.progress.evals_since_best >= patience;
        !self.progress.finished && self.progress.step < self.total_steps && !stale && !self.interrupt.requested()
    }

    /// Whether the loop ended because the user asked for it, before all steps were made.
    pub fn was_interrupted(&self) -> bool {
        self.interrupt.requested() && self.progress.step < self.total_steps
    }

    /// Counts a step that was made.
    ///
    /// # Errors
    /// If its gradient is known not to be finite: the run stops, the last checkpoint stands. Where that would mean to
    /// wait for a GPU, the next [`log`](Self::log) or [`save`](Self::save) looks.
    pub fn count_step(&mut self, tokens: u64, grad_norm: GradNorm) -> anyhow::Result<()> {
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
            "the gradient became {norm} at step {}; the last checkpoint is kept\nhint: lower `optimizer.lr`, \
             lengthen `optimizer.warmup_steps` or lower `optimizer.grad_clip`, then train again or `--resume`",
            self.progress.step
        );
        Ok(())
    }

    /// Whether this step's numbers should be logged.
    pub const fn logs(&self) -> bool {
        let step = self.progress.step;
        step == 1 || step == self.total_steps || step.is_multiple_of(max_1(self.cadence.log_every))
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
                "`{name}` became {value} at step {step}; the last checkpoint is kept\nhint: lower `optimizer.lr` or \
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
    pub const fn evaluates(&self) -> bool {
        let (step, every) = (self.progress.step, self.cadence.eval_every);
        step == self.total_steps || (every > 0 && step % every == 0)
    }

    /// Notes an evaluation; `value` is better when lower. Returns whether it is the best so far.
    pub fn note_evaluation(&mut self, value: f64, weights: Exported<'_>) -> bool {
        self.recorder.restart_clock(self.progress.tokens);
        let better = self.progress.best.is_none_or(|(_, best)| value < best);
        if better {
            self.progress.best = Some((self.progress.step, value));
            self.progress.evals_since_best = 0;
            if self.cadence.keep_best {
                self.best_weights = Some(weights.to_named());
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

    /// Whether to save after this step.
    pub const fn saves(&self) -> bool {
        let (step, every) = (self.progress.step, self.cadence.save_every);
        every > 0 && step % every == 0 && step < self.total_steps
    }

    /// Saves everything a resume needs; `optimizers` by the name of their file.
    ///
    /// # Errors
    /// If the gradient is not finite or the checkpoint cannot be written; the last one then still stands.
    pub fn save(
        &mut self,
        weights: Exported<'_>,
        optimizers: &[(&str, &AdamW)],
        extras: Extras<'_>,
    ) -> anyhow::Result<()> {
        self.check_gradient()?;
        self.progress.seconds = self.recorder.seconds();
        self.progress.stage = extras.stage;
        self.progress.updates = optimizers.iter().map(|(name, o)| ((*name).to_owned(), o.n_updates())).collect();
        let mut tensors: BTreeMap<String, NamedTensors> =
            optimizers.iter().map(|(name, o)| ((*name).to_owned(), o.to_named())).collect();
        let current = weights.to_named();
        tensors.insert("weights".into(), current.clone());
        let exported = match extras.exported {
            Some(exported) => exported.with(exported.to_named()),
            None => weights.with(if self.cadence.keep_best {
                self.best_weights.clone().unwrap_or(current)
            } else {
                current
            }),
        };
        let manifest = self.manifest();
        let snapshot = Snapshot {
            weights: exported,
            manifest,
            tokenizer: Some(&self.origin.tokenizer),
            config_toml: &self.origin.config_toml,
            value: extras.value.map(|value| Exported::Scalar(value).with(value.to_named())),
            state: Some(State { json: json!(self.progress), tensors }),
        };
        checkpoint::save(&self.out, &snapshot)
            .with_context(|| format!("failed to save the checkpoint of step {}", self.progress.step))?;
        self.recorder.restart_clock(self.progress.tokens);
        Ok(())
    }

    /// Saves a last time, as finished or as interrupted, and says so.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn finish(
        mut self,
        weights: Exported<'_>,
        optimizers: &[(&str, &AdamW)],
        extras: Extras<'_>,
    ) -> anyhow::Result<Outcome> {
        let interrupted = self.was_interrupted();
        self.progress.finished = !interrupted;
        self.save(weights, optimizers, extras)?;
        let (step, out) = (self.progress.step, self.out.display());
        if interrupted {
            tracing::info!("stopped at step {step} of {}; saved in `{out}`; go on with `--resume`", self.total_steps);
        } else {
            tracing::info!("done at step {step}; the checkpoint is in `{out}`");
        }
        self.recorder.finish();
        Ok(if interrupted { Outcome::Interrupted } else { Outcome::Finished })
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
            parents: self.origin.parents.clone(),
            data: self.origin.data.clone(),
            backend: self.origin.backend.clone(),
            metrics,
            ..Manifest::new(self.origin.stage)
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

impl Exported<'_> {
    fn to_named(self) -> NamedTensors {
        match self {
            Self::Lm(gpt) => gpt.to_named(),
            Self::Scalar(scalar) => scalar.to_named(),
        }
    }

    fn with(&self, named: NamedTensors) -> Weights {
        match self {
            Self::Lm(gpt) => Weights::Lm { named, config: gpt.config().clone() },
            Self::Scalar(scalar) => {
                Weights::Scalar { named, config: scalar.config().clone(), score_bias: scalar.score_bias() }
            }
        }
    }
}

/// Opens the checkpoint to go on from and checks that it is this stage's, with this tokenizer.
fn open_own(out: &Path, origin: &Origin) -> anyhow::Result<Checkpoint> {
    let checkpoint = Checkpoint::open(out).context("failed to resume")?;
    checkpoint.expect_stage(&[origin.stage]).context("failed to resume")?;
    if let Some(tokenizer) = checkpoint.tokenizer() {
        ensure!(
            tokenizer.sha256() == origin.tokenizer.sha256(),
            "failed to resume: `{}` was trained with another tokenizer",
            out.display()
        );
    }
    Ok(checkpoint)
}

const fn max_1(n: u64) -> u64 {
    if n == 0 { 1 } else { n }
}
