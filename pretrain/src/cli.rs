//! Flags only.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use common::cli::{ProcessArgs, RuntimeArgs, StageArgs, at_least_1, print_config_flag};

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
    /// The command
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `pretrain`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a tokenizer on the text of the configuration
    Tokenizer(TokenizerArgs),
    /// Train a model, from random weights or from a checkpoint
    Train(TrainArgs),
    /// Measure a model's loss on text, or print its logits for given token ids
    Eval(EvalArgs),
}

/// Flags of `pretrain tokenizer`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  pretrain tokenizer --config configs/tiny/pretrain.toml --data data/tiny --out runs/tokenizer",
    arg(print_config_flag())
)]
pub struct TokenizerArgs {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,

    /// Directory for the tokenizer
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Replace an earlier tokenizer in --out
    #[arg(long)]
    pub overwrite: bool,

    /// Override a key of the configuration; VALUE is TOML, or else a string (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,

    /// Folder that $DATA/ stands for in the paths of the configuration [env: KINDLING_DATA]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,

    /// Threads and verbosity
    #[command(flatten)]
    pub process: ProcessArgs,
}

/// Flags of `pretrain train`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  pretrain train --config configs/tiny/pretrain.toml --data data/tiny --tokenizer runs/tokenizer --out runs/base\n  \
        pretrain train --config configs/tiny/pretrain.toml --set train.steps=20 --print-config"
)]
pub struct TrainArgs {
    /// Directory of the tokenizer; not needed with --init
    #[arg(long, value_name = "DIR", required_unless_present_any = ["init", "print_config"], conflicts_with = "init")]
    pub tokenizer: Option<PathBuf>,

    /// Checkpoint to start from, instead of random weights
    #[arg(long, value_name = "DIR")]
    pub init: Option<PathBuf>,

    /// The flags of every training command
    #[command(flatten)]
    pub stage: StageArgs,
}

/// Flags of `pretrain eval`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("input").required(true))]
#[command(after_help = "Example:\n  pretrain eval --checkpoint runs/base --data data/tiny/pretrain.val.txt\n  \
        pretrain eval --checkpoint runs/base --ids ids.json --logits")]
pub struct EvalArgs {
    /// Checkpoint of a language model
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,

    /// Text file (.txt, .jsonl or .parquet, also .gz)
    #[arg(long, value_name = "FILE", group = "input")]
    pub data: Option<PathBuf>,

    /// File of token ids: a JSON array with an array for each sequence
    #[arg(long, value_name = "FILE", group = "input")]
    pub ids: Option<PathBuf>,

    /// Print the logits of every position as well
    #[arg(long, requires = "ids", conflicts_with = "data")]
    pub logits: bool,

    /// Sequences computed at once
    #[arg(long, value_name = "N", default_value = "8", value_parser = at_least_1)]
    pub batch_size: NonZeroUsize,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}
