//! Why an architecture cannot be built.

use thiserror::Error;

use crate::positions::{RopeScalingError, Rotary};

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
    /// The heads of keys do not divide those of queries.
    #[error("model: `n_heads` {n_heads} is not a multiple of `n_kv_heads` {n_kv_heads}")]
    KeyHeads {
        /// Heads of queries.
        n_heads: usize,
        /// Heads of keys and values.
        n_kv_heads: usize,
    },
    /// Rotary positions turn pairs of channels.
    #[error(
        "model: rotary positions turn {found} of a head's {d_head} channels, expected an even number of them, at least 2"
    )]
    Rotated {
        /// Channels turned.
        found: usize,
        /// Width of a head.
        d_head: usize,
    },
    /// An angle that is not a finite number above zero.
    #[error(
        "model: rotary positions with {rotary:?}: every number must be finite and above 0, and the high frequency factor above the low one"
    )]
    Angles {
        /// The angles.
        rotary: Rotary,
    },
    /// A key of the scaling that is missing or has no use.
    #[error(transparent)]
    Scaling(#[from] RopeScalingError),
    /// Post-norm is defined for the branches in turn.
    #[error("model: parallel branches need pre-norm")]
    ParallelPostNorm,
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
