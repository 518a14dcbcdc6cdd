//! The description of a checkpoint: `manifest.json`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::CheckpointError;
use crate::files::FileError;

/// The file in a checkpoint.
pub const MANIFEST_FILE: &str = "manifest.json";

/// The version of the layout that this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// The stage that wrote a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// `pretrain train`: a language model.
    Pretrain,
    /// `sft train`: a language model that answers.
    Sft,
    /// `reward-model train`: one score a response.
    RewardModel,
    /// `ppo train`: the policy, with the value model beside it.
    Ppo,
    /// `dpo train`: the policy.
    Dpo,
}

impl Stage {
    /// The stages that leave a language model.
    pub const LANGUAGE_MODELS: [Self; 4] = [Self::Pretrain, Self::Sft, Self::Ppo, Self::Dpo];
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pretrain => "pretrain",
            Self::Sft => "sft",
            Self::RewardModel => "reward-model",
            Self::Ppo => "ppo",
            Self::Dpo => "dpo",
        })
    }
}

/// A checkpoint that another one was made from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Parent {
    /// Where it was.
    pub path: PathBuf,
    /// Of its weights.
    pub weights_sha256: String,
}

/// Where a checkpoint comes from and what it should hold.
///
/// [`save`](super::save) fills in the versions and every hash of what it writes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the layout, [`FORMAT_VERSION`].
    pub format: u32,
    /// Version of the program that wrote it.
    pub program_version: String,
    /// Who wrote it.
    pub stage: Stage,
    /// Optimiser steps done (PPO: iterations).
    pub step: u64,
    /// Optimiser steps that the run was planned for; unknown to versions that did not write it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_steps: Option<u64>,
    /// Whether the run had come to its end; unknown to versions that did not write it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<bool>,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// The checkpoints it was made from.
    pub parents: Vec<Parent>,
    /// Of model.safetensors, or of `adapter_model.safetensors`.
    pub weights_sha256: String,
    /// Of the other files of tensors, by their path in the checkpoint.
    pub files_sha256: BTreeMap<String, String>,
    /// Of the tokenizer, as [`Tokenizer::sha256`](crate::tokenizer::Tokenizer::sha256) defines it.
    pub tokenizer_sha256: Option<String>,
    /// Of the chat template's text.
    pub chat_template_sha256: Option<String>,
    /// Of the data files, by their name in the configuration.
    pub data: BTreeMap<String, String>,
    /// The device it ran on.
    pub backend: String,
    /// The last value of each metric.
    pub metrics: BTreeMap<String, f64>,
}

impl Manifest {
    /// The manifest of a stage that has done nothing yet.
    pub fn new(stage: Stage) -> Self {
        Self {
            format: FORMAT_VERSION,
            program_version: env!("CARGO_PKG_VERSION").to_owned(),
            stage,
            step: 0,
            total_steps: None,
            finished: None,
            tokens: 0,
            parents: Vec::new(),
            weights_sha256: String::new(),
            files_sha256: BTreeMap::new(),
            tokenizer_sha256: None,
            chat_template_sha256: None,
            data: BTreeMap::new(),
            backend: String::new(),
            metrics: BTreeMap::new(),
        }
    }

    /// Reads the manifest in `dir`; `None` where there is none.
    ///
    /// # Errors
    /// If it cannot be read, is damaged, or has another format.
    pub fn read(dir: &Path) -> Result<Option<Self>, CheckpointError> {
        let path = dir.join(MANIFEST_FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(FileError::read(&path)(source).into()),
        };
        let damaged =
            |error: serde_json::Error| CheckpointError::Json { path: path.clone(), reason: error.to_string() };
        let version: Version = serde_json::from_slice(&bytes).map_err(damaged)?;
        if version.format != FORMAT_VERSION {
            return Err(CheckpointError::Format { path, found: version.format });
        }
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }
}

/// The one key that every version has.
#[derive(Deserialize)]
struct Version {
    format: u32,
}
