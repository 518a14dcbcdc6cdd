//! Flags only.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{ArgAction, Args, Parser, Subcommand};
use common::cli::{RuntimeArgs, at_least_1};

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
    /// The command
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `recipe`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run every stage of a recipe in turn, then write report.html and report.json
    Run(RunArgs),
    /// Print how much memory each stage of a recipe will need, and whether this machine has it
    Plan(PlanArgs),
    /// Write a small recipe for your own files
    New(NewArgs),
    /// Run a recipe on several backends and compare every level, from single operations to whole curves
    Compare(CompareArgs),
    /// Write the report of a run, of a single stage's directory, or of several side by side
    Report(ReportArgs),
    /// Let two checkpoints answer the same prompts and print how often the first one's answer is the better
    Duel(DuelArgs),
    /// Measure how far best-of-n, PPO, RLOO and DPO can be driven before the gold score falls
    Overoptimise(OveroptimiseArgs),
    /// Generate the data of configs/tiny as files
    World(WorldArgs),
    /// Measure the speed of training, decoding or PPO with random weights and tokens: one line of JSON
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
        are unchanged are skipped; an interrupted stage continues where it was saved when the same command is run again. Where a \
        changed setting would discard finished steps, they are listed, and --overwrite is needed.\n\nExample:\n  \
        recipe run configs/tiny --out runs/tiny\n  \
        recipe run configs/tiny --out runs/tiny-7 --seed 7 --stages world,tokenizer,pretrain\n  \
        recipe run configs/tiny --set sft.train.steps=20 --print-config"
)]
pub struct RunArgs {
    /// Folder of the recipe, or the name of one in configs/; `tiny` is in this program as well
    #[arg(value_name = "RECIPE")]
    pub recipe: String,

    /// Directory for everything: one directory for each stage, the data, the report
    #[arg(
        long,
        value_name = "DIR",
        required = false,
        required_unless_present = "print_config",
        default_value_if("print_config", "true", "DIR"),
        hide_default_value = true
    )]
    pub out: PathBuf,

    /// Folder that $DATA/ stands for in the paths of the recipe [env: KINDLING_DATA]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,

    /// Random seed of all stages, instead of the recipe's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: Option<u64>,

    /// Run these steps only
    #[arg(long, alias = "stage", value_name = "STEPS", value_delimiter = ',')]
    pub stages: Vec<Step>,

    /// Changes to the recipe's files
    #[command(flatten)]
    pub changes: ChangeArgs,

    /// Run finished steps again whose settings or inputs changed, and all that depends on them; or replace the run of another
    /// recipe in --out
    #[arg(long)]
    pub overwrite: bool,

    /// Show the run on the whole terminal: curves, samples, speed, memory, time left; q leaves the view and lets the run go on
    #[arg(long)]
    pub tui: bool,

    /// Print every configuration of the recipe with defaults and comments, then exit; no other flag is needed
    #[arg(long)]
    pub print_config: bool,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Flags of `recipe plan`.
#[derive(Debug, Args)]
#[command(
    after_help = "Nothing is trained or written. Lengths of conversations, pairs and prompts are counted where data and tokenizer \
        are there already; otherwise each is taken to be as long as the model's context.\n\nExample:\n  \
        recipe plan configs/tiny\n  \
        recipe plan configs/smollm2 --data DATA --init models/SmolLM2-135M-Instruct\n  \
        recipe plan configs/stories --data DATA --set sft.train.micro_batch_size=4 --set sft.train.checkpoint_activations=true\n  \
        recipe plan configs/stories --data DATA --ranks 2 --set pretrain.train.micro_batch_size=8 --set pretrain.train.shard_optimizer=true"
)]
pub struct PlanArgs {
    /// Folder of the recipe, or the name of one in configs/; `tiny` is in this program as well
    #[arg(value_name = "RECIPE")]
    pub recipe: String,

    /// Directory of a run of the recipe, whose tokenizer and generated data are used
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Folder that $DATA/ stands for in the paths of the recipe [env: KINDLING_DATA]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,

    /// Changes to the recipe's files
    #[command(flatten)]
    pub changes: ChangeArgs,

    /// Number of processes that are to train together on this machine, as `mpirun -n N` starts them
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_least_1)]
    pub ranks: NonZeroUsize,

    /// Print one JSON object, in whole bytes; docs/memory.md explains its keys
    #[arg(long)]
    pub json: bool,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Flags of `recipe overoptimise`.
#[derive(Debug, Args)]
#[command(
    after_help = "Needs `[overoptimise]` in recipe.toml. The recipe's steps up to its pairs are run first, or taken from an earlier run \
        in --out. Then reward models and policies are trained in OUT/overoptimise, one after the other; what is done is kept, and the same \
        command goes on after an interruption. The whole of configs/tiny takes a night, --quick ten minutes on two cores.\n\nExample:\n  \
        recipe overoptimise configs/tiny --out runs/tiny --quick\n  \
        recipe overoptimise configs/tiny --out runs/tiny"
)]
pub struct OveroptimiseArgs {
    /// Folder of the recipe, or the name of one in configs/; `tiny` is in this program as well
    #[arg(value_name = "RECIPE")]
    pub recipe: String,

    /// Directory for everything, which may hold a run of the recipe; the results are overoptimise.json and overoptimise.html
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// One seed, fewer answers and reward models, and of every method its first setting
    #[arg(long)]
    pub quick: bool,

    /// Folder that $DATA/ stands for in the paths of the recipe [env: KINDLING_DATA]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,

    /// Random seed of the recipe's steps, instead of the recipe's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: Option<u64>,

    /// Changes to the recipe's files
    #[command(flatten)]
    pub changes: ChangeArgs,

    /// Do finished work again whose settings or inputs changed
    #[arg(long)]
    pub overwrite: bool,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Flags of `recipe report`.
#[derive(Debug, Args)]
#[command(
    after_help = "Each DIR is the --out of a training command or of a recipe. Several are compared stage by stage: curves, settings \
        that differ, last numbers, samples. A run that goes on is reported as far as it is.\n\nExample:\n  \
        recipe report runs/hand/sft --out sft.html\n  \
        recipe report runs/tiny runs/tiny-7 --out seeds.html\n  \
        recipe report runs/ppo runs/ppo-low-lr runs/ppo-rloo --out ppo.html"
)]
pub struct ReportArgs {
    /// Directories of runs, at most eight
    #[arg(value_name = "DIR", required = true, num_args = 1..=8)]
    pub dirs: Vec<PathBuf>,

    /// File for the page (.html); an earlier report there is replaced
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// Flags of `recipe duel`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("judge").required(true))]
#[command(
    after_help = "Both answer with the same random numbers. Printed is one JSON object: win_rate of A, a tie counting half, with wins and ties; \
        score_a and score_b, the judge's mean scores; difference, the mean of A's less B's, prompt by prompt; each with its 95 % interval; and the \
        number of prompts that were judged.\n\nExample:\n  \
        recipe duel runs/tiny/ppo runs/tiny/dpo --prompts runs/tiny/data/prompts.test.jsonl --gold\n  \
        recipe duel runs/ppo runs/sft --prompts prompts.jsonl --reward-model runs/rm --n-prompts 200"
)]
pub struct DuelArgs {
    /// Checkpoint of a language model
    #[arg(value_name = "A")]
    pub a: PathBuf,

    /// Checkpoint of another one
    #[arg(value_name = "B")]
    pub b: PathBuf,

    /// Prompts that both answer (.jsonl, also .gz)
    #[arg(long, value_name = "FILE")]
    pub prompts: PathBuf,

    /// Use the first N prompts [default: all]
    #[arg(long, value_name = "N", value_parser = at_least_1)]
    pub n_prompts: Option<NonZeroUsize>,

    /// Judge by the score of this reward model
    #[arg(long, value_name = "DIR", group = "judge")]
    pub reward_model: Option<PathBuf>,

    /// Judge by the gold score of the generated world; prompts that ask for none of its stories are left out
    #[arg(long, group = "judge")]
    pub gold: bool,

    /// Sampling temperature; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value = "1", value_parser = temperature, allow_negative_numbers = true)]
    pub temperature: f64,

    /// Maximum tokens per answer
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least_1)]
    pub max_tokens: NonZeroUsize,

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

/// Flags of `recipe new`.
#[derive(Debug, Args)]
#[command(
    after_help = "A stage whose file is not given is left out. A pattern such as 'texts/*.txt' names several files. All are read and \
        checked first. Of conversations, pairs and prompts every twentieth is held out for evaluation.\n\nExample:\n  \
        recipe new my-recipe --text book.txt --sft answers.jsonl\n  \
        recipe new my-recipe --text book.txt --sft answers.jsonl --pairs preferences.jsonl --prompts prompts.jsonl"
)]
pub struct NewArgs {
    /// Folder of the new recipe
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,

    /// Text to pretrain on (.txt, .jsonl or .parquet, also .gz)
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,

    /// Conversations to fine-tune on (.jsonl, also .gz)
    #[arg(long, value_name = "FILE")]
    pub sft: Option<PathBuf>,

    /// Preference pairs for the reward model (.jsonl, also .gz)
    #[arg(long, value_name = "FILE")]
    pub pairs: Option<PathBuf>,

    /// Prompts for PPO (.jsonl, also .gz)
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,

    /// Model to start from instead of pretraining one: a checkpoint or a Hugging Face directory
    #[arg(long, value_name = "DIR", conflicts_with = "text")]
    pub init: Option<PathBuf>,
}

/// Flags that change what the recipe's files say.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    /// Model to start from, a checkpoint or a Hugging Face directory, instead of the recipe's `init`
    #[arg(long, value_name = "DIR")]
    pub init: Option<PathBuf>,

    /// Override a key of a stage's configuration, or of recipe.toml with `recipe.`; VALUE is TOML, or else a string
    /// (repeatable)
    #[arg(long = "set", value_name = "STAGE.KEY=VALUE")]
    pub overrides: Vec<String>,
}

impl ChangeArgs {
    /// What is laid over the recipe's files: `--set`, and `--init` as the key that it stands for.
    ///
    /// # Errors
    /// If the working directory is unknown.
    pub fn all(&self) -> Result<Vec<String>> {
        let mut all = self.overrides.clone();
        if let Some(init) = &self.init {
            let path = std::path::absolute(init).context("the working directory is unknown")?;
            all.push(format!("recipe.init={}", toml::Value::String(path.display().to_string())));
        }
        Ok(all)
    }
}

/// Flags of `recipe world`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  recipe world --out data/tiny --seed 1 --stories 24000")]
pub struct WorldArgs {
    /// Directory for the files
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Random seed; that of configs/tiny is 1
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: u64,

    /// Number of stories to pretrain on, by which the other files scale; all as in configs/tiny unless it is given
    #[arg(long, value_name = "N", value_parser = stories)]
    pub stories: Option<usize>,

    /// Replace the files of an earlier world in --out
    #[arg(long)]
    pub overwrite: bool,

    /// Log more (-vv: everything)
    #[arg(short, long, action = ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,

    /// Log warnings and errors only
    #[arg(short, long)]
    pub quiet: bool,
}

/// Parses a number of stories that a world can have.
fn temperature(text: &str) -> Result<f64, String> {
    let temperature = text.parse().ok().filter(|temperature: &f64| temperature.is_finite() && *temperature >= 0.0);
    temperature.ok_or_else(|| "expected a number from 0 up".to_owned())
}

fn stories(text: &str) -> Result<usize, String> {
    let range = 1..=toy::MOST_STORIES;
    text.parse()
        .ok()
        .filter(|n| range.contains(n))
        .ok_or_else(|| format!("expected a whole number from 1 to {}", range.end()))
}
