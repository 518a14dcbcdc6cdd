//! `chat serve` from outside: what is answered, what is refused, and who waits for whom.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message
#![allow(clippy::print_stderr)] // a test that is skipped says why

mod answers;
mod clients;
mod compare;
mod conversation;
mod limits;
mod page;
mod refusals;
mod runs;
mod server;
mod side_by_side;
#[cfg(unix)]
mod soak;
#[path = "../support/mod.rs"]
mod support;
mod webdriver;
