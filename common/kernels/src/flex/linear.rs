//! `x W + b` and its gradients.

use super::gemm::{Mat, MatMut, Output, Packed, Threads, gemm, gemm_packed};
use super::simd::{add_assign, simd};
use super::stored::{Stored, widened, with_numbers};
use super::transpose::transpose_on_all_threads;
use super::{contiguous, few, floats, matrix_dims, tensor, unset};
use burn_flex::FlexTensor;

/// `x W + b`.
pub fn forward(x: &FlexTensor, weight: &FlexTensor, bias: Option<&FlexTensor>) -> FlexTensor {
    let (n, d_in) = matrix_dims(x);
    let (_, d_out) = matrix_dims(weight);
    let mut shape = x.layout().shape().clone();
    let last = shape.num_dims() - 1;
    shape.as_mut_slice()[last] = d_out;
    let (x, weight) = (contiguous(x), contiguous(weight));
    if n <= few::ROWS {
        let bias = bias.map(contiguous);
        let bias = bias.as_deref().map(floats);
        let out = with_numbers!(weight of weight => few::times_matrix(floats(&x), weight, bias, d_out));
        return tensor(out, shape);
    }
    let mut out = unset(n * d_out);
    let bias = bias.map(contiguous);
    let output = bias.as_ref().map_or(Output::Overwrite, |bias| Output::AddRow(floats(bias)));
    let (to, x) = (MatMut::rows(&mut out, n, d_out, d_out), Mat::rows(floats(&x), n, d_in, d_in));
    with_numbers!(weight of weight => {
        gemm(to, output, x, Mat::rows(weight, d_in, d_out, d_out), 1.0, Threads::All);
    });
    tensor(out, shape)
}

/// `hidden · headᵀ`.
///
/// Of many rows the transpose is computed first: that way it is the hidden states that the product has to rearrange,
/// not the head.
pub fn logits(hidden: &FlexTensor, head: &FlexTensor) -> FlexTensor {
    let (n, d_model) = matrix_dims(hidden);
    let (vocab_size, _) = matrix_dims(head);
    let (hidden, head) = (contiguous(hidden), contiguous(head));
    let hidden = floats(&hidden);
    if n <= few::ROWS {
        let out = with_numbers!(head of head => few::times_transposed(hidden, head, d_model));
        return tensor(out, [n, vocab_size]);
    }
    let mut columns = unset(vocab_size * n);
    let mut out = unset(vocab_size * n);
    let hidden = Mat::rows(hidden, n, d_model, d_model).t();
    with_numbers!(head of head => head_times(&mut columns, head, hidden));
    transpose_on_all_threads(&mut out, &columns, vocab_size, n);
    tensor(out, [n, vocab_size])
}

/// `out = head · hidden`, where a head that is not in f32 is widened a part at a time.
fn head_times<T: Stored>(out: &mut [f32], head: &[T], hidden: Mat<'_>) {
    /// Rows of such a part.
    const ROWS: usize = 4096;
    let (d_model, n) = hidden.dims();
    let n_rows = if T::as_f32(head).is_some() { head.len() / d_model.max(1) } else { ROWS };
    let hidden = Packed::new(hidden, Threads::All);
    let parts = out.chunks_mut((n_rows * n).max(1)).zip(head.chunks((n_rows * d_model).max(1)));
    for (out, head) in parts {
        let n_rows = out.len() / n;
        widened(head, |head| {
            let head = Mat::rows(head, n_rows, d_model, d_model);
            gemm_packed(MatMut::rows(out, n_rows, n, n), Output::Overwrite, head, &hidden, 1.0, Threads::All);
        });
    }
}

/// Gradient of `x`: `grad Wᵀ`.
pub fn backward_x(weight: &FlexTensor, grad: &FlexTensor) -> FlexTensor {
    let (n, d_out) = matrix_dims(grad);
    let (d_in, _) = matrix_dims(weight);
    let mut shape = grad.layout().shape().clone();
    let last = shape.num_dims() - 1;
    shape.as_mut_slice()[last] = d_in;
    let (weight, grad) = (contiguous(weight), contiguous(grad));
    let mut out = unset(n * d_in);
    let (to, grad) = (MatMut::rows(&mut out, n, d_in, d_in), Mat::rows(floats(&grad), n, d_out, d_out));
    with_numbers!(weight of weight => {
        gemm(to, Output::Overwrite, grad, Mat::rows(weight, d_in, d_out, d_out).t(), 1.0, Threads::All);
    });
    tensor(out, shape)
}

/// Gradient of the weight: `xᵀ grad`, summed over all rows.
pub fn backward_weight(x: &FlexTensor, grad: &FlexTensor) -> FlexTensor {
    let (n, d_in) = matrix_dims(x);
    let (_, d_out) = matrix_dims(grad);
    let (x, grad) = (contiguous(x), contiguous(grad));
    let mut out = unset(d_in * d_out);
    gemm(
        MatMut::rows(&mut out, d_in, d_out, d_out),
        Output::Overwrite,
        Mat::rows(floats(&x), n, d_in, d_in).t(),
        Mat::rows(floats(&grad), n, d_out, d_out),
        1.0,
        Threads::All,
    );
    tensor(out, [d_in, d_out])
}

simd! {
    /// `to_i += from_i`.
    pub fn add_numbers(to: &mut [f32], from: &[f32]) {
        add_assign(to, from);
    }

    /// Adds each of `rows` to `total`.
    pub fn add_rows(total: &mut [f32], rows: &[f32]) {
        for row in rows.chunks_exact(total.len()) {
            add_assign(total, row);
        }
    }
}

/// The sum of `parts`, first to last.
pub fn add_in_order(parts: Vec<Vec<f32>>, n: usize) -> Vec<f32> {
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_else(|| vec![0.0; n]);
    for part in parts {
        add_numbers(&mut total, &part);
    }
    total
}
