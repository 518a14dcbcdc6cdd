//! `recipe compare`: the recipe made ready for the crate that compares backends.

use std::path::Path;

use anyhow::Result;
use common::checkpoint::Stage;
use compare::{CompareArgs, Prepared, StageConfig};

use crate::folder::Recipe;
use crate::setup::StageConfigs;
use crate::steps::Step;

/// Generates the recipe's data in `out` where it does that, and learns its tokenizer.
///
/// # Errors
/// If the recipe is not valid, or its text cannot be read.
pub fn prepare(args: &CompareArgs, out: &Path) -> Result<Prepared> {
    let recipe = Recipe::open(&args.recipe, out, args.data.as_deref(), &args.overrides, args.seed)?;
    StageConfigs::load(&recipe)?;
    recipe.write_embedded()?;
    let stages = recipe.config.stages().into_iter().filter_map(|step| {
        let stage = match step {
            Step::Pretrain => Stage::Pretrain,
            Step::Sft => Stage::Sft,
            Step::RewardModel => Stage::RewardModel,
            Step::Ppo => Stage::Ppo,
            _ => return None,
        };
        // The processes of the backends may run elsewhere.
        let file = std::path::absolute(recipe.stage_config(step)).unwrap_or_else(|_| recipe.stage_config(step));
        Some((stage, StageConfig { file, overrides: recipe.stage_overrides(step) }))
    });
    let prepared = Prepared {
        recipe: recipe.name.clone(),
        seed: recipe.config.seed,
        data: recipe.data.clone(),
        tokenizer: out.join(Step::Tokenizer.name()),
        stages: stages.collect(),
    };
    if !prepared.stages.contains_key(&Stage::Pretrain) {
        return Ok(prepared);
    }
    if let Some(world) = &recipe.config.world {
        toy::write(&out.join("data"), world)?;
    }
    pretrain::train_tokenizer(&pretrain::TokenizerArgs {
        config: recipe.stage_config(Step::Tokenizer),
        out: prepared.tokenizer.clone(),
        overwrite: true,
        overrides: recipe.stage_overrides(Step::Tokenizer),
        data: recipe.data.clone(),
        process: args.runtime.process.clone(),
    })?;
    Ok(prepared)
}
