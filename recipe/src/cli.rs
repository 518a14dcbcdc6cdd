//! Flags only.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};
use common::cli::RuntimeArgs;

use crate::steps::Step;
use bench::BenchCommand;
use compare::{CompareArgs, ProbeArgs};

/// Run a whole recipe: from text to an aligned chat model
#[derive(Debug, Parser)]
#[command(
    name = "recipe",
    version,
    arg_required_else_help = true,
    after_help = "Example:\n  \
        recipe run configs/tiny --out runs/tiny\n  \
        recipe run configs/stories --data DATA --out runs/stories --set ppo.ppo.kl_coef=0.1\n  \
        recipe world --out data/tiny\n  \
        recipe bench train --size a"
)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `recipe`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run every stage of a recipe in turn, then write report.html and report.json
    Run(RunArgs),
    /// Run a recipe on several backends and compare every level, from single operations to whole curves
    Compare(CompareArgs),
    /// Generate the data of configs/tiny as files
    World(WorldArgs),
    /// Measure the speed of training, decoding or PPO on random weights and tokens: one JSON line
    #[command(subcommand)]
    Bench(BenchCommand),
    /// One backend's part of `compare`
    #[command(hide = true)]
    Probe(ProbeArgs),
}

/// Flags of `recipe run`.
#[derive(Debug, Args)]
#[command(
    after_help = "Everything that can be checked is checked before the first step. Finished steps whose settings and inputs \
        are unchanged are skipped; an interrupted stage goes on where it was saved when the same command is run again. Where a \
        changed setting would discard finished steps, they are listed, and --overwrite is needed.\n\nExample:\n  \
        recipe run configs/tiny --out runs/tiny\n  \
        recipe run configs/tiny --out runs/tiny-7 --seed 7 --stages world,tokenizer,pretrain"
)]
pub struct RunArgs {
    /// Folder of the recipe, or the name of one in configs/; `tiny` is in this program as well
    #[arg(value_name = "RECIPE")]
    pub recipe: String,

    /// Where everything goes: one directory per stage, the data, the report
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Where the paths of the recipe that begin with $DATA/ lie [env: KINDLING_DATA]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,

    /// Seed of all stages, instead of the recipe's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: Option<u64>,

    /// Run these steps only
    #[arg(long, alias = "stage", value_name = "STEPS", value_delimiter = ',')]
    pub stages: Vec<Step>,

    /// Override one value of a stage's config, or of recipe.toml with `recipe.`; VALUE is TOML, or a string (repeatable)
    #[arg(long = "set", value_name = "STAGE.KEY=VALUE")]
    pub overrides: Vec<String>,

    /// Do finished steps anew whose settings or inputs changed, and all that depends on them; or replace the run of another
    /// recipe in --out
    #[arg(long)]
    pub overwrite: bool,

    /// On what to run
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Flags of `recipe world`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  recipe world --out data/tiny --seed 1 --stories 24000")]
pub struct WorldArgs {
    /// Where the files go
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Everything follows from it; that of configs/tiny is 1
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: u64,

    /// Stories to pretrain on; the other files keep their proportion to them
    #[arg(long, value_name = "N")]
    pub stories: Option<usize>,

    /// Replace the files of an earlier world in --out
    #[arg(long)]
    pub overwrite: bool,

    /// Say more (-vv: still more)
    #[arg(short, long, action = ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,

    /// Say nothing but warnings and errors
    #[arg(short, long)]
    pub quiet: bool,
}
