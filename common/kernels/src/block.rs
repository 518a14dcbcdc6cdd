//! The operations of a transformer block that take several steps at once.
//!
//! Two of them also hand on a tensor that is used further, so that its gradient is added in a pass that is made anyway.

use burn::tensor::Tensor;

#[cfg(feature = "flex")]
use super::autodiff::FusedOps as _;
use super::tap::{self, Call, Operation};
use super::{Activation, Kernels, add_layer_norm, bias_activation, linear, plain};
#[cfg(feature = "flex")]
use super::{check_frozen, is_fused};
#[cfg(feature = "flex")]
use burn::backend::Dispatch;

/// A linear layer's weight, `[d_in, d_out]`, and bias, `[d_out]`.
#[derive(Debug, Clone)]
pub struct Affine {
    /// `[d_in, d_out]`
    pub weight: Tensor<2>,
    /// `[d_out]`
    pub bias: Tensor<1>,
}

impl Affine {
    #[cfg(feature = "flex")]
    fn check(&self, d_in: usize) {
        let [rows, d_out] = self.weight.dims();
        assert_eq!(rows, d_in, "the last axis of x is not the first of the weight");
        assert_eq!(self.bias.dims(), [d_out], "bias and weight disagree");
        check_frozen(&self.weight, self.bias.dtype());
    }
}

/// A layer norm's gain and offset, `[d]` each, and its ε.
#[derive(Debug, Clone)]
pub struct NormWeights {
    /// `[d]`
    pub gamma: Tensor<1>,
    /// `[d]`
    pub beta: Tensor<1>,
    /// Added to the variance.
    pub eps: f64,
}

/// [`linear`], and `x` again, to be used further.
///
/// Whatever gradient comes back through the second output is added while that of `x` is computed. The fused backward
/// needs a gradient of the first output too: the two reach the loss together or not at all.
///
/// # Shapes
/// - `x`: `[.., d_in]`, weight `[d_in, d_out]`, bias `[d_out]`
/// - returns `([.., d_out], [.., d_in])`
///
/// # Panics
/// If the shapes do not fit.
pub fn linear_keeping<const D: usize>(kernels: Kernels, x: Tensor<D>, layer: Affine) -> (Tensor<D>, Tensor<D>) {
    #[cfg(feature = "flex")]
    if is_fused(kernels, &x) && !tap::is_active() {
        layer.check(x.dims()[D - 1]);
        let (weight, bias) = (layer.weight.into_dispatch(), layer.bias.into_dispatch());
        let (out, x) = Dispatch::fused_linear_keeping(x.into_dispatch(), weight, bias);
        return (Tensor::from_dispatch(out), Tensor::from_dispatch(x));
    }
    (linear(kernels, x.clone(), layer.weight, Some(layer.bias)), x)
}

/// A linear layer, the residual addition and the layer norm after it, as the end of an attention layer has them:
/// with `s = x W + b + residual`, `(layer_norm(s), s)`.
///
/// The gradient of `s` by other ways counts as in [`linear_keeping`]: only together with one of the norm.
///
/// # Shapes
/// - `x`: `[.., d_in]`, weight `[d_in, d]`, bias, gamma and beta `[d]`, `residual`: `[.., d]`
/// - returns two tensors of the shape of `residual`
///
/// # Panics
/// If the shapes do not fit.
pub fn project_add_norm<const D: usize>(
    kernels: Kernels,
    x: Tensor<D>,
    layer: Affine,
    residual: Tensor<D>,
    norm: NormWeights,
) -> (Tensor<D>, Tensor<D>) {
    let call = tap::prepare(|| {
        let (x, weight, bias) = ((&x).into(), (&layer.weight).into(), (&layer.bias).into());
        let operands = [x, weight, bias, (&residual).into(), (&norm.gamma).into(), (&norm.beta).into()];
        Call::new(Operation::ProjectAddNorm { eps: norm.eps }, operands)
    });
    #[cfg(feature = "flex")]
    if is_fused(kernels, &x) && !tap::is_active() {
        let [d] = norm.gamma.dims();
        layer.check(x.dims()[D - 1]);
        assert_eq!(x.dims()[..D - 1], residual.dims()[..D - 1], "x and residual differ in rows");
        assert_eq!([residual.dims()[D - 1], layer.bias.dims()[0], norm.beta.dims()[0]], [d; 3], "widths differ");
        let (normed, sum) = Dispatch::fused_project_add_norm(
            x.into_dispatch(),
            layer.weight.into_dispatch(),
            layer.bias.into_dispatch(),
            residual.into_dispatch(),
            norm.gamma.into_dispatch(),
            norm.beta.into_dispatch(),
            norm.eps,
        );
        return (Tensor::from_dispatch(normed), Tensor::from_dispatch(sum));
    }
    let x = linear(kernels, x, layer.weight, Some(layer.bias));
    let out = add_layer_norm(kernels, x, residual, norm.gamma, norm.beta, norm.eps);
    tap::note(call);
    out
}

/// The feed-forward layer, the residual addition and the layer norm after it:
/// with `s = act(x W₁ + b₁) W₂ + b₂ + residual`, `(layer_norm(s), s)`.
///
/// Of the hidden layer only one tensor is stored, and it goes through the cache once. The gradient of `s` by other
/// ways counts as in [`linear_keeping`]: only together with one of the norm.
///
/// # Shapes
/// - `x`, `residual`: `[.., d]`; `up`: `[d, d_ff]`; `down`: `[d_ff, d]`; gamma and beta `[d]`
/// - returns two tensors of the shape of `x`
///
/// # Panics
/// If the shapes do not fit.
pub fn mlp_add_norm<const D: usize>(
    kernels: Kernels,
    x: Tensor<D>,
    up: Affine,
    activation: Activation,
    down: Affine,
    residual: Tensor<D>,
    norm: NormWeights,
) -> (Tensor<D>, Tensor<D>) {
    let call = tap::prepare(|| {
        let (up_weight, up_bias) = ((&up.weight).into(), (&up.bias).into());
        let (down_weight, down_bias) = ((&down.weight).into(), (&down.bias).into());
        let (gamma, beta) = ((&norm.gamma).into(), (&norm.beta).into());
        let operands = [(&x).into(), up_weight, up_bias, down_weight, down_bias, (&residual).into(), gamma, beta];
        Call::new(Operation::MlpAddNorm { activation, eps: norm.eps }, operands)
    });
    #[cfg(feature = "flex")]
    if is_fused(kernels, &x) && !tap::is_active() {
        let [d] = norm.gamma.dims();
        up.check(d);
        down.check(up.bias.dims()[0]);
        assert_eq!(x.dims(), residual.dims(), "x and residual differ in shape");
        assert_eq!([x.dims()[D - 1], down.bias.dims()[0], norm.beta.dims()[0]], [d; 3], "widths differ");
        let (normed, sum) = Dispatch::fused_mlp_add_norm(
            x.into_dispatch(),
            up.weight.into_dispatch(),
            up.bias.into_dispatch(),
            activation,
            down.weight.into_dispatch(),
            down.bias.into_dispatch(),
            residual.into_dispatch(),
            norm.gamma.into_dispatch(),
            norm.beta.into_dispatch(),
            norm.eps,
        );
        return (Tensor::from_dispatch(normed), Tensor::from_dispatch(sum));
    }
    let x = linear(kernels, x, up.weight, None);
    let x = bias_activation(kernels, x, up.bias, activation);
    let x = linear(kernels, x, down.weight, Some(down.bias));
    let out = add_layer_norm(kernels, x, residual, norm.gamma, norm.beta, norm.eps);
    tap::note(call);
    out
}

/// [`layer_norm`], and `x` again, to be used further: as [`linear_keeping`].
///
/// # Shapes
/// - `x`: `[.., d]`, gamma and beta `[d]`
/// - returns two tensors of the shape of `x`
///
/// # Panics
/// If the shapes do not fit.
pub fn layer_norm_keeping<const D: usize>(kernels: Kernels, x: Tensor<D>, norm: NormWeights) -> (Tensor<D>, Tensor<D>) {
    let NormWeights { gamma, beta, eps } = norm;
    assert_eq!(x.dims()[D - 1..], gamma.dims(), "gamma and the last axis of x disagree");
    assert_eq!(x.dims()[D - 1..], beta.dims(), "beta and the last axis of x disagree");
    tap::call(|| Call::new(Operation::LayerNorm { eps }, [(&x).into(), (&gamma).into(), (&beta).into()]));
    #[cfg(feature = "flex")]
    if is_fused(kernels, &x) {
        let (gamma, beta) = (gamma.into_dispatch(), beta.into_dispatch());
        let (normed, x) = Dispatch::fused_layer_norm(x.into_dispatch(), gamma, beta, eps);
        return (Tensor::from_dispatch(normed), Tensor::from_dispatch(x));
    }
    (plain::layer_norm(x.clone(), gamma, beta, eps), x)
}
