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
    /// The command
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `sft`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train on the assistant's side of conversations
    #[command(
        after_help = "Example:\n  sft train --config configs/tiny/sft.toml --data data/tiny --init runs/base --out runs/sft\n  \
        sft train --config configs/tiny/sft.toml --set train.steps=20 --print-config"
    )]
    Train(TrainArgs),
    /// Measure loss and accuracy on the assistant's tokens
    Eval(EvalArgs),
}

/// Flags of `sft eval`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sft eval --checkpoint runs/sft --data data/tiny/sft.val.jsonl")]
pub struct EvalArgs {
    /// Checkpoint of a language model
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Conversations (.jsonl, also .gz)
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,

    /// Conversations computed at once
    #[arg(long, value_name = "N", default_value = "32", value_parser = at_least_1)]
    pub batch_size: NonZeroUsize,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}
