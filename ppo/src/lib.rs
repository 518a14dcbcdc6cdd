//! Proximal policy optimisation: prompts and a reward model in, a policy with higher scores out.
//!
//! The policy answers prompts, the reward model scores the answers, every token is charged for leaving the initial
//! policy, and a clipped objective makes tokens with a positive advantage more likely. Checkpoints of the stages `sft` and `reward-model` go
//! in, one of stage `ppo` comes out, with the value model beside it.
//!
//! In reading order: `train` is the loop, [`Iteration`] one step of it. A step samples and scores with
//! [`common::score`]; [`targets`] turns that into rewards and advantages, from [`advantage`], [`rewards`] and [`kl`], plain
//! numbers, one response a call; `update` runs the PPO epochs over the batch on the [`Learner`]'s models, [`loss`]
//! is their objective, on tensors, and `ptx` the pretraining text that may join it. [`doctor`] examines what a run would start from; [`dialect`] says how other
//! implementations choose, and `oracle` compares the equations with theirs.
//!
//! # Source
//! Schulman et al., arXiv:1707.06347; Ziegler et al., arXiv:1909.08593; Huang et al., "The N+ Implementation Details
//! of RLHF with PPO", arXiv:2403.17031. Each function cites its own source.

#![forbid(unsafe_code)]

pub mod advantage;
mod alarms;
mod cli;
mod config;
mod data;
pub mod dialect;
pub mod doctor;
mod eval;
mod iteration;
pub mod kl;
mod learner;
pub mod loss;
mod measured;
mod models;
mod needs;
mod oracle;
mod ptx;
pub mod rewards;
pub mod targets;
mod train;
mod update;

pub use cli::{Cli, Command, DialectsArgs, DoctorArgs, EvalArgs, OracleArgs, TrainArgs};
pub use common::score::{Gold, TooLong};
pub use config::{OnAlarm, PpoConfig, PpoSection, TrainConfig};
pub use dialect::{Dialect, Estimator, ValueInit};
pub use eval::{Evaluation, evaluate};
pub use iteration::{Iteration, Seconds, StepOutput};
pub use learner::{Critic, Learner};
pub use models::Models;
pub use needs::{lengths, needs};
pub use ptx::PtxConfig;
pub use train::{open_models, train};
pub use update::{Update, UpdateMetrics, ValueMetrics};

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
                args.stage.check_base([&args.policy].into_iter().chain(&args.reward_model).map(|dir| &**dir))?;
                train(&args, group, interrupt, None)
            })
        }
        Command::Eval(args) => args.runtime.run(|| eval::run(&args)),
        Command::Doctor(args) => args.runtime.run(|| doctor::run(&args)),
        Command::Dialects(args) => dialect::run(&args),
        Command::Oracle(args) => args.runtime.run(|| oracle::run(&args)),
    }
}

/// Prints the configuration that `source` describes, with every key and its meaning.
///
/// # Errors
/// If it cannot be read.
pub fn print_config(source: &ConfigSource) -> anyhow::Result<()> {
    source.print(PpoConfig::sources_mut)
}
