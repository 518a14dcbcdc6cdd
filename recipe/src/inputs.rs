//! Everything that a step's result depends on, by name, so that a change can be told in words.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use common::checkpoint::Manifest;
use common::config::PathResolver;
use common::data::{file_sha256, files};
use common::hash::{sha256_of, sha256_of_file};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

/// Prefix of a value that stands for a file's content or a model's weights.
const SHA256: &str = "sha256:";
/// The value of a file or a checkpoint that is not there.
const ABSENT: &str = "absent";
/// Prefix of the name of a checkpoint's weights.
const WEIGHTS: &str = "weights of ";

/// Settings that say when a run writes something or gives up, and not what it computes.
const WITHOUT_EFFECT: [&str; 5] =
    ["run.log_every", "run.save_every", "run.save_every_minutes", "run.tensorboard", "ppo.on_alarm"];

/// Names and values: settings as `--set` takes them, hashes of files and of the weights a step starts from.
///
/// The backend and the number of threads are left out: they say where a step runs, not what it computes. Precisions
/// are part of what it computes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Inputs(BTreeMap<String, String>);

/// Every value of a table under its whole name, which begins with `prefix` unless that is empty.
pub(crate) fn flatten(prefix: &str, table: &Table, values: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            Value::Table(table) => flatten(&name, table, values),
            value => {
                values.insert(name, value.to_string());
            }
        }
    }
}

impl Inputs {
    /// Adds a named value.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.0.insert(name.into(), value.into());
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds every value of a configuration under `prefix`.
    ///
    /// # Errors
    /// If it has no form in TOML.
    pub fn config<T: Serialize>(&mut self, prefix: &str, config: &T) -> Result<()> {
        let table = Table::try_from(config).context("the configuration has no form in TOML")?;
        flatten(prefix, &table, &mut self.0);
        Ok(())
    }

    /// Adds a stage's configuration under `prefix`. Of the files of its data the content counts, not the place.
    ///
    /// # Errors
    /// If it has no form in TOML, or a file cannot be read.
    pub fn stage_config<T: Serialize>(&mut self, prefix: &str, config: &T, resolver: &PathResolver) -> Result<()> {
        for (name, path) in self.settings(prefix, config)? {
            let path = resolver.resolve(path)?;
            // A pattern without a match counts as a file that is absent.
            let files = files::expand(&path).unwrap_or_else(|_| vec![path]);
            for (i, file) in files.iter().enumerate() {
                let of_pattern = if files.len() > 1 { format!(" ({})", i + 1) } else { String::new() };
                self.file(format!("{prefix}.{name}{of_pattern}"), file)?;
            }
        }
        Ok(())
    }

    /// Adds a stage's configuration without the files in its `[data]` and `[ptx.data]`, which it returns by their names.
    ///
    /// # Errors
    /// If it has no form in TOML.
    pub fn settings<T: Serialize>(&mut self, prefix: &str, config: &T) -> Result<Vec<(String, String)>> {
        let mut table = Table::try_from(config).context("the configuration has no form in TOML")?;
        let mut files = take_files("data", table.get_mut("data"));
        files.extend(take_files("ptx.data", table.get_mut("ptx").and_then(|ptx| ptx.get_mut("data"))));
        flatten(prefix, &table, &mut self.0);
        for name in WITHOUT_EFFECT {
            self.0.remove(&format!("{prefix}.{name}"));
        }
        Ok(files)
    }

    /// Adds a file's content.
    ///
    /// # Errors
    /// If the file is there but cannot be read.
    pub fn file(&mut self, name: impl Into<String>, path: &Path) -> Result<()> {
        let value = if path.is_file() { format!("{SHA256}{}", file_sha256(path)?) } else { ABSENT.to_owned() };
        self.set(name, value);
        Ok(())
    }

    /// Adds the weights of the checkpoint in `dir`, which the recipe calls `name`.
    ///
    /// # Errors
    /// If its manifest or, without one, a file of weights cannot be read.
    pub fn weights(&mut self, name: &str, dir: &Path) -> Result<()> {
        let value = match Manifest::read(dir)? {
            Some(manifest) => format!("{SHA256}{}", manifest.weights_sha256),
            None => foreign_weights(dir)?,
        };
        self.set(format!("{WEIGHTS}{name}"), value);
        Ok(())
    }

    /// All but those of these names.
    #[must_use]
    pub fn without(mut self, names: &[&str]) -> Self {
        self.0.retain(|name, _| !names.contains(&name.as_str()));
        self
    }

    /// One hash for all of it.
    pub fn fingerprint(&self) -> String {
        // A map of strings always has a form in JSON.
        sha256_of(serde_json::to_string(self).unwrap_or_default().as_bytes())
    }

    /// How `now` differs from what was recorded. A setting that the record lacks, because the program did not have it
    /// then, is no change while it has its default.
    pub fn changes(&self, now: &Self, defaults: &Self) -> Vec<Change> {
        let names: BTreeSet<&String> = self.0.keys().chain(now.0.keys()).collect();
        names
            .into_iter()
            .filter_map(|name| {
                let (old, new) = (self.0.get(name), now.0.get(name));
                let is_new_default = old.is_none() && new == defaults.0.get(name);
                (old != new && !is_new_default).then(|| Change {
                    name: name.clone(),
                    old: old.cloned(),
                    new: new.cloned(),
                })
            })
            .collect()
    }

    /// The inputs that a version recorded which kept no names, as far as its checkpoint tells them: the settings are those
    /// of `config`, and files and weights are those of `now` where `hashes` has them.
    #[must_use]
    pub fn recovered(now: &Self, config: &Self, hashes: &BTreeSet<String>) -> Self {
        let mut recovered = config.clone();
        for (name, value) in &now.0 {
            match value.strip_prefix(SHA256) {
                Some(hash) if hashes.contains(hash) => recovered.set(name, value),
                Some(_) => recovered.set(name, format!("{SHA256}unknown")),
                None if config.0.contains_key(name) => {}
                None => recovered.set(name, value),
            }
        }
        recovered
    }
}

/// One input that is not what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its name.
    pub name: String,
    /// Its value then.
    pub old: Option<String>,
    /// Its value now.
    pub new: Option<String>,
}

impl Change {
    /// Whether a file or checkpoint that was there is missing now.
    pub fn is_missing(&self) -> bool {
        self.new.as_deref() == Some(ABSENT)
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hashed = |value: &Option<String>| value.as_ref().is_some_and(|value| value.starts_with(SHA256));
        let subject = match self.name.strip_prefix(WEIGHTS) {
            Some(model) => format!("the model `{model}`"),
            None => format!("`{}`", self.name),
        };
        match (&self.old, &self.new) {
            _ if self.is_missing() => write!(f, "{subject} is missing"),
            (Some(_), Some(_)) if hashed(&self.old) && hashed(&self.new) => match self.name.strip_prefix(WEIGHTS) {
                Some(_) => write!(f, "{subject} has other weights"),
                None => write!(f, "the content of {subject} changed"),
            },
            (Some(old), Some(new)) if !hashed(&self.old) && !hashed(&self.new) => {
                write!(f, "{subject} changed from {old} to {new}")
            }
            (Some(old), None) if !hashed(&self.old) => write!(f, "{subject} was {old} and is no longer set"),
            (None, Some(new)) if !hashed(&self.new) => write!(f, "{subject} was not set and is now {new}"),
            (Some(_), None) => write!(f, "{subject} is no longer used"),
            _ => write!(f, "{subject} is new"),
        }
    }
}

/// Takes the lists of files out of the table `data`, which is the section `section`: every file with its name.
fn take_files(section: &str, data: Option<&mut Value>) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let Some(data) = data.and_then(Value::as_table_mut) else { return files };
    for key in ["train", "val"] {
        let paths = match data.remove(key) {
            Some(Value::Array(paths)) => paths,
            Some(path) => vec![path],
            None => Vec::new(),
        };
        let paths = paths.iter().filter_map(Value::as_str).enumerate();
        files.extend(paths.map(|(i, path)| (format!("{section}.{key}[{i}]"), path.to_owned())));
    }
    files
}

/// The hash of the weights in a directory that another program wrote.
fn foreign_weights(dir: &Path) -> Result<String> {
    let Ok(entries) = dir.read_dir() else { return Ok(ABSENT.to_owned()) };
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    let mut hashes = String::new();
    for file in &files {
        hashes += &sha256_of_file(file).with_context(|| format!("failed to read `{}`", file.display()))?;
    }
    Ok(if files.is_empty() { ABSENT.to_owned() } else { format!("{SHA256}{}", sha256_of(hashes.as_bytes())) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(pairs: &[(&str, &str)]) -> Inputs {
        Inputs(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn a_change_is_told_in_words() {
        let old = inputs(&[
            ("sft.data.train[0]", "sha256:aa"),
            ("sft.optimizer.lr", "0.0005"),
            ("sft.train.steps", "3"),
            ("weights of pretrain", "sha256:bb"),
        ]);
        let new = inputs(&[
            ("sft.data.train[0]", "sha256:ab"),
            ("sft.optimizer.lr", "0.0001"),
            ("sft.train.micro_batch_size", "8"),
            ("weights of pretrain", "absent"),
        ]);
        let told: Vec<String> = old.changes(&new, &Inputs::default()).iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "the content of `sft.data.train[0]` changed",
                "`sft.optimizer.lr` changed from 0.0005 to 0.0001",
                "`sft.train.micro_batch_size` was not set and is now 8",
                "`sft.train.steps` was 3 and is no longer set",
                "the model `pretrain` is missing",
            ]
        );
        assert!(old.changes(&old, &Inputs::default()).is_empty());
        assert_ne!(old.fingerprint(), new.fingerprint());
    }

    #[test]
    fn a_setting_that_is_newer_than_the_record_is_a_change_only_off_its_default() {
        let (old, defaults) = (inputs(&[("a", "1")]), inputs(&[("a", "0"), ("b", "2")]));
        assert!(old.changes(&inputs(&[("a", "1"), ("b", "2")]), &defaults).is_empty());
        assert_eq!(old.changes(&inputs(&[("a", "1"), ("b", "3")]), &defaults).len(), 1);
        assert_eq!(old.changes(&inputs(&[("a", "0")]), &defaults).len(), 1);
    }

    #[test]
    fn of_data_files_the_content_counts_and_of_the_cadence_only_what_has_an_effect() {
        let of = |name: &str, log_every: u64| {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(name), "abc").unwrap();
            let text = format!(
                "[data]\ntrain = [\"{name}\"]\nval = [\"no.txt\"]\non_bad_record = \"fail\"\n\
                 [ptx.data]\ntrain = [\"{name}\"]\n[run]\nlog_every = {log_every}\neval_every = 5\n"
            );
            let config: Table = toml::from_str(&text).unwrap();
            let mut inputs = Inputs::default();
            let resolver = PathResolver::new(&dir.path().join("x.toml"), None);
            inputs.stage_config("sft", &config, &resolver).unwrap();
            inputs
        };
        assert_eq!(of("a.txt", 1), of("b.txt", 2));
        let names: Vec<String> = of("a.txt", 1).0.into_keys().collect();
        assert_eq!(
            names,
            [
                "sft.data.on_bad_record",
                "sft.data.train[0]",
                "sft.data.val[0]",
                "sft.ptx.data.train[0]",
                "sft.run.eval_every",
            ]
        );
    }

    #[test]
    fn what_an_earlier_version_used_is_recovered_from_its_checkpoint() {
        let now = inputs(&[("f[0]", "sha256:aa"), ("f[1]", "sha256:bb"), ("lr", "2"), ("precision", "f32")]);
        let recovered = Inputs::recovered(&now, &inputs(&[("lr", "1")]), &["aa".to_owned()].into());
        let told: Vec<String> = recovered.changes(&now, &Inputs::default()).iter().map(ToString::to_string).collect();
        assert_eq!(told, ["the content of `f[1]` changed", "`lr` changed from 1 to 2"]);
    }
}
