//! Checkpoints: one directory in Hugging Face layout, with what training needs besides.
//!
//! ```text
//! config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json   for transformers, too
//! config.toml      the resolved configuration      manifest.json   where it comes from, and every hash
//! metrics.jsonl samples.jsonl                      state/          what --resume needs      value/   PPO's value model
//! ```
//! A checkpoint is whole or absent, see [`save`]. `model.safetensors` is what the stage hands on (with keep-best, the
//! best so far); the weights that training goes on from are in `state/`.

mod init;
mod manifest;
mod save;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use serde_json::Value;

pub use init::{grow_vocab, init_from};
pub use manifest::{FORMAT_VERSION, MANIFEST_FILE, Manifest, Parent, Stage};
pub use save::save;

use crate::files::FileError;
use crate::hash::sha256_of;
use crate::hf::{self, Head, HfError, HostModel, TokenIds};
use crate::model::{Gpt, GptConfig, NamedError, NamedTensors, ScalarGpt};
use crate::tokenizer::{Tokenizer, TokenizerError};

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
    model: HostModel,
    weights_sha256: String,
    tokenizer: Option<Tokenizer>,
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
}

impl Weights {
    fn parts(&self) -> (&GptConfig, Head, &NamedTensors) {
        match self {
            Self::Lm { named, config } => (config, Head::Lm, named),
            Self::Scalar { named, config, score_bias } => (config, Head::Score { bias: *score_bias }, named),
        }
    }
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
        .filter(|path| path.join(hf::CONFIG_FILE).is_file())
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
        if !dir.is_dir() {
            return Err(CheckpointError::NoDirectory { dir: dir.to_owned() });
        }
        if !dir.join(hf::CONFIG_FILE).is_file() {
            return Err(CheckpointError::NotACheckpoint { dir: dir.to_owned(), inside: checkpoints_in(dir) });
        }
        let manifest = Manifest::read(dir)?;
        let (model, TokenIds { eos: end_ids, .. }, weights_sha256) = hf::read(dir)?;
        if let Some(manifest) = &manifest
            && manifest.weights_sha256 != weights_sha256
        {
            return Err(CheckpointError::Changed { path: dir.join(hf::WEIGHTS_FILE) });
        }
        let has_tokenizer =
            ["tokenizer.json", "vocab.json", "encoder.json"].iter().any(|file| dir.join(file).is_file());
        let tokenizer = if has_tokenizer { Some(Tokenizer::load(dir)?.with_end_ids(end_ids)) } else { None };
        if let Some(tokenizer) = &tokenizer
            && tokenizer.vocab_size() > model.config.vocab_size
        {
            return Err(CheckpointError::Vocabulary {
                dir: dir.to_owned(),
                tokenizer: tokenizer.vocab_size(),
                model: model.config.vocab_size,
            });
        }
        if let (Some(manifest), Some(tokenizer)) = (&manifest, &tokenizer) {
            if manifest.tokenizer_sha256.as_ref().is_some_and(|hash| *hash != tokenizer.sha256()) {
                return Err(CheckpointError::Changed { path: dir.join("tokenizer.json") });
            }
            if manifest.chat_template_sha256.as_ref().is_some_and(|hash| *hash != tokenizer.chat_template_sha256()) {
                let files = ["chat_template.jinja", "tokenizer_config.json"].map(|file| dir.join(file));
                let path = files.into_iter().find(|path| path.is_file()).unwrap_or_else(|| dir.to_owned());
                return Err(CheckpointError::Changed { path });
            }
        }
        Ok(Self { dir: dir.to_owned(), manifest, model, weights_sha256, tokenizer })
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

    /// The language model, on `device`.
    ///
    /// # Errors
    /// If it is a reward model.
    pub fn load_gpt(&self, device: &Device) -> Result<Gpt, CheckpointError> {
        match self.model.head {
            Head::Lm => self.build(&self.model, |model| Gpt::from_named(&model.config, model.tensors.clone(), device)),
            Head::Score { .. } => Err(CheckpointError::NotAnLm { dir: self.dir.clone() }),
        }
    }

    /// The reward model, on `device`, its constant included.
    ///
    /// # Errors
    /// If it is a language model.
    pub fn load_scalar(&self, device: &Device) -> Result<ScalarGpt, CheckpointError> {
        self.scalar(&self.model, device)
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
        let (model, _, sha256) = hf::read(&dir)?;
        self.check_hash(&format!("{VALUE_DIR}/{}", hf::WEIGHTS_FILE), &sha256)?;
        self.scalar(&model, device)
    }

    fn scalar(&self, model: &HostModel, device: &Device) -> Result<ScalarGpt, CheckpointError> {
        match model.head {
            Head::Score { bias } => {
                self.build(model, |model| ScalarGpt::from_named(&model.config, model.tensors.clone(), bias, device))
            }
            Head::Lm => Err(CheckpointError::NotAScore { dir: self.dir.clone() }),
        }
    }

    fn build<M>(
        &self,
        model: &HostModel,
        from_named: impl FnOnce(&HostModel) -> Result<M, NamedError>,
    ) -> Result<M, CheckpointError> {
        from_named(model).map_err(|source| CheckpointError::Named { dir: self.dir.clone(), source })
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

    /// The weights that [`Checkpoint::load_gpt`] or [`Checkpoint::load_scalar`] would put on a device.
    pub const fn named(&self) -> &NamedTensors {
        &self.model.tensors
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

/// Opens a reward model and checks that it reads what `policy` writes.
///
/// # Errors
/// If there is none of stage `reward-model`, or it does not know the tokens that the policy can sample.
pub fn open_reward_model(dir: &Path, policy: &Checkpoint) -> Result<Checkpoint, CheckpointError> {
    let reward_model = Checkpoint::open(dir)?.of_stage(&[Stage::RewardModel])?;
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

/// Why a checkpoint cannot be read, used or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// No such directory.
    #[error("no checkpoint at `{}`: there is no such directory", dir.display())]
    NoDirectory {
        /// The directory.
        dir: PathBuf,
    },
    /// A directory of something else.
    #[error(
        "`{}` is not a checkpoint: it has no `config.json`\nhint: {}",
        dir.display(),
        if dir.join("tokenizer.json").is_file() {
            "it holds a tokenizer; name the directory of a model".to_owned()
        } else if inside.is_empty() {
            "a run writes its first checkpoint when it first saves".to_owned()
        } else {
            format!("pass one of the checkpoints in it: {}", inside.join(", "))
        }
    )]
    NotACheckpoint {
        /// The directory.
        dir: PathBuf,
        /// The checkpoints in it, as a recipe leaves them.
        inside: Vec<String>,
    },
    /// The wrong stage's.
    #[error(
        "checkpoint `{}` was written by stage `{found}`, expected {}\nhint: pass the directory that {} wrote",
        dir.display(),
        .expected.iter().map(|stage| format!("`{stage}`")).collect::<Vec<_>>().join(" or "),
        .expected.iter().map(|stage| format!("`{stage} train`")).collect::<Vec<_>>().join(" or ")
    )]
    Stage {
        /// The directory.
        dir: PathBuf,
        /// Who wrote it.
        found: Stage,
        /// Who should have.
        expected: Vec<Stage>,
    },
    /// A score where logits are needed.
    #[error("`{}` holds a reward or value model, expected a language model", dir.display())]
    NotAnLm {
        /// The directory.
        dir: PathBuf,
    },
    /// Logits where a score is needed.
    #[error("`{}` holds a language model, expected a reward model\nhint: pass the directory that `reward-model train` wrote", dir.display())]
    NotAScore {
        /// The directory.
        dir: PathBuf,
    },
    /// No tokenizer.
    #[error("`{}` has no tokenizer\nhint: put `tokenizer.json` and `tokenizer_config.json` into it", dir.display())]
    NoTokenizer {
        /// The directory.
        dir: PathBuf,
    },
    /// The tokenizer is another model's.
    #[error(
        "`{}`: the tokenizer has {tokenizer} tokens, the model {model}\n\
         hint: it is another model's, or tokens were added and the embedding was not resized",
        dir.display()
    )]
    Vocabulary {
        /// The directory.
        dir: PathBuf,
        /// Tokens of the tokenizer.
        tokenizer: usize,
        /// Rows of the embedding.
        model: usize,
    },
    /// The reward model lacks embeddings of tokens that the policy can sample.
    #[error(
        "the policy `{}` can sample {sampled} tokens, the reward model `{}` knows {known}",
        policy.display(),
        dir.display()
    )]
    SmallerVocabulary {
        /// The reward model's directory.
        dir: PathBuf,
        /// Rows of its embedding.
        known: usize,
        /// The policy's directory.
        policy: PathBuf,
        /// Rows of the policy's embedding.
        sampled: usize,
    },
    /// Two checkpoints that do not fit together.
    #[error(
        "`{}` and `{}` have different {what}, so one cannot read what the other writes\nhint: train both from the same `pretrain` checkpoint",
        a.display(),
        b.display()
    )]
    Partners {
        /// The difference.
        what: &'static str,
        /// One directory.
        a: PathBuf,
        /// The other.
        b: PathBuf,
    },
    /// Nothing to resume from.
    #[error("checkpoint `{}` holds no state to resume from\nhint: `--init` starts a new run from its weights", dir.display())]
    NoState {
        /// The directory.
        dir: PathBuf,
    },
    /// Not what was saved.
    #[error("`{}` is not the file that the manifest names: its SHA-256 differs\nhint: it was changed after the save; copy the whole directory again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Another layout.
    #[error("`{}` has format {found}, this program reads {FORMAT_VERSION}", path.display())]
    Format {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// Not JSON, or not the right JSON.
    #[error("`{}` is damaged: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's message.
        reason: String,
    },
    /// Not to be saved.
    #[error("not saved: tensor `{name}` of `{}` holds {value}; the last checkpoint is kept", file.display())]
    NotFinite {
        /// The file it was to go to.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// The first number that is not finite.
        value: f32,
    },
    /// Not readable.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not writable.
    #[error("failed to write `{}`, so the last checkpoint is kept: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The model's files.
    #[error(transparent)]
    Hf(#[from] HfError),
    /// The tokenizer's files.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The weights do not fit the architecture.
    #[error("`{}`: {source}", dir.display())]
    Named {
        /// The directory.
        dir: PathBuf,
        /// Which tensor.
        source: NamedError,
    },
}
