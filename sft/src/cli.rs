//! Flags only.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
pub use common::cli::InitArgs as TrainArgs;
use common::cli::{RuntimeArgs, at_least_1};

/// Fine-tune a language model on conversations
#[derive(Debug, Parser)]
#[command(
    name = "sft",
    version,
    arg_required_else_help = true,
    after_help = "Example:\n  \
        sft train --config configs/stories/sft.toml --data DATA --init runs/base --out runs/sft\n  \
        sft eval --checkpoint runs/sft --data DATA/stories/sft.val.jsonl"
)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `sft`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train on the assistant's side of conversations
    Train(TrainArgs),
    /// Measure a model's loss and accuracy on the assistant's tokens
    Eval(EvalArgs),
}

/// Flags of `sft eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Checkpoint of a language model
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Conversations (.jsonl, also .gz)
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,

    /// Conversations computed at a time
    #[arg(long, value_name = "N", default_value = "32", value_parser = at_least_1)]
    pub batch_size: NonZeroUsize,

    /// On what to run
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}
