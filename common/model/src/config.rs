//! Architecture: presets, every switch between them, and what makes a configuration valid.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use kernels::Activation;

use crate::params::{Output, Parameter, parameters};

/// How the position of a token enters the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Positions {
    /// Fixed sines and cosines (Vaswani et al. 2017, section 3.5).
    Sinusoidal,
    /// A learned vector per position (GPT-2).
    Learned,
}

/// Where LayerNorm is applied relative to a residual branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NormPlacement {
    /// `LayerNorm(x + SubLayer(x))` (Vaswani et al. 2017, GPT-1).
    Post,
    /// `x + SubLayer(LayerNorm(x))` with a final LayerNorm (GPT-2).
    Pre,
}

/// A named architecture that a configuration starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// "Attention is all you need", decoder only: sinusoidal positions, post-norm, `ReLU`, tied output weights.
    #[default]
    Transformer,
    /// GPT-2: learned positions, pre-norm, tanh-GELU, tied output weights.
    Gpt2,
}

/// Everything that fixes the architecture of a [`Gpt`](super::Gpt).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GptConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Attention heads per block; divides `d_model`.
    pub n_heads: usize,
    /// Width of the feed-forward layer.
    pub d_ff: usize,
    /// Longest sequence in tokens.
    pub max_seq_len: usize,
    /// Probability that dropout zeroes a number, in training.
    pub dropout: f64,
    /// How positions enter.
    pub positions: Positions,
    /// Where LayerNorm stands.
    pub norm: NormPlacement,
    /// The feed-forward non-linearity.
    pub activation: Activation,
    /// Whether the output weights are the token embeddings.
    pub tie_embeddings: bool,
    /// Added to the variance in LayerNorm.
    pub layer_norm_eps: f64,
}

/// The `[model]` section of a configuration file: a preset and what overrides it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSection {
    /// Architecture to start from; every other key of this section overrides one of its properties.
    pub preset: Preset,
    /// Width of the residual stream, a multiple of `n_heads`; 128 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub d_model: Option<usize>,
    /// Number of transformer blocks; 4 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub n_layers: Option<usize>,
    /// Attention heads per block; divides `d_model`; 4 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub n_heads: Option<usize>,
    /// Width of the feed-forward layers; 4 times `d_model` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub d_ff: Option<usize>,
    /// Context length in tokens: the longest sequence that the model can read; 256 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub max_seq_len: Option<usize>,
    /// Probability with which dropout zeroes an activation in training; 0 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub dropout: Option<f64>,
    /// Position encoding, instead of the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub positions: Option<Positions>,
    /// Placement of the layer norms, instead of the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm: Option<NormPlacement>,
    /// Non-linearity of the feed-forward layers, instead of the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation: Option<Activation>,
    /// Whether the output layer shares its weights with the token embeddings; both presets do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tie_embeddings: Option<bool>,
}

impl ModelSection {
    /// The architecture this section describes for a vocabulary of `vocab_size` tokens.
    ///
    /// # Errors
    /// If the numbers do not fit together, see [`GptConfig::validate`].
    pub fn resolve(&self, vocab_size: usize) -> Result<GptConfig, ModelConfigError> {
        let base = match self.preset {
            Preset::Transformer => GptConfig::transformer(vocab_size),
            Preset::Gpt2 => GptConfig::gpt2(vocab_size),
        };
        let d_model = self.d_model.unwrap_or(base.d_model);
        let config = GptConfig {
            vocab_size,
            d_model,
            n_layers: self.n_layers.unwrap_or(base.n_layers),
            n_heads: self.n_heads.unwrap_or(base.n_heads),
            d_ff: self.d_ff.unwrap_or(d_model.saturating_mul(4)),
            max_seq_len: self.max_seq_len.unwrap_or(base.max_seq_len),
            dropout: self.dropout.unwrap_or(base.dropout),
            positions: self.positions.unwrap_or(base.positions),
            norm: self.norm.unwrap_or(base.norm),
            activation: self.activation.unwrap_or(base.activation),
            tie_embeddings: self.tie_embeddings.unwrap_or(base.tie_embeddings),
            layer_norm_eps: base.layer_norm_eps,
        };
        config.validate()?;
        Ok(config)
    }
}

/// Why an architecture cannot be built.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ModelConfigError {
    /// A size is zero.
    #[error("model: `{name}` must be at least 1")]
    Zero {
        /// The configuration key.
        name: &'static str,
    },
    /// The heads do not divide the width.
    #[error("model: `d_model` {d_model} is not a multiple of `n_heads` {n_heads}")]
    Heads {
        /// Width of the residual stream.
        d_model: usize,
        /// Attention heads.
        n_heads: usize,
    },
    /// Sinusoidal positions pair sines with cosines.
    #[error("model: sinusoidal positions need an even `d_model`, found {d_model}")]
    OddWidth {
        /// Width of the residual stream.
        d_model: usize,
    },
    /// Not a probability below one.
    #[error("model: `dropout` must lie in [0, 1), found {dropout}")]
    Dropout {
        /// The value found.
        dropout: f64,
    },
    /// Zero, negative or not finite in 32 bits.
    #[error("model: `layer_norm_eps` must be a positive number that 32 bits hold, found {eps}")]
    Epsilon {
        /// The value found.
        eps: f64,
    },
    /// A size is beyond any model.
    #[error("model: `{name}` must be at most {largest}, found {found}")]
    TooLarge {
        /// The configuration key.
        name: &'static str,
        /// The value found.
        found: usize,
        /// The largest value accepted.
        largest: usize,
    },
    /// The sizes are possible one by one but not together.
    #[error("model: the sizes make {found} parameters, expected at most {largest}")]
    TooManyParameters {
        /// Numbers in all weights and in the table of positions.
        found: u128,
        /// The largest number accepted.
        largest: u128,
    },
}

impl GptConfig {
    /// The preset `transformer` at its default size.
    ///
    /// # Source
    /// Vaswani et al., arXiv:1706.03762, decoder only. Two deviations: the embeddings are not multiplied by √d, and
    /// there is no cross-attention.
    pub fn transformer(vocab_size: usize) -> Self {
        Self {
            vocab_size,
            d_model: 128,
            n_layers: 4,
            n_heads: 4,
            d_ff: 512,
            max_seq_len: 256,
            dropout: 0.0,
            positions: Positions::Sinusoidal,
            norm: NormPlacement::Post,
            activation: Activation::Relu,
            tie_embeddings: true,
            layer_norm_eps: 1e-5,
        }
    }

    /// The preset `gpt2` at the default size (not that of the 124M model).
    ///
    /// # Source
    /// Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3.
    pub fn gpt2(vocab_size: usize) -> Self {
        Self {
            positions: Positions::Learned,
            norm: NormPlacement::Pre,
            activation: Activation::GeluTanh,
            ..Self::transformer(vocab_size)
        }
    }

    /// Width of one head.
    pub const fn d_head(&self) -> usize {
        self.d_model / self.n_heads
    }

    /// The largest value of each size: beyond any model, and small enough that a product of three does not overflow.
    pub const LARGEST_SIZE: usize = 1 << 24;

    /// The largest number of parameters, the table of positions included: 275 GB of weights.
    pub const LARGEST_MODEL: u128 = 1 << 36;

    /// Number of parameters and of the numbers in a table of fixed positions.
    pub fn n_numbers(&self) -> u128 {
        let one_layer = Self { n_layers: 1, ..self.clone() };
        let numbers = |p: Parameter<'_>| {
            let copies = if p.block().is_some() { self.n_layers } else { 1 };
            p.shape().into_iter().fold(copies as u128, |product, size| product.saturating_mul(size as u128))
        };
        let fixed = if self.positions == Positions::Sinusoidal { self.max_seq_len * self.d_model } else { 0 };
        parameters(&one_layer, Output::Logits).map(numbers).fold(fixed as u128, u128::saturating_add)
    }

    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// If a size is zero or [too large](Self::LARGEST_SIZE), the heads do not divide the width, sinusoids meet an odd
    /// width, `dropout` is not a probability below one, or the whole is [too large](Self::LARGEST_MODEL).
    pub fn validate(&self) -> Result<(), ModelConfigError> {
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("n_layers", self.n_layers),
            ("n_heads", self.n_heads),
            ("d_ff", self.d_ff),
            ("max_seq_len", self.max_seq_len),
        ] {
            if value == 0 {
                return Err(ModelConfigError::Zero { name });
            }
            if value > Self::LARGEST_SIZE {
                return Err(ModelConfigError::TooLarge { name, found: value, largest: Self::LARGEST_SIZE });
            }
        }
        let (d_model, n_heads, dropout) = (self.d_model, self.n_heads, self.dropout);
        if d_model % n_heads != 0 {
            return Err(ModelConfigError::Heads { d_model, n_heads });
        }
        if self.positions == Positions::Sinusoidal && d_model % 2 != 0 {
            return Err(ModelConfigError::OddWidth { d_model });
        }
        if !(0.0..1.0).contains(&dropout) {
            return Err(ModelConfigError::Dropout { dropout });
        }
        let eps = self.layer_norm_eps;
        if !(eps as f32 > 0.0 && (eps as f32).is_finite()) {
            return Err(ModelConfigError::Epsilon { eps });
        }
        match self.n_numbers() {
            found if found > Self::LARGEST_MODEL => {
                Err(ModelConfigError::TooManyParameters { found, largest: Self::LARGEST_MODEL })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_override_changes_one_switch_of_the_preset() {
        let section =
            ModelSection { preset: Preset::Gpt2, d_model: Some(64), tie_embeddings: Some(false), ..Default::default() };
        let config = section.resolve(100).expect("valid");
        assert_eq!(config, GptConfig { d_model: 64, d_ff: 256, tie_embeddings: false, ..GptConfig::gpt2(100) });
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let with = |f: fn(&mut GptConfig)| {
            let mut config = GptConfig::transformer(10);
            f(&mut config);
            config.validate().expect_err("invalid").to_string()
        };
        assert_eq!(with(|c| c.n_heads = 3), "model: `d_model` 128 is not a multiple of `n_heads` 3");
        assert_eq!(with(|c| c.n_layers = 0), "model: `n_layers` must be at least 1");
        assert_eq!(with(|c| c.dropout = 1.0), "model: `dropout` must lie in [0, 1), found 1");
        assert_eq!(
            with(|c| c.d_model = usize::MAX),
            "model: `d_model` must be at most 16777216, found 18446744073709551615"
        );
        assert_eq!(
            with(|c| (c.d_model, c.max_seq_len) = (1 << 20, 1 << 20)),
            "model: the sizes make 18696040876032 parameters, expected at most 68719476736"
        );
        for eps in [0.0, 1e-50, 1e300, f64::NAN] {
            let mut config = GptConfig::transformer(10);
            config.layer_norm_eps = eps;
            assert!(matches!(config.validate(), Err(ModelConfigError::Epsilon { .. })), "{eps}");
        }
        assert_eq!(
            with(|c| (c.d_model, c.n_heads) = (9, 3)),
            "model: sinusoidal positions need an even `d_model`, found 9"
        );
    }
}
