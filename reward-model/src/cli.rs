//! Flags only.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
pub use common::cli::InitArgs as TrainArgs;
use common::cli::{RuntimeArgs, at_least_1};

/// Train a reward model on preference pairs
#[derive(Debug, Parser)]
#[command(
    name = "reward-model",
    version,
    arg_required_else_help = true,
    after_help = "Example:\n  \
        reward-model train --config configs/stories/reward-model.toml --data DATA --init runs/sft --out runs/rm\n  \
        reward-model eval --checkpoint runs/rm --data DATA/stories/prefs.test.jsonl\n  \
        reward-model score --checkpoint runs/rm --data answers.jsonl"
)]
pub struct Cli {
    /// The command
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `reward-model`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train on pairs of a preferred and a rejected answer
    #[command(after_help = "Example:\n  \
        reward-model train --config configs/tiny/reward-model.toml --data data/tiny --init runs/sft --out runs/rm\n  \
        reward-model train --config configs/tiny/reward-model.toml --set train.steps=20 --print-config")]
    Train(TrainArgs),
    /// Measure agreement with the labels of held-out pairs
    Eval(EvalArgs),
    /// Score answers: one line of JSON for each
    Score(ScoreArgs),
}

/// Flags of `reward-model eval`.
#[derive(Debug, Args)]
#[command(
    after_help = "The loss is that of the scores as the checkpoint gives them. Training logs `val/loss` before the scores are \
        normalised, so the two differ.\n\nExample:\n  reward-model eval --checkpoint runs/rm --data data/tiny/prefs.test.jsonl"
)]
pub struct EvalArgs {
    /// Checkpoint of a reward model
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Preference pairs (.jsonl, also .gz)
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,

    /// Answers computed at once
    #[arg(long, value_name = "N", default_value = "32", value_parser = at_least_1)]
    pub batch_size: NonZeroUsize,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Flags of `reward-model score`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("input").required(true))]
#[command(after_help = "Example:\n  reward-model score --checkpoint runs/rm --data answers.jsonl")]
pub struct ScoreArgs {
    /// Checkpoint of a reward model
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Records {prompt, response} or preference pairs (.jsonl, also .gz)
    #[arg(long, value_name = "FILE", group = "input")]
    pub data: Option<PathBuf>,

    /// File of token ids: a JSON array with an array for each sequence
    #[arg(long, value_name = "FILE", group = "input")]
    pub ids: Option<PathBuf>,

    /// Answers computed at once
    #[arg(long, value_name = "N", default_value = "32", value_parser = at_least_1)]
    pub batch_size: NonZeroUsize,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}
