//! `config.json` and `generation_config.json`, both ways.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Class, Head, HfError, TokenIds};
use crate::{Activation, GptConfig, NormPlacement, Positions};

/// The model's file.
pub const CONFIG_FILE: &str = "config.json";

/// What generating needs, for transformers.
pub const GENERATION_FILE: &str = "generation_config.json";

/// What a `config.json` says. Positions are those of the class; only the weights tell whether a table is sinusoidal.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Parsed {
    pub class: Class,
    pub head: Head,
    pub config: GptConfig,
    pub tokens: TokenIds,
}

impl Parsed {
    /// Reads the file in `dir`.
    pub fn read(dir: &Path) -> Result<Self, HfError> {
        let path = dir.join(CONFIG_FILE);
        let bytes = std::fs::read(&path).map_err(|source| HfError::Read { path: path.clone(), source })?;
        let json: Value = serde_json::from_slice(&bytes)
            .map_err(|error| HfError::Damaged { path: path.clone(), reason: error.to_string() })?;
        Reader { path: &path, json: &json }.parse()
    }
}

/// The two JSON files of a model.
pub(super) fn render(class: Class, config: &GptConfig, head: Head, tokens: TokenIds) -> (Value, Value) {
    let mut fields = match class {
        Class::Gpt2 => gpt2(config),
        Class::OpenAiGpt => openai_gpt(config),
        Class::Kindling => json!({ "gpt": config, "vocab_size": config.vocab_size }),
    };
    fields["architectures"] = json!([class.architecture(head)]);
    fields["model_type"] = json!(class.model_type());
    fields["dtype"] = json!("float32");
    fields["tie_word_embeddings"] = json!(config.tie_embeddings);
    fields["bos_token_id"] = json!(tokens.bos);
    fields["eos_token_id"] = json!(tokens.eos);
    fields["pad_token_id"] = json!(tokens.pad);
    if let Head::Score { bias } = head {
        fields["num_labels"] = json!(1);
        fields["id2label"] = json!({ "0": "score" });
        fields["label2id"] = json!({ "score": 0 });
        fields["score_bias"] = json!(bias);
    }
    let mut generation = Map::new();
    for (name, id) in [("bos_token_id", tokens.bos), ("eos_token_id", tokens.eos), ("pad_token_id", tokens.pad)] {
        if let Some(id) = id {
            generation.insert(name.to_owned(), json!(id));
        }
    }
    (fields, Value::Object(generation))
}

fn gpt2(config: &GptConfig) -> Value {
    json!({
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": (config.d_ff != 4 * config.d_model).then_some(config.d_ff),
        "activation_function": if config.activation == Activation::Relu { "relu" } else { "gelu_new" },
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": 0.02,
        "scale_attn_weights": true,
        "scale_attn_by_inverse_layer_idx": false,
        "reorder_and_upcast_attn": false,
        "use_cache": true,
    })
}

fn openai_gpt(config: &GptConfig) -> Value {
    json!({
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        // "gelu" is the tanh form in this class alone.
        "afn": if config.activation == Activation::Relu { "relu" } else { "gelu" },
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": 0.02,
    })
}

/// Takes values out of a `config.json` and names the key where one is wrong.
struct Reader<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl Reader<'_> {
    fn parse(&self) -> Result<Parsed, HfError> {
        let class = match self.text("model_type")? {
            "gpt2" => Class::Gpt2,
            "openai-gpt" => Class::OpenAiGpt,
            "kindling" => Class::Kindling,
            other => return Err(self.refuse("model_type", other, "`gpt2`, `openai-gpt` or `kindling`")),
        };
        let head = self.head(class)?;
        let config = match class {
            Class::Gpt2 => self.gpt2()?,
            Class::OpenAiGpt => self.openai_gpt()?,
            Class::Kindling => serde_json::from_value(self.json["gpt"].clone()).map_err(|error| {
                self.refuse("gpt", &error.to_string(), "the architecture as this program writes it")
            })?,
        };
        config.validate().map_err(|source| HfError::Model { path: self.path.to_owned(), source })?;
        let tokens = TokenIds {
            bos: self.token("bos_token_id")?,
            eos: self.token("eos_token_id")?,
            pad: self.token("pad_token_id")?,
        };
        Ok(Parsed { class, head, config, tokens })
    }

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
        let activation = match self.text("activation_function")? {
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => return Err(self.refuse("activation_function", other, "`gelu_new` or `relu`")),
        };
        let d_model = self.size("n_embd")?;
        let d_ff = if self.optional("n_inner").is_some() { self.size("n_inner")? } else { 4 * d_model };
        self.shared(d_model, d_ff, activation, NormPlacement::Pre)
    }

    fn openai_gpt(&self) -> Result<GptConfig, HfError> {
        let activation = match self.text("afn")? {
            "gelu" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => return Err(self.refuse("afn", other, "`gelu` or `relu`")),
        };
        let d_model = self.size("n_embd")?;
        self.shared(d_model, 4 * d_model, activation, NormPlacement::Post)
    }

    fn shared(
        &self,
        d_model: usize,
        d_ff: usize,
        activation: Activation,
        norm: NormPlacement,
    ) -> Result<GptConfig, HfError> {
        let dropout = self.number("resid_pdrop")?;
        for key in ["embd_pdrop", "attn_pdrop"] {
            let other = self.number(key)?;
            if other != dropout {
                tracing::warn!("`{}`: `{key}` is {other}; `resid_pdrop` {dropout} is used for it", self.path.display());
            }
        }
        Ok(GptConfig {
            vocab_size: self.size("vocab_size")?,
            d_model,
            n_layers: self.size("n_layer")?,
            n_heads: self.size("n_head")?,
            d_ff,
            max_seq_len: self.size("n_positions")?,
            dropout,
            positions: Positions::Learned,
            norm,
            activation,
            tie_embeddings: match self.optional("tie_word_embeddings") {
                None => true,
                Some(Value::Bool(tied)) => *tied,
                Some(other) => return Err(self.refuse("tie_word_embeddings", &other.to_string(), "a boolean")),
            },
            layer_norm_eps: self.number("layer_norm_epsilon")?,
        })
    }

    fn head(&self, class: Class) -> Result<Head, HfError> {
        let Some(name) = self.json["architectures"][0].as_str() else {
            let found = self.json["architectures"].to_string();
            return Err(self.refuse("architectures", &found, "a list of one class name"));
        };
        if name == class.architecture(Head::Lm) {
            return Ok(Head::Lm);
        }
        let bias = self.optional("score_bias").map_or(Some(0.0), Value::as_f64);
        let head = Head::Score { bias: bias.unwrap_or(f64::NAN) };
        if name != class.architecture(head) {
            let known = format!("`{}` or `{}`", class.architecture(Head::Lm), class.architecture(head));
            return Err(self.refuse("architectures", name, &known));
        }
        if bias.is_none_or(|bias| !bias.is_finite()) {
            return Err(self.refuse("score_bias", &self.json["score_bias"].to_string(), "a number"));
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
        Ok(head)
    }

    /// The value of `key`, unless it is absent or `null`.
    fn optional(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn required(&self, key: &'static str) -> Result<&Value, HfError> {
        self.optional(key).ok_or_else(|| HfError::MissingKey { path: self.path.to_owned(), key })
    }

    fn text(&self, key: &'static str) -> Result<&str, HfError> {
        let value = self.required(key)?;
        value.as_str().ok_or_else(|| self.refuse(key, &value.to_string(), "a string"))
    }

    fn size(&self, key: &'static str) -> Result<usize, HfError> {
        // Far beyond any model; keeps the products of sizes from overflowing.
        const LARGEST: u64 = 1 << 30;
        let value = self.required(key)?;
        match value.as_u64() {
            Some(size @ 1..=LARGEST) => Ok(size as usize),
            _ => Err(self.refuse(key, &value.to_string(), &format!("a whole number from 1 to {LARGEST}"))),
        }
    }

    fn number(&self, key: &'static str) -> Result<f64, HfError> {
        let value = self.required(key)?;
        value.as_f64().ok_or_else(|| self.refuse(key, &value.to_string(), "a number"))
    }

    /// A token id; the first where a list is given.
    fn token(&self, key: &str) -> Result<Option<u32>, HfError> {
        let Some(value) = self.optional(key) else { return Ok(None) };
        let first = value.get(0).unwrap_or(value);
        // -1 stands for none in some old files.
        if first.as_i64() == Some(-1) {
            return Ok(None);
        }
        let id = first.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(Some).ok_or_else(|| self.refuse(key, &value.to_string(), "a token id"))
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
