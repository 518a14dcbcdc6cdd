//! Models in Hugging Face layout, both ways: the only place with foreign names.
//!
//! Our pre-norm models are `GPT2LMHeadModel`, our post-norm models `OpenAIGPTLMHeadModel` (GPT-1's class, whose block
//! is that of "Attention is all you need"); reward and value models are the `…ForSequenceClassification` of each, with
//! one label. Both classes learn their positions, so fixed sinusoids are written as a table, and a table that holds
//! them is read as fixed again. A post-norm model whose feed-forward width is not `4 · d_model` has no counterpart: it
//! is written with `model_type: "kindling"` and our own names.

mod config;
mod names;
mod tensors;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use config::{CONFIG_FILE, GENERATION_FILE};
pub use tensors::{INDEX_FILE, WEIGHTS_FILE, read_file, write_file};

use crate::{GptConfig, HostTensor, ModelConfigError, NamedTensors, NormPlacement, Positions, sinusoid_table};
use config::Parsed;

/// How far a position table may be from the sinusoids and still be them: rounding of another implementation's sines.
const SINUSOID_TOLERANCE: f32 = 1e-6;

/// What stands on the transformer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Head {
    /// Output logits over the vocabulary.
    Lm,
    /// One number a position, plus a constant that transformers does not know of.
    Score {
        /// The constant, `score_bias` in config.json.
        bias: f64,
    },
}

/// The class a model is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// `GPT2LMHeadModel`, `GPT2ForSequenceClassification`.
    Gpt2,
    /// `OpenAIGPTLMHeadModel`, `OpenAIGPTForSequenceClassification`.
    OpenAiGpt,
    /// None of transformers' classes.
    Kindling,
}

impl Class {
    /// The class that computes what `config` describes.
    pub fn of(config: &GptConfig) -> Self {
        match config.norm {
            NormPlacement::Pre => Self::Gpt2,
            NormPlacement::Post if config.d_ff == 4 * config.d_model => Self::OpenAiGpt,
            NormPlacement::Post => Self::Kindling,
        }
    }

    const fn model_type(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt2",
            Self::OpenAiGpt => "openai-gpt",
            Self::Kindling => "kindling",
        }
    }

    const fn architecture(self, head: Head) -> &'static str {
        match (self, head) {
            (Self::Gpt2, Head::Lm) => "GPT2LMHeadModel",
            (Self::Gpt2, Head::Score { .. }) => "GPT2ForSequenceClassification",
            (Self::OpenAiGpt, Head::Lm) => "OpenAIGPTLMHeadModel",
            (Self::OpenAiGpt, Head::Score { .. }) => "OpenAIGPTForSequenceClassification",
            (Self::Kindling, Head::Lm) => "KindlingForCausalLM",
            (Self::Kindling, Head::Score { .. }) => "KindlingForSequenceClassification",
        }
    }
}

/// The ids that config.json names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TokenIds {
    /// Begins a conversation.
    pub bos: Option<u32>,
    /// Ends an answer.
    pub eos: Option<u32>,
    /// Fills a batch.
    pub pad: Option<u32>,
}

/// A model on the host, as a directory holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct HostModel {
    /// The architecture.
    pub config: GptConfig,
    /// What stands on it.
    pub head: Head,
    /// The weights under our own paths: those of [`Gpt`](crate::Gpt), or of
    /// [`ScalarGpt`](crate::ScalarGpt) with [`Head::Score`].
    pub tensors: NamedTensors,
}

/// Reads the model in `dir`: what [`write()`] writes, or transformers for the classes above.
///
/// Names may have the prefix `transformer.` or not; the causal-mask buffers of old versions are left out, any other
/// tensor that has no place is an error. A tied model may carry `lm_head.weight`: where it differs from the token
/// embedding the model is read as untied, as transformers 5 does.
///
/// Returns the model, the ids config.json names, and the SHA-256 of the weights.
///
/// # Errors
/// If a file is missing or damaged, config.json asks for what the model cannot do, or a tensor is missing, has no
/// place, has another shape or holds a number that is not finite.
pub fn read(dir: &Path) -> Result<(HostModel, TokenIds, String), HfError> {
    let Parsed { class, head, mut config, tokens } = Parsed::read(dir)?;
    let (mut found, sha256) = tensors::read_weights(dir, |name| !names::is_mask_buffer(name))?;
    let path = dir.join(WEIGHTS_FILE);
    if class != Class::Kindling {
        // Each name with its prefix, whether the file has it or not.
        found = found.into_iter().map(|(name, tensor)| (with_prefix(&name), tensor)).collect();
        untie_if_own_head(&mut config, class, head, &mut found);
        let table = format!("transformer.{}", names::position_table(class));
        if found.get(&table).is_some_and(|table| is_sinusoidal(&config, table)) {
            config.positions = Positions::Sinusoidal;
            found.remove(&table);
        }
    }
    let mut tensors = NamedTensors::new();
    for entry in names::entries(class, &config, head) {
        let Some(tensor) = found.remove(&entry.theirs) else {
            return Err(HfError::Missing { path, name: entry.theirs });
        };
        if tensor.shape != entry.shape {
            let (name, found, expected) = (entry.theirs, tensor.shape, entry.shape);
            return Err(HfError::Shape { path, name, found, expected });
        }
        tensors.insert(entry.ours, tensor);
    }
    match found.into_keys().next() {
        Some(name) => Err(HfError::Unused { path, name }),
        None => Ok((HostModel { config, head, tensors }, tokens, sha256)),
    }
}

/// Writes a model to `dir` as `config.json`, `generation_config.json` and `model.safetensors`; returns the class it is
/// written as. `tensors` have our own paths, as in [`HostModel`].
///
/// # Errors
/// If a file cannot be written or a weight is not finite.
///
/// # Panics
/// If the tensors are not those of the architecture.
pub fn write(
    dir: &Path,
    config: &GptConfig,
    head: Head,
    tensors: &NamedTensors,
    tokens: TokenIds,
) -> Result<Class, HfError> {
    let class = Class::of(config);
    if let Head::Score { bias } = head
        && !bias.is_finite()
    {
        return Err(HfError::NotFinite { path: dir.join(CONFIG_FILE), name: "score_bias".into(), value: bias as f32 });
    }
    let (description, generation) = config::render(class, config, head, tokens);
    for (file, content) in [(CONFIG_FILE, description), (GENERATION_FILE, generation)] {
        let path = dir.join(file);
        let text = format!("{content:#}\n");
        std::fs::write(&path, text).map_err(|source| HfError::Write { path, source })?;
    }
    let entries = names::entries(class, config, head);
    assert_eq!(entries.len(), tensors.len(), "the tensors are not those of {config:?}");
    let mut named: Vec<(String, &HostTensor)> = Vec::with_capacity(entries.len() + 1);
    for entry in entries {
        let Some(tensor) = tensors.get(&entry.ours) else { panic!("tensor `{}` is missing", entry.ours) };
        assert_eq!(tensor.shape, entry.shape, "tensor `{}` has another shape", entry.ours);
        named.push((entry.theirs, tensor));
    }
    let table = HostTensor {
        shape: vec![config.max_seq_len, config.d_model],
        data: match config.positions {
            Positions::Sinusoidal => sinusoid_table(config.max_seq_len, config.d_model),
            Positions::Learned => Vec::new(),
        },
    };
    if class != Class::Kindling && config.positions == Positions::Sinusoidal {
        named.push((format!("transformer.{}", names::position_table(class)), &table));
    }
    write_file(&dir.join(WEIGHTS_FILE), named)?;
    Ok(class)
}

/// `name` as the classes with a head spell it.
fn with_prefix(name: &str) -> String {
    if ["transformer.", "lm_head.", "score."].iter().any(|known| name.starts_with(known)) {
        name.to_owned()
    } else {
        format!("transformer.{name}")
    }
}

/// Drops a tied output layer that is written out, or unties the model if it is not the embedding after all.
fn untie_if_own_head(config: &mut GptConfig, class: Class, head: Head, found: &mut NamedTensors) {
    if head != Head::Lm || !config.tie_embeddings {
        return;
    }
    let Some(own) = found.get("lm_head.weight") else { return };
    if found.get(&format!("transformer.{}", names::token_table(class))) == Some(own) {
        found.remove("lm_head.weight");
    } else {
        tracing::warn!("`lm_head.weight` differs from the token embedding although config.json ties them: kept apart");
        config.tie_embeddings = false;
    }
}

fn is_sinusoidal(config: &GptConfig, table: &HostTensor) -> bool {
    if !config.d_model.is_multiple_of(2) || table.shape != [config.max_seq_len, config.d_model] {
        return false;
    }
    let sinusoids = sinusoid_table(config.max_seq_len, config.d_model);
    table.data.iter().zip(&sinusoids).all(|(a, b)| (a - b).abs() <= SINUSOID_TOLERANCE)
}

/// Why a directory is not a model we can read, or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// A file is missing or not readable.
    #[error("failed to read `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("failed to write `{}`: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("`{}` is damaged or cut short: {reason}\nhint: copy or download it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        reason: String,
    },
    /// The directory has no weights that can be read.
    #[error(
        "no weights in `{}`: expected `{WEIGHTS_FILE}` or `{INDEX_FILE}`{}",
        dir.display(),
        if *pickled { "\nhint: `pytorch_model.bin` is not read; load it with transformers and `save_pretrained` it again" } else { "" }
    )]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// Whether it holds a `pytorch_model.bin`.
        pickled: bool,
    },
    /// config.json lacks a key.
    #[error("`{}` lacks the key `{key}`", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
    },
    /// config.json asks for what the model cannot do.
    #[error("`{}`: `{key}` is {found}, expected {expected}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What could be read.
        expected: String,
    },
    /// The sizes in config.json do not fit together.
    #[error("`{}`: {source}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// Which.
        source: ModelConfigError,
    },
    /// A tensor is not there.
    #[error("`{}`: tensor `{name}` is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor has no place in the model.
    #[error("`{}`: tensor `{name}` is not used by the model that config.json describes", path.display())]
    Unused {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape.
    #[error("`{}`: tensor `{name}` has shape {found:?}, expected {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// What config.json implies.
        expected: Vec<usize>,
    },
    /// A tensor has a type that is not read.
    #[error("`{}`: tensor `{name}` is {dtype}, expected F32, F16 or BF16", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// A tensor holds NaN or an infinity.
    #[error("`{}`: tensor `{name}` holds {value}; every number must be finite", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The first such number.
        value: f32,
    },
}
