//! The float type of a model's computations.

use burn::tensor::{FloatDType, Tensor};

/// The float type a model computes in; weights, optimiser, norms and losses stay in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Precision {
    /// 32 bits, on every backend.
    #[default]
    F32,
    /// 16 bits with the range of f32.
    Bf16,
    /// 16 bits with more digits and less range: the loss is scaled, so that small gradients do not vanish.
    F16,
}

impl Precision {
    /// All, widest first.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// Its name for `--precision`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Burn's name for it.
    pub const fn dtype(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
            Self::F16 => FloatDType::F16,
        }
    }

    /// `x`, of f32, in this precision; the gradient comes back in f32.
    pub fn narrow<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        if self == Self::F32 { x } else { x.cast(self.dtype()) }
    }

    /// `x`, of this precision, in f32.
    pub fn widen<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        if self == Self::F32 { x } else { x.cast(FloatDType::F32) }
    }
}

/// The float type in which matrices that are not trained lie in memory; computations are those of [`Precision`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum TrunkPrecision {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits: half the memory, and half of what decoding reads.
    Bf16,
}

impl TrunkPrecision {
    /// Its name for `--trunk`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}
