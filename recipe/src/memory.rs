//! `recipe plan`: memory that each stage will need, before anything starts.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use common::capacity::{Lengths, Needs, Ranks, Settings};
use common::checkpoint::{CheckpointError, Manifest, Preview};
use common::cli::print_json;
use common::config::Sources;
use common::group::Share;
use common::kernels::Kernels;
use common::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

use crate::check::{self, INIT_STAGES};
use crate::cli::PlanArgs;
use crate::folder::Recipe;
use crate::setup::Setup;
use crate::steps::Step;
use crate::training;

const MIB: f64 = (1_u64 << 20) as f64;

/// Prints what each stage of a recipe will need, and whether this machine has it.
///
/// Lengths of data are those of its tokens where data and tokenizer are there, and the whole context otherwise.
///
/// # Errors
/// If the recipe is not valid, a step could not run with its data, a stage has too few micro-batches for the ranks, the initial
/// model cannot be read, or stdout is closed.
pub fn print_plan(args: &PlanArgs) -> Result<()> {
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from("."));
    let recipe = Recipe::open(&args.recipe, &out, args.data.as_deref(), &args.changes.all()?, None)?;
    let setup = Setup::open(recipe, &args.runtime)?;
    let runtime = args.runtime.open()?;
    training::check_ranks(&setup, &setup.recipe.config.stages(), args.ranks.get())?;
    let ranks = Ranks::on_this_machine(args.ranks.get());
    let planner = Planner::open(setup, runtime.effective_kernels())?;
    check::check_planned(&planner.setup, &planner.model)?;
    let stages = planner.stages(ranks.shares())?;
    let ranks = runtime.is_on_host().then_some(ranks);
    if args.json {
        let stages: Map<_, _> = stages.iter().map(|stage| (stage.step.name().to_owned(), stage.to_json())).collect();
        let available = ranks.and_then(|ranks| ranks.available()).map(whole);
        return print_json(&json!({ "stages": stages, "available": available }));
    }
    std::io::stdout().write_all(table(&stages, ranks.as_ref()).as_bytes()).context("failed to write the plan")
}

/// What a stage needs.
struct PlannedStage {
    step: Step,
    /// In each rank.
    needs: Vec<Needs>,
}

impl PlannedStage {
    fn peaks(&self) -> Vec<f64> {
        self.needs.iter().map(Needs::peak).collect()
    }

    /// All ranks together.
    fn peak(&self) -> f64 {
        self.peaks().iter().sum()
    }

    /// With a list of ranks where there are several.
    fn to_json(&self) -> Value {
        let of_rank = |needs: &Needs| {
            let mut bytes = json!(needs);
            for value in bytes.as_object_mut().into_iter().flat_map(|of| of.values_mut()) {
                *value = json!(whole(value.as_f64().unwrap_or_default()));
            }
            let Row { held, phase, other, peak, .. } = Row::of(needs, 1.0);
            let (name, _) = needs.phase();
            json!({ "bytes": bytes, "held": held, "phase": name, "phase_bytes": phase, "other": other, "peak": peak })
        };
        match &*self.needs {
            [alone] => of_rank(alone),
            ranks => {
                json!({ "ranks": ranks.iter().map(of_rank).collect::<Vec<_>>(), "peak": ranks.iter().map(|needs| Row::of(needs, 1.0).peak).sum::<i64>() })
            }
        }
    }
}

/// A count of bytes or MiB.
fn whole(number: f64) -> i64 {
    number.round() as i64
}

/// The parts of a peak in whole units, so that they add up to it.
struct Row {
    weights: i64,
    moments: i64,
    /// Weights and moments.
    held: i64,
    /// What the largest phase takes beside them.
    phase: i64,
    /// The program, its data, and what the allocator keeps.
    other: i64,
    peak: i64,
}

impl Row {
    fn of(needs: &Needs, unit: f64) -> Self {
        let of = |bytes: f64| whole(bytes / unit);
        let (weights, moments) = (of(needs.initial + needs.weights), of(needs.moments));
        let (held, phase, peak) = (weights + moments, of(needs.phase().1), of(needs.peak()));
        Self { weights, moments, held, phase, other: peak - held - phase, peak }
    }
}

/// The plan for people, in MiB; `ranks` on the host's memory.
fn table(stages: &[PlannedStage], ranks: Option<&Ranks>) -> String {
    let mut text = String::new();
    let columns = ["weights", "moments", "gradients", "activations", "cache", "saving", "phase", "other", "peak"];
    let width = |column: &str| (column.len() + 2).max(8);
    let _ = write!(text, "{:14}", "MiB");
    for column in columns {
        let _ = write!(text, "{column:>0$}", width(column));
    }
    text.push_str("  phase of the peak\n");
    for stage in stages {
        let fits = ranks.is_none_or(|ranks| ranks.have(&stage.peaks()));
        for (rank, needs) in stage.needs.iter().enumerate() {
            let name = if rank == 0 { stage.step.name().to_owned() } else { format!("  rank {rank}") };
            let _ = write!(text, "{name:14}");
            let Row { weights, moments, phase, other, peak, .. } = Row::of(needs, MIB);
            let Needs { gradients, activations, cache, saving, .. } = *needs;
            let [gradients, activations, cache, saving] =
                [gradients, activations, cache, saving].map(|n| whole(n / MIB));
            let values = [weights, moments, gradients, activations, cache, saving, phase, other, peak];
            for (column, mib) in columns.into_iter().zip(values) {
                let _ = write!(text, "{mib:>0$}", width(column));
            }
            let _ = write!(text, "  {}", needs.phase().0.name());
            if rank == 0 && !fits {
                text.push_str(", does not fit");
            }
            text.push('\n');
        }
    }
    text.push_str(
        "peak = weights + moments + phase + other\n\
         phase: the largest of what loading, a training step (its gradients and activations), decoding (the cache) and saving take\n\
         other: the program, its data and freed memory that the allocator keeps\n",
    );
    let peak = stages.iter().map(PlannedStage::peak).fold(0.0, f64::max);
    let together = match stages.first().map_or(1, |stage| stage.needs.len()) {
        1 => String::new(),
        n => format!(", all {n} ranks together"),
    };
    let _ = match ranks.and_then(Ranks::available) {
        Some(available) => {
            let verdict = if peak > available { "which is not enough" } else { "which is enough" };
            writeln!(text, "{:.0} MiB at most{together}, {:.0} available, {verdict}", peak / MIB, available / MIB)
        }
        None => writeln!(text, "{:.0} MiB at most{together}", peak / MIB),
    };
    text
}

/// The model that a recipe starts from, if it can.
fn preview_init(init: &Path, base: Option<&Path>) -> Result<Preview, CheckpointError> {
    let model = Preview::open(init, base)?;
    let stage = Manifest::read(init)?.map(|manifest| manifest.stage);
    if let Some(found) = stage.filter(|stage| !INIT_STAGES.contains(stage)) {
        return Err(CheckpointError::Stage { dir: init.to_owned(), found, expected: INIT_STAGES.to_vec() });
    }
    if model.tokenizer.is_none() {
        return Err(CheckpointError::NoTokenizer { dir: init.to_owned() });
    }
    Ok(model)
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
            (Some(init), _) => preview_init(init, base).context("failed to load `recipe.init`")?,
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

    fn stages(mut self, shares: &[Share]) -> Result<Vec<PlannedStage>> {
        let mut stages = Vec::new();
        for step in self.setup.recipe.config.stages().into_iter().filter(|step| step.trains()) {
            let needs = self.stage(step, shares)?.with_context(|| format!("the recipe has no `{step}`"))?;
            stages.push(PlannedStage { step, needs });
        }
        Ok(stages)
    }

    /// What each rank needs; `None` if the recipe has no configuration of the stage.
    fn stage(&mut self, step: Step, shares: &[Share]) -> Result<Option<Vec<Needs>>> {
        let Self { setup, kernels, model } = self;
        let (kernels, trunk, resolver) = (*kernels, setup.trunk, setup.recipe.resolver(step));
        let config = &model.config;
        let unknown = Lengths::unknown(config.max_seq_len);
        // What is generated later is not there yet.
        let is_there = |mut sources: Sources<'_>| {
            sources.iter_mut().all(|(key, files)| {
                resolver.resolve_files(key, files).is_ok() && files.iter().all(|file| file.exists())
            })
        };
        let of_all = |settings: Settings, needs: &dyn Fn(Settings) -> Needs| -> Vec<Needs> {
            shares.iter().map(|&share| needs(settings.of(share))).collect()
        };
        let needs: Option<Result<Vec<Needs>>> = match step {
            Step::Pretrain => setup.configs.pretrain.as_ref().map(|stage| {
                let seq_len = stage.seq_len(config)?;
                Ok(of_all(stage.train.memory(trunk), &|settings| {
                    pretrain::needs(stage, config, seq_len, kernels, settings)
                }))
            }),
            Step::Sft => setup.configs.sft.as_mut().map(|stage| {
                let lengths = if is_there(stage.data.sources_mut()) { sft::lengths(stage, model)? } else { unknown };
                Ok(of_all(stage.train.memory(trunk), &|settings| {
                    sft::needs(stage, config, &lengths, kernels, settings)
                }))
            }),
            Step::RewardModel => setup.configs.reward_model.as_mut().map(|stage| {
                let is_there = setup.recipe.config.collect.is_none() && is_there(stage.data.sources_mut());
                let lengths = if is_there { reward_model::lengths(stage, model)? } else { unknown };
                Ok(of_all(stage.train.memory(trunk), &|settings| {
                    reward_model::needs(stage, config, &lengths, kernels, settings)
                }))
            }),
            Step::Ppo | Step::Rloo => setup.configs.against_scores(step).cloned().map(|mut stage| {
                let lengths = if is_there(stage.data.sources_mut()) { ppo::lengths(&stage, model)? } else { unknown };
                Ok(of_all(stage.memory(trunk), &|settings| {
                    ppo::needs(&stage, model, &[model], &lengths, kernels, settings)
                }))
            }),
            Step::Dpo => setup.configs.dpo.as_mut().map(|stage| {
                let is_there = setup.recipe.config.collect.is_none() && is_there(stage.data.sources_mut());
                let lengths = if is_there { dpo::lengths(stage, model)? } else { unknown };
                Ok(of_all(stage.train.memory(trunk), &|settings| {
                    dpo::needs(stage, config, &lengths, kernels, settings)
                }))
            }),
            Step::World | Step::Tokenizer | Step::Collect | Step::Evaluate => None,
        };
        needs.transpose()
    }
}
