//! The operations of blocks whose norms have no offset, whose layers have no biases and whose feed-forward layer has a
//! gate: Llama's and those of its relatives.

// Without the flex backend there is nothing to choose.
#![cfg_attr(not(feature = "flex"), allow(unused_variables))]

use burn::tensor::Tensor;

use super::tap::{self, Call, Operation};
use super::{Activation, Adapted, Kernels, adapted_linear, plain};

#[cfg(feature = "flex")]
use super::autodiff::FusedOps as _;
#[cfg(feature = "flex")]
use super::{check_frozen, is_fused};
#[cfg(feature = "flex")]
use burn::backend::Dispatch;

/// Root-mean-square normalisation over the last axis: `x / √(mean(x²) + eps) · γ`.
///
/// # Shapes
/// - `x`: `[.., d]`, `gamma`: `[d]`
/// - returns the shape of `x`
///
/// # Panics
/// If the shapes do not fit.
///
/// # Source
/// Zhang & Sennrich, arXiv:1910.07467.
pub fn rms_norm<const D: usize>(kernels: Kernels, x: Tensor<D>, gamma: Tensor<1>, eps: f64) -> Tensor<D> {
    rms_norm_keeping(kernels, x, gamma, eps).0
}

/// [`rms_norm`], and `x` again, to be used further: as [`linear_keeping`](super::linear_keeping).
///
/// # Shapes
/// - `x`: `[.., d]`, `gamma`: `[d]`
/// - returns two tensors of the shape of `x`
///
/// # Panics
/// If the shapes do not fit.
pub fn rms_norm_keeping<const D: usize>(
    kernels: Kernels,
    x: Tensor<D>,
    gamma: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    assert_eq!(x.dims()[D - 1..], gamma.dims(), "gamma and the last axis of x disagree");
    tap::call(|| Call::new(Operation::RmsNorm { eps }, [(&x).into(), (&gamma).into()]));
    #[cfg(feature = "flex")]
    if is_fused(kernels, &x) {
        let (normed, x) = Dispatch::fused_rms_norm(x.into_dispatch(), gamma.into_dispatch(), eps);
        return (Tensor::from_dispatch(normed), Tensor::from_dispatch(x));
    }
    (plain::rms_norm(x.clone(), gamma, eps), x)
}

/// The residual addition and the norm after it: `(rms_norm(x + residual), x + residual)`.
///
/// The gradient of the sum by other ways counts as in [`linear_keeping`](super::linear_keeping): only together with one of
/// the norm.
///
/// # Shapes
/// - `x`, `residual`: `[.., d]`, `gamma`: `[d]`
/// - returns two tensors of the shape of `x`
///
/// # Panics
/// If the shapes do not fit.
pub fn add_rms_norm<const D: usize>(
    kernels: Kernels,
    x: Tensor<D>,
    residual: Tensor<D>,
    gamma: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    assert_eq!(x.dims(), residual.dims(), "x and residual differ in shape");
    assert_eq!(x.dims()[D - 1..], gamma.dims(), "gamma and the last axis of x disagree");
    tap::call(|| Call::new(Operation::AddRmsNorm { eps }, [(&x).into(), (&residual).into(), (&gamma).into()]));
    #[cfg(feature = "flex")]
    if is_fused(kernels, &x) {
        let (x, residual, gamma) = (x.into_dispatch(), residual.into_dispatch(), gamma.into_dispatch());
        let (normed, sum) = Dispatch::fused_add_rms_norm(x, residual, gamma, eps);
        return (Tensor::from_dispatch(normed), Tensor::from_dispatch(sum));
    }
    let sum = x + residual;
    (plain::rms_norm(sum.clone(), gamma, eps), sum)
}

/// A linear layer without bias, the residual addition and the norm after it, as the end of an attention layer has them:
/// with `s = x W + residual`, `(rms_norm(s), s)`.
///
/// The gradient of `s` by other ways counts as in [`linear_keeping`](super::linear_keeping): only together with one of the
/// norm.
///
/// # Shapes
/// - `x`: `[.., d_in]`, `weight`: `[d_in, d]`, `residual`: `[.., d]`, `gamma`: `[d]`
/// - returns two tensors of the shape of `residual`
///
/// # Panics
/// If the shapes do not fit.
pub fn project_add_rms_norm<const D: usize>(
    kernels: Kernels,
    x: Tensor<D>,
    layer: Adapted,
    residual: Tensor<D>,
    gamma: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    let call = tap::prepare(|| {
        let operands = [(&x).into(), (&layer.weight).into(), (&residual).into(), (&gamma).into()];
        Call::new(Operation::ProjectAddRmsNorm { eps }, operands)
    })
    .filter(|_| layer.low_rank.is_none());
    #[cfg(feature = "flex")]
    if is_fused(kernels, &x) && !tap::is_active() {
        let [d] = gamma.dims();
        assert_eq!(layer.weight.dims(), [x.dims()[D - 1], d], "the weight does not lead from x to gamma");
        check_frozen(&layer.weight, x.dtype());
        assert_eq!(x.dims()[..D - 1], residual.dims()[..D - 1], "x and residual differ in rows");
        assert_eq!(residual.dims()[D - 1], d, "residual and gamma differ in width");
        let (normed, sum) = Dispatch::fused_project_add_rms_norm(
            x.into_dispatch(),
            layer.into_dispatch(),
            residual.into_dispatch(),
            gamma.into_dispatch(),
            eps,
        );
        return (Tensor::from_dispatch(normed), Tensor::from_dispatch(sum));
    }
    let out = add_rms_norm(kernels, adapted_linear(kernels, x, layer, None), residual, gamma, eps);
    tap::note(call);
    out
}

/// `activation(gate) · up`, number by number.
///
/// # Panics
/// If the shapes differ.
///
/// # Source
/// Shazeer, arXiv:2002.05202; with [`Activation::Silu`] it is `SwiGLU`.
pub fn gate<const D: usize>(kernels: Kernels, gate: Tensor<D>, up: Tensor<D>, activation: Activation) -> Tensor<D> {
    assert_eq!(gate.dims(), up.dims(), "the gate and what it lets through differ in shape");
    tap::call(|| Call::new(Operation::Gate(activation), [(&gate).into(), (&up).into()]));
    #[cfg(feature = "flex")]
    if activation == Activation::Silu && is_fused(kernels, &gate) {
        return Tensor::from_dispatch(Dispatch::fused_gate(gate.into_dispatch(), up.into_dispatch()));
    }
    plain::activate(gate, activation) * up
}

/// The weights of a feed-forward layer with a gate: `(silu(x G) · x U) D`.
#[derive(Debug, Clone)]
pub struct GatedWeights {
    /// `G: [d, d_ff]`
    pub gate: Adapted,
    /// `U: [d, d_ff]`
    pub up: Adapted,
    /// `D: [d_ff, d]`
    pub down: Adapted,
}

/// The gated feed-forward layer, the residual addition and the norm after it:
/// with `s = (silu(x G) · x U) D + residual`, `(rms_norm(s), s)`.
///
/// Of the hidden layer two tensors are stored, and they go through the cache once. The gradient of `s` by other ways counts
/// as in [`linear_keeping`](super::linear_keeping): only together with one of the norm.
///
/// # Shapes
/// - `x`, `residual`: `[.., d]`; weights as [`GatedWeights`] has them; `gamma`: `[d]`
/// - returns two tensors of the shape of `x`
///
/// # Panics
/// If the shapes do not fit.
pub fn gated_mlp_add_rms_norm<const D: usize>(
    kernels: Kernels,
    x: Tensor<D>,
    weights: GatedWeights,
    residual: Tensor<D>,
    gamma: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    let GatedWeights { gate: gate_weight, up, down } = weights;
    let call = tap::prepare(|| {
        let [gate, up, down] = [&gate_weight, &up, &down].map(|layer| (&layer.weight).into());
        Call::new(
            Operation::GatedMlpAddRmsNorm { eps },
            [(&x).into(), gate, up, down, (&residual).into(), (&gamma).into()],
        )
    })
    .filter(|_| [&gate_weight, &up, &down].iter().all(|layer| layer.low_rank.is_none()));
    #[cfg(feature = "flex")]
    if is_fused(kernels, &x) && !tap::is_active() {
        let ([d], [_, d_ff]) = (gamma.dims(), up.weight.dims());
        let shapes = [&gate_weight, &up, &down].map(|layer| layer.weight.dims());
        assert_eq!(x.dims(), residual.dims(), "x and residual differ in shape");
        assert_eq!(x.dims()[D - 1], d, "gamma and the last axis of x disagree");
        for layer in [&gate_weight, &up, &down] {
            check_frozen(&layer.weight, x.dtype());
        }
        assert_eq!(shapes, [[d, d_ff], [d, d_ff], [d_ff, d]], "weights disagree");
        let (normed, sum) = Dispatch::fused_gated_mlp_add_rms_norm(
            x.into_dispatch(),
            gate_weight.into_dispatch(),
            up.into_dispatch(),
            down.into_dispatch(),
            residual.into_dispatch(),
            gamma.into_dispatch(),
            eps,
        );
        return (Tensor::from_dispatch(normed), Tensor::from_dispatch(sum));
    }
    let gated = adapted_linear(kernels, x.clone(), gate_weight, None);
    let active = gate(kernels, gated, adapted_linear(kernels, x, up, None), Activation::Silu);
    let out = add_rms_norm(kernels, adapted_linear(kernels, active, down, None), residual, gamma, eps);
    tap::note(call);
    out
}
