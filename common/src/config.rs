//! A TOML file, the `--set` flags over it, and the error that shows the line.
//!
//! [`load`] merges before it deserialises, so a key that only the command line gives may be one the file lacks, and
//! each error still names what the user typed: the file with line and column, or the flag. [`PathResolver`] turns the
//! paths in a config into absolute ones, which is what makes `<out>/config.toml` usable as `--config` again.

mod keys;
mod print;

pub use keys::{Interval, Key, Kind, Section, sections};
pub use print::{print, print_as, toml_text};

use std::path::{Component, Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use text::data::{DataError, files};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::files::FileError;

/// The environment variable that stands in for `--data`.
pub const DATA_VARIABLE: &str = "KINDLING_DATA";

/// The prefix of a path that is looked up in the data directory.
const DATA_PREFIX: &str = "$DATA";

/// How alike two keys are (Jaro–Winkler, 1 is equal) before one is offered for the other.
const NEAREST_KEY_SIMILARITY: f64 = 0.8;

/// A type that a configuration file is read into.
pub trait Configuration: DeserializeOwned + Serialize + JsonSchema {}

impl<T: DeserializeOwned + Serialize + JsonSchema> Configuration for T {}

/// Reads the TOML file at `path`, lays `overrides` over it and deserialises the whole.
///
/// An override is `section.key=VALUE`. VALUE is read as TOML; a VALUE that is not TOML (a bare word, a path) is a string.
/// `T` should say `#[serde(deny_unknown_fields)]`, so that a misspelt key is an error here and not a default later. The
/// ranges of numbers are those of `T`'s schema, see [`sections`].
///
/// # Errors
/// If the file cannot be read, is not TOML, or does not fit `T`, a number outside its range included. The error points at
/// the line, or names the flag.
pub fn load<T: DeserializeOwned + JsonSchema>(path: &Path, overrides: &[String]) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(FileError::read(path))?;
    parse(&text, path, overrides)
}

/// [`load`] with the file's text at hand: `path` is only for messages. For configs compiled into the program.
///
/// # Errors
/// As [`load`], but for reading.
pub fn parse<T: DeserializeOwned + JsonSchema>(
    text: &str,
    path: &Path,
    overrides: &[String],
) -> Result<T, ConfigError> {
    let mut root = DeTable::parse(text).map_err(|error| invalid(path, text, error))?;
    // Each override is a document of its own, indented so far that its spans start behind the file and behind the
    // overrides before it: a span alone then says which text it belongs to.
    let mut documents: Vec<String> = Vec::with_capacity(overrides.len());
    let mut starts = Vec::with_capacity(overrides.len());
    for flag in overrides {
        let start = documents.last().map_or(text.len(), String::len) + 1;
        documents.push(" ".repeat(start) + &override_document(flag)?);
        starts.push(start);
    }
    for (document, flag) in documents.iter().zip(overrides) {
        let table = DeTable::parse(document).map_err(|error| malformed(flag, error.message()))?;
        merge(root.get_mut(), table.into_inner()).map_err(|key| ConfigError::Override {
            flag: flag.clone(),
            reason: format!("`{key}` is not a section"),
            hint: String::new(),
        })?;
    }
    let checked = keys::check::<T>(root.get_ref());
    checked.and_then(|()| T::deserialize(toml::Deserializer::from(root))).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        match starts.iter().rposition(|&s| s <= start) {
            Some(flag_idx) => ConfigError::Override {
                flag: overrides[flag_idx].clone(),
                reason: in_words_of_toml(error.message()),
                hint: nearest_hint(error.message()),
            },
            None => invalid(path, text, error),
        }
    })
}

/// `config` as TOML text, for `<out>/config.toml`.
///
/// # Errors
/// If a value has no place in TOML, such as an integer above `i64::MAX`.
pub fn to_toml<T: Serialize>(config: &T) -> Result<String, ConfigError> {
    toml::to_string_pretty(config).map_err(|source| ConfigError::Write { source })
}

/// `config` as a TOML table.
///
/// # Errors
/// As [`to_toml`].
pub fn to_table<T: Serialize>(config: &T) -> Result<toml::Table, ConfigError> {
    toml::Table::try_from(config).map_err(|source| ConfigError::Write { source })
}

/// Resolves the paths of one config: against the config's folder, or the data directory for `$DATA/…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathResolver {
    base: PathBuf,
    data: Option<PathBuf>,
}

impl PathResolver {
    /// For the config file `config`; `data` is the `--data` flag, else the variable `KINDLING_DATA` is asked.
    pub fn new(config: &Path, data: Option<&Path>) -> Self {
        let base = config.parent().unwrap_or(Path::new("")).to_owned();
        let data = data
            .map(Path::to_owned)
            .or_else(|| std::env::var_os(DATA_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from));
        Self { base, data }
    }

    /// `path` made absolute: `$DATA/x` inside the data directory, a relative path from the config's folder.
    ///
    /// A path given with `--set` is treated alike. The result need not exist.
    ///
    /// # Errors
    /// If `path` starts with `$DATA` and there is no data directory, or the working directory is unknown.
    pub fn resolve(&self, path: impl AsRef<Path>) -> Result<PathBuf, ConfigError> {
        let path = path.as_ref();
        let joined = match path.strip_prefix(DATA_PREFIX) {
            Ok(rest) => match &self.data {
                Some(data) => data.join(rest),
                None => return Err(ConfigError::NoDataDir { path: path.to_owned() }),
            },
            Err(_) => self.base.join(path),
        };
        let absolute = std::path::absolute(&joined).map_err(FileError::read(&joined))?;
        Ok(without_dots(&absolute))
    }

    /// [`resolve`](Self::resolve)s `path` for display: `$DATA/…` stays where no data folder is set.
    ///
    /// # Errors
    /// If the working directory is unknown.
    pub fn resolve_if_known(&self, path: &mut PathBuf) -> Result<(), ConfigError> {
        match self.resolve(&*path) {
            Ok(absolute) => *path = absolute,
            Err(ConfigError::NoDataDir { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// [`resolve`](Self::resolve)s the paths under `key`; a pattern becomes the files that match it.
    ///
    /// # Errors
    /// As `resolve`, or if a pattern has no match; naming `key`.
    pub fn resolve_files(&self, key: &str, paths: &mut Vec<PathBuf>) -> Result<(), ConfigError> {
        let files = |path| files::expand(&self.resolve(path)?).map_err(ConfigError::Data);
        let found: Result<Vec<_>, _> = paths.iter().map(files).collect();
        *paths = found.map_err(|error| ConfigError::Key { key: key.to_owned(), source: Box::new(error) })?.concat();
        Ok(())
    }
}

/// The lists of files in a configuration, by their key.
pub type Sources<'a> = Vec<(&'static str, &'a mut Vec<PathBuf>)>;

/// Errors in a configuration, in the words of the file or the flag.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is not TOML or holds a key or value that has no place.
    #[error("invalid config `{}`: {report}{hint}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, column, the line itself and the reason.
        report: String,
        /// A `\nhint: …` line, or nothing.
        hint: String,
    },
    /// A `--set` flag is malformed or holds a key or value that has no place.
    #[error("invalid override `--set {flag}`: {reason}{hint}")]
    Override {
        /// The text after `--set`.
        flag: String,
        /// Why.
        reason: String,
        /// A `\nhint: …` line, or nothing.
        hint: String,
    },
    /// A `$DATA` path without a data folder.
    #[error("path `{}` starts with `$DATA`, but no data folder is set\nhint: pass `--data DIR` or set `{DATA_VARIABLE}`", path.display())]
    NoDataDir {
        /// The path as the config has it.
        path: PathBuf,
    },
    /// A pattern names no file.
    #[error(transparent)]
    Data(DataError),
    /// The value of a key cannot be used.
    #[error("`{key}`")]
    Key {
        /// The key.
        key: String,
        /// Why.
        source: Box<ConfigError>,
    },
    /// A config that TOML cannot express.
    #[error("failed to write the config as TOML: {source}")]
    Write {
        /// Why.
        source: toml::ser::Error,
    },
}

/// `key=VALUE` as one line of TOML, VALUE quoted where it is not TOML itself.
fn override_document(flag: &str) -> Result<String, ConfigError> {
    let Some((key, value)) = flag.split_once('=') else {
        return Err(malformed(flag, "expected `=` after the key"));
    };
    let (key, value) = (key.trim(), value.trim());
    if key.is_empty() {
        return Err(malformed(flag, "the key is empty"));
    }
    let as_toml = format!("{key} = {value}");
    // A line break in VALUE could smuggle in a second key.
    if !value.contains('\n') && DeTable::parse(&as_toml).is_ok() {
        return Ok(as_toml);
    }
    Ok(format!("{key} = {}", toml::Value::String(value.to_owned())))
}

fn malformed(flag: &str, reason: &str) -> ConfigError {
    ConfigError::Override {
        flag: flag.to_owned(),
        reason: reason.to_owned(),
        hint: "\nhint: write it as `--set section.key=VALUE`".to_owned(),
    }
}

/// Lays `over` on `base`; a table joins a table, anything else replaces. The error is the key of a value that an
/// override takes for a table.
fn merge<'i>(base: &mut DeTable<'i>, over: DeTable<'i>) -> Result<(), String> {
    for (key, value) in over {
        let name: &str = key.get_ref();
        let old = base.get_mut(name).map(Spanned::get_mut);
        match (old, value.get_ref()) {
            (Some(DeValue::Table(_)), DeValue::Table(_)) => {
                let (Some(DeValue::Table(old)), DeValue::Table(new)) =
                    (base.get_mut(name).map(Spanned::get_mut), value.into_inner())
                else {
                    unreachable!("both were just seen to be tables");
                };
                merge(old, new)?;
            }
            (Some(_), DeValue::Table(_)) => return Err(name.to_owned()),
            _ => {
                // Removed first, so that the key's span is the override's as well.
                base.remove(name);
                base.insert(key, value);
            }
        }
    }
    Ok(())
}

fn invalid(path: &Path, text: &str, mut error: toml::de::Error) -> ConfigError {
    error.set_input(Some(text));
    let report = in_words_of_toml(error.to_string().trim_end());
    ConfigError::Invalid { path: path.to_owned(), report, hint: nearest_hint(error.message()) }
}

/// `message` with the name of a Rust type replaced by that of its form in TOML.
fn in_words_of_toml(message: &str) -> String {
    match message.split_once("expected struct ") {
        Some((before, after)) => {
            format!("{before}expected a table{}", after.trim_start_matches(|c: char| c.is_alphanumeric()))
        }
        None => message.to_owned(),
    }
}

/// A hint line that offers the known key nearest to the unknown one, if serde's `message` is about such.
fn nearest_hint(message: &str) -> String {
    let Some((unknown, expected)) = message.split_once(", expected ") else { return String::new() };
    if !unknown.starts_with("unknown ") {
        return String::new();
    }
    let Some(unknown) = quoted(unknown).next() else { return String::new() };
    match nearest(unknown, quoted(expected)) {
        Some(known) => format!("\nhint: did you mean `{known}`?"),
        None => String::new(),
    }
}

/// The parts of `text` between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The candidate most like `word`, if any is like it at all.
pub(crate) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(similarity, _)| *similarity >= NEAREST_KEY_SIMILARITY)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

/// `path` without `.` components and with each `name/..` taken out, by text alone.
fn without_dots(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if matches!(clean.components().next_back(), Some(Component::Normal(_))) => {
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, serde::Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Sample {
        seed: u64,
        name: String,
        train: Train,
        model: Option<Model>,
    }

    #[derive(Debug, PartialEq, serde::Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Train {
        lr: f64,
        weight_decay: f64,
        warmup_steps: usize,
        files: Vec<String>,
    }

    #[derive(Debug, PartialEq, serde::Deserialize, Serialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Model {
        d_model: usize,
        preset: Preset,
    }

    #[derive(Debug, PartialEq, serde::Deserialize, Serialize, JsonSchema)]
    #[serde(rename_all = "lowercase")]
    enum Preset {
        Transformer,
        Gpt2,
    }

    impl Default for Train {
        fn default() -> Self {
            Self { lr: 1e-3, weight_decay: 0.1, warmup_steps: 100, files: Vec::new() }
        }
    }

    fn read(text: &str, overrides: &[&str]) -> Result<Sample, String> {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        parse(text, Path::new("configs/tiny/sft.toml"), &overrides).map_err(|error| error.to_string())
    }

    #[test]
    fn an_override_replaces_adds_and_makes_sections() {
        let text = "seed = 1\n[train]\nlr = 0.5\nfiles = [\"a\"]\n";
        let config = read(
            text,
            &["seed=7", "train.files=[\"b\", 'c']", "model.d_model = 0x20", "model.preset=gpt2", "name=$DATA/a b.txt"],
        );
        let config = config.expect("valid");
        assert_eq!((config.seed, config.train.lr, config.train.warmup_steps), (7, 0.5, 100));
        assert_eq!(config.train.files, ["b", "c"]);
        assert_eq!(config.model, Some(Model { d_model: 32, preset: Preset::Gpt2 }));
        assert_eq!(config.name, "$DATA/a b.txt");
    }

    #[test]
    fn the_last_of_two_overrides_wins() {
        assert_eq!(read("", &["seed=1", "seed=2"]).expect("valid").seed, 2);
    }

    #[test]
    fn an_unknown_key_is_shown_with_line_column_and_nearest_key() {
        let error = read("seed = 1\n[train]\n  warmup_step = 5\n", &["seed=3"]).expect_err("unknown key");
        assert_eq!(
            error,
            "invalid config `configs/tiny/sft.toml`: TOML parse error at line 3, column 3\n  |\n\
             3 |   warmup_step = 5\n  |   ^^^^^^^^^^^\n\
             unknown field `warmup_step`, expected one of `lr`, `weight_decay`, `warmup_steps`, `files`\n\
             hint: did you mean `warmup_steps`?"
        );
    }

    #[test]
    fn a_wrong_value_is_shown_with_its_line() {
        let error = read("[train]\nlr = \"fast\"\n", &[]).expect_err("wrong type");
        assert!(
            error.contains("line 2, column 6")
                && error.contains("invalid value \"fast\", expected `train.lr` to be a number"),
            "{error}"
        );
        let error = read("[model]\nd_model = 8\npreset = \"gpt3\"\n", &[]).expect_err("wrong variant");
        assert!(error.contains("line 3") && error.ends_with("hint: did you mean `gpt2`?"), "{error}");
        let error = read("seed = = 1\n", &[]).expect_err("not TOML");
        assert!(error.contains("line 1, column 8"), "{error}");
    }

    #[test]
    fn a_table_is_asked_for_by_its_name_in_toml() {
        let error = read("train = 3", &[]).expect_err("a number");
        assert!(error.contains("expected a table") && !error.contains("struct"), "{error}");
    }

    #[test]
    fn an_override_that_does_not_fit_names_the_flag() {
        let error = read("[train]\nlr = 1.0\n", &["seed=1", "train.weight_decy=0.1"]).expect_err("unknown key");
        assert_eq!(
            error,
            "invalid override `--set train.weight_decy=0.1`: unknown field `weight_decy`, expected one of `lr`, \
             `weight_decay`, `warmup_steps`, `files`\nhint: did you mean `weight_decay`?"
        );
        for (flag, reason) in [
            ("train.lr=fast", "invalid value \"fast\", expected `train.lr` to be a number"),
            ("seed", "expected `=`"),
            ("=1", "the key is empty"),
            ("seed.x=1", "`seed` is not a section"),
            ("a b=1", "--set section.key=VALUE"),
            ("model.d_model=1", "missing field `preset`"),
        ] {
            let error = read("seed = 1", &[flag]).expect_err("does not fit");
            assert!(
                error.starts_with(&format!("invalid override `--set {flag}`")) && error.contains(reason),
                "{error}"
            );
        }
    }

    #[test]
    fn what_is_written_reads_back_equal() {
        let config = Sample {
            seed: 3,
            name: "a \"b\" \\ c".into(),
            train: Train { lr: 0.1 + 0.2, ..Train::default() },
            model: Some(Model { d_model: 4, preset: Preset::Transformer }),
        };
        assert_eq!(read(&to_toml(&config).expect("serialises"), &[]), Ok(config));
    }

    #[test]
    fn paths_resolve_from_the_configs_folder_or_the_data_directory() {
        let resolver = PathResolver::new(Path::new("/recipes/tiny/sft.toml"), Some(Path::new("/data")));
        let resolve = |path: &str| resolver.resolve(path).map(|path| path.display().to_string()).expect("resolves");
        assert_eq!(resolve("a/b.jsonl"), "/recipes/tiny/a/b.jsonl");
        assert_eq!(resolve("../x/./y.txt"), "/recipes/x/y.txt");
        assert_eq!(resolve("$DATA/stories/train.txt"), "/data/stories/train.txt");
        assert_eq!(resolve("/elsewhere/c.txt"), "/elsewhere/c.txt");
        // A resolved path stays the same, whichever folder it is resolved from.
        let elsewhere = PathResolver { base: "/runs/sft".into(), data: None };
        assert_eq!(
            elsewhere.resolve("/data/stories/train.txt").expect("absolute"),
            Path::new("/data/stories/train.txt")
        );
    }

    #[test]
    fn a_data_path_without_a_data_directory_says_how_to_give_one() {
        let resolver = PathResolver { base: "/recipes".into(), data: None };
        let error = resolver.resolve("$DATA/train.txt").expect_err("no data directory").to_string();
        assert_eq!(
            error,
            "path `$DATA/train.txt` starts with `$DATA`, but no data folder is set\n\
             hint: pass `--data DIR` or set `KINDLING_DATA`"
        );
    }
}
