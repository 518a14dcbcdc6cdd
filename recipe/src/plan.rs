//! Before the first step: which steps are done, which go on, and which results would be lost.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Result, bail};

use crate::inputs::{Change, Inputs};
use crate::people::questions_file;
use crate::record::{RunRecord, StepRecord};
use crate::report::duration;
use crate::setup::Setup;
use crate::steps::Step;

/// The work that a step still needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is finished, and nothing it depends on has changed.
    Done,
    /// It was interrupted, and nothing it depends on has changed.
    GoesOn,
    /// It has not run, or has to run again.
    Due,
}

/// A step and what is to be done for it.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedStep {
    /// The step.
    pub step: Step,
    /// Whether this command runs it.
    pub is_wanted: bool,
    /// The work it still needs.
    pub state: State,
    /// Why earlier work would be lost; empty where none would be.
    pub losses: Vec<String>,
    /// Wall seconds of that work.
    pub seconds: f64,
}

/// How a step stands by itself, and why its result is not what it would be now.
///
/// # Errors
/// If an input cannot be read.
pub fn state_of(setup: &Setup, step: Step, old: &StepRecord, now: &Inputs) -> Result<(State, Vec<Change>)> {
    let recovered;
    let inputs = if old.inputs.is_empty() {
        recovered = setup.recovered_inputs(step, now)?;
        &recovered
    } else {
        &old.inputs
    };
    let changes = inputs.changes(now, &Setup::defaults(step)?);
    let is_whole = setup.results(step).iter().all(|path| path.exists());
    let state = match (changes.is_empty(), old.finished) {
        (true, true) if is_whole => State::Done,
        (true, false) if has_checkpoint(setup, step) => State::GoesOn,
        _ => State::Due,
    };
    Ok((state, changes))
}

/// Whether a step that is not finished left what it can go on from: a checkpoint, or questions that people answer.
fn has_checkpoint(setup: &Setup, step: Step) -> bool {
    setup.dir(step).join("manifest.json").is_file() || step == Step::Collect && questions_file(&setup.out).is_file()
}

/// Looks at every step of the recipe before any of them runs; `wanted` are those to run, all if empty.
///
/// # Errors
/// If an input cannot be read.
pub fn plan(setup: &Setup, record: &RunRecord, wanted: &[Step]) -> Result<Vec<PlannedStep>> {
    // Of the steps before: one that has not run, one that will give another result, and whether one runs again only
    // because its files are gone, which gives the same ones.
    let (mut new, mut replaced, mut is_remade) = (None, None, false);
    let mut planned = Vec::new();
    for step in setup.recipe.config.steps() {
        let is_wanted = wanted.is_empty() || wanted.contains(&step);
        let Some(old) = record.steps.get(&step) else {
            new = new.or(is_wanted.then_some(step));
            // Trained by hand into this directory, or by the recipe that this one replaces.
            let is_foreign = is_wanted && step.trains() && has_checkpoint(setup, step);
            let losses = if is_foreign { vec!["it was not trained by this recipe".to_owned()] } else { Vec::new() };
            planned.push(PlannedStep { step, is_wanted, state: State::Due, losses, seconds: 0.0 });
            continue;
        };
        let (mut state, mut changes) = state_of(setup, step, old, &setup.inputs(step)?)?;
        if is_remade {
            changes.retain(|change| !change.is_missing());
        }
        let mut reasons: Vec<String> = changes
            .iter()
            .map(|change| match new {
                Some(new) if change.is_missing() => format!("it depends on `{new}`, which has not run yet"),
                _ => change.to_string(),
            })
            .collect();
        reasons.dedup();
        if let Some(replaced) = replaced {
            reasons.push(format!("it depends on `{replaced}`"));
        }
        if !reasons.is_empty() {
            state = State::Due;
        }
        if is_wanted {
            match (state, reasons.is_empty()) {
                (State::Due, true) if old.finished => is_remade = true,
                // It failed before it saved anything.
                (State::Due, true) => new = new.or(Some(step)),
                (State::Due, false) | (State::GoesOn, _) => replaced = replaced.or(Some(step)),
                (State::Done, _) => {}
            }
        }
        let is_whole = old.finished && setup.results(step).iter().all(|path| path.exists());
        // Stale results were given up before.
        let is_lost = (is_wanted || replaced.is_some()) && !old.stale && (is_whole || has_checkpoint(setup, step));
        let losses = if is_lost { reasons } else { Vec::new() };
        planned.push(PlannedStep { step, is_wanted, state, losses, seconds: old.seconds });
    }
    Ok(planned)
}

/// Refuses to lose finished work that nobody offered up, or with `overwrite` says what is lost.
///
/// # Errors
/// If work would be lost and `overwrite` is not given.
pub fn confirm(planned: &[PlannedStep], out: &Path, overwrite: bool) -> Result<()> {
    let lost: Vec<&PlannedStep> = planned.iter().filter(|planned| !planned.losses.is_empty()).collect();
    if lost.is_empty() {
        return Ok(());
    }
    let mut text = String::new();
    for PlannedStep { step, losses, seconds, .. } in &lost {
        let _ = write!(text, "\n  {step}, {}: {}", duration(*seconds), losses.join("; "));
    }
    let seconds: f64 = lost.iter().map(|planned| planned.seconds).sum();
    if overwrite {
        tracing::info!("running again, as `--overwrite` says:{text}");
        return Ok(());
    }
    bail!(
        "this command would discard {} of work in `{}`:{text}\n\
         hint: pass `--overwrite` to run these steps again, give the settings they were made with, or pass another `--out`",
        duration(seconds),
        out.display()
    );
}
