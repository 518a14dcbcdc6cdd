//! The command `reward-model`; see the library for what it does.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    common::stage::report(reward_model::run(common::stage::parse::<reward_model::Cli>()))
}
