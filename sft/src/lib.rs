//! Supervised fine-tuning: a language model and conversations in, a chat model out.
//!
//! The objective is pretraining's cross-entropy, on the assistant's tokens alone. A checkpoint of stage `pretrain` (or
//! `sft`, or a Hugging Face directory) goes in, one of stage `sft` comes out.
//!
//! # Source
//! Ouyang et al., arXiv:2203.02155, section 3.5, "Supervised fine-tuning".

#![forbid(unsafe_code)]

mod cli;
mod config;
mod data;
mod eval;
mod needs;
mod train;

pub use cli::{Cli, Command, EvalArgs, TrainArgs};
pub use config::{SftConfig, TooLong, TrainConfig};
pub use data::check_data;
pub use eval::Evaluation;
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
    }
}

/// Prints the configuration that `source` describes, with every key and its meaning.
///
/// # Errors
/// If it cannot be read.
pub fn print_config(source: &ConfigSource) -> anyhow::Result<()> {
    source.print(|config: &mut SftConfig| config.data.sources_mut())
}
