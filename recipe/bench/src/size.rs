//! The sizes that are compared.

use clap::{Args, ValueEnum};
use common::capacity;
use common::exit::UsageError;
use common::model::{GptConfig, Rotary};
use serde_json::{Map, Value, json};
use std::num::NonZeroUsize;

/// A model, of the preset `gpt2` or `llama`, and how much it trains on at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Size {
    /// 4 layers, 4 heads, width 128, context 256, vocabulary 4096; 16 rows a step
    A,
    /// 6 layers, 6 heads, width 384, context 256, vocabulary 8192; 8 rows a step
    B,
    /// GPT-2 (124M): 12 layers, 12 heads, width 768, context 256, vocabulary 50257; 2 rows a step
    C,
    /// Llama: 8 layers, 8 heads (4 of keys), width 256, context 256, vocabulary 8192; 2 rows a step
    M,
    /// SmolLM2-135M (Llama): 30 layers, 9 heads (3 of keys), width 576, context 256, vocabulary 49152; 2 rows a step
    S,
}

impl Size {
    /// The model.
    pub fn model(self) -> GptConfig {
        let (n_layers, n_heads, d_model, vocab_size) = match self {
            Self::A => (4, 4, 128, 4096),
            Self::B => (6, 6, 384, 8192),
            Self::C => (12, 12, 768, 50257),
            Self::M => return Self::llama([8, 8, 4, 256, 704, 8192]),
            Self::S => return Self::llama([30, 9, 3, 576, 1536, 49152]),
        };
        GptConfig {
            n_layers,
            n_heads,
            d_model,
            d_ff: 4 * d_model,
            max_seq_len: 256,
            dropout: 0.0,
            ..GptConfig::gpt2(vocab_size)
        }
    }

    fn llama([n_layers, n_heads, n_kv_heads, d_model, d_ff, vocab_size]: [usize; 6]) -> GptConfig {
        GptConfig {
            n_layers,
            n_heads,
            n_kv_heads: Some(n_kv_heads),
            d_model,
            d_ff,
            max_seq_len: 256,
            rotary: Rotary { theta: 1e5, ..Rotary::default() },
            ..GptConfig::llama(vocab_size)
        }
    }

    /// Rows of a training step.
    pub const fn batch(self) -> usize {
        match self {
            Self::A => 16,
            Self::B => 8,
            Self::C | Self::M | Self::S => 2,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
            Self::C => "c",
            Self::M => "m",
            Self::S => "s",
        }
    }
}

/// The flags that choose a model.
#[derive(Debug, Clone, Args)]
pub struct Shape {
    /// Size of the model
    #[arg(long, value_enum, default_value = "a")]
    pub size: Size,

    /// Layers, instead of the size's
    #[arg(long, value_name = "N", value_parser = common::cli::at_least_1)]
    pub n_layers: Option<NonZeroUsize>,

    /// Heads, instead of the size's
    #[arg(long, value_name = "N", value_parser = common::cli::at_least_1)]
    pub n_heads: Option<NonZeroUsize>,

    /// Width, instead of the size's
    #[arg(long, value_name = "N", value_parser = common::cli::at_least_1)]
    pub d_model: Option<NonZeroUsize>,

    /// Context in tokens, instead of the size's
    #[arg(long, alias = "ctx", value_name = "N", value_parser = common::cli::at_least_1)]
    pub max_seq_len: Option<NonZeroUsize>,

    /// Vocabulary, instead of the size's
    #[arg(long, alias = "vocab", value_name = "N", value_parser = common::cli::at_least_1)]
    pub vocab_size: Option<NonZeroUsize>,
}

impl Shape {
    /// The model.
    ///
    /// # Errors
    /// If the numbers do not fit together: wrong usage.
    pub fn model(&self) -> anyhow::Result<GptConfig> {
        let mut model = self.size.model();
        let set = |value: &mut usize, flag: Option<NonZeroUsize>| *value = flag.map_or(*value, NonZeroUsize::get);
        set(&mut model.n_layers, self.n_layers);
        set(&mut model.n_heads, self.n_heads);
        set(&mut model.d_model, self.d_model);
        set(&mut model.max_seq_len, self.max_seq_len);
        set(&mut model.vocab_size, self.vocab_size);
        model.d_ff = model.d_ff * model.d_model / self.size.model().d_model;
        model.validate().map_err(|error| UsageError(error.to_string()))?;
        capacity::check_model(&model).map_err(|error| UsageError(error.to_string()))?;
        Ok(model)
    }

    /// The fields of the result that describe `model`.
    pub fn describe(&self, model: &GptConfig) -> Map<String, Value> {
        let name = if *model == self.size.model() { self.size.name() } else { "custom" };
        let fields = [
            ("size", json!(name)),
            ("n_layers", json!(model.n_layers)),
            ("n_heads", json!(model.n_heads)),
            ("d_model", json!(model.d_model)),
            ("ctx", json!(model.max_seq_len)),
            ("vocab", json!(model.vocab_size)),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}
