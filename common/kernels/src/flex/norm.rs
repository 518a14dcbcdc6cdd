//! Layer and root-mean-square normalisation, with or without the residual addition before it, and their gradients.
//!
//! The latter has no offset, and its mean counts as 0: wherever an offset may be missing, its absence says which is meant.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::linear::{add_in_order, add_numbers};
use super::simd::{dot, fma, simd, sum, sum_of_squares_around};
use super::{contiguous, floats, matrix_dims, tensor, unset};

/// Rows handled by one task.
const ROWS: usize = 64;

/// A normalised tensor, and what its backward needs.
pub struct Normed {
    /// The normalised tensor.
    pub normed: FlexTensor,
    /// `[n, 2]`: mean and reciprocal standard deviation of each row.
    pub statistics: FlexTensor,
}

/// Normalises the rows of `x`.
pub fn forward(x: &FlexTensor, gamma: &FlexTensor, beta: Option<&FlexTensor>, eps: f64) -> Normed {
    let shape = x.layout().shape().clone();
    let (n, d) = matrix_dims(x);
    let (x, gamma, beta) = (contiguous(x), contiguous(gamma), beta.map(contiguous));
    let (x, gamma, beta) = (floats(&x), floats(&gamma), beta.as_deref().map(floats));
    let (mut out, mut statistics) = (unset(x.len()), unset(n * 2));
    out.par_chunks_mut(d * ROWS).zip(statistics.par_chunks_mut(2 * ROWS)).zip(x.par_chunks(d * ROWS)).for_each(
        |((out, statistics), x)| {
            normalize_rows(out, statistics, x, gamma, beta, eps as f32);
        },
    );
    Normed { normed: tensor(out, shape), statistics: tensor(statistics, [n, 2]) }
}

/// Adds `residual` to `x` and normalises the rows of the sum; returns the sum too.
pub fn add_forward(
    x: &FlexTensor,
    residual: &FlexTensor,
    gamma: &FlexTensor,
    beta: Option<&FlexTensor>,
    eps: f64,
) -> (Normed, FlexTensor) {
    let shape = x.layout().shape().clone();
    let (n, d) = matrix_dims(x);
    let (x, residual, gamma, beta) = (contiguous(x), contiguous(residual), contiguous(gamma), beta.map(contiguous));
    let (x, residual, gamma, beta) = (floats(&x), floats(&residual), floats(&gamma), beta.as_deref().map(floats));
    let (mut out, mut total, mut statistics) = (unset(x.len()), unset(x.len()), unset(n * 2));
    out.par_chunks_mut(d * ROWS)
        .zip(total.par_chunks_mut(d * ROWS))
        .zip(statistics.par_chunks_mut(2 * ROWS))
        .zip(x.par_chunks(d * ROWS).zip(residual.par_chunks(d * ROWS)))
        .for_each(|(((out, total), statistics), (x, residual))| {
            add_and_normalize_rows((out, total), statistics, (x, residual), gamma, beta, eps as f32);
        });
    let normed = Normed { normed: tensor(out, shape.clone()), statistics: tensor(statistics, [n, 2]) };
    (normed, tensor(total, shape))
}

simd! {
    /// Normalises the rows of `x`.
    pub fn normalize_rows(
        out: &mut [f32],
        statistics: &mut [f32],
        x: &[f32],
        gamma: &[f32],
        beta: Option<&[f32]>,
        eps: f32,
    ) {
        let d = gamma.len();
        for ((out, statistics), x) in out.chunks_exact_mut(d).zip(statistics.chunks_exact_mut(2)).zip(x.chunks_exact(d)) {
            normalize(out, statistics, x, gamma, beta, eps);
        }
    }

    /// `outs`: the normalised rows and the sums; `terms`: what is added.
    pub fn add_and_normalize_rows(
        outs: (&mut [f32], &mut [f32]),
        statistics: &mut [f32],
        terms: (&[f32], &[f32]),
        gamma: &[f32],
        beta: Option<&[f32]>,
        eps: f32,
    ) {
        let d = gamma.len();
        let outs = outs.0.chunks_exact_mut(d).zip(outs.1.chunks_exact_mut(d));
        let terms = terms.0.chunks_exact(d).zip(terms.1.chunks_exact(d));
        for (((out, total), statistics), (x, residual)) in outs.zip(statistics.chunks_exact_mut(2)).zip(terms) {
            for ((total, x), residual) in total.iter_mut().zip(x).zip(residual) {
                *total = x + residual;
            }
            normalize(out, statistics, total, gamma, beta, eps);
        }
    }
}

#[inline(always)]
fn normalize(out: &mut [f32], statistics: &mut [f32], x: &[f32], gamma: &[f32], beta: Option<&[f32]>, eps: f32) {
    let d = x.len() as f32;
    let mean = if beta.is_some() { sum(x) / d } else { 0.0 };
    let variance = sum_of_squares_around(x, mean) / d;
    let scale = 1.0 / (variance + eps).sqrt();
    if let Some(beta) = beta {
        for (((out, x), gamma), beta) in out.iter_mut().zip(x).zip(gamma).zip(beta) {
            *out = fma((x - mean) * scale, *gamma, *beta);
        }
    } else {
        for ((out, x), gamma) in out.iter_mut().zip(x).zip(gamma) {
            *out = x * scale * gamma;
        }
    }
    statistics[0] = mean;
    statistics[1] = scale;
}

/// Gradients of `x`, gamma and, where there is an offset, `beta`; `other` is a gradient of `x` by other ways, which is
/// added.
///
/// With `x̂ = (x − mean) · s` and `h = grad · γ`: `∂x = s · (h − mean(h) − x̂ · mean(h x̂))`, without `mean(h)` where the
/// mean is not taken off.
pub fn backward(
    x: &FlexTensor,
    gamma: &FlexTensor,
    statistics: &FlexTensor,
    grad: &FlexTensor,
    other: Option<FlexTensor>,
    has_offset: bool,
) -> (FlexTensor, FlexTensor, Option<FlexTensor>) {
    let shape = x.layout().shape().clone();
    let (_, d) = matrix_dims(x);
    let (x, gamma, statistics, grad) = (contiguous(x), contiguous(gamma), contiguous(statistics), contiguous(grad));
    let (x, gamma, statistics, grad) = (floats(&x), floats(&gamma), floats(&statistics), floats(&grad));
    let mut x_grad = unset(x.len());
    let other = other.as_ref().map(contiguous);
    let other = other.as_deref().map(floats);
    let parts: Vec<Vec<f32>> = x_grad
        .par_chunks_mut(d * ROWS)
        .zip(statistics.par_chunks(2 * ROWS))
        .zip(x.par_chunks(d * ROWS).zip(grad.par_chunks(d * ROWS)))
        .enumerate()
        .map(|(i, ((x_grad, statistics), (x, grad)))| {
            // The gradients of gamma and beta side by side, then room for one row of x̂ and of h.
            let mut sums = vec![0.0; 4 * d];
            backward_rows(x_grad, &mut sums, x, gamma, statistics, grad, has_offset);
            if let Some(other) = other {
                add_numbers(x_grad, &other[i * d * ROWS..][..x_grad.len()]);
            }
            sums.truncate(2 * d);
            sums
        })
        .collect();
    let mut gamma_grad = add_in_order(parts, 2 * d);
    let beta_grad = gamma_grad.split_off(d);
    (tensor(x_grad, shape), tensor(gamma_grad, [d]), has_offset.then(|| tensor(beta_grad, [d])))
}

simd! {
    /// `sums`: the gradients of gamma and beta, then room for a row of x̂ and of h.
    pub fn backward_rows(
        x_grad: &mut [f32],
        sums: &mut [f32],
        x: &[f32],
        gamma: &[f32],
        statistics: &[f32],
        grad: &[f32],
        has_offset: bool,
    ) {
        let d = gamma.len();
        let (gamma_grad, rest) = sums.split_at_mut(d);
        let (beta_grad, rest) = rest.split_at_mut(d);
        let (x_hat, h) = rest.split_at_mut(d);
        let rows =
            x_grad.chunks_exact_mut(d).zip(statistics.chunks_exact(2)).zip(x.chunks_exact(d)).zip(grad.chunks_exact(d));
        for (((x_grad, statistics), x), grad) in rows {
            let (mean, scale) = (statistics[0], statistics[1]);
            for j in 0..d {
                x_hat[j] = (x[j] - mean) * scale;
                h[j] = grad[j] * gamma[j];
                gamma_grad[j] = fma(grad[j], x_hat[j], gamma_grad[j]);
                beta_grad[j] += grad[j];
            }
            let mean_h = if has_offset { sum(h) / d as f32 } else { 0.0 };
            let mean_h_x_hat = dot(h, x_hat) / d as f32;
            for ((x_grad, h), x_hat) in x_grad.iter_mut().zip(&*h).zip(&*x_hat) {
                *x_grad = scale * fma(-x_hat, mean_h_x_hat, h - mean_h);
            }
        }
    }
}
