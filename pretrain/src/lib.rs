//! Pretraining: text in, a language model out.
//!
//! The model learns to predict each token from those before it, by minimising cross-entropy over a corpus.
//! Text and a tokenizer go in, a checkpoint of stage `pretrain` comes out; `pretrain tokenizer` makes the tokenizer.
//!
//! # Source
//! Radford et al. 2018, "Improving language understanding by generative pre-training", section 3.1.

#![forbid(unsafe_code)]

mod cli;
mod config;
mod data;
mod eval;
mod needs;
mod tokenizer;
mod train;

pub use cli::{Cli, Command, EvalArgs, TokenizerArgs, TrainArgs};
pub use common::corpus::{Evaluation, Shuffle, TextConfig as DataConfig, Windows};
pub use config::{PretrainConfig, TrainConfig};
pub use data::first_windows;
pub use needs::needs;
pub use tokenizer::{TokenizerReport, train_tokenizer};
pub use train::{gradients, train};

use common::cli::{ConfigSource, print_json};
use common::session;

/// Carries out one command line.
///
/// # Errors
/// Whatever went wrong, with its context; [`common::exit::report`] prints it.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Tokenizer(args) => {
            args.process.start()?;
            print_json(&train_tokenizer(&args)?)
        }
        Command::Train(args) => {
            session::run(&args.stage.runtime, args.stage.tui, &args.stage.how_to_continue(), |group, interrupt| {
                args.stage.check_base(args.init.as_deref())?;
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
    source.print(|config: &mut PretrainConfig| config.data.sources_mut())
}
