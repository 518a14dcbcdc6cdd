//! Products of few rows with a matrix: decoding.
//!
//! Of up to [`STREAMED`] rows, reading the matrix is the work, so it is read once, in the order it lies in memory. More
//! rows are a small matrix product whose operands fit the caches as they are, so none of them is rearranged.

use pulp::{Arch, Simd, WithSimd};

use super::gemm::SharedMut;
use super::simd::{self, add_assign, add_up, fma, simd};
use super::transpose::transpose_columns;
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
const WORK: usize = 1 << 18;

/// Columns of the largest tile, two AVX-512 registers: pieces of results are cut at its multiples.
const COLUMNS: usize = 32;

/// `x W + b` with `x: [n, d_in]` and `weight: [d_in, d_out]`.
pub fn times_matrix(x: &[f32], weight: &[f32], bias: Option<&[f32]>, d_out: usize) -> Vec<f32> {
    let d_in = weight.len() / d_out.max(1);
    let n = x.len() / d_in.max(1);
    let mut out = unset(n * d_out);
    if n <= STREAMED {
        stream_matrix(&mut out, x, weight, bias, d_in);
        return out;
    }
    let n_columns = (WORK / (n * d_in).max(1)).max(1).next_multiple_of(COLUMNS);
    let shared = SharedMut::new(&mut out);
    for_each(d_out.div_ceil(n_columns), |i| {
        let first = i * n_columns;
        let n_columns = n_columns.min(d_out - first);
        let bias = bias.map(|bias| &bias[first..first + n_columns]);
        let product = Product { out: shared, out_start: first, out_stride: d_out, x, d_in };
        arch().dispatch(Tiles { product, weight: &weight[first..], stride: d_out, n_columns, bias });
    });
    out
}

/// The instructions that [`simd::level`] says.
fn arch() -> Arch {
    match simd::level() {
        #[cfg(target_arch = "x86_64")]
        simd::Level::V3 => pulp::x86::V3::try_new().map_or(Arch::Scalar, Arch::V3),
        #[cfg(target_arch = "x86_64")]
        simd::Level::Baseline => Arch::Scalar,
        _ => Arch::new(),
    }
}

/// `x · matrixᵀ` with `x: [n, d]` and `matrix: [n_out, d]`; returns `[n, n_out]`.
///
/// Of more than [`STREAMED`] rows it is `matrix · xᵀ` that is computed, and the result, smaller than the matrix, that is
/// transposed.
pub fn times_transposed(x: &[f32], matrix: &[f32], d: usize) -> Vec<f32> {
    let n_out = matrix.len() / d.max(1);
    let n = x.len() / d.max(1);
    let mut out = unset(n * n_out);
    let n_rows = (TASK / d.max(1)).max(n_out.div_ceil(RUNS)).next_multiple_of(COLUMNS);
    let shared = SharedMut::new(&mut out);
    let mut columns = unset(if n > STREAMED { x.len() } else { 0 });
    if n > STREAMED {
        transpose_columns(&mut columns, x, n, d, 0);
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
        with_scratch(n_rows * n, |results| {
            let product = Product { out: SharedMut::new(results), out_start: 0, out_stride: n, x: matrix, d_in: d };
            arch().dispatch(Tiles { product, weight: &columns, stride: n, n_columns: n, bias: None });
            for (start, results) in (0..n_rows).step_by(COLUMNS).zip(results.chunks(COLUMNS * n)) {
                for row in 0..n {
                    let out = &mut out(row)[start..start + results.len() / n];
                    for (out, results) in out.iter_mut().zip(results.chunks_exact(n)) {
                        *out = results[row];
                    }
                }
            }
        });
    });
    out
}

/// `out = x W + b` for at most [`STREAMED`] rows. A large matrix is cut into groups of rows whose partial results are
/// added in their order.
fn stream_matrix(out: &mut [f32], x: &[f32], weight: &[f32], bias: Option<&[f32]>, d_in: usize) {
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
            // The compiler may see no further: it would choose the registers of the loop above for the sum below, in halves
            // and quarters, which took 70 % more instructions.
            let mut totals = std::hint::black_box(totals);
            for (total, (x, row)) in totals.iter_mut().zip(x_rest.iter().zip(rest)) {
                *total = fma(*x, *row, *total);
            }
            *out = add_up(totals);
        }
    }
}

/// The left operand `x: [n, d_in]` and where the results of some columns go.
#[derive(Clone, Copy)]
struct Product<'a> {
    out: SharedMut<'a>,
    /// Where the first row's results begin.
    out_start: usize,
    /// From one row's results to the next's.
    out_stride: usize,
    x: &'a [f32],
    d_in: usize,
}

/// Some columns of `x W + b`, a tile of rows and columns at a time. Products are added in the order of the rows of `W`,
/// whatever the tile and the registers.
struct Tiles<'a> {
    product: Product<'a>,
    /// Begins at the first column; rows are `stride` apart.
    weight: &'a [f32],
    stride: usize,
    n_columns: usize,
    bias: Option<&'a [f32]>,
}

impl WithSimd for Tiles<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = 2 * S::F32_LANES;
        let n = self.product.x.len() / self.product.d_in.max(1);
        for column in (0..self.n_columns).step_by(width) {
            if column + width <= self.n_columns {
                self.tiles::<S, true>(simd, n, column);
            } else {
                self.tiles::<S, false>(simd, n, column);
            }
        }
    }
}

impl Tiles<'_> {
    /// All rows of the columns from `column` on, as many at a time as there are registers for their results.
    #[inline(always)]
    fn tiles<S: Simd, const FULL: bool>(&self, simd: S, n: usize, column: usize) {
        let mut row = 0;
        while S::F32_LANES >= 16 && row + 8 <= n {
            self.tile::<S, 8, FULL>(simd, row, column);
            row += 8;
        }
        while row + 4 <= n {
            self.tile::<S, 4, FULL>(simd, row, column);
            row += 4;
        }
        while row < n {
            self.tile::<S, 1, FULL>(simd, row, column);
            row += 1;
        }
    }

    /// `R` rows from `row` on, two registers of columns from `column` on; fewer columns unless `FULL`.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const FULL: bool>(&self, simd: S, row: usize, column: usize) {
        let (d_in, stride) = (self.product.d_in, self.stride);
        let n_columns = if FULL { 2 * S::F32_LANES } else { self.n_columns - column };
        let n_first = n_columns.min(S::F32_LANES);
        let load = |from: &[f32]| -> [S::f32s; 2] {
            if FULL {
                let (registers, _) = S::as_simd_f32s(&from[..2 * S::F32_LANES]);
                [registers[0], registers[1]]
            } else {
                let (first, second) = from[..n_columns].split_at(n_first);
                [simd.partial_load_f32s(first), simd.partial_load_f32s(second)]
            }
        };
        let start = self.bias.map_or([simd.splat_f32s(0.0); 2], |bias| load(&bias[column..]));
        let mut totals = [start; R];
        let x: [&[f32]; R] = std::array::from_fn(|r| &self.product.x[(row + r) * d_in..][..d_in]);
        for (k, weight) in self.weight[column..].chunks(stride).take(d_in).enumerate() {
            let [first, second] = load(weight);
            for r in 0..R {
                let x = simd.splat_f32s(x[r][k]);
                totals[r] = [simd.mul_add_f32s(x, first, totals[r][0]), simd.mul_add_f32s(x, second, totals[r][1])];
            }
        }
        for (r, [first, second]) in totals.into_iter().enumerate() {
            let start = self.product.out_start + (row + r) * self.product.out_stride + column;
            // SAFETY: the maker of the product gave it these columns of each row to itself.
            let out = unsafe { self.product.out.slice(start, n_columns) };
            if FULL {
                let (registers, _) = S::as_mut_simd_f32s(out);
                (registers[0], registers[1]) = (first, second);
            } else {
                let (out_first, out_second) = out.split_at_mut(n_first);
                simd.partial_store_f32s(out_first, first);
                simd.partial_store_f32s(out_second, second);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flex::workers::with_workers;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0).collect()
    }

    /// f32 sums of up to 600 numbers below 1, in another order.
    const REORDERED: f64 = 1e-4;

    /// Rows, length of a row, results of a row.
    const SIZES: [(usize, usize, usize); 10] = [
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
