//! `recipe.toml`: which stages, from which seed, judged how.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use common::config::{self, PathResolver};
use serde::{Deserialize, Serialize};

use crate::gold::GoldConfig;
use crate::steps::{Step, write_whole};
use toy::WorldConfig;

/// A recipe's own TOML file; the stages have one each beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecipeConfig {
    /// Heading of the report.
    pub title: String,
    /// The one seed of all steps; it goes before a `seed` in a stage's file.
    pub seed: u64,
    /// Training stages to run.
    pub stages: Vec<Step>,
    /// Data to generate; they are then what `$DATA/` means.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub world: Option<WorldConfig>,
    /// What answers are really worth, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gold: Option<GoldConfig>,
    /// Preference pairs of the SFT model's own answers; the reward model then learns from them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collect: Option<CollectConfig>,
    /// Answers to held-out prompts, for the report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluate: Option<EvaluateConfig>,
}

/// `[collect]`: pairs of the SFT model's own answers, labelled by the simulated labeller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CollectConfig {
    /// Prompts to answer for training and validation pairs.
    pub prompts: PathBuf,
    /// Prompts to answer for test pairs.
    pub test_prompts: PathBuf,
    /// Prompts to use of `prompts`, from the beginning; 0 for all.
    pub n_prompts: usize,
    /// Of these, the last that give validation pairs.
    pub n_val_prompts: usize,
    /// Answers sampled to each prompt; every two of them make a pair.
    pub samples_per_prompt: usize,
    /// Sampling temperature.
    pub temperature: f64,
    /// Longest answer in tokens.
    pub max_tokens: usize,
    /// The labeller's temperature in units of the gold score; higher errs more.
    pub label_temperature: f64,
    /// Pairs whose gold scores are nearer than this are not shown to the labeller.
    pub least_difference: f64,
    /// Answers decoded together.
    pub batch_size: usize,
}

impl Default for CollectConfig {
    fn default() -> Self {
        Self {
            prompts: PathBuf::new(),
            test_prompts: PathBuf::new(),
            n_prompts: 0,
            n_val_prompts: 200,
            samples_per_prompt: 2,
            temperature: 1.0,
            max_tokens: 128,
            label_temperature: toy::labeller::TEMPERATURE,
            least_difference: 0.02,
            batch_size: 64,
        }
    }
}

/// `[evaluate]`: answers of the base model, the SFT model and the PPO policy to prompts that none was trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateConfig {
    /// The held-out prompts.
    pub prompts: PathBuf,
    /// Prompts to use, from the beginning; 0 for all.
    pub n_prompts: usize,
    /// Preference pairs for the reward model's accuracy; with `[collect]`, its test pairs if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairs: Option<PathBuf>,
    /// Sampling temperature; 0 takes the likeliest token.
    pub temperature: f64,
    /// Longest answer in tokens.
    pub max_tokens: usize,
    /// How the base model, which knows no conversations, is asked.
    pub base_prompt: BasePrompt,
    /// Answers decoded together.
    pub batch_size: usize,
}

impl Default for EvaluateConfig {
    fn default() -> Self {
        Self {
            prompts: PathBuf::new(),
            n_prompts: 0,
            pairs: None,
            temperature: 1.0,
            max_tokens: 128,
            base_prompt: BasePrompt::default(),
            batch_size: 64,
        }
    }
}

/// How the pretrained model is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BasePrompt {
    /// `<|bos|>`, the request, a line break: text to go on from.
    #[default]
    Raw,
    /// The chat format, whose special tokens it has never seen.
    Chat,
}

impl Default for RecipeConfig {
    fn default() -> Self {
        Self {
            title: String::new(),
            seed: 0,
            stages: Step::ALL.into_iter().filter(|step| step.trains()).collect(),
            world: None,
            gold: None,
            collect: None,
            evaluate: None,
        }
    }
}

impl RecipeConfig {
    /// Checks what the types cannot.
    ///
    /// # Errors
    /// Naming the key that is out of range or lacks another.
    pub fn validate(&self) -> Result<()> {
        ensure!(!self.stages.is_empty(), "`stages` names no stage");
        if let Some(step) = self.stages.iter().find(|step| !step.trains()) {
            bail!("`stages` names `{step}`, expected `pretrain`, `sft`, `reward-model` or `ppo`");
        }
        ensure!(self.stages.is_sorted_by(|a, b| a < b), "`stages` must be in the order in which they run, each once");
        if let Some(gold) = &self.gold {
            gold.validate()?;
        }
        if let Some(world) = &self.world {
            world.validate().context("invalid `[world]`")?;
        }
        if let Some(collect) = &self.collect {
            collect.validate().context("invalid `[collect]`")?;
            ensure!(
                self.gold.is_some(),
                "`[collect]` needs `[gold]`: the simulated labeller prefers the answer of the higher gold score\n\
                 hint: add `[gold]`, or give the reward model pairs of your own in reward-model.toml"
            );
        }
        if let Some(evaluate) = &self.evaluate {
            evaluate.validate().context("invalid `[evaluate]`")?;
        }
        Ok(())
    }

    /// The steps of the recipe, in order.
    pub fn steps(&self) -> Vec<Step> {
        let has = |step: &Step| match step {
            Step::World => self.world.is_some(),
            Step::Tokenizer => self.stages.contains(&Step::Pretrain),
            Step::Collect => self.collect.is_some(),
            Step::Evaluate => self.evaluate.is_some(),
            stage => self.stages.contains(stage),
        };
        Step::ALL.into_iter().filter(has).collect()
    }
}

impl CollectConfig {
    fn validate(&self) -> Result<()> {
        ensure!(!self.prompts.as_os_str().is_empty(), "`prompts` names no file");
        ensure!(self.samples_per_prompt >= 2, "`samples_per_prompt` must be at least 2 to make a pair");
        ensure!(self.temperature > 0.0, "`temperature` must be above 0, or all answers to a prompt are the same");
        ensure!(self.label_temperature > 0.0, "`label_temperature` must be above 0");
        ensure!(self.max_tokens > 0 && self.batch_size > 0, "`max_tokens` and `batch_size` must be at least 1");
        ensure!(
            self.n_prompts == 0 || self.n_val_prompts < self.n_prompts,
            "`n_val_prompts` {} leaves nothing to train on of `n_prompts` {}",
            self.n_val_prompts,
            self.n_prompts
        );
        Ok(())
    }
}

impl EvaluateConfig {
    fn validate(&self) -> Result<()> {
        ensure!(!self.prompts.as_os_str().is_empty(), "`prompts` names no file");
        ensure!(self.temperature >= 0.0, "`temperature` must not be negative");
        ensure!(self.max_tokens > 0 && self.batch_size > 0, "`max_tokens` and `batch_size` must be at least 1");
        Ok(())
    }
}

/// Where the embedded recipe is written to, in the output directory.
pub const EMBEDDED_DIR: &str = "recipe";

/// A recipe: its folder, its own configuration, and what the command line changes.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The folder.
    pub dir: PathBuf,
    /// The folder's name.
    pub name: String,
    /// Its `recipe.toml`, overridden and with absolute paths.
    pub config: RecipeConfig,
    /// What `$DATA/` means in the stages' files.
    pub data: Option<PathBuf>,
    overrides: Vec<(Step, String)>,
}

impl Recipe {
    /// Opens the recipe in the folder `name`, or `configs/<name>`, or the one in this program.
    ///
    /// `overrides` are `stage.section.key=VALUE`, where `stage` may be `recipe`; `seed` goes before the file's; `data` is
    /// what `$DATA/` means, unless the recipe generates its data into `out`.
    ///
    /// # Errors
    /// If there is no such recipe, its configuration is not valid, or an override names no stage.
    pub fn open(name: &str, out: &Path, data: Option<&Path>, overrides: &[String], seed: Option<u64>) -> Result<Self> {
        let (dir, name) = find(name, out)?;
        let overrides = divide(overrides)?;
        let path = dir.join("recipe.toml");
        let mut config: RecipeConfig = config::load(&path, &overrides.own)?;
        let invalid = || format!("invalid config `{}`", path.display());
        if let Some(seed) = seed {
            config.seed = seed;
        }
        if let Some(world) = &mut config.world {
            world.seed = config.seed;
        }
        config.validate().with_context(invalid)?;
        let data = match (&config.world, data) {
            (Some(_), Some(_)) => bail!(
                "`--data` was given, but the recipe `{}` generates its data\nhint: leave out `--data`, or `[world]` in {}",
                dir.display(),
                path.display()
            ),
            (Some(_), None) => Some(std::path::absolute(out.join("data")).context("the working directory is unknown")?),
            (None, data) => data.map(Path::to_owned),
        };
        config.resolve(&PathResolver::new(&path, data.as_deref())).with_context(invalid)?;
        Ok(Self { dir, name, config, data, overrides: overrides.stages })
    }

    /// The configuration file of a stage; the tokenizer's is that of `pretrain`.
    pub fn stage_config(&self, step: Step) -> PathBuf {
        let stage = if step == Step::Tokenizer { Step::Pretrain } else { step };
        self.dir.join(format!("{stage}.toml"))
    }

    /// What the command line and the recipe change in a stage's configuration, as `section.key=VALUE`.
    pub fn stage_overrides(&self, step: Step) -> Vec<String> {
        let stage = if step == Step::Tokenizer { Step::Pretrain } else { step };
        let seed = format!("seed={}", self.config.seed);
        let of_stage = self.overrides.iter().filter(|(s, _)| *s == stage).map(|(_, text)| text.clone());
        std::iter::once(seed).chain(of_stage).collect()
    }
}

impl RecipeConfig {
    fn resolve(&mut self, resolver: &PathResolver) -> Result<()> {
        let mut paths: Vec<&mut PathBuf> = Vec::new();
        if let Some(collect) = &mut self.collect {
            paths.extend([&mut collect.prompts, &mut collect.test_prompts]);
        }
        if let Some(evaluate) = &mut self.evaluate {
            paths.push(&mut evaluate.prompts);
            paths.extend(&mut evaluate.pairs);
        }
        for path in paths {
            if !path.as_os_str().is_empty() {
                *path = resolver.resolve(&*path)?;
            }
        }
        if let Some(words) = self.gold.as_mut().and_then(|gold| gold.words.as_mut()) {
            *words = resolver.resolve(&*words)?.display().to_string();
        }
        Ok(())
    }
}

/// What `--set` changes.
#[derive(Debug, Default)]
struct Overrides {
    /// In recipe.toml.
    own: Vec<String>,
    /// In the stages' files.
    stages: Vec<(Step, String)>,
}

/// The recipe in this program, for a user without the repository: `configs/tiny`.
const EMBEDDED: (&str, [(&str, &str); 5]) = (
    "tiny",
    [
        ("recipe.toml", include_str!("../../configs/tiny/recipe.toml")),
        ("pretrain.toml", include_str!("../../configs/tiny/pretrain.toml")),
        ("sft.toml", include_str!("../../configs/tiny/sft.toml")),
        ("reward-model.toml", include_str!("../../configs/tiny/reward-model.toml")),
        ("ppo.toml", include_str!("../../configs/tiny/ppo.toml")),
    ],
);

/// The folder that `name` means, and the recipe's name. The embedded recipe is written into `out`.
fn find(name: &str, out: &Path) -> Result<(PathBuf, String)> {
    let is_recipe = |dir: &Path| dir.join("recipe.toml").is_file();
    let given = PathBuf::from(name);
    let named = Path::new("configs").join(name);
    for dir in [&given, &named] {
        if is_recipe(dir) {
            let absolute = dir.canonicalize().unwrap_or_else(|_| dir.clone());
            let name = absolute.file_name().map_or_else(|| name.to_owned(), |name| name.to_string_lossy().into_owned());
            return Ok((dir.clone(), name));
        }
    }
    let (embedded, files) = EMBEDDED;
    if name == embedded {
        let dir = out.join(EMBEDDED_DIR);
        std::fs::create_dir_all(&dir).with_context(|| format!("failed to make `{}`", dir.display()))?;
        for (file, text) in files {
            write_whole(&dir.join(file), text)?;
        }
        return Ok((dir, embedded.to_owned()));
    }
    bail!(
        "there is no recipe `{name}`: neither `{}` nor `{}` exists\nhint: pass a folder with a recipe.toml, or `{embedded}` \
         for the one in this program",
        given.join("recipe.toml").display(),
        named.join("recipe.toml").display()
    )
}

/// `stage.section.key=VALUE` divided into the recipe's own overrides and those of the stages.
fn divide(overrides: &[String]) -> Result<Overrides> {
    let mut divided = Overrides::default();
    for text in overrides {
        let (name, rest) = text.split_once('.').unwrap_or((text, ""));
        match Step::ALL.into_iter().find(|step| step.trains() && step.name() == name) {
            Some(step) => divided.stages.push((step, rest.to_owned())),
            None if name == "recipe" => divided.own.push(rest.to_owned()),
            None => return Err(common::exit::UsageError(format!(
                "invalid override `--set {text}`: expected it to begin with `recipe.`, `pretrain.`, `sft.`, \
                 `reward-model.` or `ppo.`\nhint: write it as `--set ppo.ppo.kl_coef=0.1`: the stage, then the key in its file"
            ))
            .into()),
        }
    }
    Ok(divided)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn recipe(toml: &str) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("recipe.toml"), toml).unwrap();
        let name = dir.path().display().to_string();
        (dir, name)
    }

    fn open(toml: &str, overrides: &[&str], seed: Option<u64>) -> Result<Recipe> {
        let (_dir, name) = recipe(toml);
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        Recipe::open(&name, Path::new("/runs/x"), Some(Path::new("/data")), &overrides, seed)
    }

    #[test]
    fn overrides_reach_their_stage_and_the_seed_reaches_all() {
        let recipe = open("seed = 1\n", &["ppo.ppo.kl_coef=0.1", "recipe.title=A"], Some(7)).unwrap();
        assert_eq!(recipe.config.title, "A");
        assert_eq!(recipe.stage_overrides(Step::Ppo), ["seed=7", "ppo.kl_coef=0.1"]);
        assert_eq!(recipe.stage_overrides(Step::Tokenizer), ["seed=7"]);
    }

    #[test]
    fn an_override_of_no_stage_is_wrong_usage() {
        let error = open("", &["train.lr=1"], None).unwrap_err();
        assert!(error.is::<common::exit::UsageError>() && error.to_string().contains("`reward-model.`"), "{error}");
    }

    #[test]
    fn steps_follow_from_the_sections() {
        let recipe = open("stages = [\"pretrain\"]\n", &[], None).unwrap();
        assert_eq!(recipe.config.steps(), [Step::Tokenizer, Step::Pretrain]);
        let text =
            "[gold]\nkind = \"world\"\n[collect]\nprompts = \"$DATA/p.jsonl\"\n[evaluate]\nprompts = \"q.jsonl\"\n";
        let recipe = open(text, &[], None).unwrap();
        assert_eq!(recipe.config.steps().len(), Step::ALL.len() - 1); // all but the world
        assert_eq!(recipe.config.collect.unwrap().prompts, Path::new("/data/p.jsonl"));
        assert!(recipe.config.evaluate.unwrap().prompts.is_absolute());
    }

    #[test]
    fn what_does_not_fit_together_is_named() {
        for (toml, expected) in [
            ("stages = []", "`stages` names no stage"),
            ("stages = [\"world\"]", "`stages` names `world`"),
            ("stages = [\"sft\", \"pretrain\"]", "order"),
            ("[collect]\nprompts = \"p\"", "`[collect]` needs `[gold]`"),
            ("[gold]\nkind = \"world\"\n[collect]\nprompts = \"p\"\nsamples_per_prompt = 1", "to make a pair"),
            ("[evaluate]\nn_prompts = 3", "`prompts` names no file"),
            ("[evalute]", "did you mean `evaluate`"),
            ("[world]\n", "generates its data"),
        ] {
            let error = format!("{:#}", open(toml, &[], None).unwrap_err());
            assert!(error.contains(expected), "{toml}: {error}");
        }
    }

    #[test]
    fn a_generated_world_lies_in_the_output_directory_and_has_the_recipes_seed() {
        let (_dir, name) =
            recipe("seed = 3\n[world]\nstories = 50\n[evaluate]\nprompts = \"$DATA/prompts.test.jsonl\"\n");
        let recipe = Recipe::open(&name, Path::new("/runs/x"), None, &[], None).unwrap();
        assert_eq!(recipe.config.world.as_ref().unwrap().seed, 3);
        assert_eq!(recipe.config.evaluate.unwrap().prompts, Path::new("/runs/x/data/prompts.test.jsonl"));
    }

    #[test]
    fn the_embedded_recipe_needs_no_folder() {
        let out = tempfile::tempdir().unwrap();
        let recipe = Recipe::open("tiny", out.path(), None, &[], None).unwrap();
        assert_eq!((recipe.name.as_str(), recipe.dir), ("tiny", out.path().join(EMBEDDED_DIR)));
        assert_eq!(recipe.config.steps(), Step::ALL);
    }

    #[test]
    fn an_unknown_recipe_says_where_it_looked() {
        let error = Recipe::open("no-such", Path::new("o"), None, &[], None).unwrap_err().to_string();
        assert!(error.contains("configs/no-such/recipe.toml") && error.contains("hint:"), "{error}");
    }
}
