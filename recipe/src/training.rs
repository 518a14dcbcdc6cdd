//! The training stages of a recipe, and the processes that share them.
//!
//! The first rank goes through the recipe and does by itself what does not train; the others wait for a stage to train with
//! it.

use std::path::PathBuf;

use anyhow::{Context, Result};
use common::cli::StageArgs;
use common::config::Configuration;
use common::group::Group;
use common::interrupt::Interrupt;
use common::session::{Outcome, settings};
use serde::{Deserialize, Serialize};

use crate::cli::RunArgs;
use crate::folder::Recipe;
use crate::gold::GoldScorer;
use crate::setup::{Setup, StageConfigs};
use crate::steps::Step;

/// What the first rank tells the others.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Next {
    /// Train this stage, from the beginning or on from its checkpoint.
    Train { step: Step, goes_on: bool },
    /// The recipe is done, or was stopped.
    End,
}

/// Checks that each of `n_ranks` processes has something to compute in each of the stages among `due`.
///
/// # Errors
/// Naming the first stage with fewer micro-batches.
pub(crate) fn check_ranks(setup: &Setup, due: &[Step], n_ranks: usize) -> Result<()> {
    let StageConfigs { pretrain, sft, reward_model, ppo, rloo, dpo } = &setup.configs;
    let amounts = [
        (Step::Pretrain, pretrain.as_ref().map(|config| config.train.amount())),
        (Step::Sft, sft.as_ref().map(|config| config.train.amount())),
        (Step::RewardModel, reward_model.as_ref().map(|config| config.train.amount())),
        (Step::Ppo, ppo.as_ref().map(ppo::PpoConfig::minibatch)),
        (Step::Rloo, rloo.as_ref().map(ppo::PpoConfig::minibatch)),
        (Step::Dpo, dpo.as_ref().map(|config| config.train.amount())),
    ];
    for (step, amount) in amounts.into_iter().filter(|(step, _)| due.contains(step)) {
        if let Some(amount) = amount {
            amount.check_ranks(n_ranks, &format!("{step}.")).with_context(|| format!("the step `{step}`"))?;
        }
    }
    Ok(())
}

/// Checks that all ranks were started with the same recipe, before the first hour is spent. Files are compared by the stages that
/// read them; where they lie may differ.
///
/// # Errors
/// Naming what differs.
pub(crate) fn agree(args: &RunArgs, setup: &Setup, group: &Group) -> Result<()> {
    if group.is_alone() {
        return Ok(());
    }
    let mut recipe = setup.recipe.config.clone();
    recipe.paths_mut().into_iter().for_each(PathBuf::clear);
    let stages: Vec<String> = args.stages.iter().map(ToString::to_string).collect();
    let out = std::path::absolute(&args.out).context("the working directory is unknown")?;
    let mut facts =
        vec![("`--stages`".to_owned(), stages.join(",")), ("`--out`".to_owned(), out.display().to_string())];
    facts.extend(settings("recipe.", &recipe)?);
    let StageConfigs { pretrain, sft, reward_model, ppo, rloo, dpo } = &setup.configs;
    facts.extend(settings_of("pretrain.", pretrain.as_ref())?);
    facts.extend(settings_of("sft.", sft.as_ref())?);
    facts.extend(settings_of("reward-model.", reward_model.as_ref())?);
    facts.extend(settings_of("ppo.", ppo.as_ref())?);
    facts.extend(settings_of("rloo.", rloo.as_ref())?);
    facts.extend(settings_of("dpo.", dpo.as_ref())?);
    Ok(group.check_same(&facts)?)
}

/// The [`settings`] of a stage, if the recipe has it.
fn settings_of<C: Configuration>(prefix: &str, config: Option<&C>) -> Result<Vec<(String, String)>> {
    config.map_or_else(|| Ok(Vec::new()), |config| settings(prefix, config))
}

/// Tells the other ranks which stage comes next.
pub(crate) fn announce(group: &Group, step: Step, goes_on: bool) -> Result<()> {
    group.gather(Some(Next::Train { step, goes_on }))?;
    Ok(())
}

/// Tells the other ranks that nothing more comes.
pub(crate) fn end(group: &Group, interrupt: Interrupt) -> Result<()> {
    group.gather(Some(Next::End))?;
    interrupt.requested_in(group)?;
    Ok(())
}

/// A recipe on a rank that trains with the first.
pub(crate) fn follow(args: &RunArgs, group: &Group, interrupt: Interrupt) -> Result<Outcome> {
    let recipe = Recipe::open(&args.recipe, &args.out, args.data.as_deref(), &args.changes.all()?, args.seed)?;
    let setup = Setup::open(recipe, &args.runtime)?;
    agree(args, &setup, group)?;
    let trainer = Trainer { args, setup: &setup, group, interrupt };
    let mut outcome = Outcome::Finished;
    loop {
        let next = group.gather(None)?.into_iter().next().flatten().context("the first rank named no step")?;
        match next {
            Next::Train { step, goes_on } => {
                outcome = trainer.train(step, goes_on).with_context(|| format!("the step `{step}` failed"))?;
            }
            Next::End => {
                let stopped = interrupt.requested_in(group)?;
                return Ok(if stopped { Outcome::Interrupted } else { outcome });
            }
        }
    }
}

/// What a stage starts from, as far as it needs it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Start {
    pub(crate) tokenizer: Option<PathBuf>,
    pub(crate) init: Option<PathBuf>,
    pub(crate) reward_model: Option<PathBuf>,
}

/// Runs the training stage `step` as its own command would; PPO and RLOO report `gold`, where it is known.
///
/// # Errors
/// As the stage, and if it lacks what it starts from.
pub(crate) fn train_stage(
    step: Step,
    start: Start,
    stage: StageArgs,
    gold: Option<&GoldScorer>,
    group: &Group,
    interrupt: Interrupt,
) -> Result<Outcome> {
    let Start { tokenizer, init, reward_model } = start;
    if step == Step::Pretrain {
        return pretrain::train(&pretrain::TrainArgs { tokenizer, init, stage }, group, interrupt);
    }
    let init = init.context("the stage has no model to start from")?;
    match step {
        Step::Sft => sft::train(&sft::TrainArgs { init, stage }, group, interrupt),
        Step::RewardModel => reward_model::train(&reward_model::TrainArgs { init, stage }, group, interrupt),
        Step::Dpo => dpo::train(&dpo::TrainArgs { init, stage }, group, interrupt),
        _ => {
            let score = gold.map(|gold| |prompt: &str, response: &str| gold.score(prompt, response));
            let reward_model = reward_model.context("PPO has no reward model")?;
            let args = ppo::TrainArgs { policy: init, reward_model: vec![reward_model], stage };
            ppo::train(&args, group, interrupt, score.as_ref().map(|score| score as ppo::Gold<'_>))
        }
    }
}

/// What training a stage of a recipe takes.
pub(crate) struct Trainer<'a> {
    pub(crate) args: &'a RunArgs,
    pub(crate) setup: &'a Setup,
    pub(crate) group: &'a Group,
    pub(crate) interrupt: Interrupt,
}

impl Trainer<'_> {
    /// Runs a training stage as its own command would.
    pub(crate) fn train(&self, step: Step, goes_on: bool) -> Result<Outcome> {
        let Self { setup, group, interrupt, .. } = *self;
        let sft = || Some(setup.dir(Step::Sft));
        let start = match step {
            Step::Pretrain => {
                let init = setup.recipe.config.init.clone();
                Start { tokenizer: init.is_none().then(|| setup.dir(Step::Tokenizer)), init, ..Start::default() }
            }
            Step::Sft => Start { init: Some(setup.base()), ..Start::default() },
            Step::RewardModel | Step::Dpo => Start { init: sft(), ..Start::default() },
            _ => Start { init: sft(), reward_model: Some(setup.dir(Step::RewardModel)), ..Start::default() },
        };
        let stage = self.stage_args(step, &start, goes_on)?;
        train_stage(step, start, stage, setup.gold.as_ref(), group, interrupt)
    }

    /// The flags with which a training stage is run. `--base` is for the model that the recipe starts from; the recipe's own
    /// adapters say where their bases are.
    fn stage_args(&self, step: Step, start: &Start, resume: bool) -> Result<StageArgs> {
        let runtime = if start.init.is_some() && start.init == self.setup.recipe.config.init {
            self.args.runtime.clone()
        } else {
            self.args.runtime.among_own(start.init.iter().chain(&start.reward_model).map(|dir| &**dir))
        };
        Ok(StageArgs {
            config: self.setup.recipe.stage_config(step),
            out: self.setup.dir(step),
            resume,
            overwrite: !resume,
            overrides: self.setup.recipe.run_overrides(step)?,
            data: self.setup.recipe.data.clone(),
            tui: self.args.tui,
            runtime,
        })
    }
}
