//! Products of few rows with a matrix, where reading the matrix is the work: decoding.

use rayon::prelude::*;

use super::simd::{add_up, fma, simd};
use super::unset;

/// Most rows that are worth this; more are a matrix product.
pub const ROWS: usize = 4;

/// Numbers of the matrix that are worth handing to another thread.
const TASK: usize = 1 << 16;

/// Most pieces a matrix is cut into, so that few partial results have to be added.
const PIECES: usize = 16;

/// `x W + b` with `x: [n, d_in]` and `weight: [d_in, d_out]`.
///
/// The matrix is read once, row after row. A large one is cut into groups of rows whose partial results are added in
/// their order.
pub fn times_matrix(x: &[f32], weight: &[f32], bias: Option<&[f32]>, d_out: usize) -> Vec<f32> {
    let d_in = weight.len() / d_out.max(1);
    let n = x.len() / d_in.max(1);
    let start = || {
        let mut out = vec![0.0; n * d_out];
        if let Some(bias) = bias {
            out.chunks_exact_mut(d_out.max(1)).for_each(|row| row.copy_from_slice(bias));
        }
        out
    };
    let n_pieces = (weight.len() / TASK).clamp(1, PIECES);
    let piece = d_in.div_ceil(n_pieces).max(1);
    if piece >= d_in {
        let mut out = start();
        add_products(&mut out, x, weight, d_in, 0);
        return out;
    }
    let parts: Vec<Vec<f32>> = weight
        .par_chunks(piece * d_out)
        .enumerate()
        .map(|(i, weight)| {
            let mut out = if i == 0 { start() } else { vec![0.0; n * d_out] };
            add_products(&mut out, x, weight, d_in, i * piece);
            out
        })
        .collect();
    super::linear::add_in_order(parts, n * d_out)
}

/// `x · matrixᵀ` with `x: [n, d]` and `matrix: [n_out, d]`; returns `[n, n_out]`.
pub fn times_transposed(x: &[f32], matrix: &[f32], d: usize) -> Vec<f32> {
    let n_out = matrix.len() / d.max(1);
    let n = x.len() / d.max(1);
    let mut out = unset(n * n_out);
    let piece = (TASK / d.max(1)).max(1);
    for (out, x) in out.chunks_exact_mut(n_out.max(1)).zip(x.chunks_exact(d.max(1))) {
        out.par_chunks_mut(piece).zip(matrix.par_chunks(piece * d)).for_each(|(out, matrix)| dots(out, x, matrix));
    }
    out
}

simd! {
    /// Adds to `out: [n, d_out]` the products of the columns of `x` from `first` on with the rows of `weight`.
    fn add_products(out: &mut [f32], x: &[f32], weight: &[f32], d_in: usize, first: usize) {
        let n = x.len() / d_in;
        let d_out = out.len() / n;
        let n_rows = weight.len() / d_out;
        for (out, x) in out.chunks_exact_mut(d_out).zip(x.chunks_exact(d_in)) {
            let x = &x[first..first + n_rows];
            let (fours, rest) = x.as_chunks::<4>();
            for (x, rows) in fours.iter().zip(weight.chunks_exact(4 * d_out)) {
                let (row_0, rows) = rows.split_at(d_out);
                let (row_1, rows) = rows.split_at(d_out);
                let (row_2, row_3) = rows.split_at(d_out);
                for ((((out, w_0), w_1), w_2), w_3) in out.iter_mut().zip(row_0).zip(row_1).zip(row_2).zip(row_3) {
                    *out = fma(x[3], *w_3, fma(x[2], *w_2, fma(x[1], *w_1, fma(x[0], *w_0, *out))));
                }
            }
            for (x, row) in rest.iter().zip(weight[fours.len() * 4 * d_out..].chunks_exact(d_out)) {
                for (out, w) in out.iter_mut().zip(row) {
                    *out = fma(*x, *w, *out);
                }
            }
        }
    }

    /// `out_i = x · row_i` of `matrix`.
    fn dots(out: &mut [f32], x: &[f32], matrix: &[f32]) {
        const N: usize = 16;
        let d = x.len();
        let (x_chunks, x_rest) = x.as_chunks::<N>();
        for (out, row) in out.iter_mut().zip(matrix.chunks_exact(d)) {
            let mut totals = [0.0f32; N];
            let (chunks, rest) = row.as_chunks::<N>();
            for (x, row) in x_chunks.iter().zip(chunks) {
                for lane in 0..N {
                    totals[lane] = fma(x[lane], row[lane], totals[lane]);
                }
            }
            for (total, (x, row)) in totals.iter_mut().zip(x_rest.iter().zip(rest)) {
                *total = fma(*x, *row, *total);
            }
            *out = add_up(totals);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0).collect()
    }

    /// f32 sums of up to 600 numbers below 1, in another order.
    const REORDERED: f64 = 1e-4;

    #[test]
    fn both_products_are_those_of_the_definition() {
        for (n, d, n_out) in [(1, 1, 1), (1, 7, 5), (3, 33, 130), (4, 128, 600), (2, 600, 513)] {
            let (x, weight) = (numbers(n * d), numbers(d * n_out + 3)[3..].to_vec());
            let bias = numbers(n_out);
            let product = times_matrix(&x, &weight, Some(&bias), n_out);
            let transposed = times_transposed(&x, &weight, d);
            for (row, x) in x.chunks(d).enumerate() {
                for j in 0..n_out {
                    let dot =
                        |w: &dyn Fn(usize) -> f32| -> f64 { (0..d).map(|i| f64::from(x[i]) * f64::from(w(i))).sum() };
                    let expected = dot(&|i| weight[i * n_out + j]) + f64::from(bias[j]);
                    assert!((f64::from(product[row * n_out + j]) - expected).abs() < REORDERED);
                    let expected = dot(&|i| weight[j * d + i]);
                    assert!((f64::from(transposed[row * n_out + j]) - expected).abs() < REORDERED);
                }
            }
        }
    }
}
