//! When a step has to run again: the hash of everything its result depends on.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use common::checkpoint::Manifest;
use common::config::{self, PathResolver};
use common::hash::sha256_of_file;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use toml::{Table, Value};

use crate::config::Recipe;
use crate::steps::Step;

/// Collects what a step depends on.
///
/// The backend and the number of threads are left out: they say where a step runs, not what it is.
pub struct Key(Sha256);

impl Key {
    /// Of a step, as this version of the program does it.
    pub fn of(step: Step) -> Self {
        let mut key = Self(Sha256::new());
        key.text("version", env!("CARGO_PKG_VERSION"));
        key.text("step", step.name());
        key
    }

    /// Adds a named text.
    pub fn text(&mut self, name: &str, text: &str) {
        // Lengths keep `ab`, `c` apart from `a`, `bc`.
        for part in [name, text] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part.as_bytes());
        }
    }

    /// Adds a configuration.
    ///
    /// # Errors
    /// If it has no form in TOML.
    pub fn config<T: Serialize>(&mut self, name: &str, config: &T) -> Result<()> {
        self.text(name, &config::to_toml(config)?);
        Ok(())
    }

    /// Adds a file's content; one that is absent counts as such, for the step itself says it better.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn file(&mut self, path: &Path) -> Result<()> {
        let hash = if path.is_file() {
            sha256_of_file(path).with_context(|| format!("failed to read `{}`", path.display()))?
        } else {
            "absent".to_owned()
        };
        self.text("file", &hash);
        Ok(())
    }

    /// Adds the weights of a checkpoint.
    ///
    /// # Errors
    /// If it has no readable manifest.
    pub fn checkpoint(&mut self, dir: &Path) -> Result<()> {
        let hash = match Manifest::read(dir)? {
            Some(manifest) => manifest.weights_sha256,
            None => "absent".to_owned(),
        };
        self.text("weights", &hash);
        Ok(())
    }

    /// Adds a stage's configuration as resolved, and the data files that its `[data]` names.
    ///
    /// # Errors
    /// If the configuration is not valid or a file cannot be read.
    pub fn stage_config<T: DeserializeOwned + Serialize>(
        &mut self,
        recipe: &Recipe,
        step: Step,
        sections: Option<&[&str]>,
    ) -> Result<()> {
        let path = recipe.stage_config(step);
        let resolved: T = config::load(&path, &recipe.stage_overrides(step))?;
        let mut table: Table = Table::try_from(&resolved).context("the configuration has no form in TOML")?;
        if let Some(sections) = sections {
            table.retain(|name, _| sections.contains(&name));
        }
        let resolver = PathResolver::new(&path, recipe.data.as_deref());
        for file in files_in(table.get("data"), &resolver)? {
            self.file(&file)?;
        }
        self.text("config", &table.to_string());
        Ok(())
    }

    /// The hash in hexadecimal.
    pub fn finish(self) -> String {
        self.0.finalize().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    }
}

/// Every string in `value` that is the path of a file.
fn files_in(value: Option<&Value>, resolver: &PathResolver) -> Result<Vec<PathBuf>> {
    Ok(match value {
        Some(Value::String(text)) => {
            let path = resolver.resolve(text)?;
            if path.is_file() { vec![path] } else { Vec::new() }
        }
        Some(Value::Array(values)) => {
            let files = values.iter().map(|value| files_in(Some(value), resolver));
            files.collect::<Result<Vec<_>>>()?.concat()
        }
        Some(Value::Table(table)) => {
            let files = table.values().map(|value| files_in(Some(value), resolver));
            files.collect::<Result<Vec<_>>>()?.concat()
        }
        _ => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_tells_apart_what_differs() {
        let with = |name: &str, text: &str| {
            let mut key = Key::of(Step::Sft);
            key.text(name, text);
            key.finish()
        };
        assert_eq!(with("a", "b"), with("a", "b"));
        assert_ne!(with("ab", "c"), with("a", "bc"));
        assert_ne!(with("a", "b"), Key::of(Step::Sft).finish());
        assert_ne!(Key::of(Step::Sft).finish(), Key::of(Step::Ppo).finish());
    }

    #[test]
    fn files_among_the_values_are_found_and_other_strings_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.txt");
        std::fs::write(&file, "abc").unwrap();
        let table: Table = toml::from_str("train = [\"a.txt\", \"none.txt\"]\nseparator = \"blank-line\"\n").unwrap();
        let resolver = PathResolver::new(&dir.path().join("x.toml"), None);
        assert_eq!(files_in(Some(&Value::Table(table)), &resolver).unwrap(), [file]);
    }
}
