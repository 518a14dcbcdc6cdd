//! A recipe made ready to run: every configuration read and checked, and what each step depends on.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use common::checkpoint::{AdapterPreview, Manifest, Opening, is_adapter};
use common::cli::RuntimeArgs;
use common::config::{self, Configuration};
use common::kernels::TrunkPrecision;
use common::model::LoraConfig;
use dpo::DpoConfig;
use ppo::{Estimator, PpoConfig};
use pretrain::PretrainConfig;
use reward_model::RewardModelConfig;
use sft::SftConfig;

use crate::collect::PairFiles;
use crate::config::{CollectConfig, EvaluateConfig};
use crate::folder::Recipe;
use crate::gold::{GoldConfig, GoldScorer};
use crate::inputs::Inputs;
use crate::steps::Step;
use toy::WorldConfig;

/// The configurations of the stages in a recipe, valid each by itself.
#[derive(Default)]
pub struct StageConfigs {
    /// pretrain.toml
    pub pretrain: Option<PretrainConfig>,
    /// sft.toml
    pub sft: Option<SftConfig>,
    /// reward-model.toml
    pub reward_model: Option<RewardModelConfig>,
    /// ppo.toml
    pub ppo: Option<PpoConfig>,
    /// rloo.toml, a configuration of PPO with another estimator
    pub rloo: Option<PpoConfig>,
    /// dpo.toml
    pub dpo: Option<DpoConfig>,
}

impl StageConfigs {
    /// Reads the configuration of every stage as `recipe run` takes it.
    ///
    /// # Errors
    /// If one is not valid.
    pub fn load(recipe: &Recipe) -> Result<Self> {
        let mut configs = Self::default();
        for step in recipe.config.stages() {
            let overrides = recipe.run_overrides(step)?;
            match step {
                Step::Pretrain => configs.pretrain = Some(load(recipe, step, &overrides, PretrainConfig::validate)?),
                Step::Sft => configs.sft = Some(load(recipe, step, &overrides, SftConfig::validate)?),
                Step::RewardModel => {
                    configs.reward_model = Some(load(recipe, step, &overrides, RewardModelConfig::validate)?);
                }
                Step::Ppo => configs.ppo = Some(load(recipe, step, &overrides, validate_ppo)?),
                Step::Rloo => configs.rloo = Some(load(recipe, step, &overrides, validate_rloo)?),
                Step::Dpo => configs.dpo = Some(load(recipe, step, &overrides, DpoConfig::validate)?),
                _ => {}
            }
        }
        Ok(configs)
    }

    /// [`RuntimeArgs::check_trunk`] of every stage.
    fn check_trunk(&self, runtime: &RuntimeArgs) -> Result<()> {
        for (step, is_there) in [
            (Step::Pretrain, self.pretrain.is_some()),
            (Step::Sft, self.sft.is_some()),
            (Step::RewardModel, self.reward_model.is_some()),
            (Step::Ppo, self.ppo.is_some()),
            (Step::Rloo, self.rloo.is_some()),
            (Step::Dpo, self.dpo.is_some()),
        ] {
            if is_there {
                let checked = runtime.check_trunk(self.lora(step));
                checked.with_context(|| format!("the step `{step}` cannot run"))?;
            }
        }
        Ok(())
    }

    /// The adapters that a step trains, where it trains no weights.
    pub fn lora(&self, step: Step) -> Option<&LoraConfig> {
        match step {
            Step::Sft => self.sft.as_ref()?.lora.as_ref(),
            Step::RewardModel => self.reward_model.as_ref()?.lora.as_ref(),
            Step::Ppo => self.ppo.as_ref()?.lora.as_ref(),
            Step::Rloo => self.rloo.as_ref()?.lora.as_ref(),
            Step::Dpo => self.dpo.as_ref()?.lora.as_ref(),
            _ => None,
        }
    }

    /// The configuration of a step that trains a policy against the reward model.
    pub fn against_scores(&self, step: Step) -> Option<&PpoConfig> {
        match step {
            Step::Ppo => self.ppo.as_ref(),
            Step::Rloo => self.rloo.as_ref(),
            _ => None,
        }
    }
}

fn load<T: Configuration + Default>(
    recipe: &Recipe,
    step: Step,
    overrides: &[String],
    validate: impl FnOnce(&T) -> Result<()>,
) -> Result<T> {
    let config: T = recipe.load(step, overrides)?;
    validate(&config).with_context(|| format!("invalid config `{}`", recipe.stage_config(step).display()))?;
    Ok(config)
}

/// A recipe has one reward model.
fn validate_ppo(config: &PpoConfig) -> Result<()> {
    config.validate()?;
    if let Some(ensemble) = config.ppo.ensemble {
        bail!(
            "`ppo.ensemble` is \"{ensemble}\", but a recipe trains one reward model\n\
             hint: leave it out, or run `ppo train` with a `--reward-model` for each"
        );
    }
    Ok(())
}

/// PPO with a value model is the stage `ppo`.
fn validate_rloo(config: &PpoConfig) -> Result<()> {
    validate_ppo(config)?;
    ensure!(
        config.ppo.estimator != Estimator::Gae,
        "`ppo.estimator` is \"gae\", which is the stage `ppo`; expected \"rloo\" or \"grpo\""
    );
    Ok(())
}

/// A recipe with all its configurations, and where its results go.
pub struct Setup {
    /// The recipe.
    pub recipe: Recipe,
    /// The output directory.
    pub out: PathBuf,
    /// The gold scorer, where the recipe has one.
    pub gold: Option<GoldScorer>,
    /// Float type of the computations, by name.
    pub precision: &'static str,
    /// Base of the initial model, if that is an adapter, in place of the one that it names.
    pub adapter_base: Option<PathBuf>,
    /// Float type of weights that are not trained.
    pub trunk: TrunkPrecision,
    /// Of the stages in the recipe.
    pub configs: StageConfigs,
}

impl Setup {
    /// Reads and checks the configuration of every stage of `recipe`.
    ///
    /// # Errors
    /// If a configuration is not valid, a stage would train the weights that `runtime` wants in bf16, it names a base though
    /// nothing is an adapter, or the gold scorer's words cannot be read.
    pub fn open(recipe: Recipe, runtime: &RuntimeArgs) -> Result<Self> {
        let gold = recipe.config.gold.as_ref().map(GoldConfig::open).transpose();
        let gold = gold.context("failed to open the gold scorer")?;
        let configs = StageConfigs::load(&recipe)?;
        configs.check_trunk(runtime)?;
        let (precision, trunk) = (runtime.precision.name(), runtime.trunk);
        let adapter_base = runtime.base().map(Path::to_owned);
        let setup = Self { gold, out: recipe.out.clone(), precision, adapter_base, trunk, configs, recipe };
        let own = setup.recipe.config.stages().into_iter().chain([Step::Sft, Step::RewardModel]);
        let own: Vec<PathBuf> = own.map(|step| setup.dir(step)).filter(|dir| is_adapter(dir)).collect();
        runtime.check_base(setup.recipe.config.init.iter().chain(&own).map(|dir| &**dir))?;
        Ok(setup)
    }

    /// How the initial model is opened.
    pub fn opening_init(&self) -> Opening<'_> {
        Opening { base: self.adapter_base.as_deref(), trunk: self.trunk }
    }

    /// How the recipe's own checkpoint in `dir` is opened: the base that was given counts where its own has moved.
    pub fn opening(&self, dir: &Path) -> Opening<'_> {
        Opening { base: self.adapter_base.as_deref().filter(|_| AdapterPreview::lacks_base(dir)), trunk: self.trunk }
    }

    /// The initial model and the data files of all steps, as far as they are there.
    pub fn files_read(&self) -> Vec<PathBuf> {
        let StageConfigs { pretrain, sft, reward_model, ppo, rloo, dpo } = &self.configs;
        let sources = [
            (Step::Pretrain, pretrain.as_ref().map(|config| config.data.sources())),
            (Step::Sft, sft.as_ref().map(|config| config.data.sources())),
            (Step::RewardModel, reward_model.as_ref().map(|config| config.data.sources())),
            (Step::Ppo, ppo.as_ref().map(PpoConfig::sources)),
            (Step::Rloo, rloo.as_ref().map(PpoConfig::sources)),
            (Step::Dpo, dpo.as_ref().map(|config| config.data.sources())),
        ];
        let mut files: Vec<PathBuf> = self.recipe.config.init.iter().cloned().collect();
        for (step, sources) in sources {
            for (key, paths) in sources.into_iter().flatten() {
                let mut paths = paths.to_vec();
                // What is generated later is not there yet.
                if self.recipe.resolver(step).resolve_files(key, &mut paths).is_ok() {
                    files.extend(paths);
                }
            }
        }
        let config = &self.recipe.config;
        let of_evaluation =
            config.evaluate.iter().flat_map(|evaluate| evaluate.pairs.iter().chain([&evaluate.prompts]));
        let of_collection = config.collect.iter().flat_map(|collect| [&collect.prompts, &collect.test_prompts]);
        let of_order = config.collect.iter().filter_map(|collect| collect.order_by.as_ref());
        files.extend(of_evaluation.chain(of_collection).chain(of_order).cloned());
        files
    }

    /// The directory of a step that has one of its own.
    pub fn dir(&self, step: Step) -> PathBuf {
        self.out.join(step.name())
    }

    /// Where the generated world and the collected pairs are.
    pub fn data_dir(&self) -> PathBuf {
        self.out.join("data")
    }

    /// The language model that SFT starts from: the recipe's own or the one it was given.
    pub fn base(&self) -> PathBuf {
        let config = &self.recipe.config;
        config
            .init
            .clone()
            .filter(|_| !config.stages().contains(&Step::Pretrain))
            .unwrap_or_else(|| self.dir(Step::Pretrain))
    }

    /// What decides the context of the models, as a message names it.
    pub fn context_source(&self) -> String {
        match (&self.recipe.config.init, &self.configs.pretrain) {
            (Some(init), _) => format!("`{}`", init.display()),
            (None, Some(_)) => "`pretrain.model.max_seq_len`".to_owned(),
            (None, None) => format!("`{}`", self.base().display()),
        }
    }

    /// Whether there is a language model from before SFT to compare with.
    pub fn has_base(&self) -> bool {
        self.recipe.config.init.is_some() || self.configs.pretrain.is_some()
    }

    /// Test pairs for the reward model: those the recipe names, or those collected.
    pub fn test_pairs(&self) -> Option<PathBuf> {
        let config = &self.recipe.config;
        let collects_test = config.collect.as_ref().is_some_and(|collect| !collect.test_prompts.as_os_str().is_empty());
        let collected = || collects_test.then(|| PairFiles::in_out(&self.out).test);
        config.evaluate.as_ref()?.pairs.clone().or_else(collected)
    }

    /// The files by which a finished step is known.
    pub fn results(&self, step: Step) -> Vec<PathBuf> {
        match step {
            Step::World => vec![self.data_dir().join("prompts.test.jsonl")],
            Step::Tokenizer => vec![self.dir(step).join("tokenizer.json")],
            Step::Collect => {
                let files = PairFiles::in_out(&self.out);
                vec![files.train, files.val]
            }
            Step::Evaluate => vec![self.out.join("evaluation.json"), self.out.join("answers.jsonl")],
            stage => vec![self.dir(stage).join("manifest.json")],
        }
    }

    /// Everything that the result of `step` depends on, as it is now.
    ///
    /// # Errors
    /// If a file or a checkpoint cannot be read.
    pub fn inputs(&self, step: Step) -> Result<Inputs> {
        let config = &self.recipe.config;
        let resolver = self.recipe.resolver(step);
        let mut inputs = Inputs::default();
        match step {
            Step::World => inputs.config("recipe.world", &config.world)?,
            Step::Tokenizer => {
                let mut table = toml::Table::try_from(&self.configs.pretrain)?;
                table.retain(|name, _| ["seed", "tokenizer", "data"].contains(&name));
                inputs.stage_config("pretrain", &table, &resolver)?;
            }
            Step::Pretrain => {
                inputs.stage_config("pretrain", &self.configs.pretrain, &resolver)?;
                match &config.init {
                    Some(init) => inputs.weights("init", init)?,
                    None => inputs.file("tokenizer.json", &self.dir(Step::Tokenizer).join("tokenizer.json"))?,
                }
            }
            Step::Sft => {
                inputs.stage_config("sft", &self.configs.sft, &resolver)?;
                inputs.weights("pretrain", &self.base())?;
            }
            Step::Collect => self.collect_inputs(config.collect.as_ref(), &mut inputs)?,
            Step::RewardModel => {
                inputs.stage_config("reward-model", &self.configs.reward_model, &resolver)?;
                inputs.weights("sft", &self.dir(Step::Sft))?;
            }
            Step::Ppo | Step::Rloo => {
                inputs.stage_config(step.name(), &self.configs.against_scores(step), &resolver)?;
                inputs.weights("sft", &self.dir(Step::Sft))?;
                inputs.weights("reward-model", &self.dir(Step::RewardModel))?;
            }
            Step::Dpo => {
                inputs.stage_config("dpo", &self.configs.dpo, &resolver)?;
                inputs.weights("sft", &self.dir(Step::Sft))?;
            }
            Step::Evaluate => self.evaluate_inputs(config.evaluate.as_ref(), &mut inputs)?,
        }
        if !matches!(step, Step::World | Step::Tokenizer) {
            inputs.set("precision", self.precision);
            if self.trunk != TrunkPrecision::F32 {
                inputs.set("trunk", self.trunk.name());
            }
        }
        Ok(inputs)
    }

    fn collect_inputs(&self, collect: Option<&CollectConfig>, inputs: &mut Inputs) -> Result<()> {
        let collect = collect.context("the recipe has no `[collect]`")?;
        inputs.config("recipe.collect", collect)?;
        inputs.file("recipe.collect.prompts", &collect.prompts)?;
        inputs.file("recipe.collect.test_prompts", &collect.test_prompts)?;
        if let Some(model) = &collect.order_by {
            inputs.weights("order_by", model)?;
        }
        inputs.set("recipe.seed", self.recipe.config.seed.to_string());
        self.gold_inputs(inputs)?;
        inputs.weights("sft", &self.dir(Step::Sft))
    }

    fn evaluate_inputs(&self, evaluate: Option<&EvaluateConfig>, inputs: &mut Inputs) -> Result<()> {
        let evaluate = evaluate.context("the recipe has no `[evaluate]`")?;
        inputs.config("recipe.evaluate", evaluate)?;
        inputs.file("recipe.evaluate.prompts", &evaluate.prompts)?;
        if let Some(pairs) = self.test_pairs() {
            inputs.file("recipe.evaluate.pairs", &pairs)?;
        }
        inputs.set("recipe.seed", self.recipe.config.seed.to_string());
        self.gold_inputs(inputs)?;
        if self.has_base() {
            inputs.weights("pretrain", &self.base())?;
        }
        for stage in self.recipe.config.stages() {
            inputs.weights(stage.name(), &self.dir(stage))?;
        }
        Ok(())
    }

    fn gold_inputs(&self, inputs: &mut Inputs) -> Result<()> {
        let Some(gold) = &self.recipe.config.gold else { return Ok(()) };
        inputs.config("recipe.gold", gold)?;
        if let Some(words) = &gold.words {
            inputs.file("recipe.gold.words", words)?;
        }
        Ok(())
    }

    /// One hash of the gold score, for what only reports it; `None` without one.
    ///
    /// # Errors
    /// If the scorer's words cannot be read.
    pub fn gold_fingerprint(&self) -> Result<Option<String>> {
        let mut inputs = Inputs::default();
        self.gold_inputs(&mut inputs)?;
        Ok((!inputs.is_empty()).then(|| inputs.fingerprint()))
    }

    /// The settings of a step as they are where nobody sets them.
    ///
    /// # Errors
    /// If they have no form in TOML.
    pub fn defaults(step: Step) -> Result<Inputs> {
        let mut defaults = Inputs::default();
        match step {
            Step::World => defaults.config("recipe.world", &WorldConfig::default())?,
            Step::Collect => defaults.config("recipe.collect", &CollectConfig::default())?,
            Step::Evaluate => defaults.config("recipe.evaluate", &EvaluateConfig::default())?,
            Step::Tokenizer | Step::Pretrain => drop(defaults.settings("pretrain", &PretrainConfig::default())?),
            Step::Sft => drop(defaults.settings("sft", &SftConfig::default())?),
            Step::RewardModel => drop(defaults.settings("reward-model", &RewardModelConfig::default())?),
            Step::Ppo | Step::Rloo => drop(defaults.settings(step.name(), &PpoConfig::default())?),
            Step::Dpo => drop(defaults.settings("dpo", &DpoConfig::default())?),
        }
        defaults.set("precision", "f32");
        defaults.set("trunk", "f32");
        Ok(defaults)
    }

    /// The inputs of a step that an earlier version finished, which recorded only their hash: a stage's checkpoint tells
    /// its settings, data and parents; of the other steps nothing is known, and their results are taken as they are.
    ///
    /// # Errors
    /// If the checkpoint's manifest cannot be read.
    pub fn recovered_inputs(&self, step: Step, now: &Inputs) -> Result<Inputs> {
        let dir = self.dir(step);
        let mut settings = Inputs::default();
        let path = dir.join("config.toml");
        match step {
            Step::Pretrain => read_settings::<PretrainConfig>(&mut settings, step, &path)?,
            Step::Sft => read_settings::<SftConfig>(&mut settings, step, &path)?,
            Step::RewardModel => read_settings::<RewardModelConfig>(&mut settings, step, &path)?,
            Step::Ppo => read_settings::<PpoConfig>(&mut settings, step, &path)?,
            _ => return Ok(now.clone()),
        }
        let Some(manifest) = Manifest::read(&dir)? else { return Ok(now.clone()) };
        let mut hashes: BTreeSet<String> = manifest.data.into_values().collect();
        hashes.extend(manifest.parents.into_iter().map(|parent| parent.weights_sha256));
        if step == Step::Pretrain {
            // A manifest has the tokenizer's hash, which is not that of its file.
            hashes.extend(common::hash::sha256_of_file(&self.dir(Step::Tokenizer).join("tokenizer.json")));
        }
        Ok(Inputs::recovered(now, &settings, &hashes))
    }
}

fn read_settings<T: Configuration>(settings: &mut Inputs, step: Step, path: &Path) -> Result<()> {
    let config: T = config::load(path, &[])?;
    settings.settings(step.name(), &config)?;
    Ok(())
}
