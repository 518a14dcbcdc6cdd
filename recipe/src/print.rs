//! `recipe run --print-config`: every configuration of a recipe as one TOML text.

use std::io::Write as _;

use anyhow::{Context, Result};
use common::config::{Configuration, Sources, print_as};

use crate::cli::RunArgs;
use crate::folder::Recipe;
use crate::setup::StageConfigs;
use crate::steps::Step;

/// Prints the configurations that a run would use, those of a file as a table of its name: keys are those of `--set`.
///
/// # Errors
/// If the recipe is not valid, or stdout is closed.
pub fn print_config(args: &RunArgs) -> Result<()> {
    let mut recipe = Recipe::read(&args.recipe, &args.out, args.data.as_deref(), &args.changes.all()?, args.seed)?;
    let StageConfigs { pretrain, sft, reward_model, ppo, rloo, dpo } = StageConfigs::load(&recipe)?;
    let resolver = recipe.own_resolver();
    for path in recipe.config.paths_mut() {
        resolver.resolve_if_known(path)?;
    }
    let text = [
        "# Keys are named as in `--set`, for example `--set sft.train.steps=20`.\n".to_owned(),
        print_as("recipe", &recipe.config),
        stage(&recipe, Step::Pretrain, pretrain, |config| config.data.sources_mut())?,
        stage(&recipe, Step::Sft, sft, |config| config.data.sources_mut())?,
        stage(&recipe, Step::RewardModel, reward_model, |config| config.data.sources_mut())?,
        stage(&recipe, Step::Ppo, ppo, ppo::PpoConfig::sources_mut)?,
        stage(&recipe, Step::Rloo, rloo, ppo::PpoConfig::sources_mut)?,
        stage(&recipe, Step::Dpo, dpo, |config| config.data.sources_mut())?,
    ];
    std::io::stdout().write_all(text.concat().as_bytes()).context("failed to write the configuration")
}

/// The configuration of a stage, `sources` of it made absolute; nothing if the recipe does without the stage.
fn stage<T: Configuration>(
    recipe: &Recipe,
    step: Step,
    config: Option<T>,
    sources: impl Fn(&mut T) -> Sources<'_>,
) -> Result<String> {
    let Some(mut config) = config else { return Ok(String::new()) };
    let resolver = recipe.resolver(step);
    for file in sources(&mut config).into_iter().flat_map(|(_, files)| files) {
        resolver.resolve_if_known(file)?;
    }
    Ok(print_as(step.name(), &config))
}
