//! A run of several processes: the command that starts one, what must be the same on every rank, and how they agree.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use anyhow::{Context, ensure};

use super::resume::flat;
use super::{Amount, Outcome, Plan};
use crate::checkpoint::Manifest;
use crate::cli::{RuntimeArgs, StageArgs};
use crate::config::{Configuration, to_table};
use crate::exit::say_error;
use crate::group::{Group, GroupError};
use crate::interrupt::{self, Interrupt, Stopped};
use crate::logging::say;
use crate::model::NamedTensors;
use crate::runtime::on_pool;
use crate::view::View;

/// How long a rank that failed waits before it says so: an error that all have is said by the first alone, which ends them.
const FIRST_SPEAKS: Duration = Duration::from_secs(3);

/// The exit code of a program that panicked.
const PANICKED: u8 = 101;

/// Settings that do not have to be the same on every rank, nor in a resumed run: where files lie. Their content is compared.
pub(super) const PLACES: [&str; 4] = ["data.train", "data.val", "ptx.data.train", "ptx.data.val"];

/// Carries out a command that trains: the other processes, logging, threads, signals, the view where it `is_viewed`, and the
/// exit code of a run that was asked to stop, which ends with `advice` on how to go on.
///
/// # Errors
/// As `train`; if the terminal cannot be taken over; [`Stopped`] for a run that was interrupted. In a group an error ends all processes.
pub fn run(
    runtime: &RuntimeArgs,
    is_viewed: bool,
    advice: &str,
    train: impl FnOnce(&Group, Interrupt) -> anyhow::Result<Outcome> + Send,
) -> anyhow::Result<()> {
    let group = Group::join(say_silent)?;
    in_group(&group, || {
        runtime.process.start_on(group.is_first())?;
        let interrupt = Interrupt::install()?;
        let view = (is_viewed && group.is_first()).then(View::open).transpose();
        let view = view.context("failed to take over the terminal")?;
        let outcome = on_pool(|| train(&group, interrupt));
        drop(view);
        match outcome? {
            Outcome::Finished => Ok(()),
            Outcome::Interrupted => {
                tracing::info!("{advice}");
                Err(interrupt.stopped().into())
            }
        }
    })
}

/// Says that a rank does not answer; the exit code.
fn say_silent(error: GroupError) -> u8 {
    interrupt::prepare_exit();
    say_error(&error.into())
}

/// Does `work`, whose failure on this rank ends every rank: the others wait for it, or are about to.
fn in_group(group: &Group, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    if group.is_alone() {
        return work();
    }
    let rank = group.rank();
    let code = match std::panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return Ok(()),
        // All ranks agreed on it.
        Ok(Err(error)) if error.is::<Stopped>() => return Err(error),
        Ok(Err(error)) if group.is_first() => say_error(&error),
        Ok(Err(error)) => {
            std::thread::sleep(FIRST_SPEAKS);
            say_error(&error.context(format!("rank {rank}")))
        }
        Err(_) => {
            say(&format!("error: rank {rank} panicked: see above"));
            PANICKED
        }
    };
    group.abort(code);
    std::process::exit(i32::from(code));
}

impl Amount {
    /// Checks that each of so many ranks has a micro-batch to compute in each step. A key that an error names begins with
    /// `prefix`: a recipe has one of that name for every stage.
    ///
    /// # Errors
    /// If there are fewer micro-batches.
    pub fn check_ranks(&self, ranks: usize, prefix: &str) -> anyhow::Result<()> {
        let (micro, batch_size) = (self.micro(), self.batch_size);
        let n = batch_size / micro;
        let hint = if batch_size < ranks {
            format!("start {batch_size} at most, or choose a larger batch, which is another training")
        } else {
            let most = (1..=batch_size / ranks).rev().find(|&most| batch_size.is_multiple_of(most)).unwrap_or(1);
            let most = if most > 1 { format!("{most} or less") } else { most.to_string() };
            format!(
                "set `{prefix}train.micro_batch_size` to {most}; the sums do not depend on the number of processes, but on this"
            )
        };
        ensure!(
            n >= ranks,
            "a batch of {batch_size} in micro-batches of {micro} is too little for {ranks} processes\nhint: {hint}"
        );
        Ok(())
    }
}

/// What decides a run's result, as names and values that a message can show.
pub(super) fn facts<C: Configuration>(
    args: &StageArgs,
    plan: &Plan<'_, C>,
    data: &BTreeMap<String, String>,
) -> anyhow::Result<Vec<(String, String)>> {
    let mut facts = vec![
        ("the program's version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ("the stage".to_owned(), plan.stage.to_string()),
        ("`--resume`".to_owned(), args.resume.to_string()),
        ("`--backend`".to_owned(), plan.runtime.label.split(':').next().unwrap_or_default().to_owned()),
        ("`--kernels`".to_owned(), format!("{:?}", plan.runtime.kernels).to_lowercase()),
        ("`--precision`".to_owned(), plan.runtime.precision.name().to_owned()),
        ("the number of steps".to_owned(), plan.total_steps.to_string()),
        ("the tokenizer (SHA-256)".to_owned(), plan.tokenizer.sha256()),
    ];
    facts.extend(settings("", plan.config)?);
    for (key, files) in &plan.data {
        for (i, file) in files.iter().enumerate() {
            let hash = data.get(&file.display().to_string()).cloned().unwrap_or_default();
            facts.push((format!("file {} of `{key}` (SHA-256)", i + 1), hash));
        }
    }
    for (flag, parent) in plan.parents {
        facts.push((format!("the weights of `{flag}` (SHA-256)"), parent.as_parent().weights_sha256));
    }
    Ok(facts)
}

/// The settings of a configuration that decide a result, by their keys behind `prefix`.
///
/// # Errors
/// If it cannot be written as TOML.
pub fn settings<C: Configuration>(prefix: &str, config: &C) -> anyhow::Result<Vec<(String, String)>> {
    let all = flat(&to_table(config)?).into_iter().filter(|(key, _)| !PLACES.contains(&key.as_str()));
    Ok(all.map(|(key, value)| (format!("`{prefix}{key}`"), value.to_string())).collect())
}

/// Checks that every rank resumes from the same checkpoint.
///
/// # Errors
/// Naming the first rank that does not.
pub(super) fn check_resumed(group: &Group, step: u64, manifest: Option<&Manifest>) -> Result<(), GroupError> {
    let weights = manifest.map_or_else(String::new, |manifest| manifest.weights_sha256.clone());
    group.check_same(&[
        ("the step of the checkpoint in `--out`".to_owned(), step.to_string()),
        ("the weights of the checkpoint in `--out` (SHA-256)".to_owned(), weights),
    ])
}

/// Checks that every rank has the same weights, to the bit.
///
/// # Errors
/// Naming the first rank that has others.
pub(super) fn check_weights(group: &Group, step: u64, weights: &NamedTensors) -> Result<(), GroupError> {
    if group.is_alone() {
        return Ok(());
    }
    let own = ("the weights".to_owned(), format!("{:016x}", checksum(weights)));
    group.check_same(&[own]).map_err(|error| match error {
        GroupError::Differ { rank, there, at_first, .. } => GroupError::Diverged { rank, step, there, at_first },
        other => other,
    })
}

/// FNV-1a over the bits of all numbers, a number at a time.
fn checksum(weights: &NamedTensors) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    let numbers = weights.values().flat_map(|tensor| &tensor.data);
    numbers.fold(OFFSET, |hash, number| (hash ^ u64::from(number.to_bits())).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::threads;
    use crate::model::HostTensor;

    #[test]
    fn more_processes_than_micro_batches_are_refused_with_a_size_that_fits() {
        let amount = Amount { epochs: None, steps: Some(1), batch_size: 8, micro_batch_size: Some(4) };
        let says = amount.check_ranks(3, "").expect_err("two micro-batches for three").to_string();
        assert!(says.contains("too little for 3 processes") && says.contains("to 2 or less"), "{says}");
        assert!(amount.check_ranks(2, "").is_ok());
        let amount = Amount { batch_size: 32, micro_batch_size: None, ..amount };
        let says = amount.check_ranks(3, "").expect_err("one micro-batch for three").to_string();
        assert!(says.contains("to 8 or less"), "10 does not divide the batch: {says}");
        let amount = Amount { batch_size: 8, ..amount };
        let says = amount.check_ranks(9, "").expect_err("two micro-batches for nine").to_string();
        assert!(says.ends_with("hint: start 8 at most, or choose a larger batch, which is another training"), "{says}");
    }

    #[test]
    fn weights_that_differ_in_a_bit_are_noticed() {
        let checked = |differs: bool| {
            threads(3, |group| {
                let mut data = vec![0.5_f32; 6];
                if differs && group.rank() == 1 {
                    data[3] = f32::from_bits(data[3].to_bits() + 1);
                }
                let weights = NamedTensors::from([("w".to_owned(), HostTensor { shape: vec![6], data })]);
                check_weights(&group, 4, &weights).map_err(|error| error.to_string())
            })
        };
        assert!(checked(false).iter().all(Result::is_ok));
        for says in checked(true) {
            let says = says.expect_err("rank 1 differs");
            assert!(says.starts_with("rank 1 differs from rank 0: the checksum of the weights after step 4"), "{says}");
        }
    }
}
