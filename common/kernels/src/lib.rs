//! The operations a training step spends its time in, each in two versions that give the same numbers.
//!
//! - **Plain**: ordinary tensor operations, on every backend, differentiated by Burn. This is the definition.
//! - **Fused**: on the `flex` backend in f32, one pass over memory and a hand-written backward; nothing of the size
//!   `[batch, n_heads, seq, seq]` or `[n, vocab_size]` is ever stored.
//!
//! Callers choose with [`Kernels`]. `Fused` silently means plain wherever there is no fused body (other backends,
//! other float types), so model code never asks where it runs.
//!
//! # Invariants
//! - Fused results have the same bits whatever the number of threads: work is cut into pieces that do not depend on
//!   it, and partial sums are added in the order of the pieces.
//! - Fused operations are differentiable once; the backward itself is not tracked.
//! - All `unsafe` of the project is in this crate: in `flex`, `softmax` and `memory`.

// Without the flex backend there is nothing to choose.
#![cfg_attr(not(feature = "flex"), allow(unused_variables))]

mod attention;
mod block;
mod checkpoint;
pub mod fault;
mod gated;
mod instructions;
mod kept;
mod low_rank;
mod plain;
mod precision;
mod step;
pub mod tap;
mod vocabulary;

pub use precision::{Precision, TrunkPrecision};

#[allow(unsafe_code)]
pub mod memory;

#[allow(unsafe_code, clippy::inline_always)]
pub mod softmax;

// `inline(always)`: a function that is not inlined is not compiled for the instruction set of its caller.
#[cfg(feature = "flex")]
#[allow(unsafe_code, clippy::inline_always, clippy::needless_pass_by_value, clippy::too_many_arguments)]
mod flex;

#[cfg(feature = "flex")]
#[allow(clippy::too_many_arguments)]
mod autodiff;

use burn::tensor::{DType, Device, Int, Tensor};

pub use attention::{Angles, Heads, attention, attention_cached, rotate};
pub use block::{Affine, NormWeights, layer_norm_keeping, linear_keeping, mlp_add_norm, project_add_norm};
pub use checkpoint::{Leaves, checkpointed};
pub use gated::{
    GatedWeights, add_rms_norm, gate, gated_mlp_add_rms_norm, project_add_rms_norm, rms_norm, rms_norm_keeping,
};
pub use instructions::Instructions;
pub use low_rank::{Adapted, LowRank, adapted_linear};
pub use step::{KeysValues, StepBlock, StepLinear, StepNorm, StepWeights, Stepper};
pub use vocabulary::{cross_entropy, logits, token_log_probs, token_log_probs_and_entropy};

use tap::{Call, Operation};

#[cfg(feature = "flex")]
use autodiff::{FusedOps as _, Weight};
#[cfg(feature = "flex")]
use burn::backend::Dispatch;

/// Which version of the operations of this module runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kernels {
    /// Ordinary tensor operations of the backend.
    Plain,
    /// Fused operations where there are any, else the plain ones.
    #[default]
    Fused,
}

/// The numbers of rows for which [`linear`], [`logits`] and [`attention_cached`] of one new position give each row the
/// same bits, fused: fewer and more rows are computed by other loops, whose sums differ in the last bits.
pub const BATCH_INVARIANT_ROWS: std::ops::RangeInclusive<usize> = 4..=64;

#[cfg(feature = "flex")]
const _: () = assert!(flex::few::STREAMED + 1 == *BATCH_INVARIANT_ROWS.start());
#[cfg(feature = "flex")]
const _: () = assert!(flex::few::ROWS == *BATCH_INVARIANT_ROWS.end());

/// The non-linearity between the two projections of the feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// `max(x, 0)`, with gradient 0 at 0.
    Relu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³)))`, GPT-2's GELU (Hendrycks & Gimpel, arXiv:1606.08415).
    GeluTanh,
    /// `x · Φ(x)` with the normal distribution's Φ (Hendrycks & Gimpel, arXiv:1606.08415).
    Gelu,
    /// `x · σ(x)` (Elfwing et al., arXiv:1702.03118), also called swish.
    Silu,
}

impl Activation {
    /// Whether the flex backend has a body of its own for it.
    pub const fn is_fused(self) -> bool {
        matches!(self, Self::Relu | Self::GeluTanh)
    }
}

/// Parameters of one `AdamW` step besides the tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta_1: f64,
    /// Decay of the second moment.
    pub beta_2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, as a fraction of `lr`.
    pub weight_decay: f64,
    /// Number of this step, the first being 1; sets the bias corrections `1 − β^step`.
    pub step: u64,
    /// Factor on the gradient before it is used: the clip of the global norm, or 1.
    pub grad_scale: f64,
}

/// One parameter in an `AdamW` step; all tensors `[n]`, none tracked by autodiff.
#[derive(Debug, Clone)]
pub struct AdamWParam {
    /// The parameter.
    pub param: Tensor<1>,
    /// Its gradient.
    pub grad: Tensor<1>,
    /// First moment.
    pub m: Tensor<1>,
    /// Second moment.
    pub v: Tensor<1>,
    /// The numbers of the step.
    pub step: AdamWStep,
}

impl AdamWStep {
    /// `1 − β₁^step` and `1 − β₂^step`.
    pub(crate) fn corrections(&self) -> [f64; 2] {
        [self.beta_1, self.beta_2].map(|beta| 1.0 - beta.powf(self.step as f64))
    }
}

/// `x W + b` over the last axis.
///
/// The weight may be in bf16 beside an `x` in f32, as any matrix of a model here may that is frozen: it is read as it lies
/// and widened, so that the result is that of the same numbers in f32.
///
/// # Shapes
/// - `x`: `[.., d_in]`, `weight`: `[d_in, d_out]`, `bias`: `[d_out]`
/// - returns `[.., d_out]`
///
/// # Panics
/// If the shapes do not fit, or a weight in bf16 takes a gradient.
pub fn linear<const D: usize>(kernels: Kernels, x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    let [d_in, d_out] = weight.dims();
    assert_eq!(x.dims()[D - 1], d_in, "the last axis of x is not the first of the weight");
    if let Some(bias) = &bias {
        assert_eq!(bias.dims(), [d_out], "bias and weight disagree");
    }
    check_frozen(&weight, x.dtype());
    tap::call(|| {
        let bias = bias.iter().map(Into::into);
        Call {
            operation: Operation::Linear,
            operands: [(&x).into(), (&weight).into()].into_iter().chain(bias).collect(),
        }
    });
    #[cfg(feature = "flex")]
    if is_fused(kernels, &x) {
        let (x, weight) = (x.into_dispatch(), Weight::Alone(weight.into_dispatch()));
        return Tensor::from_dispatch(match bias {
            Some(bias) => Dispatch::fused_linear(x, weight, bias.into_dispatch()),
            None => Dispatch::fused_linear_no_bias(x, weight),
        });
    }
    plain::linear(x, weight, bias)
}

/// `activation(x + b)`, the bias added over the last axis.
///
/// # Shapes
/// - `x`: `[.., d]`, `bias`: `[d]`
/// - returns the shape of `x`
///
/// # Panics
/// If the shapes do not fit.
pub fn bias_activation<const D: usize>(
    kernels: Kernels,
    x: Tensor<D>,
    bias: Tensor<1>,
    activation: Activation,
) -> Tensor<D> {
    assert_eq!(x.dims()[D - 1..], bias.dims(), "bias and the last axis of x disagree");
    tap::call(|| Call::new(Operation::BiasActivation(activation), [(&x).into(), (&bias).into()]));
    #[cfg(feature = "flex")]
    if activation.is_fused() && is_fused(kernels, &x) {
        return Tensor::from_dispatch(Dispatch::fused_bias_activation(
            x.into_dispatch(),
            bias.into_dispatch(),
            activation,
        ));
    }
    plain::bias_activation(x, bias, activation)
}

/// `activation(x)`, number by number.
pub fn activate<const D: usize>(x: Tensor<D>, activation: Activation) -> Tensor<D> {
    plain::activate(x, activation)
}

/// Layer normalisation over the last axis: `(x − mean) / √(var + eps) · γ + β`.
///
/// # Shapes
/// - `x`: `[.., d]`, `gamma`, `beta`: `[d]`
/// - returns the shape of `x`
///
/// # Panics
/// If the shapes do not fit.
///
/// # Source
/// Ba et al., arXiv:1607.06450; the variance is the biased one (divided by `d`), as in `PyTorch`.
pub fn layer_norm<const D: usize>(
    kernels: Kernels,
    x: Tensor<D>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    eps: f64,
) -> Tensor<D> {
    layer_norm_keeping(kernels, x, NormWeights { gamma, beta, eps }).0
}

/// The residual addition and the layer norm after it: `(layer_norm(x + residual), x + residual)`.
///
/// A post-norm block uses the first output alone; a pre-norm block carries the second on as the residual stream. The
/// gradient of the sum by other ways counts as in [`linear_keeping`]: only together with one of the norm.
///
/// # Shapes
/// - `x`, `residual`: `[.., d]`, `gamma`, `beta`: `[d]`
/// - returns two tensors of the shape of `x`
///
/// # Panics
/// If the shapes do not fit.
pub fn add_layer_norm<const D: usize>(
    kernels: Kernels,
    x: Tensor<D>,
    residual: Tensor<D>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    assert_eq!(x.dims(), residual.dims(), "x and residual differ in shape");
    assert_eq!(x.dims()[D - 1..], gamma.dims(), "gamma and the last axis of x disagree");
    assert_eq!(x.dims()[D - 1..], beta.dims(), "beta and the last axis of x disagree");
    tap::call(|| {
        Call::new(Operation::AddLayerNorm { eps }, [(&x).into(), (&residual).into(), (&gamma).into(), (&beta).into()])
    });
    #[cfg(feature = "flex")]
    if is_fused(kernels, &x) {
        let (normed, sum) = Dispatch::fused_add_layer_norm(
            x.into_dispatch(),
            residual.into_dispatch(),
            gamma.into_dispatch(),
            beta.into_dispatch(),
            eps,
        );
        return (Tensor::from_dispatch(normed), Tensor::from_dispatch(sum));
    }
    let sum = x + residual;
    (plain::layer_norm(sum.clone(), gamma, beta, eps), sum)
}

/// Runs `body` with worker threads that wait awake: for many short operations in a row, such as decoding token by token.
///
/// Changes no result. Longer operations within it have one thread less for each worker.
pub fn with_workers<R>(body: impl FnOnce() -> R) -> R {
    #[cfg(feature = "flex")]
    return flex::workers::with_workers(body);
    #[cfg(not(feature = "flex"))]
    body()
}

/// Runs two computations that have nothing to do with each other, at the same time where `device` is the CPU and its
/// kernels are ours: what one does on a single thread overlaps with the other.
///
/// Changes no result; both hold their memory at once.
pub fn join<A: Send, B: Send>(
    device: &Device,
    first: impl FnOnce() -> A + Send,
    second: impl FnOnce() -> B + Send,
) -> (A, B) {
    #[cfg(feature = "flex")]
    if is_flex(device) {
        return rayon::join(first, second);
    }
    (first(), second())
}

/// Calls `task` with each of `items`, on the [workers](with_workers) or the threads of the pool.
pub fn for_each_of<T: Send>(items: &mut [T], task: impl Fn(&mut T) + Sync) {
    #[cfg(feature = "flex")]
    flex::workers::for_each_of(items, task);
    #[cfg(not(feature = "flex"))]
    rayon::prelude::ParallelIterator::for_each(rayon::prelude::IntoParallelRefMutIterator::par_iter_mut(items), task);
}

/// The embedding of tokens at their positions: `out[b][t] = tokens[ids[b][t]] + position_table[position of (b, t)]`.
///
/// # Shapes
/// - `tokens`: `[vocab_size, d]`, `position_table`: `[n_positions, d]`, `ids`: `[batch, seq]`
/// - `positions`: `[batch · seq]`, each below `n_positions`; `None` where token `t` stands at `start + t`
/// - returns `[batch, seq, d]`
///
/// # Panics
/// If the shapes do not fit, or an id or a position has no row.
pub fn embed(
    kernels: Kernels,
    tokens: Tensor<2>,
    position_table: Tensor<2>,
    ids: Tensor<2, Int>,
    positions: Option<&[usize]>,
    start: usize,
) -> Tensor<3> {
    let [batch, seq] = ids.dims();
    let [n_positions, d] = position_table.dims();
    assert_eq!(tokens.dims()[1], d, "the tables differ in width");
    assert_eq!(positions.map_or(batch * seq, <[usize]>::len), batch * seq, "one position a token");
    let last = positions.map_or(start + seq, |positions| positions.iter().max().map_or(0, |last| last + 1));
    assert!(last <= n_positions, "position {} in a table of {n_positions}", last - 1);
    tap::call(|| {
        let positions = positions.map(<[usize]>::to_vec);
        Call::new(Operation::Embed { ids: ids.clone(), positions, start }, [(&tokens).into(), (&position_table).into()])
    });
    check_frozen(&tokens, position_table.dtype());
    #[cfg(feature = "flex")]
    if is_fused(kernels, &position_table) {
        let positions =
            positions.map_or_else(|| (0..batch * seq).map(|i| start + i % seq).collect(), <[usize]>::to_vec);
        let (tokens, position_table) = (tokens.into_dispatch(), position_table.into_dispatch());
        return Tensor::from_dispatch(Dispatch::fused_embed(tokens, position_table, ids.into_dispatch(), positions));
    }
    plain::embed(tokens, position_table, ids, positions, start)
}

/// The embedding of tokens without positions: `out[b][t] = tokens[ids[b][t]]`.
///
/// # Shapes
/// - `tokens`: `[vocab_size, d]`, `ids`: `[batch, seq]`
/// - returns `[batch, seq, d]`
///
/// # Panics
/// If an id has no row.
pub fn lookup(kernels: Kernels, tokens: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    tap::call(|| Call::new(Operation::Lookup { ids: ids.clone() }, [(&tokens).into()]));
    check_frozen(&tokens, DType::F32);
    #[cfg(feature = "flex")]
    if kernels == Kernels::Fused && matches!(tokens.dtype(), DType::F32 | DType::BF16) && is_flex(&tokens.device()) {
        return Tensor::from_dispatch(Dispatch::fused_lookup(tokens.into_dispatch(), ids.into_dispatch()));
    }
    plain::lookup(tokens, ids)
}

/// One `AdamW` step of many parameters: where fused, in one pass that the threads share.
///
/// With `g = grad · grad_scale`: `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
/// `param ← (1 − lr · weight_decay) · param − lr · m̂ / (√v̂ + eps)`, with `m̂ = m / (1 − β₁^step)` and
/// `v̂ = v / (1 − β₂^step)`. Tensors that nobody else holds are updated in place.
///
/// Returns `param`, `m` and `v` of each.
///
/// # Panics
/// If the lengths of a parameter's tensors differ.
///
/// # Source
/// Loshchilov & Hutter, arXiv:1711.05101, with the decay scaled by `lr` as in `PyTorch`.
pub fn adamw_update(kernels: Kernels, params: Vec<AdamWParam>) -> Vec<[Tensor<1>; 3]> {
    for AdamWParam { param, grad, m, v, .. } in &params {
        assert_eq!(param.dims(), grad.dims(), "param and grad differ in length");
        assert_eq!(param.dims(), m.dims(), "param and m differ in length");
        assert_eq!(param.dims(), v.dims(), "param and v differ in length");
    }
    #[cfg(feature = "flex")]
    if params.iter().all(|p| is_fused(kernels, &p.param)) {
        return flex::adamw::update(params);
    }
    params.into_iter().map(plain::adamw_update).collect()
}

/// `Σ x²` over all tensors, for the norm of all gradients: on the host, added in f64 in a fixed order where fused.
pub fn sum_of_squares(kernels: Kernels, tensors: &[Tensor<1>]) -> f64 {
    #[cfg(feature = "flex")]
    if tensors.iter().all(|x| is_fused(kernels, x)) {
        return flex::adamw::sum_of_squares(tensors);
    }
    tensors.iter().cloned().map(plain::sum_of_squares).sum()
}

/// Whether reading `x` waits for nothing: it was computed by the CPU, in the host's memory.
pub fn is_on_host<const D: usize>(x: &Tensor<D>) -> bool {
    use burn::backend::DispatchDevice;
    let device = x.device();
    match device.as_dispatch() {
        DispatchDevice::Autodiff(_) => is_on_host(&x.clone().inner()),
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => true,
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => true,
        #[allow(unreachable_patterns, reason = "with the two backends above there may be no other")]
        _ => false,
    }
}

/// Checks that a weight of another type than what it is multiplied with is frozen.
fn check_frozen(weight: &Tensor<2>, dtype: DType) {
    assert!(weight.dtype() == dtype || !weight.is_tracked(), "a weight in {:?} is frozen", weight.dtype());
}

/// Whether `x` has a fused body: the flex backend, with or without autodiff, in f32.
#[cfg(feature = "flex")]
fn is_fused<const D: usize>(kernels: Kernels, x: &Tensor<D>) -> bool {
    kernels == Kernels::Fused && x.dtype() == DType::F32 && is_flex(&x.device())
}

#[cfg(feature = "flex")]
fn is_flex(device: &Device) -> bool {
    use burn::backend::DispatchDevice;
    match device.as_dispatch() {
        DispatchDevice::Autodiff(device) => matches!(**device, DispatchDevice::Flex(_)),
        device => matches!(device, DispatchDevice::Flex(_)),
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests;
