//! Checkpoints: one directory in Hugging Face layout, with what training needs besides.
//!
//! ```text
//! config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json   for transformers, too
//! config.toml      the resolved configuration      manifest.json   where it comes from, and every hash
//! metrics.jsonl samples.jsonl                      state/          what --resume needs      value/   PPO's value model
//! ```
//! Of a model with adapters beside frozen weights, `adapter_config.json` and `adapter_model.safetensors` in PEFT's layout
//! take the place of `model.safetensors`; its base is read with it, see [`Checkpoint::open_with`].
//!
//! A checkpoint is whole or absent, see [`save`]. `model.safetensors` is what the stage hands on (with keep-best, the
//! best so far); the weights that training goes on from are in `state/`.

mod adapter;
mod error;
mod init;
mod manifest;
mod preview;
mod save;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use serde_json::Value;

use adapter::{Adapted, HostWeights};
pub use adapter::{AdapterPreview, LoraDifference, is_in as is_adapter};
pub use error::CheckpointError;
pub use init::{grow_vocab, init_from};
pub use manifest::{FORMAT_VERSION, MANIFEST_FILE, Manifest, Parent, Stage};
pub use preview::Preview;
pub use save::save;

use crate::files::FileError;
use crate::hash::sha256_of;
use crate::hf::{self, Head, HostAdapter, HostModel, TokenIds};
use crate::kernels::TrunkPrecision;
use crate::model::{Gpt, GptConfig, NamedError, NamedTensors, ScalarGpt};
use crate::tokenizer::Tokenizer;

/// The resolved configuration in a checkpoint.
pub const CONFIG_FILE: &str = "config.toml";

/// PPO's value model, a directory in a checkpoint.
const VALUE_DIR: &str = "value";

/// Directory in a checkpoint for the state that `--resume` needs.
const STATE_DIR: &str = "state";

/// The part of the state that is no tensor.
const STATE_FILE: &str = "state.json";

/// [`STATE_FILE`], from the checkpoint's directory.
pub(crate) const STATE_FILE_PATH: &str = "state/state.json";

/// A checkpoint's directory, read and verified: the weights are in memory, on no device.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Option<Manifest>,
    /// With an adapter, the weights that it stands beside.
    model: HostModel,
    adapter: Option<Adapted>,
    /// Of its own weights, with an adapter of those alone.
    weights_sha256: String,
    tokenizer: Option<Tokenizer>,
}

/// How a checkpoint is opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Opening<'a> {
    /// Directory of the base of an adapter, in place of the one that it names.
    pub base: Option<&'a Path>,
    /// The type in which the matrices are kept, which in bf16 cannot be trained.
    pub trunk: TrunkPrecision,
}

/// Contents of a checkpoint for [`save`].
#[derive(Debug, Clone)]
pub struct Snapshot<'a> {
    /// The weights that the stage hands on.
    pub weights: Weights,
    /// Where it comes from; the hashes of what is saved are filled in.
    pub manifest: Manifest,
    /// Its tokenizer.
    pub tokenizer: Option<&'a Tokenizer>,
    /// The resolved configuration.
    pub config_toml: &'a str,
    /// PPO's value model.
    pub value: Option<Weights>,
    /// The state for `--resume`.
    pub state: Option<State>,
}

/// A model's weights, by the paths of its module.
#[derive(Debug, Clone, PartialEq)]
pub enum Weights {
    /// Of a [`Gpt`].
    Lm {
        /// The weights.
        named: NamedTensors,
        /// The architecture.
        config: GptConfig,
    },
    /// Of a [`ScalarGpt`].
    Scalar {
        /// The weights.
        named: NamedTensors,
        /// The architecture of the trunk.
        config: GptConfig,
        /// The constant added to every score.
        score_bias: f64,
    },
    /// Of adapters, and of a reward model's head, beside the frozen weights of a base.
    Adapter {
        /// The adapters, their tensors and the head of the model.
        adapter: HostAdapter,
        /// The architecture of the trunk.
        config: GptConfig,
        /// The base.
        base: Parent,
    },
}

/// The state with which training goes on as if it had not stopped, f32 and exact.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct State {
    /// Counters and settings; numbers keep every bit.
    pub json: Value,
    /// Tensors by the stem of the file they go to: `weights`, `adam_m`, …
    pub tensors: BTreeMap<String, NamedTensors>,
}

/// The directories in `dir` that hold a checkpoint, quoted and in the order of their names.
fn checkpoints_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<String> = entries
        .filter(|path| path.join(hf::CONFIG_FILE).is_file() || adapter::is_in(path))
        .map(|path| format!("`{}`", path.display()))
        .collect();
    found.sort();
    found
}

impl Checkpoint {
    /// Reads the checkpoint in `dir`, or a directory that transformers wrote, and checks it against its manifest.
    ///
    /// # Errors
    /// If there is no such directory, a file is missing or damaged, the weights are not those of the manifest, or the
    /// tokenizer has more tokens than the model.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        Self::open_with(dir, Opening::default())
    }

    /// [`open`](Self::open), as `opening` says.
    ///
    /// # Errors
    /// As `open`; and if an adapter has no base, the base is another than it was trained on, or they do not fit.
    pub fn open_with(dir: &Path, opening: Opening<'_>) -> Result<Self, CheckpointError> {
        if !dir.is_dir() {
            return Err(CheckpointError::NoDirectory { dir: dir.to_owned() });
        }
        if adapter::is_in(dir) {
            return Self::open_adapter(dir, opening);
        }
        if !dir.join(hf::CONFIG_FILE).is_file() {
            return Err(CheckpointError::NotACheckpoint { dir: dir.to_owned(), inside: checkpoints_in(dir) });
        }
        let manifest = Manifest::read(dir)?;
        let (model, TokenIds { eos: end_ids, .. }, weights_sha256) = hf::read_in(dir, opening.trunk)?;
        let tokenizer = Self::read_tokenizer(dir, end_ids)?;
        let dir = dir.to_owned();
        let checkpoint = Self { dir, manifest, model, adapter: None, weights_sha256, tokenizer };
        checkpoint.check()?;
        Ok(checkpoint)
    }

    fn read_tokenizer(dir: &Path, end_ids: Vec<u32>) -> Result<Option<Tokenizer>, CheckpointError> {
        let has_tokenizer =
            ["tokenizer.json", "vocab.json", "encoder.json"].iter().any(|file| dir.join(file).is_file());
        Ok(if has_tokenizer { Some(Tokenizer::load(dir)?.with_end_ids(end_ids)) } else { None })
    }

    /// Checks that weights and tokenizer fit each other and are those of the manifest.
    fn check(&self) -> Result<(), CheckpointError> {
        let Self { dir, manifest, model, weights_sha256, tokenizer, .. } = self;
        if let Some(manifest) = manifest
            && manifest.weights_sha256 != *weights_sha256
        {
            return Err(CheckpointError::Changed { path: dir.join(self.weights_file()) });
        }
        if let Some(tokenizer) = tokenizer
            && tokenizer.vocab_size() > model.config.vocab_size
        {
            return Err(CheckpointError::Vocabulary {
                dir: dir.to_owned(),
                tokenizer: tokenizer.vocab_size(),
                model: model.config.vocab_size,
            });
        }
        if let (Some(manifest), Some(tokenizer)) = (manifest, tokenizer) {
            if manifest.tokenizer_sha256.as_ref().is_some_and(|hash| *hash != tokenizer.sha256()) {
                return Err(CheckpointError::Changed { path: dir.join("tokenizer.json") });
            }
            if manifest.chat_template_sha256.as_ref().is_some_and(|hash| *hash != tokenizer.chat_template_sha256()) {
                let files = ["chat_template.jinja", "tokenizer_config.json"].map(|file| dir.join(file));
                let path = files.into_iter().find(|path| path.is_file()).unwrap_or_else(|| dir.to_owned());
                return Err(CheckpointError::Changed { path });
            }
        }
        Ok(())
    }

    /// The file of its own weights.
    const fn weights_file(&self) -> &'static str {
        if self.adapter.is_some() { hf::ADAPTER_WEIGHTS_FILE } else { hf::WEIGHTS_FILE }
    }

    /// The stage that wrote it; `None` for a directory of another program.
    pub fn stage(&self) -> Option<Stage> {
        self.manifest.as_ref().map(|manifest| manifest.stage)
    }

    /// The checkpoint, if one of `stages` wrote it. A directory of another program has no stage and passes if it holds the
    /// kind of model that they write.
    ///
    /// # Errors
    /// If another stage wrote it, or it holds a score where they write a language model or the other way round.
    pub fn of_stage(self, stages: &[Stage]) -> Result<Self, CheckpointError> {
        match (self.stage(), self.model.head) {
            (Some(found), _) if !stages.contains(&found) => {
                Err(CheckpointError::Stage { dir: self.dir, found, expected: stages.to_vec() })
            }
            (None, Head::Score { .. }) if !stages.contains(&Stage::RewardModel) => {
                Err(CheckpointError::NotAnLm { dir: self.dir })
            }
            (None, Head::Lm) if stages == [Stage::RewardModel] => Err(CheckpointError::NotAScore { dir: self.dir }),
            _ => Ok(self),
        }
    }

    /// The language model, on `device`, an adapter added into its weights; beside them if they are in bf16, which has no
    /// digits for what an adapter adds.
    ///
    /// # Errors
    /// If it is a reward model.
    pub fn load_gpt(&self, device: &Device) -> Result<Gpt, CheckpointError> {
        self.gpt_of(self.weights(), device)
    }

    /// [`load_gpt`](Self::load_gpt) with the checkpoint's own numbers, as [`release`](Self::release) leaves it, so that no
    /// second copy stays in memory.
    ///
    /// # Errors
    /// As there.
    pub fn take_gpt(&mut self, device: &Device) -> Result<Gpt, CheckpointError> {
        let weights = self.take_weights();
        self.gpt_of(weights, device)
    }

    fn gpt_of(&self, weights: HostWeights, device: &Device) -> Result<Gpt, CheckpointError> {
        match self.model.head {
            Head::Lm => self.build(|| match self.adapter_beside(&weights) {
                Some(HostAdapter { adapters, tensors, .. }) => {
                    self.trunk_of(weights, device)?.with_adapters(adapters, tensors.clone(), device)
                }
                None => Gpt::from_both(&self.model.config, self.merged_tensors(weights.wide), weights.narrow, device),
            }),
            Head::Score { .. } => Err(CheckpointError::NotAnLm { dir: self.dir.clone() }),
        }
    }

    /// The reward model, on `device`, its constant included, an adapter as in [`load_gpt`](Self::load_gpt).
    ///
    /// # Errors
    /// If it is a language model.
    pub fn load_scalar(&self, device: &Device) -> Result<ScalarGpt, CheckpointError> {
        self.scalar_of(self.weights(), device)
    }

    /// [`load_scalar`](Self::load_scalar) with the checkpoint's own numbers, see [`take_gpt`](Self::take_gpt).
    ///
    /// # Errors
    /// As there.
    pub fn take_scalar(&mut self, device: &Device) -> Result<ScalarGpt, CheckpointError> {
        let weights = self.take_weights();
        self.scalar_of(weights, device)
    }

    fn scalar_of(&self, weights: HostWeights, device: &Device) -> Result<ScalarGpt, CheckpointError> {
        match self.model.head {
            Head::Score { bias } => self.build(|| {
                if let Some(HostAdapter { adapters, tensors, .. }) = self.adapter_beside(&weights) {
                    let trunk = self.trunk_of(weights, device)?;
                    return ScalarGpt::with_adapters(trunk, adapters, tensors.clone(), bias, device);
                }
                let tensors = self.merged_tensors(weights.wide);
                ScalarGpt::from_both(&self.model.config, tensors, weights.narrow, bias, device)
            }),
            Head::Lm => Err(CheckpointError::NotAScore { dir: self.dir.clone() }),
        }
    }

    /// PPO's value model, on `device`.
    ///
    /// # Errors
    /// If there is none, or it is damaged.
    pub fn load_value(&self, device: &Device) -> Result<ScalarGpt, CheckpointError> {
        let dir = self.dir.join(VALUE_DIR);
        if !dir.is_dir() {
            return Err(CheckpointError::NoDirectory { dir });
        }
        let mut value = Self::open(&dir)?;
        self.check_hash(&format!("{VALUE_DIR}/{}", value.weights_file()), &value.weights_sha256)?;
        value.take_scalar(device).map_err(|error| match error {
            CheckpointError::NotAScore { .. } => CheckpointError::NotAScore { dir: self.dir.clone() },
            other => other,
        })
    }

    fn build<M>(&self, model: impl FnOnce() -> Result<M, NamedError>) -> Result<M, CheckpointError> {
        model().map_err(|source| CheckpointError::Named { dir: self.dir.clone(), source })
    }

    /// The state for `--resume`.
    ///
    /// # Errors
    /// If the checkpoint has none, or it is damaged.
    pub fn state(&self) -> Result<State, CheckpointError> {
        let dir = self.dir.join(STATE_DIR);
        let path = dir.join(STATE_FILE);
        let (Some(manifest), true) = (&self.manifest, path.is_file()) else {
            return Err(CheckpointError::NoState { dir: self.dir.clone() });
        };
        let bytes = std::fs::read(&path).map_err(FileError::read(&path))?;
        self.check_hash(&format!("{STATE_DIR}/{STATE_FILE}"), &sha256_of(&bytes))?;
        let json = serde_json::from_slice(&bytes)
            .map_err(|error| CheckpointError::Json { path, reason: error.to_string() })?;
        let mut tensors = BTreeMap::new();
        for file in manifest.files_sha256.keys() {
            let stem = file.strip_prefix("state/").and_then(|file| file.strip_suffix(".safetensors"));
            let Some(stem) = stem else { continue };
            let (found, sha256) = hf::read_file(&self.dir.join(file), |_| true)?;
            self.check_hash(file, &sha256)?;
            tensors.insert(stem.to_owned(), found);
        }
        Ok(State { json, tensors })
    }

    /// Whether the run that wrote it had come to its end; `None` where nothing says so, as in a directory of another
    /// program.
    ///
    /// # Errors
    /// If the state of a checkpoint of an earlier version is damaged.
    pub fn is_finished(&self) -> Result<Option<bool>, CheckpointError> {
        #[derive(serde::Deserialize)]
        struct Progress {
            finished: bool,
        }
        let path = self.dir.join(STATE_FILE_PATH);
        match &self.manifest {
            Some(Manifest { finished: Some(finished), .. }) => Ok(Some(*finished)),
            Some(_) if path.is_file() => {
                let text = std::fs::read(&path).map_err(FileError::read(&path))?;
                let progress: Progress = serde_json::from_slice(&text)
                    .map_err(|error| CheckpointError::Json { path, reason: error.to_string() })?;
                Ok(Some(progress.finished))
            }
            _ => Ok(None),
        }
    }

    fn check_hash(&self, file: &str, sha256: &str) -> Result<(), CheckpointError> {
        let expected = self.manifest.as_ref().and_then(|manifest| manifest.files_sha256.get(file));
        match expected {
            Some(expected) if expected != sha256 => Err(CheckpointError::Changed { path: self.dir.join(file) }),
            _ => Ok(()),
        }
    }

    /// Where it was read from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its manifest; `None` for a directory of another program.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The architecture.
    pub fn model_config(&self) -> &GptConfig {
        &self.model.config
    }

    /// The same model, to be trained with `dropout`; with the probability it was trained with where that is not given.
    #[must_use]
    pub fn with_dropout(mut self, dropout: Option<f64>) -> Self {
        let own = self.model.config.dropout;
        self.model.config.dropout = dropout.unwrap_or(own);
        if dropout.is_none() && own > 0.0 {
            tracing::info!("`{}` keeps its dropout of {own}; `model.dropout` sets another", self.dir.display());
        }
        self
    }

    /// Its own weights: those that training changed, of which an adapter is all.
    pub fn named(&self) -> &NamedTensors {
        self.adapter.as_ref().map_or(&self.model.tensors, |adapted| &adapted.adapter.tensors)
    }

    /// The tokenizer, if the directory has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The tokenizer, which every stage but evaluation on token ids needs.
    ///
    /// # Errors
    /// If the directory has none.
    pub fn require_tokenizer(&self) -> Result<&Tokenizer, CheckpointError> {
        self.tokenizer().ok_or_else(|| CheckpointError::NoTokenizer { dir: self.dir.clone() })
    }

    /// The entry under which a checkpoint made from this one names it.
    pub fn as_parent(&self) -> Parent {
        let path = std::path::absolute(&self.dir).unwrap_or_else(|_| self.dir.clone());
        Parent { path, weights_sha256: self.weights_sha256.clone() }
    }
}

/// Checks that two checkpoints that work together cut text into the same tokens and render the same conversations.
///
/// # Errors
/// If one has no tokenizer, or tokenizer or chat template differ.
pub fn ensure_same_tokenizer(a: &Checkpoint, b: &Checkpoint) -> Result<(), CheckpointError> {
    let (of_a, of_b) = (a.require_tokenizer()?, b.require_tokenizer()?);
    let what = if of_a.sha256() != of_b.sha256() {
        "tokenizers"
    } else if of_a.chat_template_sha256() != of_b.chat_template_sha256() {
        "chat templates"
    } else {
        return Ok(());
    };
    Err(CheckpointError::Partners { what, a: a.dir.clone(), b: b.dir.clone() })
}

/// Opens a reward model, as [`Checkpoint::open_with`], and checks that it reads what `policy` writes.
///
/// # Errors
/// If there is none of stage `reward-model`, or it does not know the tokens that the policy can sample.
pub fn open_reward_model(dir: &Path, opening: Opening<'_>, policy: &Checkpoint) -> Result<Checkpoint, CheckpointError> {
    let reward_model = Checkpoint::open_with(dir, opening)?.of_stage(&[Stage::RewardModel])?;
    ensure_same_tokenizer(policy, &reward_model)?;
    let (sampled, known) = (policy.model_config().vocab_size, reward_model.model_config().vocab_size);
    if sampled > known {
        return Err(CheckpointError::SmallerVocabulary {
            dir: dir.to_owned(),
            known,
            policy: policy.dir.clone(),
            sampled,
        });
    }
    Ok(reward_model)
}
