//! Flags only.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use common::cli::{RuntimeArgs, StageArgs, at_least_1};
use common::score::Ensemble;

use crate::dialect::Dialect;

/// Improve a policy against a reward model by PPO
#[derive(Debug, Parser)]
#[command(
    name = "ppo",
    version,
    arg_required_else_help = true,
    after_help = "Example:\n  \
        ppo train --config configs/stories/ppo.toml --data DATA --policy runs/sft --reward-model runs/rm --out runs/ppo\n  \
        ppo eval --checkpoint runs/ppo --reference runs/sft --reward-model runs/rm --data prompts.jsonl\n  \
        ppo doctor --policy runs/sft --reward-model runs/rm --data prompts.jsonl"
)]
pub struct Cli {
    /// The command
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `ppo`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a policy for higher scores
    Train(TrainArgs),
    /// Compare a policy with its reference on held-out prompts
    Eval(EvalArgs),
    /// Examine what a run would start from, before it starts
    Doctor(DoctorArgs),
    /// List what implementations of PPO do differently, switch by switch, with the line of the source
    Dialects(DialectsArgs),
    /// Compare the equations of training with what the original implementations make of the same numbers
    Oracle(OracleArgs),
}

/// Flags of `ppo oracle`.
#[derive(Debug, Args)]
#[command(after_help = "Exits with 1 if an equation is off.\n\nExample:\n  ppo oracle --dialect trl")]
pub struct OracleArgs {
    /// Only this dialect
    #[arg(long, value_name = "NAME")]
    pub dialect: Option<Dialect>,

    /// Recorded numbers to compare with [default: those in the program]
    #[arg(long, value_name = "FILE")]
    pub vectors: Option<PathBuf>,

    /// Print one JSON object in place of a line an equation
    #[arg(long)]
    pub json: bool,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Flags of `ppo dialects`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ppo dialects --json")]
pub struct DialectsArgs {
    /// Print one JSON object in place of the list
    #[arg(long)]
    pub json: bool,
}

/// Flags of `ppo train`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ppo train --config configs/tiny/ppo.toml --data data/tiny --policy runs/sft --reward-model runs/rm --out runs/ppo\n  \
        ppo train --config configs/tiny/ppo.toml --set train.steps=2 --print-config"
)]
pub struct TrainArgs {
    /// Checkpoint of the initial policy, which is also the reference: stage sft
    #[arg(long, value_name = "DIR")]
    pub policy: PathBuf,

    /// Checkpoint of the reward model, which also initialises the value model; repeated, `ppo.ensemble` says how the scores of all
    /// become one, and the first initialises the value model
    #[arg(long, value_name = "DIR", required = true)]
    pub reward_model: Vec<PathBuf>,

    /// The flags of every training command
    #[command(flatten)]
    pub stage: StageArgs,
}

/// Flags of `ppo eval`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ppo eval --checkpoint runs/ppo --reference runs/sft --reward-model runs/rm --data data/tiny/prompts.test.jsonl"
)]
pub struct EvalArgs {
    /// Checkpoint of the policy
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Checkpoint of the policy to compare with
    #[arg(long, value_name = "DIR")]
    pub reference: PathBuf,

    /// Checkpoint of the reward model; repeated, --ensemble says how the scores of all become one
    #[arg(long, value_name = "DIR", required = true)]
    pub reward_model: Vec<PathBuf>,

    /// How the scores of several reward models become one: mean, worst or mean-less-variance [default: that of the checkpoint's
    /// training, else mean]
    #[arg(long, value_name = "NAME")]
    pub ensemble: Option<Ensemble>,

    /// Prompts (.jsonl, also .gz)
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,

    /// Sampling temperature [default: that of the checkpoint's training, else 1]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f64>,

    /// Maximum tokens per answer [default: that of the checkpoint's training, else 128]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,

    /// Random seed of the samples
    #[arg(long, value_name = "N", default_value = "0")]
    pub seed: u64,

    /// Answers computed at once
    #[arg(long, value_name = "N", default_value = "64", value_parser = at_least_1)]
    pub batch_size: NonZeroUsize,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Flags of `ppo doctor`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exits with 1 if a check fails. Where the files of pairs are not given, those are read that the reward model's own \
        config.toml names.\n\nExample:\n  ppo doctor --config configs/tiny/ppo.toml --policy runs/sft --reward-model runs/rm --data data/tiny/prompts.train.jsonl"
)]
pub struct DoctorArgs {
    /// Checkpoint of the initial policy: stage sft
    #[arg(long, value_name = "DIR")]
    pub policy: PathBuf,

    /// Checkpoint of the reward model
    #[arg(long, value_name = "DIR")]
    pub reward_model: PathBuf,

    /// Prompts of the run (.jsonl, also .gz; repeatable)
    #[arg(long, value_name = "FILE", required = true)]
    pub data: Vec<PathBuf>,

    /// Configuration of the run (TOML) [default: every key's default]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Override a key of the configuration; VALUE is TOML, or else a string (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,

    /// Preference pairs that the reward model was not trained on
    #[arg(long, value_name = "FILE")]
    pub pairs: Option<PathBuf>,

    /// Preference pairs that the reward model was trained on
    #[arg(long, value_name = "FILE")]
    pub train_pairs: Option<PathBuf>,

    /// Print one JSON object in place of a line a check
    #[arg(long)]
    pub json: bool,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}
