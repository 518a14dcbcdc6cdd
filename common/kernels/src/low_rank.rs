//! Linear layers with two thin matrices beside the weight: low-rank adapters.
//!
//! # Source
//! Hu et al., arXiv:2106.09685.

// Without the flex backend there is nothing to choose.
#![cfg_attr(not(feature = "flex"), allow(unused_variables))]

use std::ops::Range;

use burn::tensor::Tensor;

use super::{Kernels, linear};

#[cfg(feature = "flex")]
use super::autodiff::{FusedOps as _, Weight};
#[cfg(feature = "flex")]
use super::{is_fused, tap};
#[cfg(feature = "flex")]
use burn::backend::Dispatch;

/// Two thin matrices beside a weight: `scale · A B` is added to it, or to some of its columns.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// The `A` of all parts side by side, `[d_in, n_parts · rank]`
    pub a: Tensor<2>,
    /// The `B` of all parts side by side, `[rank, Σ widths]`
    pub b: Tensor<2>,
    /// The columns of the weight that each part is added to: in order, not overlapping
    pub parts: Vec<Range<usize>>,
    /// Factor on the product.
    pub scale: f64,
}

impl LowRank {
    /// `y + scale · x A B`, by ordinary operations.
    ///
    /// # Shapes
    /// - `y`: `[.., d_out]`, `x`: `[.., d_in]`
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn add<const D: usize>(self, kernels: Kernels, y: Tensor<D>, x: Tensor<D>) -> Tensor<D> {
        let Self { a, b, parts, scale } = self;
        let hidden = linear(kernels, x, a, None) * scale; // [.., n_parts · rank]
        let dims = y.dims();
        let d_out = dims[D - 1];
        if let [part] = &parts[..]
            && part.len() == d_out
        {
            return y + linear(kernels, hidden, b, None);
        }
        let [rank, _] = b.dims();
        let zeros = |width: usize| {
            let mut dims = dims;
            dims[D - 1] = width;
            Tensor::zeros(dims, (&y.device(), y.dtype()))
        };
        let (mut added, mut end, mut column) = (Vec::new(), 0, 0);
        for (i, part) in parts.iter().enumerate() {
            if part.start > end {
                added.push(zeros(part.start - end));
            }
            let hidden = hidden.clone().narrow(D - 1, i * rank, rank);
            added.push(linear(kernels, hidden, b.clone().narrow(1, column, part.len()), None));
            (end, column) = (part.end, column + part.len());
        }
        if end < d_out {
            added.push(zeros(d_out - end));
        }
        y + Tensor::cat(added, D - 1)
    }

    #[cfg(feature = "flex")]
    fn check(&self, [d_in, d_out]: [usize; 2]) {
        let ([rows, width], [rank, columns]) = (self.a.dims(), self.b.dims());
        let mut end = 0;
        for part in &self.parts {
            assert!(end <= part.start && part.start <= part.end, "parts overlap or are out of order: {:?}", self.parts);
            end = part.end;
        }
        let widths: usize = self.parts.iter().map(Range::len).sum();
        assert!(end <= d_out, "a part ends at column {end} of {d_out}");
        assert_eq!(
            [rows, width, columns],
            [d_in, self.parts.len() * rank, widths],
            "thin matrices and weight disagree"
        );
    }
}

/// A weight, and what stands beside it.
#[derive(Debug, Clone)]
pub struct Adapted {
    /// `[d_in, d_out]`
    pub weight: Tensor<2>,
    /// Added to the weight.
    pub low_rank: Option<LowRank>,
}

impl From<Tensor<2>> for Adapted {
    fn from(weight: Tensor<2>) -> Self {
        Self { weight, low_rank: None }
    }
}

impl Adapted {
    /// For an operation that has compared the weight's shape with the others'.
    #[cfg(feature = "flex")]
    pub(crate) fn into_dispatch(self) -> Weight<Dispatch> {
        let Some(low_rank) = self.low_rank else { return Weight::Alone(self.weight.into_dispatch()) };
        low_rank.check(self.weight.dims());
        let LowRank { a, b, parts, scale } = low_rank;
        let [weight, a, b] = [self.weight, a, b].map(Tensor::into_dispatch);
        Weight::Adapted { weight, a, b, parts, scale }
    }
}

/// `x (W + scale · A B) + b` over the last axis, computed as `x W + b + scale · (x A) B`.
///
/// Where the weight takes no gradient, none is computed. Where `B` is zero, the numbers are those of [`linear`].
///
/// # Shapes
/// - `x`: `[.., d_in]`, weight `[d_in, d_out]`, `bias`: `[d_out]`
/// - returns `[.., d_out]`
///
/// # Panics
/// If the shapes do not fit.
pub fn adapted_linear<const D: usize>(
    kernels: Kernels,
    x: Tensor<D>,
    layer: Adapted,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    if layer.low_rank.is_none() {
        return linear(kernels, x, layer.weight, bias);
    }
    #[cfg(feature = "flex")]
    if is_fused(kernels, &x) && !tap::is_active() {
        assert_eq!(x.dims()[D - 1], layer.weight.dims()[0], "the last axis of x is not the first of the weight");
        let (x, weight) = (x.into_dispatch(), layer.into_dispatch());
        return Tensor::from_dispatch(match bias {
            Some(bias) => Dispatch::fused_linear(x, weight, bias.into_dispatch()),
            None => Dispatch::fused_linear_no_bias(x, weight),
        });
    }
    let y = linear(kernels, x.clone(), layer.weight, bias);
    match layer.low_rank {
        Some(low_rank) => low_rank.add(kernels, y, x),
        None => y,
    }
}
