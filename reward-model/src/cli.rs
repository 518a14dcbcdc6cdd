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
        reward-model eval --checkpoint runs/rm --data DATA/stories/pairs.test.jsonl\n  \
        reward-model score --checkpoint runs/rm --data answers.jsonl"
)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `reward-model`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train on pairs of a preferred and a rejected answer
    Train(TrainArgs),
    /// Measure how often the model agrees with the labels of held-out pairs
    Eval(EvalArgs),
    /// Score answers, one JSON line each
    Score(ScoreArgs),
}

/// Flags of `reward-model eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Checkpoint of a reward model
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Preference pairs (.jsonl, also .gz)
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,

    /// Answers computed at a time
    #[arg(long, value_name = "N", default_value = "32", value_parser = at_least_1)]
    pub batch_size: NonZeroUsize,

    /// On what to run
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Flags of `reward-model score`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("input").required(true))]
pub struct ScoreArgs {
    /// Checkpoint of a reward model
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Records {prompt, response} or preference pairs (.jsonl, also .gz)
    #[arg(long, value_name = "FILE", group = "input")]
    pub data: Option<PathBuf>,

    /// A JSON array of arrays of token ids, used as they are
    #[arg(long, value_name = "FILE", group = "input")]
    pub ids: Option<PathBuf>,

    /// Answers computed at a time
    #[arg(long, value_name = "N", default_value = "32", value_parser = at_least_1)]
    pub batch_size: NonZeroUsize,

    /// On what to run
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}
