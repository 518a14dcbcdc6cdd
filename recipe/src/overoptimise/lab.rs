//! The trainings and measurements, each carried out once.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use common::checkpoint::Checkpoint;
use common::cli::{RuntimeArgs, StageArgs};
use common::config::Configuration;
use common::conversation::{Message, encode_prompt};
use common::data::records::{OnBadRecord, Pair, Prompt, read_pairs, read_prompts};
use common::files::write_whole;
use common::generate::SamplingConfig;
use common::group::Group;
use common::interrupt::Interrupt;
use common::metrics::{MetricsLog, names};
use common::rng::Streams;
use common::score::{Ensemble, FrozenModels, Prompts, Response, Sampling, TooLong, score_rows};
use common::session::Outcome;
use dpo::DpoConfig;
use ppo::PpoConfig;
use pretrain::PretrainConfig;
use reward_model::RewardModelConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sft::SftConfig;

use super::config::OveroptimiseConfig;
use super::curves::Point;
use super::design::{Design, Judge, Policy, Size, Sizes};
use super::units::Units;
use crate::answers::PromptSampler;
use crate::collect::PairFiles;
use crate::config::{BasePrompt, CollectConfig};
use crate::gold::GoldScorer;
use crate::inputs::Inputs;
use crate::setup::Setup;
use crate::steps::Step;
use crate::training::{Start, train_stage};

/// Sampling streams from here on belong to the pools of answers.
const FIRST_ROW: u64 = 1 << 52;

/// About how many answers are sampled between two places where the work can be broken off.
const ANSWERS_OF_A_PART: usize = 4096;

/// Everything that the work needs.
pub(crate) struct Lab<'a> {
    /// What is measured.
    pub config: &'a OveroptimiseConfig,
    /// The sizes of further reward models.
    pub sizes: &'a Sizes,
    /// Which trainings that takes.
    pub design: &'a Design,
    /// The recipe, of which the steps up to the pairs are done.
    pub setup: &'a Setup,
    /// Its pairs.
    pub collect: &'a CollectConfig,
    /// The gold score.
    pub gold: &'a GoldScorer,
    /// On what to run.
    pub runtime: &'a RuntimeArgs,
    /// Whether to stop.
    pub interrupt: Interrupt,
    /// What is done.
    pub units: Units,
}

/// An answer of the SFT model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PoolAnswer {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Whether it ended by itself.
    pub ended: bool,
    /// Its gold score.
    pub gold: f64,
}

/// `Break` where the user asked to stop.
pub(crate) type Stopped<T> = std::ops::ControlFlow<(), T>;

impl Lab<'_> {
    /// Parts of the work of this design.
    pub(crate) fn n_units(config: &OveroptimiseConfig, design: &Design, n_prompts: usize) -> usize {
        let n_policies = design.policies().count();
        let n_points = design.policies().filter(|(_, policy)| matches!(policy, Policy::Dpo(_))).count();
        let per_seed = 2 * design.judges().count() + n_policies + n_points;
        2 * config.sizes.len() + n_prompts.div_ceil(prompts_of_a_part(config.pool)) + config.seeds.len() * per_seed
    }

    /// The held-out prompts.
    pub(crate) fn prompts(config: &OveroptimiseConfig, gold: &GoldScorer) -> Result<Vec<Prompt>> {
        let mut prompts = read_prompts(&config.prompts, OnBadRecord::Fail)?;
        if config.n_prompts > 0 {
            prompts.truncate(config.n_prompts);
        }
        if let Some(prompt) = prompts.iter().find(|prompt| !gold.understands(&prompt.text)) {
            bail!("the gold score is not defined for answers to `{}`\nhint: leave such prompts out", prompt.text);
        }
        ensure!(!prompts.is_empty(), "`{}` has no prompt", config.prompts.display());
        Ok(prompts)
    }

    /// The language models of other sizes that reward models start from.
    pub(crate) fn sizes(&mut self) -> Result<Outcome> {
        for Size { name, overrides } in &self.sizes.all {
            let pretrained = format!("models/{name}/pretrain");
            for (step, unit, overrides) in [
                (Step::Pretrain, pretrained.clone(), overrides.clone()),
                (Step::Sft, format!("models/{name}/sft"), Vec::new()),
            ] {
                let inits = [self.units.path(&pretrained)];
                let inits = if step == Step::Sft { &inits[..] } else { &[] };
                if self.train(&unit, step, overrides, inits)? == Outcome::Interrupted {
                    return Ok(Outcome::Interrupted);
                }
            }
        }
        Ok(Outcome::Finished)
    }

    /// The SFT model's answers, `pool` to a prompt side by side.
    pub(crate) fn pool(&mut self, prompts: &[Prompt]) -> Result<Stopped<Vec<PoolAnswer>>> {
        let sft = self.setup.dir(Step::Sft);
        let n = prompts_of_a_part(self.config.pool);
        let mut answers = Vec::new();
        for (part, chunk) in prompts.chunks(n).enumerate() {
            let name = format!("pool-{}x{}/part-{part}.jsonl", prompts.len(), self.config.pool);
            let mut inputs = Inputs::default();
            inputs.weights("sft", &sft)?;
            inputs.file("overoptimise.prompts", &self.config.prompts)?;
            inputs.set("recipe.seed", self.setup.recipe.config.seed.to_string());
            inputs.set("recipe.collect.temperature", self.collect.temperature.to_string());
            inputs.set("recipe.collect.max_tokens", self.collect.max_tokens.to_string());
            inputs.set("precision", self.setup.precision);
            let path = self.units.path(&name);
            let (this, pool) = (SamplingJob::of(self), self.config.pool);
            let first_row = FIRST_ROW + (part * n * pool) as u64;
            let outcome = self.units.run(&name, inputs, |_| this.sample(chunk, pool, first_row, &path))?;
            if outcome == Outcome::Interrupted {
                return Ok(Stopped::Break(()));
            }
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
            for line in text.lines() {
                let answer: PoolAnswer = serde_json::from_str(line)
                    .with_context(|| format!("`{}` is damaged\nhint: delete it", path.display()))?;
                answers.push(answer);
            }
        }
        ensure!(
            answers.len() == prompts.len() * self.config.pool,
            "the pools of answers are not whole\nhint: delete them"
        );
        Ok(Stopped::Continue(answers))
    }

    /// Trains a reward model.
    pub(crate) fn reward_model(&mut self, judge: &Judge, seed: u64, pairs: &[Pair]) -> Result<Outcome> {
        let labels = self.labels(judge, seed, pairs, "train")?;
        let val = read_pairs(&PairFiles::in_out(&self.setup.out).val, OnBadRecord::Fail)?;
        let val = self.labels(&Judge { pairs: None, ..judge.clone() }, seed, &val, "val")?;
        let n = judge.pairs.unwrap_or(pairs.len()).min(pairs.len());
        let config: RewardModelConfig = self.load(Step::RewardModel, &[])?;
        let mut overrides = vec![
            format!("seed={seed}"),
            path_override("data.train", &labels)?,
            path_override("data.val", &val)?,
            "run.keep_best=true".to_owned(),
        ];
        if config.train.steps.is_none() {
            let a_pass = n.div_ceil(config.train.batch_size).max(1);
            let epochs = (config.train.epochs as usize).max(self.config.least_steps.div_ceil(a_pass));
            let eval_every = (config.run.eval_every as usize).min((a_pass * epochs / 8).max(1));
            overrides.extend([format!("train.epochs={epochs}"), format!("run.eval_every={eval_every}")]);
        }
        let init = match &judge.size {
            Some(size) => self.units.path(&format!("models/{size}/sft")),
            None => self.setup.dir(Step::Sft),
        };
        self.train(&reward_model_name(judge, seed), Step::RewardModel, overrides, &[init])
    }

    /// The scores that a reward model gives the pool.
    pub(crate) fn scores(
        &mut self,
        judge: &Judge,
        seed: u64,
        prompts: &[Prompt],
        pool: &[PoolAnswer],
    ) -> Result<Stopped<Vec<f64>>> {
        let name = format!("scores-{}x{}/{}-{seed}.json", prompts.len(), self.config.pool, judge.name());
        let model = self.units.path(&reward_model_name(judge, seed));
        let mut inputs = Inputs::default();
        inputs.weights("reward-model", &model)?;
        for part in 0..prompts.len().div_ceil(prompts_of_a_part(self.config.pool)) {
            let part = format!("pool-{}x{}/part-{part}.jsonl", prompts.len(), self.config.pool);
            inputs.file(part.clone(), &self.units.path(&part))?;
        }
        let path = self.units.path(&name);
        let (runtime, batch_size, per_prompt) = (self.runtime, self.collect.batch_size, self.config.pool);
        let work = |_| -> Result<Outcome> {
            let mut checkpoint = Checkpoint::open(&model)?;
            let scalar = runtime.open()?.take_scalar(&mut checkpoint)?;
            let tokenizer = checkpoint.require_tokenizer()?;
            let mut rows = Vec::with_capacity(pool.len());
            for (prompt, answers) in prompts.iter().zip(pool.chunks(per_prompt)) {
                let ids = encode_prompt(tokenizer, &prompt.messages)?;
                rows.extend(answers.iter().map(|answer| [&ids[..], &answer.ids].concat()));
            }
            let context = scalar.config().max_seq_len;
            if let Some(row) = rows.iter().find(|row| row.len() > context) {
                bail!("an answer and its prompt have {} tokens, but the reward model takes {context}", row.len());
            }
            let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
            let scores = score_rows(&scalar, &rows, batch_size)?;
            write_whole(&path, serde_json::to_string(&scores)?)?;
            Ok(Outcome::Finished)
        };
        if self.units.run(&name, inputs, work)? == Outcome::Interrupted || self.interrupt.requested() {
            return Ok(Stopped::Break(()));
        }
        let path = self.units.path(&name);
        read_json(&path).map(Stopped::Continue)
    }

    /// The stage that trains a policy, and the keys that make it this one.
    pub(crate) fn policy_overrides(config: &OveroptimiseConfig, policy: Policy) -> (Step, Vec<String>) {
        let against_scores = |kl_coef: f64| {
            let steps = config.policy_steps;
            vec![format!("train.steps={steps}"), "run.log_every=1".to_owned(), format!("ppo.kl_coef={kl_coef}")]
        };
        match policy {
            Policy::Ppo(kl_coef) => (Step::Ppo, against_scores(kl_coef)),
            Policy::Rloo(kl_coef) => {
                let estimator = "ppo.estimator=\"rloo\"".to_owned();
                let samples = format!("ppo.samples_per_prompt={}", config.rloo_samples);
                (Step::Ppo, [against_scores(kl_coef), vec![estimator, samples]].concat())
            }
            Policy::Dpo(beta) => (Step::Dpo, vec![format!("dpo.beta={beta}")]),
        }
    }

    /// Trains a policy and measures it; `gold` is the initial policy's mean on the held-out prompts. None of RLOO's and PPO's gold
    /// scores is centred yet.
    pub(crate) fn policy(
        &mut self,
        judge: &Judge,
        policy: Policy,
        seed: u64,
        pairs: &[Pair],
        gold: f64,
    ) -> Result<Stopped<Vec<Point>>> {
        let name = format!("{}/{}-{seed}", policy.name(), judge.name());
        let reward_model = self.units.path(&reward_model_name(judge, seed));
        let sft = self.setup.dir(Step::Sft);
        let mut overrides = vec![format!("seed={seed}")];
        let (step, keys) = Self::policy_overrides(self.config, policy);
        overrides.extend(keys);
        let inits = if step == Step::Dpo {
            let labels = self.labels(judge, seed, pairs, "train")?;
            overrides.push(path_override("data.train", &labels)?);
            vec![sft]
        } else {
            vec![sft, reward_model.clone()]
        };
        if self.train(&name, step, overrides, &inits)? == Outcome::Interrupted {
            return Ok(Stopped::Break(()));
        }
        let dir = self.units.path(&name);
        match policy {
            Policy::Dpo(beta) => self.answers_of(&name, &dir, &reward_model, beta, gold),
            Policy::Ppo(_) | Policy::Rloo(_) => Ok(Stopped::Continue(of_metrics(&dir)?)),
        }
    }

    /// What a policy's answers to the held-out prompts come to.
    fn answers_of(
        &mut self,
        name: &str,
        dir: &Path,
        reward_model: &Path,
        beta: f64,
        gold_of_sft: f64,
    ) -> Result<Stopped<Vec<Point>>> {
        let sft = self.setup.dir(Step::Sft);
        let mut inputs = Inputs::default();
        inputs.weights("policy", dir)?;
        inputs.weights("sft", &sft)?;
        inputs.weights("reward-model", reward_model)?;
        inputs.file("overoptimise.prompts", &self.config.prompts)?;
        inputs.set("overoptimise.n_prompts", self.config.n_prompts.to_string());
        inputs.set("overoptimise.samples", self.config.samples.to_string());
        inputs.set("recipe.collect.temperature", self.collect.temperature.to_string());
        inputs.set("recipe.collect.max_tokens", self.collect.max_tokens.to_string());
        let unit = format!("{name}.json");
        let path = self.units.path(&unit);
        let (config, collect, runtime, gold) = (self.config, self.collect, self.runtime, self.gold);
        let seed = self.setup.recipe.config.seed;
        let work = |_| -> Result<Outcome> {
            let policy = Checkpoint::open(dir)?;
            let (reference, judge) = (Checkpoint::open(&sft)?, Checkpoint::open(reward_model)?);
            let tokenizer = policy.require_tokenizer()?;
            let context = judge.model_config().max_seq_len.min(policy.model_config().max_seq_len);
            let files = std::slice::from_ref(&config.prompts);
            let max_tokens = collect.max_tokens;
            let mut prompts =
                Prompts::read(files, tokenizer, context, max_tokens, OnBadRecord::Fail.into(), TooLong::Fail)?.encoded;
            if config.n_prompts > 0 {
                prompts.truncate(config.n_prompts);
            }
            let prompts: Vec<_> =
                prompts.into_iter().flat_map(|prompt| std::iter::repeat_n(prompt, config.samples)).collect();
            let open = runtime.open()?;
            let score = |prompt: &str, answer: &str| gold.score(prompt, answer);
            let frozen = FrozenModels {
                reference: open.gpt(&reference)?,
                reward_model: open.scalar(&judge)?,
                further: Vec::new(),
                ensemble: Ensemble::default(),
                gold: Some(&score),
                batch_size: collect.batch_size,
            };
            let streams = Streams::new(seed).of("overoptimise");
            let sampling = Sampling::new(collect.temperature, max_tokens, streams, tokenizer, collect.batch_size);
            let responses = sampling.answer(&open.gpt(&policy)?, &prompts, 0)?;
            let rollouts = frozen.rollouts(&prompts, responses, collect.temperature)?;
            let n = rollouts.len() as f64;
            let point = Point {
                at: beta,
                kl: rollouts.iter().map(common::score::Rollout::kl).sum::<f64>() / n,
                gold: rollouts.iter().filter_map(|rollout| rollout.gold).sum::<f64>() / n,
                proxy: rollouts.iter().map(|rollout| f64::from(rollout.score)).sum::<f64>() / n,
            };
            write_whole(&path, serde_json::to_string(&point)?)?;
            Ok(Outcome::Finished)
        };
        if self.units.run(&unit, inputs, work)? == Outcome::Interrupted || self.interrupt.requested() {
            return Ok(Stopped::Break(()));
        }
        let path = self.units.path(&unit);
        let point: Point = read_json(&path)?;
        Ok(Stopped::Continue(vec![Point { gold: point.gold - gold_of_sft, ..point }]))
    }

    /// Writes the pairs of a reward model, in an order of the seed's: labelled by the gold score, and so many of them wrongly.
    fn labels(&self, judge: &Judge, seed: u64, pairs: &[Pair], part: &str) -> Result<PathBuf> {
        let streams = Streams::new(seed).of("overoptimise/labels").of(part);
        let order = streams.get("order", 0).permutation(pairs.len());
        let mut text = String::new();
        for &i in order.iter().take(judge.pairs.unwrap_or(pairs.len())) {
            let pair = &pairs[i];
            let asked = pair.prompt.last().map_or("", |message| message.content.as_str());
            let of = |answer: &str| self.gold.score(asked, answer).context("a collected pair has no gold score");
            let (chosen, rejected) = (of(&pair.chosen)?, of(&pair.rejected)?);
            // The same number for every share, so that more wrong labels are those and further ones.
            let is_wrong = streams.get("wrong", i as u64).uniform() < judge.wrong_labels;
            let keeps = (chosen > rejected) != is_wrong;
            let (chosen, rejected) =
                if keeps { (&pair.chosen, &pair.rejected) } else { (&pair.rejected, &pair.chosen) };
            writeln!(text, "{}", json!({ "prompt": pair.prompt, "chosen": chosen, "rejected": rejected }))?;
        }
        let judge = Judge { size: None, ..judge.clone() };
        let path = self.units.path(&format!("labels/{}-{seed}.{part}.jsonl", judge.name()));
        let dir = self.units.path("labels");
        std::fs::create_dir_all(&dir).with_context(|| format!("failed to make `{}`", dir.display()))?;
        write_whole(&path, text)?;
        std::path::absolute(path).context("the working directory is unknown")
    }

    fn load<T: Configuration + Default>(&self, step: Step, overrides: &[String]) -> Result<T> {
        let all = [self.setup.recipe.run_overrides(step)?, overrides.to_vec()].concat();
        self.setup.recipe.load(step, &all)
    }

    /// Trains a stage in the laboratory, from the models `inits`.
    fn train(&mut self, name: &str, step: Step, overrides: Vec<String>, inits: &[PathBuf]) -> Result<Outcome> {
        let recipe = &self.setup.recipe;
        let resolver = recipe.resolver(step);
        let mut inputs = Inputs::default();
        match step {
            Step::Pretrain => {
                inputs.stage_config("pretrain", &self.load::<PretrainConfig>(step, &overrides)?, &resolver)?;
                inputs.file("tokenizer.json", &self.setup.dir(Step::Tokenizer).join("tokenizer.json"))?;
            }
            Step::Sft => inputs.stage_config("sft", &self.load::<SftConfig>(step, &overrides)?, &resolver)?,
            Step::RewardModel => {
                inputs.stage_config("reward-model", &self.load::<RewardModelConfig>(step, &overrides)?, &resolver)?;
            }
            Step::Dpo => inputs.stage_config("dpo", &self.load::<DpoConfig>(step, &overrides)?, &resolver)?,
            _ => inputs.stage_config("ppo", &self.load::<PpoConfig>(step, &overrides)?, &resolver)?,
        }
        for (name, init) in ["initial model", "reward model"].into_iter().zip(inits) {
            inputs.weights(name, init)?;
        }
        inputs.set("precision", self.setup.precision);
        let all = [recipe.run_overrides(step)?, overrides].concat();
        let stage = |resume: bool| StageArgs {
            config: recipe.stage_config(step),
            out: self.units.path(name),
            resume,
            overwrite: !resume,
            overrides: all.clone(),
            data: recipe.data.clone(),
            tui: false,
            runtime: self.runtime.among_own(inits.iter().map(|dir| &**dir)),
        };
        let mut inits = inits.iter().cloned();
        let start = Start {
            tokenizer: (step == Step::Pretrain).then(|| self.setup.dir(Step::Tokenizer)),
            init: inits.next(),
            reward_model: inits.next(),
        };
        let (interrupt, gold, stages) = (self.interrupt, self.gold, [stage(false), stage(true)]);
        let work = |goes_on: bool| {
            let [fresh, resumed] = stages;
            let stage = if goes_on { resumed } else { fresh };
            train_stage(step, start, stage, Some(gold), &Group::alone(), interrupt)
        };
        self.units.run(name, inputs, work)
    }
}

/// What sampling a part of the pool needs.
struct SamplingJob<'a> {
    setup: &'a Setup,
    collect: &'a CollectConfig,
    gold: &'a GoldScorer,
    runtime: &'a RuntimeArgs,
    interrupt: Interrupt,
}

impl<'a> SamplingJob<'a> {
    fn of(lab: &Lab<'a>) -> Self {
        let Lab { setup, collect, gold, runtime, interrupt, .. } = *lab;
        Self { setup, collect, gold, runtime, interrupt }
    }

    /// Writes `pool` answers to each of `prompts`.
    fn sample(&self, prompts: &[Prompt], pool: usize, first_row: u64, path: &Path) -> Result<Outcome> {
        let dir = self.setup.dir(Step::Sft);
        let mut checkpoint = Checkpoint::open_with(&dir, self.setup.opening(&dir))?;
        let gpt = self.runtime.open()?.take_gpt(&mut checkpoint)?;
        let sampler = PromptSampler {
            gpt: &gpt,
            tokenizer: checkpoint.require_tokenizer()?,
            form: BasePrompt::Chat,
            sampling: SamplingConfig {
                temperature: self.collect.temperature,
                max_tokens: self.collect.max_tokens,
                ..SamplingConfig::default()
            },
            batch_size: self.collect.batch_size,
        };
        let repeated: Vec<Vec<Message>> =
            prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt.messages.clone(), pool)).collect();
        let streams = Streams::new(self.setup.recipe.config.seed);
        let Some(answers) = sampler.answer(&repeated, streams, first_row, "sampling the pool", self.interrupt)? else {
            return Ok(Outcome::Interrupted);
        };
        let mut text = String::new();
        for (prompt, answers) in prompts.iter().zip(answers.chunks(pool)) {
            for Response { ids, text: answer, ended, .. } in answers {
                let gold = self.gold.score(&prompt.text, answer.trim()).context("an answer has no gold score")?;
                writeln!(text, "{}", json!({ "ids": ids, "ended": ended, "gold": gold }))?;
            }
        }
        write_whole(path, text)?;
        Ok(Outcome::Finished)
    }
}

/// Prompts whose answers are sampled without a break.
fn prompts_of_a_part(pool: usize) -> usize {
    (ANSWERS_OF_A_PART / pool.max(1)).max(1)
}

fn reward_model_name(judge: &Judge, seed: u64) -> String {
    format!("reward-models/{}-{seed}", judge.name())
}

fn path_override(key: &str, path: &Path) -> Result<String> {
    let path = std::path::absolute(path).context("the working directory is unknown")?;
    Ok(format!("{key}=[{}]", toml::Value::String(path.display().to_string())))
}

/// What the laboratory wrote before.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("failed to read `{}`", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("`{}` is damaged\nhint: delete it", path.display()))
}

/// Where a policy was at each of its steps, on the answers that the step samples: divergence, gold and proxy are of one policy.
fn of_metrics(dir: &Path) -> Result<Vec<Point>> {
    let log = MetricsLog::read(dir)?;
    let series = |name| log.series(name);
    let (kl, gold, score) = (series(names::OBJECTIVE_KL), series(names::GOLD_SCORE), series(names::OBJECTIVE_SCORE));
    ensure!(
        !kl.is_empty() && kl.len() == gold.len() && kl.len() == score.len(),
        "the metrics in `{}` lack steps\nhint: delete that directory",
        dir.display()
    );
    let steps = kl.into_iter().zip(gold).zip(score);
    Ok(steps.map(|(((step, kl), (_, gold)), (_, proxy))| Point { at: step, kl, gold, proxy }).collect())
}
