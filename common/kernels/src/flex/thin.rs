//! Linear layers with two thin matrices beside the weight: `x W + scale · x A B`, and their gradients.
//!
//! What is added to a product is computed while its block of rows is in the cache; of it `x A` is kept, which has few
//! columns.

use std::ops::Range;

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::branch::{blocks, blocks_mut, packed, rows_of_blocks, times};
use super::gemm::{Mat, MatMut, Output, Packed, SharedMut, Threads, gemm, gemm_packed};
use super::linear::{self, add_in_order, add_rows, backward_weight};
use super::simd::{fma, simd};
use super::stored::with_numbers;
use super::{contiguous, few, floats, matrix_dims, nothing, tensor, unset};

/// A weight, `[d_in, d_out]`, and what stands beside it.
#[derive(Debug, Clone)]
pub struct Adapted {
    pub weight: FlexTensor,
    pub thin: Option<Thin>,
}

/// Two thin matrices, whose product is added to some columns of a weight.
#[derive(Debug, Clone)]
pub struct Thin {
    /// `[d_in, n_parts · rank]`
    pub a: FlexTensor,
    /// `[rank, Σ widths]`
    pub b: FlexTensor,
    /// The columns of each part.
    pub parts: Vec<Range<usize>>,
    pub scale: f32,
}

impl Thin {
    /// Each part's columns of `x A`, of the weight, and of `B`.
    fn columns(&self) -> impl Iterator<Item = [Range<usize>; 3]> {
        let (rank, _) = matrix_dims(&self.b);
        let mut start = 0;
        self.parts.iter().enumerate().map(move |(i, part)| {
            let of_b = start..start + part.len();
            start = of_b.end;
            [i * rank..(i + 1) * rank, part.clone(), of_b]
        })
    }

    /// Gradients of `A` and `B`, from those of `x A` and of the layer's result.
    fn grads(&self, x: &FlexTensor, hidden: &FlexTensor, grads: [&FlexTensor; 2]) -> [FlexTensor; 2] {
        let [hidden_grad, grad] = grads;
        let ((n, d_out), (rank, width)) = (matrix_dims(grad), matrix_dims(&self.b));
        let (_, n_hidden) = matrix_dims(hidden);
        let (contiguous_hidden, grad) = (contiguous(hidden), contiguous(grad));
        let hidden = Mat::rows(floats(&contiguous_hidden), n, n_hidden, n_hidden);
        let grad = Mat::rows(floats(&grad), n, d_out, d_out);
        let mut b_grad = unset(rank * width);
        let mut out = MatMut::rows(&mut b_grad, rank, width, width);
        for [of_hidden, of_weight, of_b] in self.columns() {
            let (hidden, grad) = (hidden.part(0..n, of_hidden), grad.part(0..n, of_weight));
            gemm(out.block(0..rank, of_b), Output::Overwrite, hidden.t(), grad, self.scale, Threads::All);
        }
        [backward_weight(x, hidden_grad), tensor(b_grad, [rank, width])]
    }
}

impl Adapted {
    /// Columns of `x A`: none where nothing stands beside the weight.
    pub fn n_hidden(&self) -> usize {
        self.thin.as_ref().map_or(0, |thin| matrix_dims(&thin.a).1)
    }

    /// The matrices rearranged for [`Layer::forward`].
    pub fn for_forward(&self) -> Layer<'_> {
        Layer::new(self, false)
    }

    /// The matrices rearranged for [`Layer::backward`].
    pub fn for_backward(&self) -> Layer<'_> {
        Layer::new(self, true)
    }

    /// Gradients of `A` and `B`, if they are there; see [`Thin::grads`].
    pub fn thin_grads(&self, x: &FlexTensor, hidden: &FlexTensor, grads: [&FlexTensor; 2]) -> [Option<FlexTensor>; 2] {
        self.thin.as_ref().map_or([None, None], |thin| thin.grads(x, hidden, grads).map(Some))
    }
}

/// A layer's matrices, or their transposes, rearranged for products with rows.
pub struct Layer<'a> {
    weight: Packed,
    dims: (usize, usize),
    /// `A`, and each part of `B`.
    thin: Option<(&'a Thin, Packed, Vec<Packed>)>,
}

impl<'a> Layer<'a> {
    fn new(adapted: &'a Adapted, transposed: bool) -> Self {
        let thin = adapted.thin.as_ref().map(|thin| {
            let (rank, width) = matrix_dims(&thin.b);
            let b = contiguous(&thin.b);
            let b = Mat::rows(floats(&b), rank, width, width);
            let parts = thin.columns().map(|[_, _, of_b]| {
                let b = b.part(0..rank, of_b);
                Packed::new(if transposed { b.t() } else { b }, Threads::All)
            });
            (thin, packed(&thin.a, transposed), parts.collect())
        });
        Self { weight: packed(&adapted.weight, transposed), dims: matrix_dims(&adapted.weight), thin }
    }

    /// `out = x W + scale · x A B`, added to what `output` says, for a block of rows; writes `x A` to `hidden`.
    pub fn forward(&self, out: &mut [f32], output: Output<'_>, x: &[f32], hidden: &mut [f32]) {
        let (d_in, d_out) = self.dims;
        times(out, output, x, &self.weight, d_in, d_out);
        let Some((thin, a, b)) = &self.thin else { return };
        let (n, n_hidden) = (out.len() / d_out, hidden.len() * d_out / out.len());
        times(hidden, Output::Overwrite, x, a, d_in, n_hidden);
        let hidden = Mat::rows(hidden, n, n_hidden, n_hidden);
        let mut out = MatMut::rows(out, n, d_out, d_out);
        for ([of_hidden, of_weight, _], b) in thin.columns().zip(b) {
            let (out, hidden) = (out.block(0..n, of_weight), hidden.part(0..n, of_hidden));
            gemm_packed(out, Output::Accumulate, hidden, b, thin.scale, Threads::One);
        }
    }

    /// Gradients of `x`, which `output` may add to those that are there, and of `x A` for a block of rows.
    ///
    /// `x_grad` is empty where none is wanted.
    pub fn backward(&self, x_grad: &mut [f32], output: Output<'_>, grad: &[f32], hidden_grad: &mut [f32]) {
        let (d_in, d_out) = self.dims;
        let n = grad.len() / d_out;
        if !x_grad.is_empty() {
            times(x_grad, output, grad, &self.weight, d_out, d_in);
        }
        let Some((thin, a, b)) = &self.thin else { return };
        let n_hidden = hidden_grad.len() / n;
        let mut hidden = MatMut::rows(hidden_grad, n, n_hidden, n_hidden);
        let grad = Mat::rows(grad, n, d_out, d_out);
        for ([of_hidden, of_weight, _], b) in thin.columns().zip(b) {
            let (hidden, grad) = (hidden.block(0..n, of_hidden), grad.part(0..n, of_weight));
            gemm_packed(hidden, Output::Overwrite, grad, b, thin.scale, Threads::One);
        }
        if !x_grad.is_empty() {
            times(x_grad, Output::Accumulate, hidden_grad, a, n_hidden, d_in);
        }
    }
}

/// `x W + b + scale · x A B`, and `x A`.
pub fn forward(x: &FlexTensor, layer: &Adapted, bias: Option<&FlexTensor>) -> (FlexTensor, FlexTensor) {
    if layer.thin.is_none() {
        return (linear::forward(x, &layer.weight, bias), nothing());
    }
    let ((n, d_in), (_, d_out), n_hidden) = (matrix_dims(x), matrix_dims(&layer.weight), layer.n_hidden());
    let mut shape = x.layout().shape().clone();
    let last = shape.num_dims() - 1;
    shape.as_mut_slice()[last] = d_out;
    let (x, bias) = (contiguous(x), bias.map(contiguous));
    let (x, bias) = (floats(&x), bias.as_deref().map(floats));
    if n <= few::ROWS {
        let [out, hidden] = of_few_rows(x, layer, bias, d_out);
        return (tensor(out, shape), tensor(hidden, [n, n_hidden]));
    }
    let matrices = layer.for_forward();
    let (mut out, mut hidden) = (unset(n * d_out), unset(n * n_hidden));
    let (rows, output) = (rows_of_blocks(n), bias.map_or(Output::Overwrite, Output::AddRow));
    let shared = SharedMut::new(&mut hidden);
    blocks_mut(&mut out, rows, d_out).zip(blocks(x, rows, d_in)).enumerate().for_each(|(i, (out, x))| {
        // SAFETY: blocks have different rows.
        let hidden = unsafe { shared.slice(i * rows * n_hidden, x.len() / d_in * n_hidden) };
        matrices.forward(out, output, x, hidden);
    });
    (tensor(out, shape), tensor(hidden, [n, n_hidden]))
}

/// [`forward`] for so few rows that no matrix is rearranged.
fn of_few_rows(x: &[f32], layer: &Adapted, bias: Option<&[f32]>, d_out: usize) -> [Vec<f32>; 2] {
    let (d_in, _) = matrix_dims(&layer.weight);
    let n = x.len() / d_in.max(1);
    let (mut out, mut hidden) = (unset(n * d_out), unset(n * layer.n_hidden()));
    few_rows_into(&mut out, &mut hidden, x, layer, bias);
    [out, hidden]
}

/// [`forward`] for at most [`few::ROWS`] rows, into `out` and, where something stands beside the weight, `hidden`.
pub fn few_rows_into(out: &mut [f32], hidden: &mut [f32], x: &[f32], layer: &Adapted, bias: Option<&[f32]>) {
    let (_, d_out) = matrix_dims(&layer.weight);
    let weight = contiguous(&layer.weight);
    with_numbers!(weight of weight => few::times_matrix_into(out, x, weight, bias, d_out));
    let Some(thin) = &layer.thin else { return };
    let ((_, n_hidden), (_, width)) = (matrix_dims(&thin.a), matrix_dims(&thin.b));
    let (a, b) = (contiguous(&thin.a), contiguous(&thin.b));
    few::times_matrix_into(hidden, x, floats(&a), None, n_hidden);
    for (out, hidden) in out.chunks_exact_mut(d_out).zip(hidden.chunks_exact(n_hidden)) {
        for [of_hidden, of_weight, of_b] in thin.columns() {
            let out = &mut out[of_weight];
            for (factor, b) in hidden[of_hidden].iter().zip(floats(&b).chunks_exact(width)) {
                add_scaled(out, thin.scale * factor, &b[of_b.clone()]);
            }
        }
    }
}

simd! {
    /// `to_i += factor · from_i`.
    fn add_scaled(to: &mut [f32], factor: f32, from: &[f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = fma(factor, *from, *to);
        }
    }
}

/// Which gradients of a layer are wanted, beside those of what is always trained.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub x: bool,
    pub weight: bool,
}

/// Gradients of a layer: of `x`, the weight, the bias, `A` and `B`, as far as they are wanted and there.
pub struct Grads {
    pub x: Option<FlexTensor>,
    pub weight: Option<FlexTensor>,
    pub bias: FlexTensor,
    pub thin: [Option<FlexTensor>; 2],
}

/// Gradients of [`forward`], which gave `hidden`.
pub fn backward(x: &FlexTensor, layer: &Adapted, hidden: &FlexTensor, grad: &FlexTensor, wanted: Wanted) -> Grads {
    let x_shape = x.layout().shape().clone();
    let ((n, d_out), (_, d_in), n_hidden) = (matrix_dims(grad), matrix_dims(x), layer.n_hidden());
    let x_width = if wanted.x { d_in } else { 0 };
    let matrices = layer.for_backward();
    let (mut x_grad, mut hidden_grad) = (unset(n * x_width), unset(n * n_hidden));
    let shared = [&mut x_grad[..], &mut hidden_grad[..]].map(SharedMut::new);
    let (grad, rows) = (contiguous(grad), rows_of_blocks(n));
    let parts: Vec<Vec<f32>> = blocks(floats(&grad), rows, d_out)
        .enumerate()
        .map(|(i, grad)| {
            let (first_row, n) = (i * rows, grad.len() / d_out);
            let [all_x, all_hidden] = shared;
            // SAFETY: blocks have different rows.
            let x_grad = unsafe { all_x.slice(first_row * x_width, n * x_width) };
            // SAFETY: as above.
            let hidden_grad = unsafe { all_hidden.slice(first_row * n_hidden, n * n_hidden) };
            let mut bias_grad = vec![0.0; d_out];
            add_rows(&mut bias_grad, grad);
            matrices.backward(x_grad, Output::Overwrite, grad, hidden_grad);
            bias_grad
        })
        .collect();
    Grads {
        x: wanted.x.then(|| tensor(x_grad, x_shape)),
        weight: wanted.weight.then(|| backward_weight(x, &grad)),
        bias: tensor(add_in_order(parts, d_out), [d_out]),
        thin: layer.thin_grads(x, hidden, [&tensor(hidden_grad, [n, n_hidden]), &grad]),
    }
}
