//! Reward modelling: preference pairs in, a model that scores answers out.
//!
//! The transformer of a language model gets a head with one output, and learns to give the preferred one of two
//! answers the higher score. A checkpoint of stage `sft` (or `pretrain`) goes in, one of stage `reward-model` comes
//! out, its scores normalised so that the initial model's own answers have mean 0 and deviation 1.
//!
//! # Source
//! Stiennon et al., arXiv:2009.01325, section 3.4; Ziegler et al., arXiv:1909.08593, section 2, for the
//! normalisation.

#![forbid(unsafe_code)]

pub mod agreement;
mod cli;
mod config;
mod data;
mod eval;
mod label;
pub mod loss;
mod needs;
mod normalisation;
mod score;
mod train;

pub use cli::{AgreementArgs, By, Cli, Command, EvalArgs, LabelArgs, ScoreArgs, TrainArgs};
pub use config::{BestBy, NormalisationConfig, RewardModelConfig, TooLong, TrainConfig};
pub use data::check_data;
pub use eval::{Evaluation, OfAnnotator, evaluate};
pub use needs::{lengths, needs};
pub use train::train;

use common::cli::ConfigSource;
use common::session;

/// Carries out one command line.
///
/// # Errors
/// Whatever went wrong, with its context; [`common::exit::report`] prints it.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Train(args) => {
            session::run(&args.stage.runtime, args.stage.tui, &args.stage.how_to_continue(), |group, interrupt| {
                args.stage.check_base([&*args.init])?;
                train(&args, group, interrupt)
            })
        }
        Command::Eval(args) => args.runtime.run(|| eval::run(&args)),
        Command::Score(args) => args.runtime.run(|| score::run(&args)),
        Command::Label(args) => label::run(&args),
        Command::Agreement(args) => agreement::run(&args),
    }
}

/// Prints the configuration that `source` describes, with every key and its meaning.
///
/// # Errors
/// If it cannot be read.
pub fn print_config(source: &ConfigSource) -> anyhow::Result<()> {
    source.print(|config: &mut RewardModelConfig| config.data.sources_mut())
}
