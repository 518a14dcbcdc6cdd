//! `<out>/recipe.json`: what was run, from which inputs, and how far it came.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use common::files::{read_if_there, write_whole};
use serde::{Deserialize, Serialize};

use crate::inputs::Inputs;
use crate::steps::Step;

/// The entry of one step in `recipe.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Everything that the step's result depends on. Empty in the records of versions that kept a hash instead.
    #[serde(default)]
    pub inputs: Inputs,
    /// Whether it came to its end.
    pub finished: bool,
    /// Wall seconds, over all sittings.
    pub seconds: f64,
    /// Whether an earlier step has been done anew since: the result may rest on what is gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stale: bool,
    /// The gold score that the step reported, as [`Inputs::fingerprint`]; it is no input of a step that only reports it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gold: Option<String>,
}

/// `<out>/recipe.json`.
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
    /// Description of the gold score; absent where there is no gold score.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gold: Option<String>,
    /// The same for programs, as [`Inputs::fingerprint`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gold_fingerprint: Option<String>,
    /// Answers to a prompt from which preference pairs are made, with `[collect]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples_per_prompt: Option<usize>,
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
        let Some(text) = read_if_there(&path)? else { return Ok(Self::default()) };
        serde_json::from_str(&text).with_context(|| format!("`{}` is not the record of a recipe", path.display()))
    }

    /// Writes the record, whole or not at all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, out: &Path) -> Result<()> {
        Ok(write_whole(&out.join("recipe.json"), serde_json::to_string_pretty(self)?)?)
    }

    /// Whether it is of the recipe of this name, or of none yet.
    pub fn is_of(&self, name: &str) -> bool {
        self.recipe.is_empty() || self.recipe == name
    }

    /// The record of a step that rests on what the steps before it left.
    pub fn current(&self, step: Step) -> Option<&StepRecord> {
        self.steps.get(&step).filter(|record| !record.stale)
    }

    /// Wall seconds of a step over all sittings; 0 if it has not run.
    pub fn seconds(&self, step: Step) -> f64 {
        self.steps.get(&step).map_or(0.0, |record| record.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_the_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(RunRecord::load(dir.path()).unwrap(), RunRecord::default());
        let mut record = RunRecord { recipe: "tiny".to_owned(), seed: 7, ..RunRecord::default() };
        let mut inputs = Inputs::default();
        inputs.set("seed", "7");
        let done = StepRecord { inputs, finished: true, seconds: 1.5, stale: false, gold: None };
        record.steps.insert(Step::RewardModel, done);
        record.save(dir.path()).unwrap();
        assert_eq!(RunRecord::load(dir.path()).unwrap(), record);
        assert!(std::fs::read_to_string(dir.path().join("recipe.json")).unwrap().contains("\"reward-model\""));
    }

    #[test]
    fn a_record_of_an_earlier_version_has_no_inputs() {
        let record: StepRecord = serde_json::from_str(r#"{"key": "3b5d", "finished": true, "seconds": 2.0}"#).unwrap();
        assert!(record.finished && record.inputs.is_empty() && !record.stale);
    }
}
