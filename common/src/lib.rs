//! Library shared by the stages of Kindling.
//!
//! Modules in reading order: [`model`] (the one transformer), [`kernels`] (its fused operations), [`loss`], [`optim`],
//! [`tokenizer`], [`conversation`], [`data`], [`generate`], [`score`] (what models say of responses), [`checkpoint`] with [`hf`], [`config`], [`corpus`] (text to train language models on), [`metrics`],
//! [`backend`], [`runtime`] (models placed on a device), [`capacity`] (whether they fit into memory), [`rng`], [`hash`]; of the command line [`cli`], [`logging`],
//! [`view`], [`interrupt`], [`pace`] (both for work in rows), [`out_dir`], [`exit`]; [`group`] (the processes that train together); and [`session`] (what every training run does the same way).
//!
//! # Invariants
//! - Who may use whom, `testing` aside: `model` → `kernels`, `rng`; `loss` and `optim` → `model`, `kernels`; `generate` →
//!   `model`, `kernels`, `rng`; `conversation` → `tokenizer`; `data` → `rng` and, for messages, `conversation`; `score` → `model`,
//!   `data`, `generate`; `hf` → `model`; `checkpoint` → `model`, `rng`, `hf`, `tokenizer`; `backend` → `config`, `kernels`; `runtime` →
//!   `backend`, `checkpoint`, `group`, `hf`, `model`, `optim`; `capacity` → `model`, `kernels`, `group`, `reduce`, `hf`; `corpus` → `data`, `tokenizer`, `model`, `loss`, `config`, `group`, `interrupt`, `logging`, `rng`; `cli` → `runtime`, `config`, `out_dir`, `logging`; `view` → `metrics`, `logging`, `interrupt`; `pace` → `logging`, `interrupt`; `session` → all that a run needs; all that write or read files → `files`, `hash`. There are no other edges; `tests/architecture.rs` checks them.
//! - `model` and `loss` do no I/O and read no clock, environment, file or global random state.
//! - Every random decision comes from [`rng::Streams`], on the host, so that all backends see the same numbers.

#![forbid(unsafe_code)]

pub mod backend;
pub mod capacity;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod corpus;
pub mod exit;
pub mod interrupt;
pub mod logging;
pub mod metrics;
pub mod out_dir;
pub mod pace;
pub mod runtime;
pub mod session;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod view;

pub use base::{files, hash, rng, stats};
pub use group;
pub use kernels;
pub use model::{self, generate, hf, loss, optim, reduce};
pub use score;
pub use text::{conversation, data, tokenizer};
