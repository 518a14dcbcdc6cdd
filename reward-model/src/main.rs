//! The command `reward-model`; see the library for what it does.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    common::exit::report(common::cli::carry_out(reward_model::run, reward_model::print_config))
}
