//! Flags only.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use common::cli::{RuntimeArgs, StageArgs, at_least_1};

/// Pretrain a GPT on text
#[derive(Debug, Parser)]
#[command(
    name = "pretrain",
    version,
    arg_required_else_help = true,
    after_help = "Example:\n  \
        pretrain tokenizer --config configs/stories/pretrain.toml --data DATA --out runs/tokenizer\n  \
        pretrain train --config configs/stories/pretrain.toml --data DATA --tokenizer runs/tokenizer --out runs/base\n  \
        pretrain eval --checkpoint runs/base --data held-out.txt"
)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `pretrain`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a tokenizer on the config's text
    Tokenizer(TokenizerArgs),
    /// Train a model, from random weights or from a checkpoint
    Train(TrainArgs),
    /// Measure a model's loss on text, or print its logits for given token ids
    Eval(EvalArgs),
}

/// Flags of `pretrain tokenizer`.
#[derive(Debug, Args)]
pub struct TokenizerArgs {
    /// What to do, as TOML
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,

    /// Where the tokenizer goes
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Replace what an earlier run left in --out
    #[arg(long)]
    pub overwrite: bool,

    /// Override one value of the config; VALUE is TOML, or a string (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,

    /// Where the paths of the config that begin with $DATA/ lie [env: KINDLING_DATA]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,

    /// On what to run
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Flags of `pretrain train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Directory of the tokenizer; not needed with --init
    #[arg(long, value_name = "DIR", required_unless_present = "init", conflicts_with = "init")]
    pub tokenizer: Option<PathBuf>,

    /// Checkpoint to go on from with new data, instead of random weights
    #[arg(long, value_name = "DIR")]
    pub init: Option<PathBuf>,

    /// What every stage takes
    #[command(flatten)]
    pub stage: StageArgs,
}

/// Flags of `pretrain eval`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("input").required(true))]
pub struct EvalArgs {
    /// Checkpoint of a language model
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Text to measure the loss on (.txt, .jsonl or .parquet, also .gz)
    #[arg(long, value_name = "FILE", group = "input")]
    pub data: Option<PathBuf>,

    /// A JSON array of arrays of token ids, used as they are
    #[arg(long, value_name = "FILE", group = "input")]
    pub ids: Option<PathBuf>,

    /// Print the logits of every position too
    #[arg(long, requires = "ids", conflicts_with = "data")]
    pub logits: bool,

    /// Rows computed at a time
    #[arg(long, value_name = "N", default_value = "8", value_parser = at_least_1)]
    pub batch_size: NonZeroUsize,

    /// On what to run
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}
