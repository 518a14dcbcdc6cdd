//! `recipe plan`: memory that each stage will need, before anything starts.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result};
use common::capacity::{self, Lengths, Needs};
use common::checkpoint::Preview;
use common::cli::print_json;
use common::config::Sources;
use common::kernels::Kernels;
use common::tokenizer::Tokenizer;
use serde_json::{Map, json};

use crate::cli::PlanArgs;
use crate::folder::Recipe;
use crate::setup::Setup;
use crate::steps::Step;

const MIB: f64 = (1_u64 << 20) as f64;

/// Prints what each stage of a recipe will need, and whether this machine has it.
///
/// Lengths of data are those of its tokens where data and tokenizer are there, and the whole context otherwise.
///
/// # Errors
/// If the recipe is not valid, the initial model cannot be read, or stdout is closed.
pub fn print_plan(args: &PlanArgs) -> Result<()> {
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from("."));
    let recipe = Recipe::open(&args.recipe, &out, args.data.as_deref(), &args.changes.all()?, None)?;
    let setup = Setup::open(recipe, &args.runtime)?;
    let runtime = args.runtime.open()?;
    let needs = Planner::open(setup, runtime.effective_kernels())?.stages()?;
    let available = if runtime.is_on_host() { capacity::available() } else { None };
    if args.json {
        let stages: Map<_, _> = needs
            .iter()
            .map(|(step, needs)| (step.name().to_owned(), json!({ "bytes": needs, "peak": needs.peak() })))
            .collect();
        return print_json(&json!({ "stages": stages, "available": available }));
    }
    std::io::stdout().write_all(table(&needs, available).as_bytes()).context("failed to write the plan")
}

/// The plan for people, in MiB.
fn table(stages: &[(Step, Needs)], available: Option<f64>) -> String {
    let mut text = String::new();
    let columns = ["weights", "moments", "gradients", "activations", "cache", "saving", "peak"];
    let _ = write!(text, "{:14}", "MiB");
    for column in columns {
        let _ = write!(text, "{column:>13}");
    }
    text.push('\n');
    for (step, needs) in stages {
        let _ = write!(text, "{:14}", step.name());
        let Needs { initial, weights, moments, gradients, activations, cache, saving, .. } = *needs;
        for bytes in [initial + weights, moments, gradients, activations, cache, saving, needs.peak()] {
            let _ = write!(text, "{:>13.0}", bytes / MIB);
        }
        if available.is_some_and(|available| needs.peak() > available) {
            text.push_str("  does not fit");
        }
        text.push('\n');
    }
    let peak = stages.iter().map(|(_, needs)| needs.peak()).fold(0.0, f64::max);
    let _ = match available {
        Some(available) => {
            let verdict = if peak > available { "which is not enough" } else { "which is enough" };
            writeln!(text, "{:.0} MiB at most, {:.0} available, {verdict}", peak / MIB, available / MIB)
        }
        None => writeln!(text, "{:.0} MiB at most", peak / MIB),
    };
    text
}

/// What is known before the first step.
struct Planner {
    setup: Setup,
    kernels: Kernels,
    /// The model that the stages pass on; its tokenizer if it is there.
    model: Preview,
}

impl Planner {
    fn open(setup: Setup, kernels: Kernels) -> Result<Self> {
        let base = setup.adapter_base.as_deref();
        let model = match (&setup.recipe.config.init, &setup.configs.pretrain) {
            (Some(init), _) => Preview::open(init, base).context("failed to load `recipe.init`")?,
            (None, Some(config)) => {
                let invalid = || format!("invalid config `{}`", setup.recipe.stage_config(Step::Pretrain).display());
                let tokenizer = Tokenizer::load(&setup.dir(Step::Tokenizer)).ok();
                let vocab_size = tokenizer.as_ref().map_or(config.tokenizer.vocab_size, Tokenizer::vocab_size);
                let config = config.model.resolve(vocab_size).with_context(invalid)?;
                Preview { config, tokenizer, weights_dir: setup.base() }
            }
            // The recipe goes on from what an earlier run of it left.
            (None, None) => Preview::open(&setup.base(), base).context("failed to load the model to start from")?,
        };
        Ok(Self { setup, kernels, model })
    }

    fn stages(mut self) -> Result<Vec<(Step, Needs)>> {
        let mut stages = Vec::new();
        for step in self.setup.recipe.config.stages().into_iter().filter(|step| step.trains()) {
            let needs = self.stage(step)?;
            stages.push((step, needs.with_context(|| format!("the recipe has no `{step}`"))?));
        }
        Ok(stages)
    }

    /// `None` if the recipe has no configuration of the stage.
    fn stage(&mut self, step: Step) -> Result<Option<Needs>> {
        let Self { setup, kernels, model } = self;
        let (kernels, trunk, resolver) = (*kernels, setup.trunk, setup.recipe.resolver(step));
        let config = &model.config;
        let unknown = Lengths::unknown(config.max_seq_len);
        // What is generated later is not there yet.
        let is_there = |mut sources: Sources<'_>| {
            sources.iter_mut().all(|(key, files)| resolver.resolve_files(key, files).is_ok())
        };
        let needs: Option<Result<Needs>> = match step {
            Step::Pretrain => setup.configs.pretrain.as_ref().map(|stage| {
                let settings = stage.train.amount().memory(stage.train.checkpoint_activations, trunk);
                let has_init = setup.recipe.config.init.is_some();
                Ok(pretrain::needs(stage, config, stage.seq_len(config)?, has_init, kernels, settings))
            }),
            Step::Sft => setup.configs.sft.as_mut().map(|stage| {
                let lengths = if is_there(stage.data.sources_mut()) { sft::lengths(stage, model)? } else { unknown };
                let settings = stage.train.amount().memory(stage.train.checkpoint_activations, trunk);
                Ok(sft::needs(stage, config, &lengths, kernels, settings))
            }),
            Step::RewardModel => setup.configs.reward_model.as_mut().map(|stage| {
                let is_there = setup.recipe.config.collect.is_none() && is_there(stage.data.sources_mut());
                let lengths = if is_there { reward_model::lengths(stage, model)? } else { unknown };
                let settings = stage.train.amount().memory(stage.train.checkpoint_activations, trunk);
                Ok(reward_model::needs(stage, config, &lengths, kernels, settings))
            }),
            Step::Ppo | Step::Rloo => setup.configs.against_scores(step).cloned().map(|mut stage| {
                let lengths = if is_there(stage.data.sources_mut()) { ppo::lengths(&stage, model)? } else { unknown };
                Ok(ppo::needs(&stage, model, &[model], &lengths, kernels, stage.memory(trunk)))
            }),
            Step::Dpo => setup.configs.dpo.as_mut().map(|stage| {
                let is_there = setup.recipe.config.collect.is_none() && is_there(stage.data.sources_mut());
                let lengths = if is_there { dpo::lengths(stage, model)? } else { unknown };
                let settings = stage.train.amount().memory(stage.train.checkpoint_activations, trunk);
                Ok(dpo::needs(stage, config, &lengths, kernels, settings))
            }),
            Step::World | Step::Tokenizer | Step::Collect | Step::Evaluate => None,
        };
        needs.transpose()
    }
}
