//! The steps of a recipe and the record of which are done, `<out>/recipe.json`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// One step of a recipe, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Generate the data of a recipe that brings its own world.
    World,
    /// Learn the tokenizer.
    Tokenizer,
    /// Next-token prediction on text.
    Pretrain,
    /// Supervised fine-tuning on conversations.
    Sft,
    /// Sample preference pairs from the SFT model and label them.
    Collect,
    /// Train the reward model on preference pairs.
    RewardModel,
    /// Improve the SFT model by PPO against the reward model.
    Ppo,
    /// Answer the held-out prompts with every policy and score the answers.
    Evaluate,
}

impl Step {
    /// Every step, in running order.
    pub const ALL: [Self; 8] = [
        Self::World,
        Self::Tokenizer,
        Self::Pretrain,
        Self::Sft,
        Self::Collect,
        Self::RewardModel,
        Self::Ppo,
        Self::Evaluate,
    ];

    /// Name in commands, directories and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::World => "world",
            Self::Tokenizer => "tokenizer",
            Self::Pretrain => "pretrain",
            Self::Sft => "sft",
            Self::Collect => "collect",
            Self::RewardModel => "reward-model",
            Self::Ppo => "ppo",
            Self::Evaluate => "evaluate",
        }
    }

    /// The steps that train and leave a checkpoint.
    pub fn trains(self) -> bool {
        matches!(self, Self::Pretrain | Self::Sft | Self::RewardModel | Self::Ppo)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What `recipe.json` says about one step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// SHA-256 of everything the step's result depends on.
    pub key: String,
    /// Whether it came to its end.
    pub finished: bool,
    /// Wall seconds, over all sittings.
    pub seconds: f64,
}

/// `<out>/recipe.json`: what was run, with what, and how far it came.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Name of the recipe: its folder.
    pub recipe: String,
    /// Title of the report, from `recipe.toml`.
    pub title: String,
    /// The one seed.
    pub seed: u64,
    /// Program version.
    pub version: String,
    /// Backend of the last sitting.
    pub backend: String,
    /// Threads of the last sitting.
    pub threads: usize,
    /// What the gold score is, in words; absent where it is not known.
    pub gold: Option<String>,
    /// The steps so far.
    pub steps: BTreeMap<Step, StepRecord>,
}

impl RunRecord {
    /// Reads the record in `out`; an empty one if there is none yet.
    ///
    /// # Errors
    /// If the file is there but is not such a record.
    pub fn load(out: &Path) -> Result<Self> {
        let path = out.join("recipe.json");
        if !path.exists() {
            return Ok(Self::default());
        }
        let text = fs::read_to_string(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("`{}` is not the record of a recipe", path.display()))
    }

    /// Writes the record beside and renames it over the old one.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, out: &Path) -> Result<()> {
        write_whole(&out.join("recipe.json"), &serde_json::to_string_pretty(self)?)
    }

    /// Wall seconds of a step over all sittings; 0 if it has not run.
    pub fn seconds(&self, step: Step) -> f64 {
        self.steps.get(&step).map_or(0.0, |record| record.seconds)
    }
}

/// Writes a text file whole or not at all: beside first, then renamed into place.
///
/// # Errors
/// If the file cannot be written or renamed.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let beside = path.with_extension("partial");
    fs::write(&beside, text)
        .and_then(|()| fs::rename(&beside, path))
        .with_context(|| format!("failed to write `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_the_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(RunRecord::load(dir.path()).unwrap(), RunRecord::default());
        let mut record = RunRecord { recipe: "tiny".to_owned(), seed: 7, ..RunRecord::default() };
        let done = StepRecord { key: "k".to_owned(), finished: true, seconds: 1.5 };
        record.steps.insert(Step::RewardModel, done);
        record.save(dir.path()).unwrap();
        assert_eq!(RunRecord::load(dir.path()).unwrap(), record);
        assert!(fs::read_to_string(dir.path().join("recipe.json")).unwrap().contains("\"reward-model\""));
    }

    #[test]
    fn steps_are_ordered_as_they_run_and_named_as_in_commands() {
        assert!(Step::ALL.is_sorted());
        for step in Step::ALL {
            assert_eq!(serde_json::to_value(step).unwrap(), step.name());
        }
    }
}
