//! `config.json` and `generation_config.json`, read.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use base::files::FileError;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Class, Head, HfError, TokenIds};
use crate::{Activation, GptConfig, NormPlacement, Positions, RopeScaling, Rotary};

/// The model's file.
pub const CONFIG_FILE: &str = "config.json";

/// The settings of generation, for transformers.
pub const GENERATION_FILE: &str = "generation_config.json";

/// A JSON file of a model is larger by far only if it is something else.
const MAX_JSON_BYTES: u64 = 100_000_000;

/// The model that `config.json` and `generation_config.json` describe. Positions are those of the class; only the weights tell
/// whether a table is sinusoidal.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Parsed {
    pub class: Class,
    /// `None` where no architecture is named.
    pub head: Option<Head>,
    pub config: GptConfig,
    pub tokens: TokenIds,
}

impl Parsed {
    /// Reads the files in `dir`, of which the second may be absent.
    pub fn read(dir: &Path) -> Result<Self, HfError> {
        let (path, generation_path) = (dir.join(CONFIG_FILE), dir.join(GENERATION_FILE));
        let json = read_json(&path)?;
        let generation = if generation_path.is_file() { read_json(&generation_path)? } else { Value::Null };
        let reader = Reader { path: &path, json: &json };
        let (class, config) = reader.architecture()?;
        let head = reader.head(class)?;
        // An id beyond the vocabulary is never generated; small models made with a class's defaults name such.
        let known = |id: &u32| (*id as usize) < config.vocab_size;
        let (default_bos, default_eos) = class.default_ids();
        let of_config = reader.ids("eos_token_id")?;
        let of_generation = Reader { path: &generation_path, json: &generation }.ids("eos_token_id")?;
        let mut eos = match (of_generation, of_config) {
            (None, None) => default_eos.into_iter().collect(),
            (first, second) => [first, second].into_iter().flatten().flatten().collect::<Vec<u32>>(),
        };
        let mut seen = BTreeSet::new();
        eos.retain(|id| known(id) && seen.insert(*id));
        let single = |ids: Option<Vec<u32>>, default| ids.map_or(default, |ids| ids.first().copied()).filter(known);
        let bos = single(reader.ids("bos_token_id")?, default_bos);
        let pad = single(reader.ids("pad_token_id")?, None);
        Ok(Self { class, head, tokens: TokenIds { bos, eos, pad }, config })
    }
}

/// The content of a JSON file that may come from anyone.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, HfError> {
    let damaged = |reason: String| HfError::Damaged { path: path.to_owned(), reason };
    let (file, n_bytes) = super::tensors::open(path)?;
    if n_bytes > MAX_JSON_BYTES {
        return Err(damaged(format!("it has {n_bytes} bytes, expected at most {MAX_JSON_BYTES}")));
    }
    let mut bytes = Vec::new();
    let read = file.take(MAX_JSON_BYTES).read_to_end(&mut bytes);
    read.map_err(FileError::read(path))?;
    serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))
}

/// Takes values out of a JSON file and names the key where one is wrong. A key that is absent or `null` has the value
/// that transformers' class gives it.
struct Reader<'a> {
    path: &'a Path,
    json: &'a Value,
}

/// Sizes under the name of the class and under the name that transformers takes for it in every class.
const ALIASES: [(&str, &str); 4] = [
    ("n_embd", "hidden_size"),
    ("n_layer", "num_hidden_layers"),
    ("n_head", "num_attention_heads"),
    ("n_positions", "max_position_embeddings"),
];

/// What the classes of Llama's kind differ in.
#[allow(clippy::struct_excessive_bools, reason = "each is a difference of its own")]
struct LlamaClass {
    vocab_size: usize,
    d_ff: usize,
    max_seq_len: usize,
    n_kv_heads: Option<usize>,
    head_dim: Option<usize>,
    /// Whether config.json says if attention has biases; otherwise `qkv_bias` does.
    has_bias_key: bool,
    qkv_bias: bool,
    mlp_bias_key: bool,
    qk_norm: bool,
    windows_by_default: bool,
}

const LLAMA: LlamaClass = LlamaClass {
    vocab_size: 32_000,
    d_ff: 11_008,
    max_seq_len: 2048,
    n_kv_heads: None,
    head_dim: None,
    has_bias_key: true,
    qkv_bias: false,
    mlp_bias_key: true,
    qk_norm: false,
    windows_by_default: false,
};

const MISTRAL: LlamaClass = LlamaClass {
    d_ff: 14_336,
    max_seq_len: 131_072,
    n_kv_heads: Some(8),
    has_bias_key: false,
    mlp_bias_key: false,
    windows_by_default: true,
    ..LLAMA
};

const QWEN2: LlamaClass = LlamaClass {
    vocab_size: 151_936,
    d_ff: 22_016,
    max_seq_len: 32_768,
    n_kv_heads: Some(32),
    has_bias_key: false,
    qkv_bias: true,
    mlp_bias_key: false,
    ..LLAMA
};

const QWEN3: LlamaClass =
    LlamaClass { head_dim: Some(128), has_bias_key: true, qkv_bias: false, qk_norm: true, ..QWEN2 };

impl Reader<'_> {
    fn architecture(&self) -> Result<(Class, GptConfig), HfError> {
        let known = "`gpt2`, `openai-gpt`, `llama`, `mistral`, `qwen2`, `qwen3`, `gpt_neox` or `kindling`";
        let Some(model_type) = self.optional("model_type") else {
            return Err(HfError::MissingKey { path: self.path.to_owned(), key: "model_type" });
        };
        let (class, config) = match model_type.as_str() {
            Some("gpt2") => (Class::Gpt2, self.gpt2()?),
            Some("openai-gpt") => (Class::OpenAiGpt, self.openai_gpt()?),
            Some("llama") => (Class::Llama, self.llama(&LLAMA)?),
            Some("mistral") => (Class::Mistral, self.llama(&MISTRAL)?),
            Some("qwen2") => (Class::Qwen2, self.llama(&QWEN2)?),
            Some("qwen3") => (Class::Qwen3, self.llama(&QWEN3)?),
            Some("gpt_neox") => (Class::GptNeox, self.gpt_neox()?),
            Some("kindling") => (Class::Kindling, self.kindling()?),
            Some(other) => return Err(self.refuse("model_type", other, known)),
            None => return Err(self.refuse("model_type", &model_type.to_string(), known)),
        };
        config.validate().map_err(|source| HfError::Model { path: self.path.to_owned(), source })?;
        Ok((class, config))
    }

    /// # Source
    /// Defaults: `GPT2Config` of transformers 5.23.
    fn gpt2(&self) -> Result<GptConfig, HfError> {
        for (key, required) in
            [("scale_attn_weights", true), ("scale_attn_by_inverse_layer_idx", false), ("add_cross_attention", false)]
        {
            if let Some(found) = self.optional(key)
                && found.as_bool() != Some(required)
            {
                return Err(self.refuse(key, &found.to_string(), &format!("`{required}`")));
            }
        }
        let activation = match self.text("activation_function", "gelu_new")? {
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => return Err(self.refuse("activation_function", other, "`gelu_new` or `relu`")),
        };
        let config = self.shared(50_257, 1024, activation, NormPlacement::Pre)?;
        let d_ff = self.size("n_inner", config.d_ff)?;
        Ok(GptConfig { d_ff, ..config })
    }

    /// # Source
    /// Defaults: `OpenAIGPTConfig` of transformers 5.23.
    fn openai_gpt(&self) -> Result<GptConfig, HfError> {
        let activation = match self.text("afn", "gelu")? {
            "gelu" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => return Err(self.refuse("afn", other, "`gelu` or `relu`")),
        };
        self.shared(40_478, 512, activation, NormPlacement::Post)
    }

    /// # Source
    /// Defaults: `LlamaConfig`, `MistralConfig`, `Qwen2Config`, `Qwen3Config` of transformers 5.23.
    fn llama(&self, class: &LlamaClass) -> Result<GptConfig, HfError> {
        self.refuse_quantised()?;
        self.refuse_windows(class)?;
        let activation = self.text("hidden_act", "silu")?;
        if !["silu", "swish"].contains(&activation) {
            return Err(self.refuse("hidden_act", activation, "`silu`"));
        }
        let (d_model, n_heads) = (self.size("hidden_size", 4096)?, self.size("num_attention_heads", 32)?);
        let bias = if class.has_bias_key { self.flag("attention_bias", false)? } else { class.qkv_bias };
        let head_dim = match self.optional("head_dim") {
            Some(_) => Some(self.size("head_dim", 0)?),
            None => class.head_dim,
        };
        Ok(GptConfig {
            d_model,
            n_layers: self.size("num_hidden_layers", 32)?,
            n_heads,
            d_ff: self.size("intermediate_size", class.d_ff)?,
            max_seq_len: self.size("max_position_embeddings", class.max_seq_len)?,
            dropout: self.number("attention_dropout", 0.0)?,
            tie_embeddings: self.flag("tie_word_embeddings", false)?,
            layer_norm_eps: self.number("rms_norm_eps", 1e-6)?,
            n_kv_heads: Some(self.size("num_key_value_heads", class.n_kv_heads.unwrap_or(n_heads))?),
            head_dim: head_dim.filter(|&width| width * n_heads != d_model),
            rotary: self.rotary(&["partial_rotary_factor"], 1.0)?,
            qkv_bias: bias,
            proj_bias: class.has_bias_key && bias,
            mlp_bias: class.mlp_bias_key && self.flag("mlp_bias", false)?,
            qk_norm: class.qk_norm,
            ..GptConfig::llama(self.size("vocab_size", class.vocab_size)?)
        })
    }

    /// # Source
    /// Defaults: `GPTNeoXConfig` of transformers 5.23.
    fn gpt_neox(&self) -> Result<GptConfig, HfError> {
        self.refuse_quantised()?;
        let activation = match self.text("hidden_act", "gelu")? {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => return Err(self.refuse("hidden_act", other, "`gelu`, `gelu_new` or `relu`")),
        };
        let bias = self.flag("attention_bias", true)?;
        Ok(GptConfig {
            d_model: self.size("hidden_size", 6144)?,
            n_layers: self.size("num_hidden_layers", 44)?,
            n_heads: self.size("num_attention_heads", 64)?,
            d_ff: self.size("intermediate_size", 24_576)?,
            max_seq_len: self.size("max_position_embeddings", 2048)?,
            dropout: self.number("hidden_dropout", 0.0)?,
            activation,
            tie_embeddings: self.flag("tie_word_embeddings", false)?,
            layer_norm_eps: self.number("layer_norm_eps", 1e-5)?,
            rotary: self.rotary(&["partial_rotary_factor", "rotary_pct"], 0.25)?,
            qkv_bias: bias,
            proj_bias: bias,
            parallel: self.flag("use_parallel_residual", true)?,
            ..GptConfig::gpt_neox(self.size("vocab_size", 50_432)?)
        })
    }

    /// The angles of positions, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`.
    fn rotary(&self, fraction_keys: &[&str], default_fraction: f64) -> Result<Rotary, HfError> {
        let section = ["rope_parameters", "rope_scaling"].into_iter().find_map(|key| Some((key, self.optional(key)?)));
        let empty = Value::Object(Map::new());
        let (section_name, json) = section.unwrap_or(("rope_parameters", &empty));
        if !json.is_object() {
            return Err(self.refuse(section_name, &json.to_string(), "an object"));
        }
        let inner = Reader { path: self.path, json };
        let here = |key: &str| if inner.optional(key).is_some() { &inner } else { self };
        let theta = here("rope_theta").number("rope_theta", self.number("rotary_emb_base", 10_000.0)?)?;
        let mut fraction = default_fraction;
        for key in fraction_keys {
            fraction = here(key).number(key, fraction)?;
        }
        let kind = match inner.optional("rope_type") {
            Some(_) => inner.text("rope_type", "default")?,
            None => inner.text("type", "default")?,
        };
        let needed = |key: &'static str| match inner.optional(key) {
            Some(_) => inner.number(key, 0.0),
            None => Err(self.refuse(section_name, &json.to_string(), &format!("an object with `{key}`"))),
        };
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: needed("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original: needed("original_max_position_embeddings")? as usize,
            },
            other => return Err(self.refuse("rope_type", other, "`default`, `linear` or `llama3`")),
        };
        Ok(Rotary { theta, fraction, scaling })
    }

    /// Weights of fewer bits are other numbers than the model's.
    fn refuse_quantised(&self) -> Result<(), HfError> {
        match self.optional("quantization_config") {
            Some(found) => {
                let method = found["quant_method"].as_str().unwrap_or("some method");
                Err(self.refuse("quantization_config", method, "weights in f32, f16 or bf16"))
            }
            None => Ok(()),
        }
    }

    /// Attention that does not see everything before it is another model.
    fn refuse_windows(&self, class: &LlamaClass) -> Result<(), HfError> {
        let window = match self.json.get("sliding_window") {
            None if class.windows_by_default => Some("4096".to_owned()),
            None | Some(Value::Null) => None,
            Some(window) if class.windows_by_default => Some(window.to_string()),
            Some(window) => self.flag("use_sliding_window", false)?.then(|| window.to_string()),
        };
        if let Some(window) = window {
            return Err(self.refuse("sliding_window", &window, "`null`: attention to everything before"));
        }
        let layers = self.optional("layer_types").and_then(Value::as_array).into_iter().flatten();
        match layers.into_iter().find(|kind| kind.as_str() != Some("full_attention")) {
            Some(kind) => Err(self.refuse("layer_types", &kind.to_string(), "`full_attention` throughout")),
            None => Ok(()),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, HfError> {
        let Some(value) = self.optional(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.refuse(key, &value.to_string(), "a boolean"))
    }

    fn kindling(&self) -> Result<GptConfig, HfError> {
        serde_json::from_value(self.json["gpt"].clone())
            .map_err(|error| self.refuse("gpt", &error.to_string(), "the architecture as this program writes it"))
    }

    fn shared(
        &self,
        vocab_size: usize,
        max_seq_len: usize,
        activation: Activation,
        norm: NormPlacement,
    ) -> Result<GptConfig, HfError> {
        let dropout = self.number("resid_pdrop", 0.1)?;
        for key in ["embd_pdrop", "attn_pdrop"] {
            let other = self.number(key, 0.1)?;
            if other != dropout {
                tracing::warn!("`{}`: `{key}` is {other}; `resid_pdrop` {dropout} is used for it", self.path.display());
            }
        }
        let d_model = self.size("n_embd", 768)?;
        Ok(GptConfig {
            vocab_size: self.size("vocab_size", vocab_size)?,
            d_model,
            n_layers: self.size("n_layer", 12)?,
            n_heads: self.size("n_head", 12)?,
            d_ff: 4 * d_model,
            max_seq_len: self.size("n_positions", max_seq_len)?,
            dropout,
            positions: Positions::Learned,
            norm,
            activation,
            tie_embeddings: match self.optional("tie_word_embeddings") {
                None => true,
                Some(Value::Bool(tied)) => *tied,
                Some(other) => return Err(self.refuse("tie_word_embeddings", &other.to_string(), "a boolean")),
            },
            layer_norm_eps: self.number("layer_norm_epsilon", 1e-5)?,
            ..GptConfig::gpt2(vocab_size)
        })
    }

    /// The head of the named architecture, `None` where none is named.
    fn head(&self, class: Class) -> Result<Option<Head>, HfError> {
        let Some(architectures) = self.optional("architectures") else { return Ok(None) };
        let Some(name) = architectures[0].as_str() else {
            return Err(self.refuse("architectures", &architectures.to_string(), "a list of one class name"));
        };
        if name == class.architecture(Head::Lm) {
            return Ok(Some(Head::Lm));
        }
        let bias = self.number("score_bias", 0.0)?;
        let head = Head::Score { bias };
        if name != class.architecture(head) {
            let known = format!("`{}` or `{}`", class.architecture(Head::Lm), class.architecture(head));
            return Err(self.refuse("architectures", name, &known));
        }
        if !(bias as f32).is_finite() {
            return Err(self.refuse("score_bias", &bias.to_string(), "a number that 32 bits hold"));
        }
        // transformers writes `id2label` and leaves out both where there are two, its default.
        let (key, n_labels) = match (self.optional("num_labels"), self.optional("id2label")) {
            (Some(n), _) => ("num_labels", n.as_u64().unwrap_or(0)),
            (None, Some(labels)) => ("id2label", labels.as_object().map_or(0, |labels| labels.len() as u64)),
            (None, None) => ("num_labels", 2),
        };
        if n_labels != 1 {
            return Err(self.refuse(key, &format!("{n_labels} labels"), "1 label, the score"));
        }
        Ok(Some(head))
    }

    /// The value of `key` or of its alias, unless it is absent or `null`.
    fn optional(&self, key: &str) -> Option<&Value> {
        let alias = ALIASES.iter().find(|(name, _)| *name == key).map(|(_, alias)| *alias);
        let values = [Some(key), alias].into_iter().flatten().filter_map(|key| self.json.get(key));
        values.into_iter().find(|value| !value.is_null())
    }

    fn text(&self, key: &str, default: &'static str) -> Result<&str, HfError> {
        let Some(value) = self.optional(key) else { return Ok(default) };
        value.as_str().ok_or_else(|| self.refuse(key, &value.to_string(), "a string"))
    }

    fn size(&self, key: &str, default: usize) -> Result<usize, HfError> {
        let Some(value) = self.optional(key) else { return Ok(default) };
        match value.as_u64() {
            Some(size) if (1..=GptConfig::LARGEST_SIZE as u64).contains(&size) => Ok(size as usize),
            _ => {
                let expected = format!("a whole number from 1 to {}", GptConfig::LARGEST_SIZE);
                Err(self.refuse(key, &value.to_string(), &expected))
            }
        }
    }

    fn number(&self, key: &str, default: f64) -> Result<f64, HfError> {
        let Some(value) = self.optional(key) else { return Ok(default) };
        value.as_f64().ok_or_else(|| self.refuse(key, &value.to_string(), "a number"))
    }

    /// Token ids, one or a list; `None` where the key is absent, none where it is `null` or the −1 of some old files.
    fn ids(&self, key: &str) -> Result<Option<Vec<u32>>, HfError> {
        let Some(value) = self.json.get(key) else { return Ok(None) };
        let ids = match value {
            Value::Null => &[],
            Value::Array(ids) => &ids[..],
            one => std::slice::from_ref(one),
        };
        let named = ids.iter().filter(|id| id.as_i64() != Some(-1));
        let ids = named.map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect::<Option<_>>();
        ids.map(Some).ok_or_else(|| self.refuse(key, &value.to_string(), "a token id or a list of them"))
    }

    fn refuse(&self, key: &str, found: &str, expected: &str) -> HfError {
        HfError::Key {
            path: self.path.to_owned(),
            key: key.to_owned(),
            found: found.to_owned(),
            expected: expected.to_owned(),
        }
    }
}
