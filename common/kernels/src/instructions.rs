//! The vector instructions that the fused kernels use.

#[cfg(feature = "flex")]
use crate::flex::simd::{Level, level, limit};

/// A set of instructions that the fused kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Instructions {
    /// Those that every processor of this kind has.
    Baseline,
    /// AVX2 with FMA, of x86-64.
    Avx2,
    /// AVX-512, of x86-64.
    Avx512,
}

impl Instructions {
    /// Those in use: the most that the processor has, unless they were limited.
    pub fn in_use() -> Self {
        #[cfg(feature = "flex")]
        match level() {
            Level::Baseline => Self::Baseline,
            Level::V3 => Self::Avx2,
            Level::V4 => Self::Avx512,
        }
        #[cfg(not(feature = "flex"))]
        Self::Baseline
    }

    /// Uses no more than these from now on, so that a processor can be measured as if it had less. Returns whether it has them.
    ///
    /// For the start of a program: what one kernel has rearranged for AVX-512, another cannot read with less.
    pub fn limit(self) -> bool {
        #[cfg(feature = "flex")]
        limit(match self {
            Self::Baseline => Level::Baseline,
            Self::Avx2 => Level::V3,
            Self::Avx512 => Level::V4,
        });
        Self::in_use() == self
    }

    /// Its name for `--instructions`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}
