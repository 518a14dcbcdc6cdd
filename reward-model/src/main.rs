//! The command `reward-model`; see the library for what it does.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    common::exit::report(reward_model::run(common::cli::parse::<reward_model::Cli>()))
}
