//! Flags only.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use common::cli::{RuntimeArgs, StageArgs, at_least_1};

/// Train a policy on preference pairs by DPO, without a reward model
#[derive(Debug, Parser)]
#[command(
    name = "dpo",
    version,
    arg_required_else_help = true,
    after_help = "Example:\n  \
        dpo train --config configs/tiny/dpo.toml --data data/tiny --init runs/sft --out runs/dpo\n  \
        dpo eval --checkpoint runs/dpo --reference runs/sft --data data/tiny/prefs.test.jsonl"
)]
pub struct Cli {
    /// The command
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `dpo`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train on pairs of a preferred and a rejected answer
    Train(TrainArgs),
    /// Measure the implicit reward of a policy on held-out pairs
    Eval(EvalArgs),
}

/// Flags of `dpo train`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  dpo train --config configs/tiny/dpo.toml --data data/tiny --init runs/sft --out runs/dpo\n  \
        dpo train --config configs/tiny/dpo.toml --set train.steps=20 --print-config"
)]
pub struct TrainArgs {
    /// Checkpoint of the initial policy, which is also the reference: stage sft or dpo, or a Hugging Face directory
    #[arg(long, value_name = "DIR")]
    pub init: PathBuf,

    /// The flags of every training command
    #[command(flatten)]
    pub stage: StageArgs,
}

/// Flags of `dpo eval`.
#[derive(Debug, Args)]
#[command(
    after_help = "Loss and β are those of the checkpoint's training, or the defaults for a checkpoint of another stage.\n\n\
        Example:\n  dpo eval --checkpoint runs/dpo --reference runs/sft --data data/tiny/prefs.test.jsonl"
)]
pub struct EvalArgs {
    /// Checkpoint of the policy
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Checkpoint of the policy that the reward is measured from
    #[arg(long, value_name = "DIR")]
    pub reference: PathBuf,

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
