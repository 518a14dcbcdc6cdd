//! A recipe's folder: where it is, what the command line changes in its files, and those files read and checked.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use common::config::{self, ConfigError, Configuration, PathResolver};
use common::exit::UsageError;
use common::files::write_whole;

use toy::WorldConfig;

use crate::collect::PairFiles;
use crate::config::RecipeConfig;
use crate::steps::Step;

/// A recipe's own file.
const FILE: &str = "recipe.toml";

/// Where the embedded recipe is written to, in the output directory.
const EMBEDDED_DIR: &str = "recipe";

/// A recipe: its folder, its own configuration, and what the command line changes.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The folder.
    pub dir: PathBuf,
    /// The folder's name.
    pub name: String,
    /// Its `recipe.toml`, overridden and with absolute paths.
    pub config: RecipeConfig,
    /// The output directory.
    pub out: PathBuf,
    /// The folder that `$DATA/` stands for in the stages' files.
    pub data: Option<PathBuf>,
    is_embedded: bool,
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
        let mut recipe = Self::read(name, out, data, overrides, seed)?;
        let (resolver, path) = (recipe.own_resolver(), recipe.dir.join(FILE));
        for file in recipe.config.paths_mut() {
            *file = resolver.resolve(&*file).with_context(|| format!("invalid config `{}`", path.display()))?;
        }
        Ok(recipe)
    }

    /// [`open`](Self::open) with the paths of `recipe.toml` as they stand there.
    ///
    /// # Errors
    /// As there, but for paths.
    pub fn read(name: &str, out: &Path, data: Option<&Path>, overrides: &[String], seed: Option<u64>) -> Result<Self> {
        let (dir, name, is_embedded) = find(name, out)?;
        let overrides = Overrides::divide(overrides)?;
        let path = dir.join(FILE);
        let mut config: RecipeConfig = load(&path, is_embedded, "recipe", &overrides.own)?;
        if let Some(seed) = seed {
            config.seed = seed;
        }
        if let Some(world) = &mut config.world {
            world.seed = config.seed;
        }
        config.validate().with_context(|| format!("invalid config `{}`", path.display()))?;
        let data = match (&config.world, data) {
            (Some(_), Some(_)) => bail!(
                "`--data` was given, but the recipe `{}` generates its data\nhint: leave out `--data`, or `[world]` in {}",
                dir.display(),
                path.display()
            ),
            (Some(_), None) => Some(std::path::absolute(out.join("data")).context("the working directory is unknown")?),
            (None, data) => data.map(Path::to_owned),
        };
        Ok(Self { dir, name, config, out: out.to_owned(), data, is_embedded, overrides: overrides.stages })
    }

    /// Writes the recipe in this program to its folder, from where the stages read it; nothing for any other recipe.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write_embedded(&self) -> Result<()> {
        if !self.is_embedded {
            return Ok(());
        }
        std::fs::create_dir_all(&self.dir).with_context(|| format!("failed to make `{}`", self.dir.display()))?;
        for (file, text) in EMBEDDED.1 {
            write_whole(&self.dir.join(file), text)?;
        }
        Ok(())
    }

    /// The configuration file of a stage; the tokenizer's is that of `pretrain`.
    pub fn stage_config(&self, step: Step) -> PathBuf {
        self.dir.join(format!("{}.toml", file_of(step)))
    }

    /// Overrides of a stage's configuration by `recipe run`: [`stage_overrides`](Self::stage_overrides), and collected
    /// pairs take the place of the reward model's own, and of DPO's.
    ///
    /// # Errors
    /// If the working directory is unknown.
    pub fn run_overrides(&self, step: Step) -> Result<Vec<String>> {
        let mut overrides = self.stage_overrides(step);
        if matches!(step, Step::RewardModel | Step::Dpo) && self.config.collect.is_some() {
            let out = std::path::absolute(&self.out).context("the working directory is unknown")?;
            let files = PairFiles::in_out(&out);
            for (key, path) in [("data.train", files.train), ("data.val", files.val)] {
                let path = toml::Value::String(path.display().to_string());
                overrides.push(format!("{key}=[{path}]"));
            }
        }
        Ok(overrides)
    }

    /// Overrides of a stage's configuration by the command line and the recipe, as `section.key=VALUE`.
    pub fn stage_overrides(&self, step: Step) -> Vec<String> {
        let seed = format!("seed={}", self.config.seed);
        let of_stage = self.overrides.iter().filter(|(s, _)| *s == file_of(step)).map(|(_, text)| text.clone());
        std::iter::once(seed).chain(of_stage).collect()
    }

    /// Resolves the paths of `recipe.toml`.
    pub fn own_resolver(&self) -> PathResolver {
        PathResolver::new(&self.dir.join(FILE), self.data.as_deref())
    }

    /// Resolves the paths of a stage's configuration.
    pub fn resolver(&self, step: Step) -> PathResolver {
        PathResolver::new(&self.stage_config(step), self.data.as_deref())
    }

    /// Reads a stage's configuration with `overrides` over it; errors name an override as it was given to this program.
    ///
    /// # Errors
    /// If the file cannot be read or does not fit `T`.
    pub fn load<T: Configuration + Default>(&self, step: Step, overrides: &[String]) -> Result<T> {
        Ok(load(&self.stage_config(step), self.is_embedded, file_of(step).name(), overrides)?)
    }
}

/// The stage in whose file the configuration of `step` stands.
fn file_of(step: Step) -> Step {
    if step == Step::Tokenizer { Step::Pretrain } else { step }
}

/// Reads a file of a recipe, with errors in terms of `--set <prefix>.key=VALUE`.
fn load<T: Configuration + Default>(
    path: &Path,
    is_embedded: bool,
    prefix: &str,
    overrides: &[String],
) -> Result<T, ConfigError> {
    let embedded = EMBEDDED.1.iter().find(|(file, _)| is_embedded && path.ends_with(file));
    let read = |overrides: &[String]| match embedded {
        Some((_, text)) => config::parse(text, path, overrides),
        None => config::load(path, overrides),
    };
    read(overrides).map_err(|error| match error {
        ConfigError::Override { flag, reason, hint } => {
            let hint = match section_of(read, &flag) {
                Some(section) if reason.starts_with("unknown field") => {
                    let key = flag.split('=').next().unwrap_or_default().trim();
                    format!("\nhint: did you mean `{prefix}.{section}.{key}`?")
                }
                _ => hint,
            };
            ConfigError::Override { flag: format!("{prefix}.{flag}"), reason, hint }
        }
        other => other,
    })
}

/// The section of `T` in which the override `flag`, `key=VALUE`, would be valid by `read`.
fn section_of<T: Configuration + Default>(
    read: impl Fn(&[String]) -> Result<T, ConfigError>,
    flag: &str,
) -> Option<String> {
    let table = toml::Table::try_from(T::default()).ok()?;
    let sections = table.into_iter().filter(|(_, value)| value.is_table()).map(|(name, _)| name);
    sections.into_iter().find(|section| read(&[format!("{section}.{flag}")]).is_ok())
}

/// The overrides of `--set`.
#[derive(Debug, Default)]
struct Overrides {
    /// In recipe.toml.
    own: Vec<String>,
    /// In the stages' files.
    stages: Vec<(Step, String)>,
}

/// The recipe in this program, for a user without the repository: `configs/tiny`.
const EMBEDDED: (&str, [(&str, &str); 7]) = (
    "tiny",
    [
        ("recipe.toml", include_str!("../../configs/tiny/recipe.toml")),
        ("pretrain.toml", include_str!("../../configs/tiny/pretrain.toml")),
        ("sft.toml", include_str!("../../configs/tiny/sft.toml")),
        ("reward-model.toml", include_str!("../../configs/tiny/reward-model.toml")),
        ("ppo.toml", include_str!("../../configs/tiny/ppo.toml")),
        ("rloo.toml", include_str!("../../configs/tiny/rloo.toml")),
        ("dpo.toml", include_str!("../../configs/tiny/dpo.toml")),
    ],
);

/// The world of the recipe in this program.
///
/// # Errors
/// If that recipe is not valid.
pub(crate) fn embedded_world() -> Result<WorldConfig> {
    let config: RecipeConfig = load(Path::new(FILE), true, "recipe", &[])?;
    config.world.context("the recipe in this program generates no world")
}

/// The folder that `name` means, the recipe's name, and whether it is the one in this program, whose folder is in `out`.
fn find(name: &str, out: &Path) -> Result<(PathBuf, String, bool)> {
    let is_recipe = |dir: &Path| dir.join(FILE).is_file();
    let given = PathBuf::from(name);
    let named = Path::new("configs").join(name);
    for dir in [&given, &named] {
        if is_recipe(dir) {
            let absolute = dir.canonicalize().unwrap_or_else(|_| dir.clone());
            let name = absolute.file_name().map_or_else(|| name.to_owned(), |name| name.to_string_lossy().into_owned());
            return Ok((dir.clone(), name, false));
        }
    }
    let embedded = EMBEDDED.0;
    if name == embedded {
        return Ok((out.join(EMBEDDED_DIR), embedded.to_owned(), true));
    }
    bail!(
        "there is no recipe `{name}`: neither `{}` nor `{}` exists\nhint: pass a folder with a recipe.toml, or `{embedded}` \
         for the one in this program",
        given.join(FILE).display(),
        named.join(FILE).display()
    )
}

impl Overrides {
    /// `stage.section.key=VALUE` divided into the recipe's own overrides and those of the stages.
    fn divide(overrides: &[String]) -> Result<Self> {
        let mut divided = Self::default();
        for text in overrides {
            let (name, rest) = text.split_once('.').unwrap_or((text, ""));
            match Step::ALL.into_iter().find(|step| step.trains() && step.name() == name) {
                Some(step) => divided.stages.push((step, rest.to_owned())),
                None if name == "recipe" => divided.own.push(rest.to_owned()),
                None => {
                    return Err(UsageError(format!(
                        "invalid override `--set {text}`: expected it to begin with `recipe.`, `pretrain.`, `sft.`, \
                         `reward-model.`, `ppo.`, `rloo.` or `dpo.`\nhint: write it as `--set ppo.ppo.kl_coef=0.1`: the stage, then the \
                         key in its file"
                    ))
                    .into());
                }
            }
        }
        Ok(divided)
    }
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
        assert!(error.is::<UsageError>() && error.to_string().contains("`reward-model.`"), "{error}");
    }

    #[test]
    fn an_override_is_named_as_it_was_typed() {
        let error = open("", &["recipe.sede=3"], None).unwrap_err().to_string();
        assert!(error.starts_with("invalid override `--set recipe.sede=3`: unknown field `sede`"), "{error}");
        assert!(error.ends_with("hint: did you mean `seed`?"), "{error}");
        let (dir, name) = recipe("");
        fs::write(dir.path().join("pretrain.toml"), "[data]\ntrain = [\"a.txt\"]\n").unwrap();
        let overrides = ["pretrain.steps=3".to_owned()];
        let recipe = Recipe::open(&name, Path::new("o"), None, &overrides, None).unwrap();
        let load = |step| recipe.load::<pretrain::PretrainConfig>(step, &recipe.stage_overrides(step));
        for step in [Step::Pretrain, Step::Tokenizer] {
            let error = load(step).unwrap_err().to_string();
            assert!(error.starts_with("invalid override `--set pretrain.steps=3`: unknown field `steps`"), "{error}");
            assert!(error.ends_with("hint: did you mean `pretrain.train.steps`?"), "{error}");
        }
    }

    #[test]
    fn paths_are_those_of_the_recipe_or_of_the_data_directory() {
        let text =
            "[gold]\nkind = \"world\"\n[collect]\nprompts = \"$DATA/p.jsonl\"\n[evaluate]\nprompts = \"q.jsonl\"\n";
        let recipe = open(text, &["recipe.init=models/a"], None).unwrap();
        assert_eq!(recipe.config.collect.unwrap().prompts, Path::new("/data/p.jsonl"));
        assert!(recipe.config.evaluate.unwrap().prompts.is_absolute());
        assert!(recipe.config.init.unwrap().is_absolute());
    }

    #[test]
    fn what_does_not_fit_together_is_named() {
        for (toml, expected) in [
            ("stages = []", "`stages` names no stage"),
            ("stages = [\"world\"]", "`stages` names `world`"),
            ("stages = [\"sft\", \"pretrain\"]", "order"),
            (
                "stages = [\"sft\", \"dpo\"]\n[evaluate]\nprompts = \"p\"\nbest_of = [4]",
                "`evaluate.best_of` needs the stages",
            ),
            ("[collect]\nprompts = \"p\"", "`[collect]` needs `[gold]`"),
            (
                "[gold]\nkind = \"world\"\n[collect]\nprompts = \"p\"\nsamples_per_prompt = 1",
                "`collect.samples_per_prompt` to be a whole number from 2",
            ),
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
        assert_eq!((recipe.name.as_str(), &recipe.dir), ("tiny", &out.path().join(EMBEDDED_DIR)));
        let expected: Vec<Step> = Step::ALL.into_iter().filter(|step| !step.is_extra()).collect();
        assert_eq!(recipe.config.steps(), expected);
        let load = || recipe.load::<sft::SftConfig>(Step::Sft, &[]).unwrap();
        let embedded = load();
        assert!(!recipe.dir.exists(), "reading it wrote it");
        recipe.write_embedded().unwrap();
        let written: sft::SftConfig = config::load(&recipe.stage_config(Step::Sft), &[]).unwrap();
        assert_eq!(written, embedded);
    }

    #[test]
    fn an_unknown_recipe_says_where_it_looked() {
        let error = Recipe::open("no-such", Path::new("o"), None, &[], None).unwrap_err().to_string();
        assert!(error.contains("configs/no-such/recipe.toml") && error.contains("hint:"), "{error}");
    }
}
