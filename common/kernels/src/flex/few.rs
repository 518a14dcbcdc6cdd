//! Products of few rows with a matrix: decoding.
//!
//! Reading the matrix is the work, so it is read once, in the order it lies in memory for up to [`STREAMED`] rows, and in
//! [strips](super::strips) for more, whose products are added in the order of the matrix's rows.

use super::gemm::{Mat, MatMut, SharedMut};
use super::simd::{add_assign, add_up, fma, simd};
use super::stored::{Stored, widened};
use super::strips::{self, prefetch};
use super::tile::{LANES, Start, multiply_panel, pack_columns, widest};
use super::workers::for_each;
use super::{unset, with_scratch};

/// Most rows that are worth this; more are a matrix product.
pub const ROWS: usize = 64;

/// Most rows for which reading the matrix is the work.
pub const STREAMED: usize = 3;

/// Numbers of the matrix that are worth handing to another thread.
const TASK: usize = 1 << 13;

/// Most pieces a matrix is cut into by its rows, so that few partial results have to be added.
const PIECES: usize = 8;

/// Most pieces a matrix is cut into by its results.
const RUNS: usize = 64;

/// Multiplications that are worth handing to another thread.
const WORK: usize = 1 << 17;

/// Rows of the matrix whose products are added to a result while it is in a register.
const TOGETHER: usize = 8;

/// Fewest results of a row that a matrix is cut into which is read from memory, the faster the longer its pieces of rows.
const PIECE: usize = 256;

/// Numbers of a matrix that is likely to lie in the second cache or the third.
const NEAR: usize = 1 << 18;

/// Columns of the widest strip.
const COLUMNS: usize = 4 * LANES;

/// Rows of a matrix in bf16 that are widened at a time, to be read from the second cache.
const WIDENED: usize = 64;

/// `x W + b` with `x: [n, d_in]` and `weight: [d_in, d_out]`.
pub fn times_matrix<T: Stored>(x: &[f32], weight: &[T], bias: Option<&[f32]>, d_out: usize) -> Vec<f32> {
    let n = x.len() * d_out / weight.len().max(1);
    let mut out = unset(n * d_out);
    times_matrix_into(&mut out, x, weight, bias, d_out);
    out
}

/// [`times_matrix`] into an `out` that is there already.
pub fn times_matrix_into<T: Stored>(out: &mut [f32], x: &[f32], weight: &[T], bias: Option<&[f32]>, d_out: usize) {
    let d_in = weight.len() / d_out.max(1);
    let n = x.len() / d_in.max(1);
    if n <= STREAMED {
        return stream_matrix(out, x, weight, bias, d_in);
    }
    // Whole strips, and whole cache lines of a matrix in either type.
    let unit = strips::columns(n) * (COLUMNS / strips::columns(n)).max(1);
    let narrowest = if weight.len() <= NEAR { unit } else { PIECE };
    let n_tasks = (d_out / (WORK / (n * d_in).max(1)).max(narrowest)).max(1);
    let n_columns = match n_tasks {
        1 => d_out.max(1),
        // As many for each thread.
        _ => d_out.div_ceil(n_tasks.next_multiple_of(rayon::current_num_threads())).next_multiple_of(unit),
    };
    let shared = SharedMut::new(out);
    for_each(d_out.div_ceil(n_columns), |i| {
        let first = i * n_columns;
        let n_columns = n_columns.min(d_out - first);
        let bias = bias.map(|bias| &bias[first..first + n_columns]);
        // SAFETY: each task has its own columns of each row.
        let out = unsafe { shared.mat(first, n, n_columns, d_out) };
        with_scratch(strips::PANEL, |panel| {
            strips::multiply(out, bias, Mat::rows(x, n, d_in, d_in), &weight[first..], d_out, panel);
        });
    });
}

/// `x · matrixᵀ` with `x: [n, d]` and `matrix: [n_out, d]`; returns `[n, n_out]`.
///
/// Of more than [`STREAMED`] rows it is `matrix · xᵀ` that is computed, and the result, smaller than the matrix, that is
/// transposed.
pub fn times_transposed<T: Stored>(x: &[f32], matrix: &[T], d: usize) -> Vec<f32> {
    let n_out = matrix.len() / d.max(1);
    let n = x.len() / d.max(1);
    let mut out = unset(n * n_out);
    let n_rows = (TASK / d.max(1)).max(n_out.div_ceil(RUNS)).next_multiple_of(COLUMNS);
    let shared = SharedMut::new(&mut out);
    // Filled up with zeros to whole registers.
    let width = n.next_multiple_of(LANES);
    let mut panels = vec![0.0; if n > STREAMED { d * width } else { 0 }];
    for (panel, first) in panels.chunks_mut((d * widest()).max(1)).zip((0..n).step_by(widest())) {
        let n_columns = widest().min(n - first);
        pack_columns(panel, n_columns.next_multiple_of(LANES), n_columns, &x[first * d..], d);
    }
    for_each(n_out.div_ceil(n_rows), |i| {
        let first = i * n_rows;
        let matrix = &matrix[first * d..matrix.len().min((first + n_rows) * d)];
        let n_rows = matrix.len() / d;
        // SAFETY: each task has its own columns of each row.
        let out = |row: usize| unsafe { shared.slice(row * n_out + first, n_rows) };
        if n <= STREAMED {
            for (row, x) in x.chunks_exact(d).enumerate() {
                dots(out(row), x, matrix);
            }
            return;
        }
        let n_at_a_time = if T::as_f32(matrix).is_some() { n_rows } else { WIDENED };
        with_scratch(n_at_a_time * width, |results| {
            for (first, matrix) in (0..n_rows).step_by(n_at_a_time).zip(matrix.chunks(n_at_a_time * d)) {
                let n_rows = matrix.len() / d;
                let results = &mut results[..n_rows * width];
                widened(matrix, |matrix| {
                    let matrix = Mat::rows(matrix, n_rows, d, d);
                    let mut results = MatMut::rows(results, n_rows, width, width);
                    for (panel, first) in panels.chunks((d * widest()).max(1)).zip((0..width).step_by(widest())) {
                        let to = results.block(0..n_rows, first..width.min(first + widest()));
                        multiply_panel(to, Start::Zero, 1.0, matrix, panel);
                    }
                });
                for (start, results) in (0..n_rows).step_by(COLUMNS).zip(results.chunks(COLUMNS * width)) {
                    for row in 0..n {
                        let out = &mut out(row)[first + start..][..results.len() / width];
                        for (out, results) in out.iter_mut().zip(results.chunks_exact(width)) {
                            *out = results[row];
                        }
                    }
                }
            }
        });
    });
    out
}

/// `out = x W + b` for at most [`STREAMED`] rows. A large matrix is cut into groups of rows whose partial results are
/// added in their order.
fn stream_matrix<T: Stored>(out: &mut [f32], x: &[f32], weight: &[T], bias: Option<&[f32]>, d_in: usize) {
    let (n_out, d_out) = (out.len(), weight.len() / d_in.max(1));
    let begin = |out: &mut [f32]| match bias {
        Some(bias) => out.chunks_exact_mut(d_out.max(1)).for_each(|row| row.copy_from_slice(bias)),
        None => out.fill(0.0),
    };
    let n_pieces = (weight.len() / TASK).clamp(1, PIECES);
    let piece = d_in.div_ceil(n_pieces).next_multiple_of(4);
    if piece >= d_in {
        begin(out);
        return add_products(out, x, weight, d_in, 0);
    }
    let n_pieces = d_in.div_ceil(piece);
    with_scratch((n_pieces - 1) * n_out, |parts| {
        let (first, others) = (SharedMut::new(out), SharedMut::new(parts));
        for_each(n_pieces, |i| {
            // SAFETY: each task has its own partial result, the first in the output itself.
            let part = unsafe { if i == 0 { first.slice(0, n_out) } else { others.slice((i - 1) * n_out, n_out) } };
            if i == 0 {
                begin(part);
            } else {
                part.fill(0.0);
            }
            let rows = i * piece..d_in.min((i + 1) * piece);
            add_products(part, x, &weight[rows.start * d_out..rows.end * d_out], d_in, rows.start);
        });
        add_parts(out, parts);
    });
}

simd! {
    /// Adds each part to `out`, first to last.
    fn add_parts(out: &mut [f32], parts: &[f32]) {
        for part in parts.chunks_exact(out.len()) {
            add_assign(out, part);
        }
    }

    /// Adds to `out: [n, d_out]` the products of the columns of `x` from `first` on with the rows of `weight`.
    fn add_products<T: Stored>(out: &mut [f32], x: &[f32], weight: &[T], d_in: usize, first: usize) {
        let n = x.len() / d_in;
        let d_out = out.len() / n;
        let n_rows = weight.len() / d_out;
        for (out, x) in out.chunks_exact_mut(d_out).zip(x.chunks_exact(d_in)) {
            let x = &x[first..first + n_rows];
            if size_of::<T>() < size_of::<f32>() {
                add_products_row_by_row(out, x, weight);
                continue;
            }
            let (groups, rest) = x.as_chunks::<TOGETHER>();
            for (x, rows) in groups.iter().zip(weight.chunks_exact(TOGETHER * d_out)) {
                let rows: [&[T]; TOGETHER] = std::array::from_fn(|i| &rows[i * d_out..][..d_out]);
                for (j, out) in out.iter_mut().enumerate() {
                    for i in 0..TOGETHER {
                        *out = fma(x[i], rows[i][j].widen(), *out);
                    }
                }
            }
            for (x, row) in rest.iter().zip(weight[groups.len() * TOGETHER * d_out..].chunks_exact(d_out)) {
                for (out, w) in out.iter_mut().zip(row) {
                    *out = fma(*x, w.widen(), *out);
                }
            }
        }
    }

    /// `out_i = x · row_i` of `matrix`.
    fn dots<T: Stored>(out: &mut [f32], x: &[f32], matrix: &[T]) {
        /// Rows at a time, so that one sum need not wait for the last.
        const TOGETHER: usize = 4;
        let d = x.len();
        let (outs, rest) = out.as_chunks_mut::<TOGETHER>();
        let (rows, rest_of_rows) = matrix.split_at(outs.len() * TOGETHER * d);
        for (out, rows) in outs.iter_mut().zip(rows.chunks_exact(TOGETHER * d)) {
            *out = dots_of(x, std::array::from_fn(|i| &rows[i * d..][..d]));
        }
        for (out, row) in rest.iter_mut().zip(rest_of_rows.chunks_exact(d)) {
            [*out] = dots_of(x, [row]);
        }
    }
}

/// `x · row_i`.
#[inline(always)]
fn dots_of<T: Stored, const ROWS: usize>(x: &[f32], rows: [&[T]; ROWS]) -> [f32; ROWS] {
    const N: usize = 16;
    let mut totals = [[0.0f32; N]; ROWS];
    let (x_chunks, x_rest) = x.as_chunks::<N>();
    let chunks: [&[[T; N]]; ROWS] = std::array::from_fn(|i| &rows[i].as_chunks::<N>().0[..x_chunks.len()]);
    for (c, x) in x_chunks.iter().enumerate() {
        for i in 0..ROWS {
            for lane in 0..N {
                totals[i][lane] = fma(x[lane], chunks[i][c][lane].widen(), totals[i][lane]);
            }
        }
    }
    // The compiler may see no further: it would choose the registers of the loop above for the sum below, in halves and
    // quarters, which took 70 % more instructions.
    let mut totals = std::hint::black_box(totals);
    let mut dots = [0.0; ROWS];
    for i in 0..ROWS {
        for (total, (x, row)) in totals[i].iter_mut().zip(x_rest.iter().zip(&rows[i][x_chunks.len() * N..])) {
            *total = fma(*x, row.widen(), *total);
        }
        dots[i] = add_up(totals[i]);
    }
    dots
}

/// Adds to `out` the products of `x` with the rows of `weight`, which are read one after the other, while later ones are asked
/// for.
///
/// Rows of 16-bit numbers are half as long: of eight at a time memory delivered two thirds as much.
#[inline(always)]
fn add_products_row_by_row<T: Stored>(out: &mut [f32], x: &[f32], weight: &[T]) {
    /// How many rows later.
    const AHEAD: usize = 8;
    /// Numbers of a cache line.
    const LINE: usize = 32;
    let d_out = out.len();
    for (x, row) in x.iter().zip(weight.chunks_exact(d_out)) {
        let (outs, rest) = out.as_chunks_mut::<LINE>();
        let (lines, rest_of_row) = row.as_chunks::<LINE>();
        for (out, line) in outs.iter_mut().zip(lines) {
            prefetch(line.as_ptr().wrapping_add(AHEAD * d_out));
            for lane in 0..LINE {
                out[lane] = fma(*x, line[lane].widen(), out[lane]);
            }
        }
        for (out, w) in rest.iter_mut().zip(rest_of_row) {
            *out = fma(*x, w.widen(), *out);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::bf16;

    use super::*;
    use crate::flex::workers::with_workers;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0).collect()
    }

    /// f32 sums of up to 600 numbers below 1, in another order.
    const REORDERED: f64 = 1e-4;

    /// Rows, length of a row, results of a row.
    const SIZES: [(usize, usize, usize); 19] = [
        (1, 1, 1),
        (1, 7, 5),
        (3, 33, 130),
        (4, 128, 600),
        (2, 600, 513),
        (1, 130, 700),
        (5, 31, 33),
        (13, 64, 97),
        (32, 128, 512),
        (64, 200, 65),
        // Beyond the second cache.
        (5, 301, 520),
        (8, 500, 515),
        // In one tile each, with and without a narrow strip, and alone.
        (7, 131, 550),
        (8, 65, 96),
        (8, 200, 47),
        (7, 64, 700),
        (16, 260, 1000),
        (17, 300, 520),
        (40, 257, 701),
    ];

    #[test]
    fn both_products_are_those_of_the_definition() {
        for (n, d, n_out) in SIZES {
            let (x, weight) = (numbers(n * d), numbers(d * n_out + 3)[3..].to_vec());
            let bias = numbers(n_out);
            let product = times_matrix(&x, &weight, Some(&bias), n_out);
            let transposed = times_transposed(&x, &weight, d);
            for (row, x) in x.chunks(d).enumerate() {
                for j in 0..n_out {
                    let dot =
                        |w: &dyn Fn(usize) -> f32| -> f64 { (0..d).map(|i| f64::from(x[i]) * f64::from(w(i))).sum() };
                    let expected = dot(&|i| weight[i * n_out + j]) + f64::from(bias[j]);
                    assert!((f64::from(product[row * n_out + j]) - expected).abs() < REORDERED, "{n} {d} {n_out}");
                    let expected = dot(&|i| weight[j * d + i]);
                    assert!((f64::from(transposed[row * n_out + j]) - expected).abs() < REORDERED, "{n} {d} {n_out}");
                }
            }
        }
    }

    #[test]
    fn more_rows_than_are_streamed_give_each_result_one_chain_of_products() {
        for (n, d, n_out) in SIZES.into_iter().filter(|(n, ..)| *n > STREAMED) {
            let (x, weight, bias) = (numbers(n * d), numbers(d * n_out), numbers(n_out));
            let half: Vec<bf16> = weight.iter().map(|&weight| bf16::from_f32(weight)).collect();
            let (product, transposed) =
                (times_matrix(&x, &weight, Some(&bias), n_out), times_transposed(&x, &weight, d));
            let (product_of_half, transposed_of_half) =
                (times_matrix(&x, &half, Some(&bias), n_out), times_transposed(&x, &half, d));
            let chain = |first: f32, x: &[f32], w: &dyn Fn(usize) -> f32| {
                x.iter().enumerate().fold(first, |total, (i, &x)| fma(x, w(i), total)).to_bits()
            };
            for (row, x) in x.chunks(d).enumerate() {
                for j in 0..n_out {
                    let what = format!("{n} {d} {n_out}, row {row}, result {j}");
                    let at = row * n_out + j;
                    assert_eq!(product[at].to_bits(), chain(bias[j], x, &|i| weight[i * n_out + j]), "{what}");
                    assert_eq!(transposed[at].to_bits(), chain(0.0, x, &|i| weight[j * d + i]), "{what}");
                    let of_half = chain(bias[j], x, &|i| half[i * n_out + j].widen());
                    assert_eq!(product_of_half[at].to_bits(), of_half, "{what}");
                    let of_half = chain(0.0, x, &|i| half[j * d + i].widen());
                    assert_eq!(transposed_of_half[at].to_bits(), of_half, "{what}");
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_product() {
        for (n, d, n_out) in SIZES {
            let (x, weight) = (numbers(n * d), numbers(d * n_out));
            let products = |n_threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("a thread pool");
                let both = || [times_matrix(&x, &weight, None, n_out), times_transposed(&x, &weight, d)];
                let alone = pool.install(both);
                assert_eq!(alone, pool.install(|| with_workers(both)), "{n} {d} {n_out} on {n_threads}");
                alone
            };
            let one = products(1);
            assert_eq!(one, products(2));
            assert_eq!(one, products(3));
        }
    }
}
