//! Checks that fail in the first seconds instead of after hours: data, models and lengths of the steps to come.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use common::checkpoint::{self, AdapterPreview, Checkpoint, LoraDifference, Preview, Stage};
use common::conversation;
use common::corpus::TextConfig;
use common::data::files;
use common::data::records::{self, OnBadRecord, Prompt};
use common::hf;
use common::model::{GptConfig, LoraConfig};
use common::session::DataConfig;
use common::tokenizer::Tokenizer;

use crate::collect::PairFiles;
use crate::config::{CollectConfig, LabelledBy};
use crate::people;
use crate::setup::Setup;
use crate::steps::Step;

/// The stages whose checkpoints a recipe can start from.
pub const INIT_STAGES: [Stage; 2] = [Stage::Pretrain, Stage::Sft];

/// Checks everything that the steps `due` will need and that is there already.
///
/// # Errors
/// Naming the step that would fail, and why.
pub fn check(setup: &Setup, due: &[Step]) -> Result<()> {
    let checker = Checker { setup, due, model: Model::open(setup, due)? };
    let order_by = setup.recipe.config.collect.as_ref().and_then(|collect| collect.order_by.as_ref());
    if let Some(dir) = order_by.filter(|_| due.contains(&Step::Collect)) {
        let opened = Checkpoint::open(dir).and_then(|model| model.of_stage(&[Stage::RewardModel]));
        opened.context("failed to load `recipe.collect.order_by`")?;
    }
    for &step in due {
        checker.step(step).with_context(|| format!("the step `{step}` cannot run"))?;
    }
    Ok(())
}

/// Checks the configurations and the data of a recipe that is only planned, with a model like `model`: data that no step is
/// to write has to be there.
///
/// # Errors
/// Naming the step that would fail, and why.
pub fn check_planned(setup: &Setup, model: &Preview) -> Result<()> {
    // The tokenizer of an earlier run is no more than a guess at the one to come.
    let tokenizer = model.tokenizer.clone().filter(|_| setup.recipe.config.init.is_some());
    let checker = Checker { setup, due: &Step::ALL, model: Model { config: Some(model.config.clone()), tokenizer } };
    for step in setup.recipe.config.steps() {
        let checked = checker.adapters(step).and_then(|()| checker.data(step)).and_then(|()| checker.lengths(step));
        checked.with_context(|| format!("the step `{step}` cannot run"))?;
    }
    Ok(())
}

/// Checks that prompts and answers of the steps `due` fit the context, which takes the tokenizer that was just learned.
///
/// # Errors
/// Naming the step that would fail, and why.
pub fn check_lengths(setup: &Setup, due: &[Step]) -> Result<()> {
    let checker = Checker { setup, due, model: Model::open(setup, &[])? };
    for &step in due {
        checker.lengths(step).with_context(|| format!("the step `{step}` cannot run"))?;
    }
    Ok(())
}

/// Facts about the model that are known before it is trained.
struct Model {
    config: Option<GptConfig>,
    tokenizer: Option<Tokenizer>,
}

impl Model {
    fn open(setup: &Setup, due: &[Step]) -> Result<Self> {
        if let Some(init) = &setup.recipe.config.init {
            let model =
                checkpoint::init_from(init, setup.opening_init()).and_then(|model| model.of_stage(&INIT_STAGES));
            let model = model.context("failed to load `recipe.init`")?;
            return Ok(Self {
                config: Some(model.model_config().clone()),
                tokenizer: Some(model.require_tokenizer().context("failed to load `recipe.init`")?.clone()),
            });
        }
        let config = match &setup.configs.pretrain {
            Some(config) => {
                let invalid = || format!("invalid config `{}`", setup.recipe.stage_config(Step::Pretrain).display());
                let model = config.model.resolve(config.tokenizer.vocab_size).with_context(invalid)?;
                config.seq_len(&model).with_context(invalid)?;
                Some(model)
            }
            // The recipe goes on from what an earlier run of it left.
            None => Checkpoint::open_with(&setup.base(), setup.opening(&setup.base()))
                .ok()
                .map(|model| model.model_config().clone()),
        };
        let dir = setup.dir(Step::Tokenizer);
        let is_there = dir.join("tokenizer.json").is_file() && !due.contains(&Step::Tokenizer);
        Ok(Self { config, tokenizer: if is_there { Some(Tokenizer::load(&dir)?) } else { None } })
    }
}

struct Checker<'a> {
    setup: &'a Setup,
    due: &'a [Step],
    model: Model,
}

impl Checker<'_> {
    fn step(&self, step: Step) -> Result<()> {
        self.parents(step)?;
        self.adapters(step)?;
        self.data(step)?;
        self.lengths(step)
    }

    /// Whether the last step reads the test pairs.
    fn reads_test_pairs(&self) -> bool {
        self.setup.recipe.config.stages().iter().any(|step| matches!(step, Step::RewardModel | Step::Dpo))
    }

    /// The checkpoints that a step starts from are made by this command or were made before.
    fn parents(&self, step: Step) -> Result<()> {
        let config = &self.setup.recipe.config;
        let mut parents = match step {
            Step::Pretrain if config.init.is_none() => vec![Step::Tokenizer],
            Step::Sft if self.setup.base() == self.setup.dir(Step::Pretrain) => vec![Step::Pretrain],
            Step::World | Step::Tokenizer | Step::Pretrain | Step::Sft => Vec::new(),
            Step::Collect | Step::RewardModel | Step::Dpo => vec![Step::Sft],
            Step::Ppo | Step::Rloo => vec![Step::Sft, Step::RewardModel],
            Step::Evaluate => config.stages(),
        };
        if step == Step::Evaluate && config.stages().into_iter().any(Step::follows_scores) {
            parents.extend([Step::Sft, Step::RewardModel]);
        }
        if step == Step::Evaluate && config.stages().contains(&Step::Dpo) {
            parents.push(Step::Sft);
        }
        if matches!(step, Step::RewardModel | Step::Dpo) && config.collect.is_some() {
            parents.push(Step::Collect);
        }
        for parent in parents {
            let is_made = self.due.contains(&parent);
            let is_there = self.setup.results(parent).iter().all(|path| path.exists());
            let or_else = if parent == Step::Pretrain { "; or name a model to start from with `--init`" } else { "" };
            ensure!(
                is_made || is_there,
                "it needs what `{parent}` leaves, and `{}` holds none\nhint: run `{parent}` as well: leave out \
                 `--stages`, or name it in `stages` of recipe.toml{or_else}",
                self.setup.out.display()
            );
        }
        Ok(())
    }

    /// Whether a file should be there now: it is not to be written by a step of this command.
    fn is_there(&self, path: &Path) -> bool {
        let pairs = PairFiles::in_out(&self.setup.out);
        let is_collected = [&pairs.train, &pairs.val, &pairs.test].iter().any(|file| same(file, path));
        let is_generated = path.starts_with(self.setup.data_dir())
            || self.setup.recipe.data.as_ref().is_some_and(|data| path.starts_with(data));
        let is_world = self.setup.recipe.config.world.is_some() && is_generated && !is_collected;
        !(is_collected && self.due.contains(&Step::Collect) || is_world && self.due.contains(&Step::World))
    }

    /// Adapters stand on layers that the model has, and those that go on from a model's adapter have its settings.
    fn adapters(&self, step: Step) -> Result<()> {
        let (Some(lora), Some(config)) = (self.setup.configs.lora(step), &self.model.config) else { return Ok(()) };
        hf::adapters_of(config, lora).with_context(|| format!("invalid `{step}.lora`"))?;
        let Some((parent, found)) = self.adapter_before(step)? else { return Ok(()) };
        let difference = LoraDifference::of(config, lora, &found)?;
        let Some(LoraDifference { key, asked, found }) = difference else { return Ok(()) };
        bail!(
            "`{step}.lora.{key}` is {asked}, but the adapter {parent}, which it goes on with, has {found}\nhint: set it to \
             the same in both, or leave out `[lora]` in {step}.toml to train all weights"
        )
    }

    /// The adapter of the model that a step trains further, if that is one, and where it is.
    fn adapter_before(&self, step: Step) -> Result<Option<(String, LoraConfig)>> {
        let made = self.setup.configs.sft.as_ref().filter(|_| step != Step::Sft && self.due.contains(&Step::Sft));
        if let Some(sft) = made {
            return Ok(sft.lora.clone().map(|lora| ("of `sft`".to_owned(), lora)));
        }
        let dir = if step == Step::Sft { self.setup.base() } else { self.setup.dir(Step::Sft) };
        let there = AdapterPreview::open(&dir).with_context(|| format!("failed to load `{}`", dir.display()))?;
        Ok(there.map(|adapter| (format!("in `{}`", dir.display()), adapter.lora)))
    }

    /// The files of a step that should be there now, as absolute paths.
    fn files(&self, step: Step, files: &[PathBuf]) -> Result<Vec<PathBuf>> {
        let resolver = self.setup.recipe.resolver(step);
        let mut all = Vec::new();
        for file in files {
            let path = resolver.resolve(file)?;
            if self.is_there(&path) {
                all.extend(files::expand(&path)?);
            } else if path.parent().is_some_and(|dir| same(dir, &self.setup.data_dir())) {
                check_generated(&path)?;
            }
        }
        Ok(all)
    }

    /// Every record of a step's data can be used; of text to pretrain on, that there is any.
    fn data(&self, step: Step) -> Result<()> {
        match step {
            Step::World => {}
            Step::Tokenizer | Step::Pretrain => {
                let Some(config) = &self.setup.configs.pretrain else { return Ok(()) };
                self.texts(step, &config.data, "data")?;
            }
            Step::Sft => {
                let Some(config) = &self.setup.configs.sft else { return Ok(()) };
                for file in self.files(step, &[&config.data.train[..], &config.data.val[..]].concat())? {
                    records::check_conversations(&file, config.data.read_options())?;
                }
            }
            Step::RewardModel => {
                let Some(config) = &self.setup.configs.reward_model else { return Ok(()) };
                for file in self.files(step, &[&config.data.train[..], &config.data.val[..]].concat())? {
                    records::check_pairs(&file, config.data.read_options())?;
                }
            }
            Step::Dpo => {
                let Some(config) = &self.setup.configs.dpo else { return Ok(()) };
                for file in self.files(step, &[&config.data.train[..], &config.data.val[..]].concat())? {
                    records::check_pairs(&file, config.data.read_options())?;
                }
            }
            Step::Collect | Step::Ppo | Step::Rloo | Step::Evaluate => {
                for (file, prompts) in self.prompts(step)? {
                    self.gold(step, &file, &prompts)?;
                    self.labels(step, &file, prompts.len())?;
                }
                if let Some(ptx) = self.setup.configs.against_scores(step).and_then(|config| config.ptx.as_ref()) {
                    self.texts(step, &ptx.data, "ptx.data")?;
                }
            }
        }
        if let (Step::Evaluate, Some(pairs)) = (step, self.setup.test_pairs())
            && self.is_there(&pairs)
            && self.reads_test_pairs()
        {
            records::check_pairs(&pairs, OnBadRecord::Fail)?;
        }
        Ok(())
    }

    /// Every file of text has some.
    fn texts(&self, step: Step, text: &TextConfig, section: &'static str) -> Result<()> {
        for file in self.files(step, &[&text.train[..], &text.val[..]].concat())? {
            records::check_texts(&file, &text.separator, text.read_options(section))?;
        }
        Ok(())
    }

    /// There are as many pairs as people are to decide about.
    fn labels(&self, step: Step, file: &Path, n_prompts: usize) -> Result<()> {
        let asks = |collect: &&CollectConfig| {
            step == Step::Collect && collect.labels == LabelledBy::People && same(&collect.prompts, file)
        };
        let Some(collect) = self.setup.recipe.config.collect.as_ref().filter(asks) else { return Ok(()) };
        let n_used = if collect.n_prompts > 0 { n_prompts.min(collect.n_prompts) } else { n_prompts };
        let k = collect.samples_per_prompt;
        people::check_n_labels(collect.n_labels, n_used * k * (k - 1) / 2)
    }

    /// The prompts that a step answers, file by file, as far as they are there.
    fn prompts(&self, step: Step) -> Result<Vec<(PathBuf, Vec<Prompt>)>> {
        let config = &self.setup.recipe.config;
        let (files, on_bad) = match (step, &config.collect, &config.evaluate, self.setup.configs.against_scores(step)) {
            (Step::Collect, Some(collect), ..) => {
                (vec![collect.prompts.clone(), collect.test_prompts.clone()], OnBadRecord::Fail.into())
            }
            (Step::Evaluate, _, Some(evaluate), _) => (vec![evaluate.prompts.clone()], OnBadRecord::Fail.into()),
            (.., Some(ppo)) => ([&ppo.data.train[..], &ppo.data.val[..]].concat(), ppo.data.read_options()),
            _ => return Ok(Vec::new()),
        };
        let files: Vec<PathBuf> = files.into_iter().filter(|file| !file.as_os_str().is_empty()).collect();
        let mut all = Vec::new();
        for file in self.files(step, &files)? {
            let prompts = records::read_prompts(&file, on_bad)?;
            all.push((file, prompts));
        }
        Ok(all)
    }

    /// The gold scorer understands the prompts: all that are to be labelled, some of those that are only reported on.
    fn gold(&self, step: Step, file: &Path, prompts: &[Prompt]) -> Result<()> {
        let Some(gold) = &self.setup.gold else { return Ok(()) };
        let foreign = prompts.iter().find(|prompt| !gold.understands(&prompt.text));
        let is_labelled = self.setup.recipe.config.collect.as_ref().is_some_and(|c| c.labels == LabelledBy::Simulated);
        if step == Step::Collect
            && is_labelled
            && let Some(prompt) = foreign
        {
            bail!(
                "the gold score is not defined for answers to `{}` of `{}`\nhint: leave such prompts out",
                prompt.text,
                file.display()
            );
        }
        ensure!(
            prompts.iter().any(|prompt| gold.understands(&prompt.text)),
            "no prompt of `{}` is a request of the world, which is all that `gold.kind = \"world\"` scores\n\
             hint: leave `[gold]` out of recipe.toml, or choose `kind = \"lexicon\"`",
            file.display()
        );
        Ok(())
    }

    /// Prompts and answers fit the model's context.
    fn lengths(&self, step: Step) -> Result<()> {
        let config = &self.setup.recipe.config;
        let Some(model) = &self.model.config else { return Ok(()) };
        let context = model.max_seq_len;
        if let Some(ptx) = self.setup.configs.against_scores(step).and_then(|config| config.ptx.as_ref()) {
            ptx.seq_len(context)?;
        }
        if let Some(tokenizer) = &self.model.tokenizer {
            self.encoded(step, tokenizer, context)?;
        }
        let (name, n_new) = match (step, &config.collect, &config.evaluate) {
            (Step::Collect, Some(collect), _) => ("recipe.collect.max_tokens", collect.max_tokens),
            (Step::Evaluate, _, Some(evaluate)) => ("recipe.evaluate.max_tokens", evaluate.max_tokens),
            (Step::Ppo | Step::Rloo, ..) => match self.setup.configs.against_scores(step) {
                Some(config) if step == Step::Rloo => ("rloo.ppo.response_length", config.ppo.response_length),
                Some(config) => ("ppo.ppo.response_length", config.ppo.response_length),
                None => return Ok(()),
            },
            (Step::RewardModel, ..) => match &self.setup.configs.reward_model {
                Some(config) if config.normalisation.samples > 0 => {
                    ("reward-model.normalisation.max_tokens", config.normalisation.max_tokens)
                }
                _ => return Ok(()),
            },
            _ => return Ok(()),
        };
        ensure!(
            n_new < context,
            "`{name}` is {n_new}, but the model's context ({}) has {context} tokens, the prompt's included",
            self.setup.context_source()
        );
        let Some(tokenizer) = &self.model.tokenizer else { return Ok(()) };
        let skips =
            self.setup.configs.against_scores(step).is_some_and(|config| config.data.on_too_long == ppo::TooLong::Skip);
        for (file, prompts) in self.prompts(step)? {
            let lengths = prompts
                .iter()
                .map(|prompt| Ok(conversation::encode_prompt(tokenizer, &prompt.messages)?.len()))
                .collect::<Result<Vec<usize>>>()
                .with_context(|| format!("failed to encode a prompt of `{}`", file.display()))?;
            let n_too_long = lengths.iter().filter(|&&length| length + n_new > context).count();
            let longest = lengths.iter().max().copied().unwrap_or(0);
            ensure!(
                n_too_long == 0 || skips && n_too_long < lengths.len(),
                "{n_too_long} of {} prompts of `{}` leave no room for {n_new} more tokens in the context of {context}; \
                 the longest has {longest}\nhint: lower `{name}`, or shorten or leave out these prompts",
                lengths.len(),
                file.display()
            );
        }
        Ok(())
    }

    /// Conversations and pairs are accepted as they will be, once there is a tokenizer to measure them with.
    fn encoded(&self, step: Step, tokenizer: &Tokenizer, context: usize) -> Result<()> {
        let there = |files: &[PathBuf]| self.files(step, files);
        match step {
            Step::Sft => {
                let Some(config) = &self.setup.configs.sft else { return Ok(()) };
                for files in [there(&config.data.train)?, there(&config.data.val)?] {
                    if !files.is_empty() {
                        sft::check_data(&files, tokenizer, context, &config.data)?;
                    }
                }
            }
            Step::RewardModel => {
                let Some(config) = &self.setup.configs.reward_model else { return Ok(()) };
                for files in [there(&config.data.train)?, there(&config.data.val)?] {
                    if !files.is_empty() {
                        reward_model::check_data(&files, tokenizer, context, &config.data)?;
                    }
                }
            }
            Step::Dpo => {
                let Some(config) = &self.setup.configs.dpo else { return Ok(()) };
                for files in [there(&config.data.train)?, there(&config.data.val)?] {
                    if !files.is_empty() {
                        reward_model::check_data(&files, tokenizer, context, &config.data)?;
                    }
                }
            }
            Step::Evaluate if self.reads_test_pairs() => {
                if let Some(pairs) = self.setup.test_pairs().filter(|pairs| self.is_there(pairs)) {
                    reward_model::check_data(&[pairs], tokenizer, context, &DataConfig::default())?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// A file that is to be generated has a name that one of them will have.
fn check_generated(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let is_pattern = name.contains(['*', '?', '[']);
    let pairs = PairFiles::in_out(Path::new(""));
    let collected = [&pairs.train, &pairs.val, &pairs.test].map(|file| file.file_name().unwrap_or_default());
    let is_collected = collected.iter().any(|file| file.to_string_lossy() == name);
    ensure!(
        is_pattern || is_collected || toy::FILES.contains(&&*name),
        "no `{name}` is generated\nhint: the files of the world are {}",
        toy::FILES.map(|file| format!("`{file}`")).join(", ")
    );
    Ok(())
}

/// Whether two paths, one of them perhaps relative, are the same file's.
fn same(a: &Path, b: &Path) -> bool {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    absolute(a) == absolute(b)
}
