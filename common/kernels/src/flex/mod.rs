//! The fused operations on the `flex` backend, over plain slices: one file an operation.
//!
//! Work is cut into pieces of fixed size, handed to the thread pool and put together in the order of the pieces, so
//! that the number of threads never shows in a result.

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod branch;
pub mod decode;
pub mod embedding;
pub mod few;
mod gemm;
pub mod linear;
pub mod log_probs;
pub mod norm;
pub mod rotary;
pub mod simd;
pub mod step;
mod stored;
mod strips;
pub mod thin;
mod tile;
mod transpose;
pub mod workers;

use std::borrow::Cow;
use std::cell::Cell;
use std::mem::MaybeUninit;

use burn::backend::Flex;
use burn::tensor::{DType, Shape, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use self::branch::{Affine, Norm};
use self::rotary::Direction;
use self::thin::Adapted;
use super::autodiff::{FusedOps, Weight};
use super::{Activation, Heads};

impl FusedOps for Flex {
    fn fused_linear(x: FlexTensor, weight: Weight<Self>, bias: FlexTensor) -> FlexTensor {
        thin::forward(&x, &weight.into(), Some(&bias)).0
    }

    fn fused_linear_no_bias(x: FlexTensor, weight: Weight<Self>) -> FlexTensor {
        thin::forward(&x, &weight.into(), None).0
    }

    fn fused_linear_keeping(x: FlexTensor, weight: FlexTensor, bias: FlexTensor) -> (FlexTensor, FlexTensor) {
        (linear::forward(&x, &weight, Some(&bias)), x)
    }

    fn fused_project_add_norm(
        x: FlexTensor,
        weight: FlexTensor,
        bias: FlexTensor,
        residual: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        eps: f64,
    ) -> (FlexTensor, FlexTensor) {
        let norm = Norm { gamma: &gamma, beta: Some(&beta), eps };
        let layer = Adapted { weight, thin: None };
        let (out, sum, _) = branch::project(&x, &layer, Some(&bias), &residual, &norm);
        (out.normed, sum)
    }

    fn fused_mlp_add_norm(
        x: FlexTensor,
        up_weight: FlexTensor,
        up_bias: FlexTensor,
        activation: Activation,
        down_weight: FlexTensor,
        down_bias: FlexTensor,
        residual: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        eps: f64,
    ) -> (FlexTensor, FlexTensor) {
        let up = Affine { weight: &up_weight, bias: Some(&up_bias) };
        let down = Affine { weight: &down_weight, bias: Some(&down_bias) };
        let norm = Norm { gamma: &gamma, beta: Some(&beta), eps };
        let (out, sum, _) = branch::mlp(&x, &up, activation, &down, &residual, &norm);
        (out.normed, sum)
    }

    fn fused_embed(
        tokens: FlexTensor,
        position_table: FlexTensor,
        ids: FlexTensor,
        positions: Vec<usize>,
    ) -> FlexTensor {
        let (n_rows, _) = matrix_dims(&tokens);
        let rows = embedding::rows_of(&ids, n_rows);
        embedding::forward(&tokens, &position_table, &rows, &positions, ids.layout().shape().dims())
    }

    fn fused_lookup(tokens: FlexTensor, ids: FlexTensor) -> FlexTensor {
        let (n_rows, _) = matrix_dims(&tokens);
        embedding::lookup(&tokens, &embedding::rows_of(&ids, n_rows), ids.layout().shape().dims())
    }

    fn fused_bias_activation(x: FlexTensor, bias: FlexTensor, activation: Activation) -> FlexTensor {
        activation::forward(&x, &bias, activation)
    }

    fn fused_layer_norm(x: FlexTensor, gamma: FlexTensor, beta: FlexTensor, eps: f64) -> (FlexTensor, FlexTensor) {
        (norm::forward(&x, &gamma, Some(&beta), eps).normed, x)
    }

    fn fused_add_layer_norm(
        x: FlexTensor,
        residual: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        eps: f64,
    ) -> (FlexTensor, FlexTensor) {
        let (out, sum) = norm::add_forward(&x, &residual, &gamma, Some(&beta), eps);
        (out.normed, sum)
    }

    fn fused_rms_norm(x: FlexTensor, gamma: FlexTensor, eps: f64) -> (FlexTensor, FlexTensor) {
        (norm::forward(&x, &gamma, None, eps).normed, x)
    }

    fn fused_add_rms_norm(
        x: FlexTensor,
        residual: FlexTensor,
        gamma: FlexTensor,
        eps: f64,
    ) -> (FlexTensor, FlexTensor) {
        let (out, sum) = norm::add_forward(&x, &residual, &gamma, None, eps);
        (out.normed, sum)
    }

    fn fused_project_add_rms_norm(
        x: FlexTensor,
        weight: Weight<Self>,
        residual: FlexTensor,
        gamma: FlexTensor,
        eps: f64,
    ) -> (FlexTensor, FlexTensor) {
        let norm = Norm { gamma: &gamma, beta: None, eps };
        let (out, sum, _) = branch::project(&x, &weight.into(), None, &residual, &norm);
        (out.normed, sum)
    }

    fn fused_gate(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        activation::gate(&gate, &up)
    }

    fn fused_gated_mlp_add_rms_norm(
        x: FlexTensor,
        gate: Weight<Self>,
        up: Weight<Self>,
        down: Weight<Self>,
        residual: FlexTensor,
        gamma: FlexTensor,
        eps: f64,
    ) -> (FlexTensor, FlexTensor) {
        let norm = Norm { gamma: &gamma, beta: None, eps };
        let layers = [gate, up, down].map(Adapted::from);
        let (out, sum, _) = branch::gated_mlp(&x, layers.each_ref(), &residual, &norm);
        (out.normed, sum)
    }

    fn fused_attention(qkv: FlexTensor, first_key: Vec<usize>, heads: Heads) -> FlexTensor {
        attention::forward(&qkv, &first_key, heads).0
    }

    fn fused_rotate(qkv: FlexTensor, heads: Heads, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
        rotary::rotate(qkv, heads, &cos, &sin, Direction::Forward)
    }

    fn fused_attention_cached(
        qkv: FlexTensor,
        keys: FlexTensor,
        values: FlexTensor,
        cached: &[usize],
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        decode::attention_cached(&qkv, keys, values, cached)
    }

    fn fused_token_log_probs(
        hidden: FlexTensor,
        head: FlexTensor,
        targets: FlexTensor,
        scale: f64,
    ) -> (FlexTensor, FlexTensor) {
        let out = log_probs::forward(&hidden, &head, &targets, scale);
        (out.of_targets, out.entropy)
    }

    fn fused_cross_entropy(hidden: FlexTensor, head: FlexTensor, targets: FlexTensor, weight: f64) -> FlexTensor {
        log_probs::cross_entropy(&hidden, &head, &targets, weight)
    }

    fn fused_logits(hidden: FlexTensor, head: FlexTensor) -> FlexTensor {
        linear::logits(&hidden, &head)
    }
}

/// The tensor's numbers in order, copied only if they do not lie so.
pub fn contiguous(tensor: &FlexTensor) -> Cow<'_, FlexTensor> {
    // Even a copy that shares the numbers allocates its shape, which counts where a token is decoded in a fifth of a
    // millisecond.
    if tensor.is_contiguous() { Cow::Borrowed(tensor) } else { Cow::Owned(tensor.to_contiguous()) }
}

/// The numbers of a tensor that [`contiguous`] returned.
fn floats(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("an f32 tensor that was made contiguous")
}

/// The tensor, with numbers that lie in order and that nobody else holds, so that they can be overwritten.
fn exclusive(tensor: FlexTensor) -> FlexTensor {
    // What others hold is copied by the first who writes.
    if is_whole(&tensor) { tensor } else { tensor.to_contiguous() }
}

/// Whether the tensor's numbers lie in order and are all of its storage: a view of a larger tensor is copied out of it.
fn is_whole(tensor: &FlexTensor) -> bool {
    tensor.is_contiguous() && tensor.bytes().len() == 4 * tensor.layout().num_elements()
}

/// The numbers of an integer tensor.
fn indices(tensor: &FlexTensor) -> Vec<usize> {
    let tensor = tensor.to_contiguous();
    let index = |value: i64| usize::try_from(value).expect("an index is not negative");
    match tensor.dtype() {
        DType::I64 => tensor.as_slice::<i64>().into_iter().flatten().map(|&i| index(i)).collect(),
        DType::I32 => tensor.as_slice::<i32>().into_iter().flatten().map(|&i| index(i64::from(i))).collect(),
        other => panic!("indices of type {other:?}, expected I64 or I32"),
    }
}

/// A tensor of `data`, without copying it.
fn tensor(data: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(data, shape.into()))
}

/// A tensor without numbers.
pub fn nothing() -> FlexTensor {
    tensor(Vec::new(), [0])
}

/// Rows and columns of a tensor seen as a matrix: the last axis, and all before it.
fn matrix_dims(tensor: &FlexTensor) -> (usize, usize) {
    let shape = tensor.layout().shape();
    let cols = shape.as_slice().last().copied().expect("a tensor with an axis");
    (shape.num_elements().checked_div(cols).unwrap_or(0), cols)
}

/// `tensor` times the one number of `factor`; `tensor` itself if that is 1.
pub fn scaled(mut tensor: FlexTensor, factor: &FlexTensor) -> FlexTensor {
    let factor = floats(&contiguous(factor))[0];
    if factor != 1.0 {
        tensor.storage_mut::<f32>().par_iter_mut().for_each(|x| *x *= factor);
    }
    tensor
}

/// `n` numbers of any value, for an output of which every element is written.
///
/// Clearing it first would cost a pass over memory, which for the large tensors here is a good part of the work.
fn unset(n: usize) -> Vec<f32> {
    let mut data = Vec::with_capacity(n);
    initialise(&mut data.spare_capacity_mut()[..n]);
    // SAFETY: the capacity is at least `n`, and the numbers are initialised.
    unsafe { data.set_len(n) };
    data
}

/// Plain numbers: every pattern of bits is a value.
trait Numbers: Copy {}

impl Numbers for f32 {}

/// Gives `memory` values without a pass over it: those that its bytes happen to be.
///
/// A reference to memory that nothing has written is undefined even for numbers that are not read. The block of assembly
/// has no instructions, but the compiler must assume that it writes to what it gets a pointer to; what it then wrote are
/// the bytes that are there.
fn initialise<T: Numbers>(memory: &mut [MaybeUninit<T>]) {
    #[cfg(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri)))]
    // SAFETY: nothing is executed, and the memory is borrowed exclusively.
    unsafe {
        std::arch::asm!("/* {0} */", in(reg) memory.as_mut_ptr(), options(nostack, preserves_flags));
    }
    #[cfg(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri))))]
    memory.fill_with(MaybeUninit::zeroed);
}

/// Gives `body` a buffer of `n` numbers of any value, kept by the thread from one call to the next.
fn with_scratch<R>(n: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    }
    // Taken out, not borrowed: should the thread enter a second body meanwhile, that one gets a fresh buffer.
    let mut buffer = SCRATCH.take();
    if buffer.len() < n {
        buffer.resize(n, 0.0);
    }
    let result = body(&mut buffer[..n]);
    SCRATCH.set(buffer);
    result
}
