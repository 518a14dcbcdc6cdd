//! The command `dpo`; see the library for what it does.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    common::exit::report(common::cli::carry_out(dpo::run, dpo::print_config))
}
