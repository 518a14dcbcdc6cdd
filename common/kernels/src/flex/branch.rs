//! A branch of a transformer block with what follows it: linear layers, the residual addition and the layer norm, a
//! block of rows at a time.
//!
//! While a block of rows goes through all steps it stays in the cache, and threads meet once, not after every step.
//! Blocks depend on the number of rows alone, and what is summed over rows is summed block by block in their order.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::activation;
use super::gemm::{Mat, MatMut, Output, Packed, SharedMut, Threads, gemm_packed};
use super::linear::{add_in_order, add_numbers, add_rows, backward_weight};
use super::norm::{self, Normed};
use super::stored::with_numbers;
use super::thin::{self, Adapted, Wanted};
use super::{contiguous, exclusive, floats, matrix_dims, tensor, unset, with_scratch};
use crate::Activation;

/// Rows of a block, unless there are few.
const ROWS: usize = 128;

/// Rows of each block, of `n` in all: enough blocks for a few threads.
pub fn rows_of_blocks(n: usize) -> usize {
    (n / 4).clamp(24, ROWS)
}

/// Weight and bias of a linear layer.
pub struct Affine<'a> {
    pub weight: &'a FlexTensor,
    pub bias: Option<&'a FlexTensor>,
}

/// Gain, offset and ε of a norm; without an offset it is the root mean square that is 1.
pub struct Norm<'a> {
    pub gamma: &'a FlexTensor,
    pub beta: Option<&'a FlexTensor>,
    pub eps: f64,
}

/// A product is added to the bias, if there is one.
fn onto(bias: Option<&FlexTensor>) -> Output<'_> {
    bias.map_or(Output::Overwrite, |bias| Output::AddRow(floats(bias)))
}

/// The rows of a matrix with `d` columns in blocks.
pub fn blocks(x: &[f32], rows: usize, d: usize) -> rayon::slice::Chunks<'_, f32> {
    x.par_chunks((rows * d).max(1))
}

/// As [`blocks`], to write.
pub fn blocks_mut(x: &mut [f32], rows: usize, d: usize) -> rayon::slice::ChunksMut<'_, f32> {
    x.par_chunks_mut((rows * d).max(1))
}

/// The first row of each block.
fn first_rows(n: usize) -> impl IndexedParallelIterator<Item = usize> {
    let rows = rows_of_blocks(n);
    (0..n.div_ceil(rows)).into_par_iter().map(move |block| block * rows)
}

/// `out = x · weight (+ what output says)` for one block of rows.
pub fn times(out: &mut [f32], output: Output<'_>, x: &[f32], weight: &Packed, d_in: usize, d_out: usize) {
    let n = out.len() / d_out;
    let x = Mat::rows(x, n, d_in, d_in);
    gemm_packed(MatMut::rows(out, n, d_out, d_out), output, x, weight, 1.0, Threads::One);
}

/// A weight `[d_in, d_out]`, rearranged for products with it, or with its transpose.
pub fn packed(weight: &FlexTensor, transposed: bool) -> Packed {
    let (d_in, d_out) = matrix_dims(weight);
    let weight = contiguous(weight);
    with_numbers!(weight of weight => {
        let weight = Mat::rows(weight, d_in, d_out, d_out);
        Packed::new(if transposed { weight.t() } else { weight }, Threads::All)
    })
}

/// `x W + b + residual` and its layer norm; also `x A` of what stands beside the weight.
pub fn project(
    x: &FlexTensor,
    layer: &Adapted,
    bias: Option<&FlexTensor>,
    residual: &FlexTensor,
    norm: &Norm<'_>,
) -> (Normed, FlexTensor, FlexTensor) {
    let ((n, d_in), n_hidden) = (matrix_dims(x), layer.n_hidden());
    let (matrices, bias, x) = (layer.for_forward(), bias.map(contiguous), contiguous(x));
    let x = floats(&x);
    let mut hidden = unset(n * n_hidden);
    let shared = SharedMut::new(&mut hidden);
    let (normed, sum) = add_and_norm(residual, norm, |first_row, n, out| {
        // SAFETY: blocks have different rows.
        let hidden = unsafe { shared.slice(first_row * n_hidden, n * n_hidden) };
        matrices.forward(out, onto(bias.as_deref()), &x[first_row * d_in..][..n * d_in], hidden);
    });
    (normed, sum, tensor(hidden, [n, n_hidden]))
}

/// `act(x W₁ + b₁) W₂ + b₂ + residual` and its layer norm; also what the backward needs of the hidden layer: its
/// values for `ReLU`, what the activation is applied to otherwise.
pub fn mlp(
    x: &FlexTensor,
    up: &Affine<'_>,
    activation: Activation,
    down: &Affine<'_>,
    residual: &FlexTensor,
    norm: &Norm<'_>,
) -> (Normed, FlexTensor, FlexTensor) {
    let (n, d) = matrix_dims(x);
    let (_, d_ff) = matrix_dims(up.weight);
    let (up_weight, down_weight) = (packed(up.weight, false), packed(down.weight, false));
    let (up_bias, down_bias, x) = (up.bias.map(contiguous), down.bias.map(contiguous), contiguous(x));
    let x = floats(&x);
    let mut saved = unset(n * d_ff);
    let shared = SharedMut::new(&mut saved);
    let (normed, sum) = add_and_norm(residual, norm, |first_row, n, out| {
        // SAFETY: blocks have different rows.
        let saved = unsafe { shared.slice(first_row * d_ff, n * d_ff) };
        let x = &x[first_row * d..][..n * d];
        times(saved, onto(up_bias.as_deref()), x, &up_weight, d, d_ff);
        let mut finish = |active: &[f32]| times(out, onto(down_bias.as_deref()), active, &down_weight, d_ff, d);
        match activation {
            Activation::Relu => {
                activation::relu(saved);
                finish(saved);
            }
            Activation::GeluTanh => with_scratch(saved.len(), |active| {
                activation::gelu(active, saved);
                finish(active);
            }),
            Activation::Gelu | Activation::Silu => unreachable!("it has no fused body"),
        }
    });
    (normed, sum, tensor(saved, [n, d_ff]))
}

/// What the backward of [`gated_mlp`] needs of the hidden layer.
#[derive(Debug, Clone)]
pub struct GatedHidden {
    /// `x G` and `x U`, `[n, d_ff]`
    pub gates: [FlexTensor; 2],
    /// `x A` of what stands beside the three weights.
    pub thin: [FlexTensor; 3],
}

/// `(silu(x G) · x U) W + residual` and its norm; also what the backward needs.
pub fn gated_mlp(
    x: &FlexTensor,
    layers: [&Adapted; 3],
    residual: &FlexTensor,
    norm: &Norm<'_>,
) -> (Normed, FlexTensor, GatedHidden) {
    let (n, d) = matrix_dims(x);
    let (_, d_ff) = matrix_dims(&layers[0].weight);
    let [of_gate, of_up, of_down] = layers.map(Adapted::for_forward);
    let widths = layers.map(Adapted::n_hidden);
    let x = contiguous(x);
    let x = floats(&x);
    let (mut gate, mut up) = (unset(n * d_ff), unset(n * d_ff));
    let mut thin = widths.map(|width| unset(n * width));
    let shared = [&mut gate[..], &mut up[..]].map(SharedMut::new);
    let shared_thin = SharedRows::new(&mut thin, widths);
    let (normed, sum) = add_and_norm(residual, norm, |first_row, n, out| {
        // SAFETY: blocks have different rows.
        let [gate, up] = shared.map(|all| unsafe { all.slice(first_row * d_ff, n * d_ff) });
        // SAFETY: as above.
        let [gate_hidden, up_hidden, down_hidden] = unsafe { shared_thin.rows(first_row, n) };
        let x = &x[first_row * d..][..n * d];
        of_gate.forward(gate, Output::Overwrite, x, gate_hidden);
        of_up.forward(up, Output::Overwrite, x, up_hidden);
        with_scratch(gate.len(), |active| {
            activation::silu_gate(active, gate, up);
            of_down.forward(out, Output::Overwrite, active, down_hidden);
        });
    });
    let thin = [0, 1, 2].map(|i| tensor(std::mem::take(&mut thin[i]), [n, widths[i]]));
    (normed, sum, GatedHidden { gates: [gate, up].map(|hidden| tensor(hidden, [n, d_ff])), thin })
}

/// Three matrices of which each block of rows is written by one task; some may have no columns.
#[derive(Clone, Copy)]
struct SharedRows<'a> {
    data: [SharedMut<'a>; 3],
    widths: [usize; 3],
}

impl<'a> SharedRows<'a> {
    fn new(data: &'a mut [Vec<f32>; 3], widths: [usize; 3]) -> Self {
        Self { data: data.each_mut().map(|data| SharedMut::new(data)), widths }
    }

    /// # Safety
    /// While the result lives, nobody else reads or writes these rows.
    unsafe fn rows(self, first: usize, n: usize) -> [&'a mut [f32]; 3] {
        let Self { data, widths } = self;
        // SAFETY: promised by the caller.
        [0, 1, 2].map(|i| unsafe { data[i].slice(first * widths[i], n * widths[i]) })
    }
}

/// For each block of rows: `branch` computes what is added to `residual`, then the sum is normalised.
///
/// `branch` gets the first row, the number of rows, and where to write them.
fn add_and_norm(
    residual: &FlexTensor,
    norm: &Norm<'_>,
    branch: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> (Normed, FlexTensor) {
    let shape = residual.layout().shape().clone();
    let (n, d) = matrix_dims(residual);
    let rows = rows_of_blocks(n);
    let (residual, gamma, beta) = (contiguous(residual), contiguous(norm.gamma), norm.beta.map(contiguous));
    let (gamma, beta) = (floats(&gamma), beta.as_deref().map(floats));
    let (mut normed, mut sum, mut statistics) = (unset(n * d), unset(n * d), unset(n * 2));
    blocks_mut(&mut normed, rows, d)
        .zip(blocks_mut(&mut sum, rows, d))
        .zip(blocks_mut(&mut statistics, rows, 2))
        .zip(blocks(floats(&residual), rows, d))
        .enumerate()
        .for_each(|(i, (((normed, sum), statistics), residual))| {
            branch(i * rows, sum.len() / d, sum);
            add_numbers(sum, residual);
            norm::normalize_rows(normed, statistics, sum, gamma, beta, norm.eps as f32);
        });
    let normed = Normed { normed: tensor(normed, shape.clone()), statistics: tensor(statistics, [n, 2]) };
    (normed, tensor(sum, shape))
}

/// State for the backward of the residual addition and the layer norm.
#[derive(Debug, Clone)]
pub struct NormState {
    pub sum: FlexTensor,
    pub gamma: FlexTensor,
    pub statistics: FlexTensor,
    /// Whether the norm has an offset.
    pub has_offset: bool,
}

impl NormState {
    pub fn new(sum: &FlexTensor, gamma: &FlexTensor, statistics: FlexTensor, has_offset: bool) -> Self {
        Self { sum: sum.clone(), gamma: gamma.clone(), statistics, has_offset }
    }
}

/// Gradients of the layer norm's gain and offset, and of the sum that it normalised.
pub struct NormGrads {
    pub gamma: FlexTensor,
    pub beta: FlexTensor,
    pub sum: FlexTensor,
}

/// Gradients of a linear layer.
pub struct AffineGrads {
    pub x: FlexTensor,
    pub weight: FlexTensor,
    pub bias: FlexTensor,
}

/// Gradients of [`project`], which gave `hidden`, from that of the norm and, if there is one, that of the sum by other ways.
pub fn project_backward(
    x: &FlexTensor,
    layer: &Adapted,
    hidden: &FlexTensor,
    state: NormState,
    grad: &FlexTensor,
    sum_grad: Option<FlexTensor>,
    wanted: Wanted,
) -> (thin::Grads, NormGrads) {
    let x_shape = x.layout().shape().clone();
    let ((n, d_in), (_, d), n_hidden) = (matrix_dims(x), matrix_dims(&layer.weight), layer.n_hidden());
    let x_width = if wanted.x { d_in } else { 0 };
    let matrices = layer.for_backward();
    let (mut x_grad, mut hidden_grad) = (unset(n * x_width), unset(n * n_hidden));
    let shared = [&mut x_grad[..], &mut hidden_grad[..]].map(SharedMut::new);
    let (norm, sums) = through_norm(state, grad, sum_grad, 0, first_rows(n), |first_row, grad, _| {
        let (n, [all_x, all_hidden]) = (grad.len() / d, shared);
        // SAFETY: blocks have different rows.
        let x_grad = unsafe { all_x.slice(first_row * x_width, n * x_width) };
        // SAFETY: as above.
        let hidden_grad = unsafe { all_hidden.slice(first_row * n_hidden, n * n_hidden) };
        matrices.backward(x_grad, Output::Overwrite, grad, hidden_grad);
    });
    let [bias, _] = sums;
    let grads = thin::Grads {
        x: wanted.x.then(|| tensor(x_grad, x_shape)),
        weight: wanted.weight.then(|| backward_weight(x, &norm.sum)),
        bias: tensor(bias, [d]),
        thin: layer.thin_grads(x, hidden, [&tensor(hidden_grad, [n, n_hidden]), &norm.sum]),
    };
    (grads, norm)
}

/// Gradients of [`mlp`], from that of the norm and, if there is one, that of the sum by other ways.
///
/// `saved`: what the forward gave. `same`: the residual was `x` itself; then the gradient of `x` holds both parts.
#[allow(clippy::too_many_arguments)]
pub fn mlp_backward(
    x: &FlexTensor,
    weights: [&FlexTensor; 2],
    activation: Activation,
    saved: FlexTensor,
    same: bool,
    state: NormState,
    grad: &FlexTensor,
    sum_grad: Option<FlexTensor>,
) -> ([AffineGrads; 2], NormGrads) {
    let [up, down] = weights;
    let x_shape = x.layout().shape().clone();
    let (n, d) = matrix_dims(x);
    let (_, d_ff) = matrix_dims(up);
    let (up, down) = (packed(up, true), packed(down, true));
    let rows = rows_of_blocks(n);
    let mut active = exclusive(saved);
    let (mut hidden_grad, mut x_grad) = (unset(n * d_ff), unset(n * d));
    let outs = blocks_mut(&mut hidden_grad, rows, d_ff)
        .zip(blocks_mut(active.storage_mut::<f32>(), rows, d_ff))
        .zip(blocks_mut(&mut x_grad, rows, d));
    let (norm, sums) =
        through_norm(state, grad, sum_grad, d_ff, outs, |((hidden, active), x_grad), grad, bias_grad| {
            times(hidden, Output::Overwrite, grad, &down, d, d_ff);
            match activation {
                Activation::Relu => activation::relu_backward(hidden, bias_grad, active),
                Activation::GeluTanh => activation::gelu_backward(hidden, bias_grad, active),
                Activation::Gelu | Activation::Silu => unreachable!("it has no fused body"),
            }
            let output = if same {
                x_grad.copy_from_slice(grad);
                Output::Accumulate
            } else {
                Output::Overwrite
            };
            times(x_grad, output, hidden, &up, d_ff, d);
        });
    let [down_bias, up_bias] = sums;
    let hidden_grad = tensor(hidden_grad, [n, d_ff]);
    let down = AffineGrads {
        weight: backward_weight(&active, &norm.sum),
        bias: tensor(down_bias, [d]),
        x: hidden_grad.clone(),
    };
    drop(active);
    let up = AffineGrads {
        weight: backward_weight(x, &hidden_grad),
        bias: tensor(up_bias, [d_ff]),
        x: tensor(x_grad, x_shape),
    };
    ([up, down], norm)
}

/// Gradients of [`gated_mlp`].
pub struct GatedGrads {
    pub x: Option<FlexTensor>,
    /// Of the gate, up and down.
    pub weights: [Option<FlexTensor>; 3],
    /// Of the `A` and `B` beside each.
    pub thin: [[Option<FlexTensor>; 2]; 3],
}

/// Gradients of [`gated_mlp`] and of its norm, from that of the norm and, if there is one, that of the sum by other ways.
///
/// `saved`: what the forward gave.
pub fn gated_mlp_backward(
    x: &FlexTensor,
    layers: [&Adapted; 3],
    saved: GatedHidden,
    state: NormState,
    grad: &FlexTensor,
    sum_grad: Option<FlexTensor>,
    wants_x: bool,
    wants_weights: [bool; 3],
) -> (GatedGrads, NormGrads) {
    let x_shape = x.layout().shape().clone();
    let ((n, d), (_, d_ff)) = (matrix_dims(x), matrix_dims(&layers[0].weight));
    let [of_gate, of_up, of_down] = layers.map(Adapted::for_backward);
    let widths = layers.map(Adapted::n_hidden);
    let rows = rows_of_blocks(n);
    let [mut gate, mut up] = saved.gates.map(exclusive);
    let x_width = if wants_x { d } else { 0 };
    let (mut active, mut x_grad) = (unset(n * d_ff), unset(n * x_width));
    let mut thin = widths.map(|width| unset(n * width));
    let (shared_x, shared_thin) = (SharedMut::new(&mut x_grad), SharedRows::new(&mut thin, widths));
    let hidden = blocks_mut(gate.storage_mut::<f32>(), rows, d_ff).zip(blocks_mut(up.storage_mut::<f32>(), rows, d_ff));
    let outs = hidden.zip(blocks_mut(&mut active, rows, d_ff)).zip(first_rows(n));
    let (norm, _) = through_norm(state, grad, sum_grad, 0, outs, |(((gate, up), active), first_row), grad, _| {
        let n = grad.len() / d;
        // SAFETY: blocks have different rows.
        let x_grad = unsafe { shared_x.slice(first_row * x_width, n * x_width) };
        // SAFETY: as above.
        let [gate_hidden, up_hidden, down_hidden] = unsafe { shared_thin.rows(first_row, n) };
        of_down.backward(active, Output::Overwrite, grad, down_hidden);
        activation::silu_gate_backward(active, gate, up);
        of_gate.backward(x_grad, Output::Overwrite, gate, gate_hidden);
        of_up.backward(x_grad, Output::Accumulate, up, up_hidden);
    });
    let active = tensor(active, [n, d_ff]);
    let operands = [(x, &gate), (x, &up), (&active, &norm.sum)];
    let of_layers = [0, 1, 2].map(|i| {
        let (x, grad) = operands[i];
        let hidden_grad = tensor(std::mem::take(&mut thin[i]), [n, widths[i]]);
        let weight = wants_weights[i].then(|| backward_weight(x, grad));
        (weight, layers[i].thin_grads(x, &saved.thin[i], [&hidden_grad, grad]))
    });
    let [gate, up, down] = of_layers;
    let grads = GatedGrads {
        x: wants_x.then(|| tensor(x_grad, x_shape)),
        weights: [gate.0, up.0, down.0],
        thin: [gate.1, up.1, down.1],
    };
    (grads, norm)
}

/// The gradient through the layer norm and the addition, and on through `branch`, a block of rows at a time.
///
/// `branch` gets its block of `outs`, the gradient of the sum in these rows, and room for `width` sums over rows.
/// Also returns the sum of the sum's gradient over all rows, and that of what `branch` summed.
fn through_norm<P, T>(
    state: NormState,
    grad: &FlexTensor,
    sum_grad: Option<FlexTensor>,
    width: usize,
    outs: P,
    branch: impl Fn(T, &[f32], &mut [f32]) + Sync,
) -> (NormGrads, [Vec<f32>; 2])
where
    P: IndexedParallelIterator<Item = T>,
    T: Send,
{
    let shape = state.sum.layout().shape().clone();
    let (n, d) = matrix_dims(&state.sum);
    let rows = rows_of_blocks(n);
    let (sum, gamma) = (contiguous(&state.sum), contiguous(&state.gamma));
    let (statistics, grad) = (contiguous(&state.statistics), contiguous(grad));
    let other = sum_grad.as_ref().map(contiguous);
    let other = other.as_deref().map(floats);
    let mut total = unset(n * d);
    let inputs =
        blocks(floats(&sum), rows, d).zip(blocks(floats(&grad), rows, d)).zip(blocks(floats(&statistics), rows, 2));
    let parts: Vec<Vec<f32>> = blocks_mut(&mut total, rows, d)
        .zip(inputs)
        .zip(outs)
        .enumerate()
        .map(|(i, ((total, ((sum, grad), statistics)), out))| {
            // The gradients of gamma and beta, room for two rows, the sums of the sum's gradient and of the branch.
            let mut sums = vec![0.0; 5 * d + width];
            let (of_norm, others) = sums.split_at_mut(4 * d);
            norm::backward_rows(total, of_norm, sum, floats(&gamma), statistics, grad, state.has_offset);
            if let Some(other) = other {
                add_numbers(total, &other[i * rows * d..][..total.len()]);
            }
            let (bias, of_branch) = others.split_at_mut(d);
            add_rows(bias, total);
            branch(out, total, of_branch);
            sums.drain(2 * d..4 * d);
            sums
        })
        .collect();
    let mut gamma_grad = add_in_order(parts, 3 * d + width);
    let of_branch = gamma_grad.split_off(3 * d);
    let bias = gamma_grad.split_off(2 * d);
    let beta_grad = gamma_grad.split_off(d);
    let norm = NormGrads { gamma: tensor(gamma_grad, [d]), beta: tensor(beta_grad, [d]), sum: tensor(total, shape) };
    (norm, [bias, of_branch])
}

/// Gradients of a linear layer, in one pass over the rows but for that of the weight.
///
/// `x_grad`: the gradient of `x` by other ways, which is added.
pub fn affine_backward(
    x: &FlexTensor,
    weight: &FlexTensor,
    grad: &FlexTensor,
    x_grad: Option<FlexTensor>,
) -> AffineGrads {
    let x_shape = x.layout().shape().clone();
    let (n, d_out) = matrix_dims(grad);
    let (_, d_in) = matrix_dims(x);
    let transposed = packed(weight, true);
    let output = if x_grad.is_some() { Output::Accumulate } else { Output::Overwrite };
    let mut x_grad = x_grad.map_or_else(|| tensor(unset(n * d_in), [n, d_in]), exclusive);
    let grad = contiguous(grad);
    let rows = rows_of_blocks(n);
    let parts: Vec<Vec<f32>> = blocks_mut(x_grad.storage_mut::<f32>(), rows, d_in)
        .zip(blocks(floats(&grad), rows, d_out))
        .map(|(x_grad, grad)| {
            let mut bias_grad = vec![0.0; d_out];
            add_rows(&mut bias_grad, grad);
            times(x_grad, output, grad, &transposed, d_out, d_in);
            bias_grad
        })
        .collect();
    AffineGrads {
        x: x_grad.reshape(x_shape),
        weight: backward_weight(x, &grad),
        bias: tensor(add_in_order(parts, d_out), [d_out]),
    }
}
