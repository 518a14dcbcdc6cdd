//! Talking to any checkpoint of a language model.
//!
//! `chat` holds a conversation in the terminal (or with a pipe), `chat generate` answers one prompt, once or several times,
//! and `chat serve` answers requests over HTTP. What is written for the user goes through the chat template of the checkpoint's tokenizer; `chat generate --raw` continues plain text.

#![forbid(unsafe_code)]

mod best_of;
mod cli;
mod generate;
mod history;
mod merge;
mod model;
mod repl;
mod serve;
mod stop_text;
mod terminal;

pub use cli::{
    Cli, Command, ConversationArgs, GenerateArgs, MergeArgs, NamedCheckpoint, SamplingArgs, ServeArgs, ServeLimits,
};
pub use history::History;
pub use model::{ChatModel, Completion, FinishReason, OnText};
pub use stop_text::StopText;

/// Carries out one command line.
///
/// # Errors
/// Whatever went wrong, with its context; [`common::exit::report`] prints it.
pub fn run(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Some(Command::Generate(args)) => generate::run(args),
        Some(Command::Merge(args)) => merge::run(args),
        Some(Command::Serve(args)) => serve::run(args),
        None => repl::run(&cli.conversation),
    }
}
