//! Architecture: presets, every switch between them, and what makes a configuration valid.

mod error;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use error::ModelConfigError;
pub use kernels::Activation;

use crate::params::{Output, Parameter, parameters};
use crate::positions::{RopeScaling, RopeScalingSection, Rotary};

/// How the position of a token enters the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Positions {
    /// Fixed sines and cosines (Vaswani et al. 2017, section 3.5).
    Sinusoidal,
    /// A learned vector per position (GPT-2).
    Learned,
    /// Queries and keys are rotated by angles that grow with the position (Su et al., arXiv:2104.09864).
    Rotary,
}

/// The normalisation of a hidden state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NormKind {
    /// Mean 0 and variance 1, then a gain and an offset (Ba et al., arXiv:1607.06450).
    #[default]
    LayerNorm,
    /// Root mean square 1, then a gain (Zhang & Sennrich, arXiv:1910.07467).
    RmsNorm,
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
    /// Llama: rotary positions, `RMSNorm` before the branches, `SwiGLU`, no biases, fewer heads of keys than of queries.
    Llama,
    /// Qwen 2 and 2.5: Llama with biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: Llama with queries and keys normalised.
    Qwen3,
    /// GPT-NeoX and Pythia: both branches read the same residual stream; a quarter of each head is rotated.
    GptNeox,
}

/// Everything that fixes the architecture of a [`Gpt`](super::Gpt).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "each is a switch of its own between architectures")]
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
    /// Added to the variance, or to the mean square, in the norms.
    pub layer_norm_eps: f64,
    /// Heads of keys and values, each shared by equally many heads of queries; `None` for one each.
    #[serde(default)]
    pub n_kv_heads: Option<usize>,
    /// Width of a head; `None` for `d_model / n_heads`.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Kind of the norms.
    #[serde(default)]
    pub norm_kind: NormKind,
    /// The angles, with rotary positions.
    #[serde(default)]
    pub rotary: Rotary,
    /// Whether the feed-forward layer multiplies its hidden state by a gate, `act(x·G) · (x·U)`, as `SwiGLU` does
    /// (Shazeer, arXiv:2002.05202).
    #[serde(default)]
    pub gated: bool,
    /// Whether queries, keys and values have biases.
    #[serde(default = "yes")]
    pub qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    #[serde(default = "yes")]
    pub proj_bias: bool,
    /// Whether the feed-forward layers have biases.
    #[serde(default = "yes")]
    pub mlp_bias: bool,
    /// Whether the queries and keys of each head are normalised.
    #[serde(default)]
    pub qk_norm: bool,
    /// Whether attention and feed-forward layer both read the block's input, and are added to it together.
    #[serde(default)]
    pub parallel: bool,
}

const fn yes() -> bool {
    true
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
    /// Whether the output layer shares its weights with the token embeddings; all presets but `gpt-neox` do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tie_embeddings: Option<bool>,
    /// Heads of keys and values; divides `n_heads`; half of them by default in `llama`, `qwen2` and `qwen3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub n_kv_heads: Option<usize>,
    /// Width of a head; `d_model / n_heads` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub head_dim: Option<usize>,
    /// Base of the wavelengths of rotary positions; 10,000 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1e12))]
    pub rope_theta: Option<f64>,
    /// Change of the rotary angles for long contexts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScalingSection>,
    /// Share of each head's channels that rotary positions turn; 1 by default, 0.25 in `gpt-neox`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub rotary_fraction: Option<f64>,
    /// Added to the variance or mean square in the norms; 1e-5 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub norm_eps: Option<f64>,
    /// Whether the linear layers of attention have biases, instead of the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_bias: Option<bool>,
    /// Whether the feed-forward layers have biases, instead of the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mlp_bias: Option<bool>,
    /// Whether queries and keys are normalised head by head, instead of the preset's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qk_norm: Option<bool>,
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
            Preset::Llama => GptConfig::llama(vocab_size),
            Preset::Qwen2 => GptConfig { qkv_bias: true, ..GptConfig::llama(vocab_size) },
            Preset::Qwen3 => GptConfig { qk_norm: true, ..GptConfig::llama(vocab_size) },
            Preset::GptNeox => GptConfig::gpt_neox(vocab_size),
        };
        let d_model = self.d_model.unwrap_or(base.d_model);
        let config = GptConfig {
            vocab_size,
            d_model,
            n_layers: self.n_layers.unwrap_or(base.n_layers),
            n_heads: self.n_heads.unwrap_or(base.n_heads),
            // A gated layer has three matrices: two thirds of the width give the same number of parameters.
            d_ff: self.d_ff.unwrap_or(if base.gated {
                d_model.saturating_mul(8).div_ceil(3).next_multiple_of(8)
            } else {
                d_model.saturating_mul(4)
            }),
            max_seq_len: self.max_seq_len.unwrap_or(base.max_seq_len),
            dropout: self.dropout.unwrap_or(base.dropout),
            positions: self.positions.unwrap_or(base.positions),
            norm: self.norm.unwrap_or(base.norm),
            activation: self.activation.unwrap_or(base.activation),
            tie_embeddings: self.tie_embeddings.unwrap_or(base.tie_embeddings),
            layer_norm_eps: self.norm_eps.unwrap_or(base.layer_norm_eps),
            n_kv_heads: self.n_kv_heads.or_else(|| {
                let n_heads = self.n_heads.unwrap_or(base.n_heads);
                base.n_kv_heads.map(|_| if n_heads.is_multiple_of(2) { n_heads / 2 } else { n_heads })
            }),
            head_dim: self.head_dim.or(base.head_dim),
            norm_kind: base.norm_kind,
            rotary: Rotary {
                theta: self.rope_theta.unwrap_or(base.rotary.theta),
                fraction: self.rotary_fraction.unwrap_or(base.rotary.fraction),
                scaling: self.rope_scaling.unwrap_or_default().resolve()?,
            },
            gated: base.gated,
            qkv_bias: self.attention_bias.unwrap_or(base.qkv_bias),
            proj_bias: self.attention_bias.unwrap_or(base.proj_bias),
            mlp_bias: self.mlp_bias.unwrap_or(base.mlp_bias),
            qk_norm: self.qk_norm.unwrap_or(base.qk_norm),
            parallel: base.parallel,
        };
        config.validate()?;
        Ok(config)
    }
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
            n_kv_heads: None,
            head_dim: None,
            norm_kind: NormKind::LayerNorm,
            rotary: Rotary::default(),
            gated: false,
            qkv_bias: true,
            proj_bias: true,
            mlp_bias: true,
            qk_norm: false,
            parallel: false,
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

    /// The preset `llama` at the default size.
    ///
    /// # Source
    /// Touvron et al., arXiv:2302.13971, section 2.2; grouped queries: Ainslie et al., arXiv:2305.13245.
    pub fn llama(vocab_size: usize) -> Self {
        Self {
            d_ff: 344,
            positions: Positions::Rotary,
            norm: NormPlacement::Pre,
            activation: Activation::Silu,
            n_kv_heads: Some(2),
            norm_kind: NormKind::RmsNorm,
            gated: true,
            qkv_bias: false,
            proj_bias: false,
            mlp_bias: false,
            ..Self::transformer(vocab_size)
        }
    }

    /// The preset `gpt-neox` at the default size.
    ///
    /// # Source
    /// Black et al., arXiv:2204.06745, section 2.1; Biderman et al., arXiv:2304.01373 (Pythia).
    pub fn gpt_neox(vocab_size: usize) -> Self {
        Self {
            positions: Positions::Rotary,
            norm: NormPlacement::Pre,
            activation: Activation::Gelu,
            tie_embeddings: false,
            rotary: Rotary { fraction: 0.25, ..Rotary::default() },
            parallel: true,
            ..Self::transformer(vocab_size)
        }
    }

    /// Width of one head.
    pub const fn d_head(&self) -> usize {
        match self.head_dim {
            Some(head_dim) => head_dim,
            None => self.d_model / self.n_heads,
        }
    }

    /// Heads of keys and values.
    pub const fn n_kv_heads(&self) -> usize {
        match self.n_kv_heads {
            Some(n_kv_heads) => n_kv_heads,
            None => self.n_heads,
        }
    }

    /// Widths of the queries, keys and values of a position.
    pub const fn qkv_widths(&self) -> [usize; 3] {
        let of_keys = self.n_kv_heads() * self.d_head();
        [self.n_heads * self.d_head(), of_keys, of_keys]
    }

    /// Channels of a head that rotary positions turn.
    pub fn n_rotated(&self) -> usize {
        (self.d_head() as f64 * self.rotary.fraction) as usize
    }

    /// Whether a branch of a block and what follows it have a fused body: those of `llama` and its relatives have, and
    /// without adapters those of `gpt2` and `transformer`.
    pub(crate) fn has_fused_blocks(&self, has_adapters: bool) -> bool {
        let layers = self.norm_kind == NormKind::RmsNorm && self.gated && self.activation == Activation::Silu;
        let plain = !self.proj_bias && !self.mlp_bias && !self.parallel && self.norm == NormPlacement::Pre;
        !has_adapters && self.has_gpt_blocks() || layers && plain
    }

    /// Whether a block is that of the presets `transformer` and `gpt2`.
    pub fn has_gpt_blocks(&self) -> bool {
        let same_heads = self.n_kv_heads() == self.n_heads && self.d_head() * self.n_heads == self.d_model;
        let biases = self.qkv_bias && self.proj_bias && self.mlp_bias;
        let layers = self.norm_kind == NormKind::LayerNorm && self.activation.is_fused() && !self.gated;
        same_heads && biases && layers && !self.qk_norm && !self.parallel && self.positions != Positions::Rotary
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
            ("n_kv_heads", self.n_kv_heads.unwrap_or(1)),
            ("head_dim", self.head_dim.unwrap_or(1)),
        ] {
            if value == 0 {
                return Err(ModelConfigError::Zero { name });
            }
            if value > Self::LARGEST_SIZE {
                return Err(ModelConfigError::TooLarge { name, found: value, largest: Self::LARGEST_SIZE });
            }
        }
        let (d_model, n_heads, dropout) = (self.d_model, self.n_heads, self.dropout);
        if self.head_dim.is_none() && d_model % n_heads != 0 {
            return Err(ModelConfigError::Heads { d_model, n_heads });
        }
        let n_kv_heads = self.n_kv_heads();
        if n_heads % n_kv_heads != 0 {
            return Err(ModelConfigError::KeyHeads { n_heads, n_kv_heads });
        }
        if self.parallel && self.norm == NormPlacement::Post {
            return Err(ModelConfigError::ParallelPostNorm);
        }
        if self.positions == Positions::Rotary {
            self.validate_rotary()?;
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

    fn validate_rotary(&self) -> Result<(), ModelConfigError> {
        let Rotary { theta, fraction, scaling } = self.rotary;
        let (numbers, ordered) = match scaling {
            RopeScaling::Default => (vec![theta, fraction], true),
            RopeScaling::Linear { factor } => (vec![theta, fraction, factor], true),
            RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original } => {
                (vec![theta, fraction, factor, low, high, original as f64], high > low)
            }
        };
        if !(ordered && fraction <= 1.0 && numbers.iter().all(|&x| x > 0.0 && x.is_finite())) {
            return Err(ModelConfigError::Angles { rotary: self.rotary });
        }
        match self.n_rotated() {
            found if found < 2 || found % 2 != 0 => Err(ModelConfigError::Rotated { found, d_head: self.d_head() }),
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
