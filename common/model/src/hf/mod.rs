//! Models in Hugging Face layout, both ways. Foreign names are here and in the [table of parameters](crate::params) alone.
//!
//! Models with rotary positions are those of Llama, Qwen or GPT-NeoX, whichever class has the same switches. Of the others our
//! pre-norm models are `GPT2LMHeadModel`, our post-norm models `OpenAIGPTLMHeadModel` (GPT-1's class, whose block
//! is that of "Attention is all you need"); reward and value models are the `…ForSequenceClassification` of each, with
//! one label. Both classes learn their positions, so fixed sinusoids are written as a table, and a table that holds
//! them is read as fixed again. A post-norm model whose feed-forward width is not `4 · d_model` has no counterpart: it
//! is written with `model_type: "kindling"` and our own names, and so is any other mixture of switches that no class has.

mod adapter;
mod config;
mod names;
mod render;
mod tensors;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use base::files::FileError;
use half::bf16;
use kernels::TrunkPrecision;

pub use adapter::{
    ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterFiles, Base, HostAdapter, adapters_of, read_adapter,
    write_adapter,
};
pub use config::{CONFIG_FILE, GENERATION_FILE};
pub use tensors::{INDEX_FILE, WEIGHTS_FILE, read_file, write_file};

use crate::params::{Output, Parameter, Role, parameters, path_of};
use crate::{
    ALL_LINEAR, Activation, GptConfig, HostTensor, ModelConfigError, NamedTensors, NormKind, NormPlacement, Positions,
    sinusoid_table,
};
use config::Parsed;
use names::Assembled;
use tensors::Weights;

/// How far a position table may be from the sinusoids and still be them: rounding of another implementation's sines.
const SINUSOID_TOLERANCE: f32 = 1e-6;

/// The head on the transformer.
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
    /// `LlamaForCausalLM`, `LlamaForSequenceClassification`.
    Llama,
    /// `MistralForCausalLM`, `MistralForSequenceClassification`: read, and written as Llama's.
    Mistral,
    /// `Qwen2ForCausalLM`, `Qwen2ForSequenceClassification`.
    Qwen2,
    /// `Qwen3ForCausalLM`, `Qwen3ForSequenceClassification`.
    Qwen3,
    /// `GPTNeoXForCausalLM`, `GPTNeoXForSequenceClassification`.
    GptNeox,
    /// None of transformers' classes.
    Kindling,
}

impl Head {
    /// The constant added to every score; 0 for a language model.
    pub const fn bias(self) -> f64 {
        match self {
            Self::Lm => 0.0,
            Self::Score { bias } => bias,
        }
    }

    /// The output of the model that it stands for.
    pub const fn output(self) -> Output {
        match self {
            Self::Lm => Output::Logits,
            Self::Score { .. } => Output::Score,
        }
    }
}

impl Class {
    /// The class that computes what `config` describes.
    pub fn of(config: &GptConfig) -> Self {
        if config.has_gpt_blocks() {
            return match config.norm {
                NormPlacement::Pre => Self::Gpt2,
                NormPlacement::Post if config.d_ff == 4 * config.d_model => Self::OpenAiGpt,
                NormPlacement::Post => Self::Kindling,
            };
        }
        if config.norm != NormPlacement::Pre || config.positions != Positions::Rotary {
            return Self::Kindling;
        }
        let GptConfig { qkv_bias, proj_bias, mlp_bias, qk_norm, gated, parallel, activation, .. } = *config;
        let is_whole = config.rotary.fraction == 1.0;
        let own_width = config.n_heads * config.d_head() == config.d_model;
        match config.norm_kind {
            NormKind::RmsNorm if gated && !parallel && is_whole && activation == Activation::Silu => {
                match (qk_norm, qkv_bias, proj_bias, mlp_bias) {
                    (true, _, _, false) if qkv_bias == proj_bias => Self::Qwen3,
                    (false, true, false, false) if own_width => Self::Qwen2,
                    (false, ..) if qkv_bias == proj_bias => Self::Llama,
                    _ => Self::Kindling,
                }
            }
            NormKind::LayerNorm
                if !gated
                    && !qk_norm
                    && mlp_bias
                    && qkv_bias == proj_bias
                    && own_width
                    && config.n_kv_heads() == config.n_heads
                    && activation != Activation::Silu =>
            {
                Self::GptNeox
            }
            _ => Self::Kindling,
        }
    }

    /// Before the names of tensors of the trunk.
    const fn prefix(self) -> &'static str {
        match self {
            Self::Gpt2 | Self::OpenAiGpt => "transformer.",
            Self::Llama | Self::Mistral | Self::Qwen2 | Self::Qwen3 => "model.",
            Self::GptNeox => "gpt_neox.",
            Self::Kindling => "",
        }
    }

    /// Before the index of a block.
    const fn blocks(self) -> &'static str {
        match self {
            Self::Gpt2 | Self::OpenAiGpt => "h",
            _ => "layers",
        }
    }

    /// The tokens that begin and end a text where no file of the model names one.
    const fn default_ids(self) -> (Option<u32>, Option<u32>) {
        match self {
            Self::Gpt2 => (Some(50_256), Some(50_256)),
            Self::Llama | Self::Mistral => (Some(1), Some(2)),
            Self::GptNeox => (Some(0), Some(2)),
            Self::OpenAiGpt | Self::Qwen2 | Self::Qwen3 | Self::Kindling => (None, None),
        }
    }

    const fn model_type(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt2",
            Self::OpenAiGpt => "openai-gpt",
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::GptNeox => "gpt_neox",
            Self::Kindling => "kindling",
        }
    }

    const fn architecture(self, head: Head) -> &'static str {
        match (self, head) {
            (Self::Gpt2, Head::Lm) => "GPT2LMHeadModel",
            (Self::Gpt2, Head::Score { .. }) => "GPT2ForSequenceClassification",
            (Self::OpenAiGpt, Head::Lm) => "OpenAIGPTLMHeadModel",
            (Self::OpenAiGpt, Head::Score { .. }) => "OpenAIGPTForSequenceClassification",
            (Self::Llama, Head::Lm) => "LlamaForCausalLM",
            (Self::Llama, Head::Score { .. }) => "LlamaForSequenceClassification",
            (Self::Mistral, Head::Lm) => "MistralForCausalLM",
            (Self::Mistral, Head::Score { .. }) => "MistralForSequenceClassification",
            (Self::Qwen2, Head::Lm) => "Qwen2ForCausalLM",
            (Self::Qwen2, Head::Score { .. }) => "Qwen2ForSequenceClassification",
            (Self::Qwen3, Head::Lm) => "Qwen3ForCausalLM",
            (Self::Qwen3, Head::Score { .. }) => "Qwen3ForSequenceClassification",
            (Self::GptNeox, Head::Lm) => "GPTNeoXForCausalLM",
            (Self::GptNeox, Head::Score { .. }) => "GPTNeoXForSequenceClassification",
            (Self::Kindling, Head::Lm) => "KindlingForCausalLM",
            (Self::Kindling, Head::Score { .. }) => "KindlingForSequenceClassification",
        }
    }
}

/// The ids that config.json and `generation_config.json` name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenIds {
    /// Begins a conversation.
    pub bos: Option<u32>,
    /// Each ends an answer.
    pub eos: Vec<u32>,
    /// Fills a batch.
    pub pad: Option<u32>,
}

/// A model on the host, as a directory holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct HostModel {
    /// The architecture.
    pub config: GptConfig,
    /// Its head.
    pub head: Head,
    /// The weights under our own paths: those of [`Gpt`](crate::Gpt), or of
    /// [`ScalarGpt`](crate::ScalarGpt) with [`Head::Score`].
    pub tensors: NamedTensors,
    /// Those among the weights that stay in bf16: none, or all for which [`Role::may_be_narrow`].
    pub narrow: NamedTensors<bf16>,
}

/// Reads the model in `dir`: what [`write()`] writes, or transformers for the classes above.
///
/// Keys that config.json lacks have the values of transformers' class. Names may have the prefix `transformer.` or not;
/// buffers of old versions (causal masks, position ids) are left out, any other tensor that has no place is an error. A
/// tied model may carry `lm_head.weight`: where it differs from the token embedding the model is read as untied, as
/// transformers 5 does. Nothing as large as the model is allocated before every tensor's shape is known to be right.
///
/// Returns the model, the ids that its files name, and the SHA-256 of the weights.
///
/// # Errors
/// If a file is missing or damaged, config.json asks for what the model cannot do, or a tensor is missing, has no
/// place, has another shape or holds a number that is not finite.
pub fn read(dir: &Path) -> Result<(HostModel, TokenIds, String), HfError> {
    read_in(dir, TrunkPrecision::F32)
}

/// [`read`], with matrices in the type of `trunk`: into bf16 those of a file in bf16 as they are, others rounded to the
/// nearest, each while it is read.
///
/// # Errors
/// As `read`.
pub fn read_in(dir: &Path, trunk: TrunkPrecision) -> Result<(HostModel, TokenIds, String), HfError> {
    let Parsed { class, head, mut config, tokens } = Parsed::read(dir)?;
    let known_as = |name: &str| names::known_as(class, name);
    let weights = Weights::open(dir, known_as)?;
    let scores = weights.tensors.contains_key("score.weight");
    let head = head.unwrap_or(if scores { Head::Score { bias: 0.0 } } else { Head::Lm });
    let output = head.output();
    // An output layer that is written out although it is tied is read, to be compared with the embedding.
    let untied = GptConfig { tie_embeddings: false, ..config.clone() };
    let written_out = config.tie_embeddings
        && class != Class::Kindling
        && names::name_of(class, &untied, output, Role::OutputHead).is_some_and(|n| weights.tensors.contains_key(&n));
    if written_out {
        config = untied;
    }
    check_shapes(&dir.join(WEIGHTS_FILE), class, &config, output, &weights)?;
    let is_narrow = |p: &Parameter<'_>| trunk == TrunkPrecision::Bf16 && p.role().may_be_narrow();
    let halves = parameters(&config, output).filter(is_narrow);
    let halves = halves.flat_map(|parameter| names::spans(class, &parameter)).map(|(name, _)| name).collect();
    let (theirs, sha256) = weights.read(known_as, &halves)?;
    let all = || parameters(&config, output);
    let mut tensors = names::import(class, all().filter(|parameter| !is_narrow(parameter)), theirs.wide);
    let mut narrow = names::import(class, all().filter(is_narrow), theirs.narrow);
    if written_out && (is_tied(&config, &mut tensors) || is_tied(&config, &mut narrow)) {
        config.tie_embeddings = true;
    } else if written_out {
        tracing::warn!("the output layer differs from the token embedding although config.json ties them: kept apart");
    }
    if class != Class::Kindling {
        fix_positions(&mut config, output, &mut tensors);
    }
    Ok((HostModel { config, head, tensors, narrow }, tokens, sha256))
}

/// The architecture that config.json describes; only the weights tell whether tied embeddings are written out, and
/// whether positions are sinusoidal.
///
/// # Errors
/// If the file is missing or damaged, or asks for what the model cannot do.
pub fn read_config(dir: &Path) -> Result<GptConfig, HfError> {
    Ok(Parsed::read(dir)?.config)
}

/// Checks that the weights are those of the model that config.json describes, before any is read.
fn check_shapes(
    path: &Path,
    class: Class,
    config: &GptConfig,
    output: Output,
    weights: &Weights,
) -> Result<(), HfError> {
    let mut used = BTreeSet::new();
    for parameter in parameters(config, output) {
        for (name, span) in names::spans(class, &parameter) {
            match weights.tensors.get(&name) {
                None => return Err(HfError::Missing { path: path.to_owned(), name }),
                Some((path, found)) if *found != span.shape => {
                    let (path, found, expected) = (path.clone(), found.clone(), span.shape);
                    return Err(HfError::Shape { path, name, found, expected });
                }
                Some(_) => used.insert(name),
            };
        }
    }
    match weights.tensors.iter().find(|(name, _)| !used.contains(*name)) {
        Some((name, (path, _))) => Err(HfError::Unused { path: path.clone(), name: name.clone() }),
        None => Ok(()),
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
    tokens: &TokenIds,
) -> Result<Class, HfError> {
    let class = Class::of(config);
    if let Head::Score { bias } = head
        && !bias.is_finite()
    {
        return Err(HfError::NotFinite { path: dir.join(CONFIG_FILE), name: "score_bias".into(), value: bias as f32 });
    }
    let (description, generation) = render::render(class, config, head, tokens);
    for (file, content) in [(CONFIG_FILE, description), (GENERATION_FILE, generation)] {
        let path = dir.join(file);
        let text = format!("{content:#}\n");
        std::fs::write(&path, text).map_err(FileError::write(&path))?;
    }
    let mut theirs = names::export(class, config, head.output(), tensors);
    if class != Class::Kindling && config.positions == Positions::Sinusoidal {
        let learned = GptConfig { positions: Positions::Learned, ..config.clone() };
        let (shape, data) =
            (vec![config.max_seq_len, config.d_model], sinusoid_table(config.max_seq_len, config.d_model));
        let name = names::name_of(class, &learned, head.output(), Role::PositionEmbedding)
            .expect("the table has learned positions");
        theirs.insert(name, Assembled::Own(HostTensor { shape, data }));
    }
    tensors::write_all(&dir.join(WEIGHTS_FILE), theirs.iter().map(|(name, tensor)| (name.clone(), tensor)))?;
    Ok(class)
}

/// Whether the output layer is the token embedding after all, if they are among `tensors`; then it is dropped.
fn is_tied<T: PartialEq>(config: &GptConfig, tensors: &mut NamedTensors<T>) -> bool {
    let path = |role| path_of(config, Output::Logits, role);
    let (Some(head), Some(embedding)) = (path(Role::OutputHead), path(Role::TokenEmbedding)) else { return false };
    let is_tied = tensors.get(&head).is_some_and(|weights| Some(weights) == tensors.get(&embedding));
    if is_tied {
        tensors.remove(&head);
    }
    is_tied
}

/// Drops a position table that holds the sinusoids.
fn fix_positions(config: &mut GptConfig, output: Output, tensors: &mut NamedTensors) {
    let Some(path) = path_of(config, output, Role::PositionEmbedding) else { return };
    if !config.d_model.is_multiple_of(2) {
        return;
    }
    let sinusoids = sinusoid_table(config.max_seq_len, config.d_model);
    if tensors[&path].data.iter().zip(&sinusoids).all(|(a, b)| (a - b).abs() <= SINUSOID_TOLERANCE) {
        tensors.remove(&path);
        config.positions = Positions::Sinusoidal;
    }
}

/// Why a directory is not a model we can read, or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is not what its name says.
    #[error("`{}` is damaged or cut short: {reason}\nhint: copy or download it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The parser's message.
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
    /// config.json lacks a key that has no default.
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
        /// The values that can be read.
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
    #[error("`{}`: tensor `{name}` is missing\nhint: the files of this directory are not of one model; copy or download them again", path.display())]
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
    #[error("`{}`: tensor `{name}` has shape {found:?}, expected {expected:?}\nhint: the files of this directory are not of one model; copy or download them again", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that config.json implies.
        expected: Vec<usize>,
    },
    /// A tensor of an adapter has another shape.
    #[error(
        "`{}`: tensor `{name}` has shape {found:?}, expected {expected:?} for rank {rank} on this base\nhint: the adapter was made for \
         another base, or with another rank than `{ADAPTER_CONFIG_FILE}` says",
        path.display()
    )]
    AdapterShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that rank and base imply.
        expected: Vec<usize>,
        /// The rank.
        rank: usize,
    },
    /// A tensor of an adapter is not there, or has no place.
    #[error(
        "`{}`: tensor `{name}` {}\nhint: the adapter was made for another base, or its files are not of one adapter",
        path.display(),
        if *is_missing { "is missing" } else { "has no place beside this base and these targets" }
    )]
    AdapterTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Whether it should be there.
        is_missing: bool,
    },
    /// The head of a reward model is not among the tensors of its adapter.
    #[error(
        "`{}` is the adapter of a reward model and lacks its head `{name}`\nhint: without the head there are no scores; save the \
         adapter again, with `score` among `modules_to_save`",
        path.display()
    )]
    NoHead {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// The directory of an adapter has no weights that can be read.
    #[error(
        "no weights in `{}`: expected `{ADAPTER_WEIGHTS_FILE}`{}",
        dir.display(),
        if *pickled { "\nhint: `adapter_model.bin` is not read; load it with PEFT and `save_pretrained` it again" } else { "" }
    )]
    NoAdapterWeights {
        /// The directory.
        dir: PathBuf,
        /// Whether it holds an `adapter_model.bin`.
        pickled: bool,
    },
    /// No linear layer has this name.
    #[error(
        "`{target}` is no linear layer of this model\nhint: targets can be {}, or \"{ALL_LINEAR}\"",
        known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    )]
    UnknownTarget {
        /// The name.
        target: String,
        /// The names that there are.
        known: Vec<String>,
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
