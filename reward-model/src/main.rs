//! The command `reward-model`; see the library for what it does.

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    common::stage::report(reward_model::run(reward_model::Cli::parse()))
}
