//! Small experiments beside the chapters of `docs/book`: each prints the one thing that its chapter speaks of.
//!
//! They call the functions that training calls and compute nothing of their own that training computes, but for
//! [`attention`], which writes the equation out and compares.

#![forbid(unsafe_code)]

mod attention;
mod cli;
mod decoding;
mod figures;
mod inside;
mod numbers;
mod preferences;
mod text;
mod vectors;

use std::io::Write;

use anyhow::{Context, Result};

pub use cli::{Cli, Command};

/// Carries out a command.
///
/// # Errors
/// If a file cannot be read or written.
pub fn run(cli: &Cli) -> Result<()> {
    cli.process.start()?;
    let printed = match &cli.command {
        Command::Tokens { dir, text } => text::tokens(dir, text)?,
        Command::Conversation { dir, prompt, response } => text::conversation(dir, prompt, response)?,
        Command::Positions => vectors::positions(),
        Command::Neighbours { checkpoint, words } => vectors::neighbours(checkpoint, words)?,
        Command::Attention { checkpoint, text } => attention::attention(checkpoint, text)?,
        Command::Residual { checkpoint, text } => inside::residual(checkpoint, text)?,
        Command::Parameters => inside::parameters()?,
        Command::Next { checkpoint, prompt } => decoding::next(checkpoint, prompt)?,
        Command::Preferences => preferences::table()?,
        Command::Rewards => numbers::rewards(),
        Command::Advantages => numbers::advantages(),
        Command::Clip => numbers::clip()?,
        Command::Figures { run, out } => figures::draw(run, out)?,
    };
    std::io::stdout().write_all(printed.as_bytes()).context("failed to write the result")
}
