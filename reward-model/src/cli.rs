//! Flags only.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand};
pub use common::cli::InitArgs as TrainArgs;
use common::cli::{RuntimeArgs, at_least_1};

pub use crate::label::By;

/// Train a reward model on preference pairs
#[derive(Debug, Parser)]
#[command(
    name = "reward-model",
    version,
    arg_required_else_help = true,
    after_help = "Example:\n  \
        reward-model train --config configs/stories/reward-model.toml --data DATA --init runs/sft --out runs/rm\n  \
        reward-model eval --checkpoint runs/rm --data DATA/stories/prefs.test.jsonl\n  \
        reward-model score --checkpoint runs/rm --data answers.jsonl\n  \
        reward-model label --policy runs/sft --prompts prompts.jsonl --out labels.jsonl"
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
    /// Decide which of two answers is better, one key a decision
    Label(LabelArgs),
    /// Measure how far people agree: kappa of every two, alpha of all
    Agreement(AgreementArgs),
}

/// Flags of `reward-model label`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("questions").required(true))]
#[command(
    after_help = "Every decision is a preference record, on the disk before the next question: {prompt, chosen, rejected, annotator, \
        seconds}, or {prompt, tied} where neither answer is better, which training leaves out. The same command goes on where it \
        stopped; skipped questions come again.\n\nExample:\n  \
        reward-model label --policy runs/sft --prompts prompts.jsonl --out labels.jsonl\n  \
        reward-model label --pairs pairs.jsonl --out labels.jsonl --annotator mia"
)]
pub struct LabelArgs {
    /// Checkpoint whose answers are compared, two to each prompt
    #[arg(long, value_name = "DIR", group = "questions", requires = "prompts")]
    pub policy: Option<PathBuf>,

    /// Prompts to answer (.jsonl, also .gz)
    #[arg(long, value_name = "FILE", requires = "policy", conflicts_with = "pairs")]
    pub prompts: Option<PathBuf>,

    /// Pairs of answers to decide about, whatever they say already (.jsonl, also .gz)
    #[arg(long, value_name = "FILE", group = "questions")]
    pub pairs: Option<PathBuf>,

    /// File that decisions are appended to (.jsonl)
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,

    /// Name in the records; your user name, or gold, if not given
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    pub annotator: Option<String>,

    /// Who decides
    #[arg(long, value_name = "WHO", value_enum, default_value = "person")]
    pub by: By,

    /// Decisions of this annotator after which to stop, earlier ones included
    #[arg(long, value_name = "N", value_parser = at_least_1)]
    pub limit: Option<NonZeroUsize>,

    /// After every N decisions, ask one of them again: how far do you agree with yourself? 0 for never
    #[arg(long, value_name = "N", default_value = "10")]
    pub repeat_every: usize,

    /// Temperature of the answers
    #[arg(long, value_name = "T", default_value = "1.0", value_parser = at_least_0)]
    pub temperature: f64,

    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least_1)]
    pub max_tokens: NonZeroUsize,

    /// With --by gold: gold points by which the labeller errs as people do, 0 for never
    #[arg(long, value_name = "T", default_value = "0", value_parser = at_least_0)]
    pub label_temperature: f64,

    /// Seed of the answers and of the side on which each stands
    #[arg(long, value_name = "N", default_value = "0")]
    pub seed: u64,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Flags of `reward-model agreement`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  reward-model agreement mia.jsonl tom.jsonl")]
pub struct AgreementArgs {
    /// Files of labels; where a record names no annotator, the file's name does
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
}

fn at_least_0(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "expected a number of at least 0".to_owned())
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
