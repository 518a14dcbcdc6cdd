//! The stages in turn, from plain text to an aligned chat model, and the report on them.
//!
//! A recipe is a folder with one TOML file a stage and `recipe.toml` ([`RecipeConfig`]). [`run`] works through its steps:
//! generate the data, learn a tokenizer, pretrain, fine-tune, collect and label preference pairs, train the reward model,
//! PPO, and the evaluation on held-out prompts. What is finished and unchanged is skipped, what was interrupted goes on.
//!
//! This is the only crate that depends on the stages; they do not know each other and meet in checkpoints. Modules in
//! reading order: [`steps`], `config` and `folder` (the recipe's files), `setup` (everything read and checked), `run`,
//! `plan` with [`inputs`] and [`record`] (when a step has to run again), `print` (`--print-config`), `memory` (what each stage needs), `check` (what can be found wrong at once),
//! `collect`, `evaluate`, `overoptimise`, [`report`], [`gold`] (what an answer is really worth), [`toy`] (the generated data of
//! `configs/tiny`), [`bench`] (how fast all of it is here) and [`compare`] (whether backends
//! agree).

#![forbid(unsafe_code)]

mod answers;
mod best_of;
mod check;
mod cli;
mod collect;
mod comparison;
mod config;
mod doctor;
mod duel;
mod evaluate;
mod folder;
pub mod gold;
pub mod inputs;
mod memory;
mod new;
mod overoptimise;
mod people;
mod plan;
mod print;
pub mod record;
pub mod report;
pub mod results;
mod run;
mod setup;
pub mod steps;
mod training;

pub use cli::{Cli, Command, NewArgs, OveroptimiseArgs, PlanArgs, ReportArgs, RunArgs, WorldArgs};
pub use config::{BasePrompt, CollectConfig, EvaluateConfig, LabelOrder, LabelledBy, RecipeConfig};
pub use folder::Recipe;
pub use overoptimise::config::OveroptimiseConfig;
pub use run::run;

use std::io::Write as _;

use anyhow::{Context, Result, bail, ensure};
use common::cli::print_json;
use common::files::is_filled;
use common::group::Group;
use common::session;

use toy::WorldConfig;

/// Carries out one command line.
///
/// # Errors
/// Whatever went wrong, with its context; [`common::exit::report`] prints it.
pub fn execute(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Run(args) if args.print_config => print::print_config(&args),
        Command::Run(args) => {
            session::run(&args.runtime, args.tui, "run the same command again to continue", |group, interrupt| {
                run(&args, group, interrupt)
            })
        }
        Command::Plan(args) => {
            args.runtime.start()?;
            memory::print_plan(&args)
        }
        Command::Overoptimise(args) => {
            session::run(&args.runtime, false, "run the same command again to continue", |group, interrupt| {
                ensure!(group.is_alone(), "`recipe overoptimise` is one process\nhint: start it without `mpirun`");
                overoptimise::overoptimise(&args, interrupt)
            })
        }
        Command::Report(args) => {
            Group::check_alone()?;
            common::logging::init(0, false);
            report::run(&args)
        }
        Command::Duel(args) => args.runtime.run(|| duel::duel(&args)),
        Command::New(args) => {
            Group::check_alone()?;
            common::logging::init(0, false);
            write!(std::io::stdout(), "{}", new::new(&args)?).context("failed to write the result")
        }
        Command::Bench(command) => bench::run(&command),
        Command::Compare(args) => {
            args.runtime.start()?;
            compare::compare(&args, |out| comparison::prepare(&args, out))
        }
        Command::Probe(args) => {
            args.runtime.start()?;
            compare::probe(&args)
        }
        Command::World(args) => {
            Group::check_alone()?;
            common::logging::init(args.verbose, args.quiet);
            generate_world(&args)
        }
    }
}

/// Carries out `recipe world`: the files, and one JSON object on stdout.
fn generate_world(args: &WorldArgs) -> Result<()> {
    let out = &args.out;
    if is_filled(out)? && !args.overwrite {
        bail!(
            "output directory `{}` is not empty\nhint: pass `--overwrite` to replace an earlier world, or another `--out`",
            out.display()
        );
    }
    let is_world = toy::FILES.iter().all(|name| out.join(name).is_file());
    if is_filled(out)? && !is_world {
        bail!(
            "refusing to overwrite `{}`: it does not hold a generated world\nhint: pass another `--out`",
            out.display()
        );
    }
    let tiny = folder::embedded_world()?;
    let sizes = match args.stories {
        Some(stories) => WorldConfig::with_stories(args.seed, stories),
        None => tiny.clone(),
    };
    let WorldConfig { pretrain_flaws, flaws, label_temperature, .. } = tiny;
    let world = WorldConfig { seed: args.seed, pretrain_flaws, flaws, label_temperature, ..sizes };
    let summary = toy::write(out, &world)?;
    print_json(&summary)
}
