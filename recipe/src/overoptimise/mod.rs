//! `recipe overoptimise`: gold and proxy against the distance from the initial policy, for best-of-n, PPO, RLOO and DPO.
//!
//! A reward model is only a proxy of what is wanted; optimised hard enough, it goes on rising while the gold score falls. The
//! laboratory trains reward models of several sizes, on several numbers of pairs and with several shares of wrong labels,
//! optimises against each, and fits the forms of [`fit`]. [`design`] says what is trained, [`lab`] trains and measures it,
//! [`units`] remembers what is done, [`curves`] makes curves of it, and [`results`] and [`page`] say what came out.
//!
//! # Source
//! Gao, Schulman, Hilton, "Scaling laws for reward model overoptimization", arXiv:2210.10760.

pub mod config;
mod curves;
mod design;
mod fit;
mod lab;
mod page;
mod results;
mod units;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use common::config::Configuration;
use common::data::records::{OnBadRecord, Pair, Prompt, read_pairs};
use common::files::write_whole;
use common::group::Group;
use common::interrupt::Interrupt;
use common::model::params::{Output, parameters};
use common::out_dir::OutLock;
use common::score::Ensemble;
use common::session::Outcome;
use common::stats::Interval;
use dpo::DpoConfig;
use ppo::PpoConfig;
use pretrain::PretrainConfig;
use reward_model::RewardModelConfig;
use sft::SftConfig;

use crate::cli::{ChangeArgs, OveroptimiseArgs, RunArgs};
use crate::collect::PairFiles;
use crate::config::LabelledBy;
use crate::folder::Recipe;
use crate::report::duration;
use crate::run;
use crate::setup::Setup;
use crate::steps::{Progress, Step};
use config::OveroptimiseConfig;
use curves::{Curve, Point, SeedCurve};
use design::{Design, Judge, Policy, Sizes};
use fit::Form;
use lab::{Lab, PoolAnswer, Stopped};
use page::Rendered;
use results::{JudgeResult, Method, NamedCurve, Results};
use units::Units;

/// The laboratory's folder in the output directory.
const DIR: &str = "overoptimise";

/// Carries out `recipe overoptimise`: the recipe's steps up to the pairs, and then everything that is not done yet.
///
/// # Errors
/// If the recipe lacks what the laboratory needs, a step or a training fails, or finished work would be lost.
pub(crate) fn overoptimise(args: &OveroptimiseArgs, interrupt: Interrupt) -> Result<Outcome> {
    let overrides = args.changes.all()?;
    let recipe = Recipe::open(&args.recipe, &args.out, args.data.as_deref(), &overrides, args.seed)?;
    let config = checked(&recipe)?;
    let config = if args.quick { config.quick() } else { config };
    let sizes = sizes_of(&recipe, &config)?;
    check_stages(&recipe, &config)?;
    let _lock = OutLock::take_inside(&args.out)?;
    let steps: Vec<Step> = recipe.config.steps().into_iter().filter(|step| *step <= Step::Collect).collect();
    let run_args = |stages| RunArgs {
        recipe: args.recipe.clone(),
        out: args.out.clone(),
        data: args.data.clone(),
        seed: args.seed,
        stages,
        changes: ChangeArgs { init: None, overrides: overrides.clone() },
        overwrite: args.overwrite,
        tui: false,
        print_config: false,
        runtime: args.runtime.clone(),
    };
    let carry_out = |steps| -> Result<Progress> {
        Ok(run::carry_out(&run_args(steps), recipe.clone(), &Group::alone(), interrupt)?.1)
    };
    let setup = Setup::open(recipe.clone(), &args.runtime)?;
    // The prompts are read before hours of work, though the world may have to write them first.
    let absolute = |path: &Path| std::path::absolute(path).context("the working directory is unknown");
    let of_world = steps.contains(&Step::World) && absolute(&config.prompts)?.starts_with(absolute(&setup.data_dir())?);
    if of_world && !config.prompts.exists() && carry_out(vec![Step::World])? != Progress::Finished {
        return Ok(Outcome::Interrupted);
    }
    Lab::prompts(&config, setup.gold.as_ref().context("the recipe has no `[gold]`")?)?;
    if carry_out(steps)? != Progress::Finished {
        return Ok(Outcome::Interrupted);
    }
    let Some(results) = measure(args, &config, &sizes, &setup, interrupt)? else {
        tracing::info!("stopped");
        return Ok(Outcome::Interrupted);
    };
    say(args, &results)?;
    Ok(Outcome::Finished)
}

/// `[overoptimise]` of the recipe, once it is clear that it can be carried out.
fn checked(recipe: &Recipe) -> Result<OveroptimiseConfig> {
    let Some(config) = &recipe.config.overoptimise else {
        bail!(
            "the recipe `{}` has no `[overoptimise]`\nhint: configs/tiny has one; docs/configuration.md lists its keys",
            recipe.name
        );
    };
    let collect = recipe.config.collect.as_ref();
    ensure!(
        collect.is_some_and(|collect| collect.labels == LabelledBy::Simulated) && recipe.config.gold.is_some(),
        "`[overoptimise]` needs `[gold]`, and `[collect]` with the simulated labeller: it labels pairs by the gold score"
    );
    Ok(config.clone())
}

/// Checks the configuration of every stage as each training will take it, before the first of them.
fn check_stages(recipe: &Recipe, config: &OveroptimiseConfig) -> Result<()> {
    fn check<T: Configuration + Default>(
        recipe: &Recipe,
        step: Step,
        keys: &[String],
        validate: impl FnOnce(&T) -> Result<()>,
    ) -> Result<()> {
        let overrides = [recipe.run_overrides(step)?, keys.to_vec()].concat();
        let config: T = recipe.load(step, &overrides)?;
        validate(&config).with_context(|| {
            let keys = if keys.is_empty() { String::new() } else { format!(" with {}", keys.join(", ")) };
            format!("invalid config `{}`{keys}", recipe.stage_config(step).display())
        })
    }
    check(recipe, Step::RewardModel, &[], RewardModelConfig::validate)?;
    if !config.sizes.is_empty() {
        check(recipe, Step::Sft, &[], SftConfig::validate)?;
    }
    let design = Design::new(config, &Sizes::default(), usize::MAX, false);
    for (_, policy) in design.policies() {
        let (step, keys) = Lab::policy_overrides(config, policy);
        match step {
            Step::Dpo => check(recipe, step, &keys, DpoConfig::validate)?,
            _ => check(recipe, step, &keys, PpoConfig::validate)?,
        }
    }
    Ok(())
}

/// The sizes of further reward models, in order.
fn sizes_of(recipe: &Recipe, config: &OveroptimiseConfig) -> Result<Sizes> {
    if config.sizes.is_empty() {
        return Ok(Sizes::default());
    }
    ensure!(
        recipe.config.stages().contains(&Step::Pretrain) && recipe.config.init.is_none(),
        "`overoptimise.sizes` needs a recipe that pretrains its model\nhint: leave `sizes` out"
    );
    let n_parameters = |overrides: &[String]| -> Result<usize> {
        let overrides = [recipe.run_overrides(Step::Pretrain)?, overrides.to_vec()].concat();
        let pretrain: PretrainConfig = recipe.load(Step::Pretrain, &overrides)?;
        pretrain.validate()?;
        let model = pretrain.model.resolve(pretrain.tokenizer.vocab_size)?;
        Ok(parameters(&model, Output::Logits).map(|parameter| parameter.shape().iter().product::<usize>()).sum())
    };
    let sizes = config.sizes.iter().map(|size| {
        let overrides: Vec<String> = size.split_whitespace().map(|key| format!("model.{key}")).collect();
        let n =
            n_parameters(&overrides).with_context(|| format!("`overoptimise.sizes` has an invalid size, `{size}`"))?;
        Ok((n, overrides))
    });
    let sizes = Sizes::new(sizes.collect::<Result<_>>()?, n_parameters(&[])?);
    for pair in sizes.all.windows(2) {
        ensure!(pair[0].name != pair[1].name, "`overoptimise.sizes` has two sizes of {} parameters", pair[0].name);
    }
    Ok(sizes)
}

/// Does what is not done, and measures; `None` if the user asked to stop.
fn measure(
    args: &OveroptimiseArgs,
    config: &OveroptimiseConfig,
    sizes: &Sizes,
    setup: &Setup,
    interrupt: Interrupt,
) -> Result<Option<Results>> {
    let gold = setup.gold.as_ref().context("the recipe has no `[gold]`")?;
    let collect = setup.recipe.config.collect.as_ref().context("the recipe has no `[collect]`")?;
    let pairs = read_pairs(&PairFiles::in_out(&setup.out).train, OnBadRecord::Fail)?;
    let prompts = Lab::prompts(config, gold)?;
    let too_many: Vec<String> = config.pairs.iter().filter(|&&n| n >= pairs.len()).map(usize::to_string).collect();
    if !too_many.is_empty() {
        tracing::warn!(
            "only {} pairs were collected, so there is no further reward model of {}",
            pairs.len(),
            too_many.join(" or ")
        );
    }
    let design = Design::new(config, sizes, pairs.len(), args.quick);
    let dir = setup.out.join(DIR);
    std::fs::create_dir_all(&dir).with_context(|| format!("failed to make `{}`", dir.display()))?;
    let units = Units::open(&dir, args.overwrite, Lab::n_units(config, &design, prompts.len()))?;
    let mut lab =
        Lab { config, sizes, design: &design, setup, collect, gold, runtime: &args.runtime, interrupt, units };
    let Some((judges, curves, of_sft)) = curves_of(&mut lab, &prompts, &pairs)? else { return Ok(None) };
    let mut results = Results {
        recipe: setup.recipe.name.clone(),
        title: setup.recipe.config.title.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        quick: args.quick,
        seeds: config.seeds.clone(),
        prompts: prompts.len(),
        pool: config.pool,
        pairs: pairs.len(),
        gold: of_sft,
        seconds: lab.units.seconds_of_all(),
        judges,
        curves,
        findings: Vec::new(),
    };
    results.find(&design);
    write_whole(&setup.out.join("overoptimise.json"), serde_json::to_string_pretty(&results)?)?;
    let Rendered { html, figures } = page::render(&results, &design)?;
    write_whole(&setup.out.join("overoptimise.html"), html)?;
    let dir = dir.join("figures");
    std::fs::create_dir_all(&dir).with_context(|| format!("failed to make `{}`", dir.display()))?;
    for (name, svg) in figures {
        write_whole(&dir.join(name), svg)?;
    }
    Ok(Some(results))
}

/// Reward models, curves, and the SFT model's gold score.
type Measured = (Vec<JudgeResult>, Vec<NamedCurve>, Interval);

/// Every reward model and every curve; `None` if the user asked to stop.
fn curves_of(lab: &mut Lab<'_>, prompts: &[Prompt], pairs: &[Pair]) -> Result<Option<Measured>> {
    if lab.sizes()? == Outcome::Interrupted {
        return Ok(None);
    }
    let Stopped::Continue(pool) = lab.pool(prompts)? else { return Ok(None) };
    let golds: Vec<f64> = pool.iter().map(|answer| answer.gold).collect();
    let n = lab.config.pool;
    let of_prompts: Vec<f64> = golds.chunks(n).map(|golds| golds.iter().sum::<f64>() / n as f64).collect();
    let of_sft = Interval::of(&of_prompts).context("there is no prompt")?;
    let (mut judges, mut curves) = (Vec::new(), Vec::new());
    for judge in lab.design.judges() {
        let Some(scores) = scores_of(lab, judge, prompts, pairs, &pool)? else { return Ok(None) };
        let accuracy =
            scores.iter().filter_map(|scores| curves::accuracy(&golds, scores, n, lab.collect.least_difference));
        judges.push(JudgeResult { judge: judge.clone(), accuracy: accuracy.collect() });
        let seeds = lab.config.seeds.iter().zip(&scores);
        let best = seeds.map(|(&seed, scores)| SeedCurve { seed, points: curves::best_of_n(&golds, scores, n) });
        let mut push = |method, curve: Option<Curve>| {
            curves.extend(curve.map(|curve| NamedCurve { method, judge: judge.clone(), curve }));
        };
        push(Method::BestOfN, Curve::new(Form::BestOfN, best.collect(), false));
        if scores.len() > 1 && *judge == lab.design.centre {
            for ensemble in Ensemble::ALL {
                let points = curves::best_of_n(&golds, &curves::ensemble_scores(ensemble, &scores), n);
                let one = vec![SeedCurve { seed: lab.config.seeds[0], points }];
                push(Method::Ensemble(ensemble), Curve::new(Form::BestOfN, one, false));
            }
        }
    }
    let Some(of_policies) = policies_of(lab, pairs, of_sft.mean)? else { return Ok(None) };
    curves.extend(of_policies);
    Ok(Some((judges, curves, of_sft)))
}

/// The scores by a reward model of every seed.
fn scores_of(
    lab: &mut Lab<'_>,
    judge: &Judge,
    prompts: &[Prompt],
    pairs: &[Pair],
    pool: &[PoolAnswer],
) -> Result<Option<Vec<Vec<f64>>>> {
    let mut all = Vec::new();
    for &seed in &lab.config.seeds {
        if lab.reward_model(judge, seed, pairs)? == Outcome::Interrupted {
            return Ok(None);
        }
        let Stopped::Continue(scores) = lab.scores(judge, seed, prompts, pool)? else { return Ok(None) };
        all.push(scores);
    }
    Ok(Some(all))
}

/// Curves of the policies that are trained; `None` if the user asked to stop.
fn policies_of(lab: &mut Lab<'_>, pairs: &[Pair], gold_of_sft: f64) -> Result<Option<Vec<NamedCurve>>> {
    let mut found: Vec<(Method, Judge, Vec<SeedCurve>)> = Vec::new();
    for (judge, policy) in lab.design.policies() {
        let method = match policy {
            Policy::Ppo(kl_coef) => Method::Ppo(kl_coef),
            Policy::Rloo(kl_coef) => Method::Rloo(kl_coef),
            Policy::Dpo(_) => Method::Dpo,
        };
        for &seed in &lab.config.seeds {
            let Stopped::Continue(points) = lab.policy(judge, policy, seed, pairs, gold_of_sft)? else {
                return Ok(None);
            };
            let place = found.iter().position(|(m, j, _)| *m == method && j == judge).unwrap_or_else(|| {
                found.push((method, judge.clone(), Vec::new()));
                found.len() - 1
            });
            let seeds = &mut found[place].2;
            match seeds.iter_mut().find(|curve| curve.seed == seed) {
                Some(curve) => curve.points.extend(points),
                None => seeds.push(SeedCurve { seed, points }),
            }
        }
    }
    centre(&mut found);
    let curves = found.into_iter().filter_map(|(method, judge, mut seeds)| {
        if method == Method::Dpo {
            for curve in &mut seeds {
                curve.points.sort_by(|a, b| b.at.total_cmp(&a.at));
            }
        }
        Some(NamedCurve { method, judge, curve: Curve::new(Form::Rl, seeds, method != Method::Dpo)? })
    });
    Ok(Some(curves.collect()))
}

/// Makes gains of the gold scores of PPO and RLOO: the first step of each samples from the initial policy.
fn centre(found: &mut [(Method, Judge, Vec<SeedCurve>)]) {
    let is_rl = |method: &Method| matches!(method, Method::Ppo(_) | Method::Rloo(_));
    let of_rl = || found.iter().filter(|(method, ..)| is_rl(method)).flat_map(|(_, _, seeds)| seeds);
    let first: Vec<f64> = of_rl().filter_map(|curve| curve.points.first()).map(|point| point.gold).collect();
    let mean = first.iter().sum::<f64>() / first.len().max(1) as f64;
    let points = found.iter_mut().filter(|(method, ..)| is_rl(method)).flat_map(|(_, _, seeds)| seeds);
    points.flat_map(|curve| &mut curve.points).for_each(|point: &mut Point| point.gold -= mean);
}

/// The result on stdout.
fn say(args: &OveroptimiseArgs, results: &Results) -> Result<()> {
    let mut text = format!(
        "gold score {:.3} before, over {} answers to {} prompts each\n",
        results.gold.mean, results.pool, results.prompts
    );
    for NamedCurve { method, judge, curve } in &results.curves {
        writeln!(text, "{}, {}: {}", method.title(), judge.title(), results::describe(curve))?;
    }
    for finding in &results.findings {
        writeln!(text, "{}: {} {}", finding.verdict, finding.claim, finding.numbers)?;
    }
    writeln!(text, "{} of work; report: {}", duration(results.seconds), args.out.join("overoptimise.html").display())?;
    write!(std::io::stdout(), "{text}").context("failed to write the result")
}
