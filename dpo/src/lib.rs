//! Direct preference optimisation: preference pairs in, a policy that prefers as people did out, without a reward model.
//!
//! The policy itself is the reward model: `β·(log π(y|x) − log π_ref(y|x))` is the reward that it would be optimal for, and
//! training raises it on the preferred answer of a pair above that of the rejected one. A checkpoint of stage `sft` (or an
//! instruct model in Hugging Face layout) goes in, which is also the reference `π_ref`; one of stage `dpo` comes out.
//!
//! In reading order: [`loss`] is the objective, `train` one step of it, `data` pairs as batches, `reference` what the
//! reference says of every pair, computed once.
//!
//! # Source
//! Rafailov et al., arXiv:2305.18290; IPO: Azar et al., arXiv:2310.12036. Each function cites its own.

#![forbid(unsafe_code)]

mod cli;
mod config;
mod data;
mod eval;
pub mod loss;
mod needs;
mod reference;
mod train;

pub use cli::{Cli, Command, EvalArgs, TrainArgs};
pub use config::{DpoConfig, DpoSection, Objective, TooLong, TrainConfig};
pub use eval::{Evaluation, evaluate};
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
    source.print(|config: &mut DpoConfig| config.data.sources_mut())
}
