//! Proximal policy optimisation: prompts and a reward model in, a policy that answers as the reward model likes out.
//!
//! The policy answers prompts, the reward model scores the answers, every token is charged for leaving the initial
//! policy, and a clipped objective makes what paid more likely. Checkpoints of the stages `sft` and `reward-model` go
//! in, one of stage `ppo` comes out, with the value model beside it.
//!
//! In reading order: [`advantage`], [`rewards`] and [`kl`] are the targets, plain numbers, one response a call;
//! [`loss`] is the objective, on tensors; `rollout` samples and scores, `update` makes the epochs over a batch of
//! rollouts, `iteration` is one after the other, `train` is the loop around it.
//!
//! # Source
//! Schulman et al., arXiv:1707.06347; Ziegler et al., arXiv:1909.08593; Huang et al., "The N+ Implementation Details
//! of RLHF with PPO", arXiv:2403.17031. Each function names what it takes from where.

pub mod advantage;
mod cli;
mod config;
mod data;
mod eval;
mod iteration;
pub mod kl;
pub mod loss;
mod replay;
pub mod rewards;
mod rollout;
mod train;
mod trial;
mod update;

pub use cli::{Cli, Command, EvalArgs, TrainArgs};
pub use config::{PpoConfig, PpoSection, TooLong, TrainConfig, ValueInit};
pub use eval::{Estimate, Evaluation, evaluate};
pub use iteration::Seconds;
pub use replay::{Replay, replay};
pub use train::train;
pub use trial::{Measurement, Trial};

use common::cli::ConfigSource;
use common::session;

/// A recipe's true reward of a response to a prompt, where it is known: reported, never trained on.
pub type Gold<'a> = &'a dyn Fn(&str, &str) -> f64;

/// Carries out one command line.
///
/// # Errors
/// Whatever went wrong, with its context; [`common::exit::report`] prints it.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Train(args) => {
            session::run(&args.stage.runtime, "go on with `--resume`", |interrupt| train(&args, interrupt, None))
        }
        Command::Eval(args) => args.runtime.run(|| eval::run(&args)),
    }
}

/// Prints the configuration that `source` describes, with every key and its meaning.
///
/// # Errors
/// If it cannot be read.
pub fn print_config(source: &ConfigSource) -> anyhow::Result<()> {
    source.print(|config: &mut PpoConfig| config.data.files_mut())
}
