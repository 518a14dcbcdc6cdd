//! Products of few rows with a matrix: decoding.
//!
//! Of up to [`STREAMED`] rows, reading the matrix is the work, so it is read once, in the order it lies in memory. So it is
//! for up to [`SIDE_BY_SIDE`] rows if it does not fit the second cache. More rows are a small matrix product, a tile at a
//! time; of a large matrix some rows are put together first. Whichever it is, products of more than [`STREAMED`] rows are
//! added in the order of the matrix's rows.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::gemm::SharedMut;
use super::simd::{self, add_assign, add_up, fma, simd};
use super::stored::{Stored, four_rows, widen_here, widened};
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

/// Most rows whose results are all kept near while the matrix is read once.
const SIDE_BY_SIDE: usize = 16;

/// Results kept in the first cache, beside the rows of the matrix that are added to them.
const NEAREST: usize = 2048;

/// Rows of the matrix that are put together at a time.
const DEPTH: usize = 64;

/// Columns of the matrix that are put together at a time.
const BLOCK: usize = 256;

/// Numbers of a matrix that stays in the second cache, so that the order in which it is read matters little.
const NEAR: usize = 1 << 17;

/// Rows of the matrix whose products are added to a result while it is in a register.
const TOGETHER: usize = 8;

/// Rows of the matrix that are asked for before they are needed.
const AHEAD: usize = 8;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Fewest results of a row that a matrix is cut into.
const PIECE: usize = 256;

/// Columns of the largest tile, two AVX-512 registers: pieces of results are cut at its multiples.
const COLUMNS: usize = 32;

/// Rows of a matrix in bf16 that are widened at a time, to be read from the second cache.
const WIDENED: usize = 64;

/// `x W + b` with `x: [n, d_in]` and `weight: [d_in, d_out]`.
pub fn times_matrix<T: Stored>(x: &[f32], weight: &[T], bias: Option<&[f32]>, d_out: usize) -> Vec<f32> {
    let d_in = weight.len() / d_out.max(1);
    let n = x.len() / d_in.max(1);
    let mut out = unset(n * d_out);
    if n <= STREAMED {
        stream_matrix(&mut out, x, weight, bias, d_in);
        return out;
    }
    let n_columns = (WORK / (n * d_in).max(1)).max(PIECE);
    let n_tasks = d_out.div_ceil(n_columns);
    // An even number, for an even number of threads.
    let n_columns = d_out.div_ceil(if n_tasks > 1 { n_tasks.next_multiple_of(2) } else { 1 }).next_multiple_of(COLUMNS);
    let shared = SharedMut::new(&mut out);
    for_each(d_out.div_ceil(n_columns), |i| {
        let first = i * n_columns;
        let n_columns = n_columns.min(d_out - first);
        let bias = bias.map(|bias| &bias[first..first + n_columns]);
        let is_near = weight.len() <= NEAR;
        if n <= SIDE_BY_SIDE && !is_near {
            // SAFETY: each task has its own columns of each row.
            let mut rows: Vec<&mut [f32]> =
                (0..n).map(|row| unsafe { shared.slice(row * d_out + first, n_columns) }).collect();
            for row in &mut rows {
                match bias {
                    Some(bias) => row.copy_from_slice(bias),
                    None => row.fill(0.0),
                }
            }
            return add_products_of_rows(&mut rows, x, &weight[first..], d_out, d_in);
        }
        let (weight, out_start, out_stride) = (&weight[first..], first, d_out);
        with_scratch((DEPTH + 1) * BLOCK, |panel| {
            let as_it_lies = is_near && d_out.is_multiple_of(lanes()) && T::as_f32(weight).is_some();
            let panel = (!as_it_lies).then_some(panel);
            let (stride, out) = (d_out, shared);
            arch().dispatch(Tiles { x, d_in, weight, stride, n_columns, bias, out, out_start, out_stride, panel });
        });
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

/// Numbers in a register of [`arch`].
fn lanes() -> usize {
    match simd::level() {
        simd::Level::V4 => 16,
        simd::Level::V3 => 8,
        simd::Level::Baseline => 4,
    }
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
    let width = n.next_multiple_of(lanes());
    let mut columns = vec![0.0; if n > STREAMED { d * width } else { 0 }];
    if n == width {
        transpose_columns(&mut columns, x, n, d, 0);
    } else {
        for (to, i) in columns.chunks_exact_mut(width).zip(0..) {
            to.iter_mut().zip(x[i..].iter().step_by(d)).for_each(|(to, from)| *to = *from);
        }
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
                widened(matrix, |matrix| multiply_tiles(results, matrix, d, &columns, width));
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

/// `out = matrix · columns`, whose rows have `width` numbers, whole registers.
fn multiply_tiles(out: &mut [f32], matrix: &[f32], d: usize, columns: &[f32], width: usize) {
    let out = SharedMut::new(out);
    arch().dispatch(Tiles {
        x: matrix,
        d_in: d,
        weight: columns,
        stride: width,
        n_columns: width,
        bias: None,
        out,
        out_start: 0,
        out_stride: width,
        panel: None,
    });
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

    /// Adds to rows of `out` the products of the rows of `x` with columns of `weight`, whose rows lie `stride` apart.
    fn add_products_of_rows<T: Stored>(out: &mut [&mut [f32]], x: &[f32], weight: &[T], stride: usize, d_in: usize) {
        let mut buffer = [0.0; NEAREST];
        let n_columns = out[0].len();
        let piece = (NEAREST / out.len()).next_multiple_of(COLUMNS);
        for first in (0..n_columns).step_by(piece) {
            let columns = first..n_columns.min(first + piece);
            for k in (0..d_in / 4 * 4).step_by(4) {
                let rows: [&[T]; 4] = std::array::from_fn(|i| &weight[(k + i) * stride..][columns.clone()]);
                if T::as_f32(rows[0]).is_none() {
                    // Pieces so short that the processor does not see the next ones coming.
                    for line in (0..columns.len()).step_by(LINE / size_of::<T>()) {
                        for row in rows {
                            prefetch(row.as_ptr().wrapping_add(AHEAD * stride + line));
                        }
                    }
                }
                let rows = four_rows(rows, &mut buffer);
                let (pairs, last) = out.as_chunks_mut::<2>();
                let (x_pairs, x_last) = x.split_at(pairs.len() * 2 * d_in);
                for ([out_0, out_1], x) in pairs.iter_mut().zip(x_pairs.chunks_exact(2 * d_in)) {
                    let (x_0, x_1) = (&x[k..k + 4], &x[d_in + k..d_in + k + 4]);
                    let (out_0, out_1) = (&mut out_0[columns.clone()], &mut out_1[columns.clone()]);
                    let weights = rows[0].iter().zip(rows[1]).zip(rows[2]).zip(rows[3]);
                    for ((out_0, out_1), (((w_0, w_1), w_2), w_3)) in out_0.iter_mut().zip(out_1).zip(weights) {
                        *out_0 = fma(x_0[3], *w_3, fma(x_0[2], *w_2, fma(x_0[1], *w_1, fma(x_0[0], *w_0, *out_0))));
                        *out_1 = fma(x_1[3], *w_3, fma(x_1[2], *w_2, fma(x_1[1], *w_1, fma(x_1[0], *w_0, *out_1))));
                    }
                }
                for out in last {
                    let x = &x_last[k..k + 4];
                    let weights = rows[0].iter().zip(rows[1]).zip(rows[2]).zip(rows[3]);
                    for (out, (((w_0, w_1), w_2), w_3)) in out[columns.clone()].iter_mut().zip(weights) {
                        *out = fma(x[3], *w_3, fma(x[2], *w_2, fma(x[1], *w_1, fma(x[0], *w_0, *out))));
                    }
                }
            }
            for k in d_in / 4 * 4..d_in {
                let row = &weight[k * stride..][columns.clone()];
                for (out, x) in out.iter_mut().zip(x.chunks_exact(d_in)) {
                    for (out, weight) in out[columns.clone()].iter_mut().zip(row) {
                        *out = fma(x[k], weight.widen(), *out);
                    }
                }
            }
        }
    }

    /// `out_i = x · row_i` of `matrix`.
    fn dots<T: Stored>(out: &mut [f32], x: &[f32], matrix: &[T]) {
        const N: usize = 16;
        let d = x.len();
        let (x_chunks, x_rest) = x.as_chunks::<N>();
        for (out, row) in out.iter_mut().zip(matrix.chunks_exact(d)) {
            let mut totals = [0.0f32; N];
            let (chunks, rest) = row.as_chunks::<N>();
            for (x, row) in x_chunks.iter().zip(chunks) {
                for lane in 0..N {
                    totals[lane] = fma(x[lane], row[lane].widen(), totals[lane]);
                }
            }
            // The compiler may see no further: it would choose the registers of the loop above for the sum below, in halves
            // and quarters, which took 70 % more instructions.
            let mut totals = std::hint::black_box(totals);
            for (total, (x, row)) in totals.iter_mut().zip(x_rest.iter().zip(rest)) {
                *total = fma(*x, row.widen(), *total);
            }
            *out = add_up(totals);
        }
    }
}

/// Some columns of `x W + b`, a tile of rows and columns at a time. Products are added in the order of the rows of `W`,
/// whatever the tile and the registers.
struct Tiles<'a, T> {
    /// `[n, d_in]`
    x: &'a [f32],
    d_in: usize,
    /// Begins at the first column; rows are `stride` apart.
    weight: &'a [T],
    stride: usize,
    n_columns: usize,
    bias: Option<&'a [f32]>,
    /// Where the first row's results begin, and from one row's results to the next's.
    out: SharedMut<'a>,
    out_start: usize,
    out_stride: usize,
    /// Room for [`DEPTH`] rows of [`BLOCK`] columns, where a part of the weight is put together before it is used: as it
    /// lies, each piece of a tile would be far from the one before. Without it the columns fill registers, and the weight is
    /// in f32.
    panel: Option<&'a mut [f32]>,
}

/// Two registers of columns, or one, of some rows of the weight.
struct Strip<'a> {
    /// Begins at the first row and column; rows are `stride` apart.
    weight: &'a [f32],
    stride: usize,
    depth: Range<usize>,
    /// The first column, and how many there are.
    column: usize,
    n_columns: usize,
}

impl<T: Stored> WithSimd for Tiles<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let width = 2 * S::F32_LANES;
        let Some(panel) = self.panel.take() else {
            let weight = T::as_f32(self.weight).expect("what is read as it lies is in f32");
            for column in (0..self.n_columns).step_by(width) {
                let n_columns = width.min(self.n_columns - column);
                let (weight, stride) = (&weight[column..], self.stride);
                self.strip(simd, &Strip { weight, stride, depth: 0..self.d_in, column, n_columns });
            }
            return;
        };
        for first in (0..self.d_in.max(1)).step_by(DEPTH) {
            let depth = first..self.d_in.min(first + DEPTH);
            for block in (0..self.n_columns).step_by(BLOCK) {
                let n_columns = BLOCK.min(self.n_columns - block);
                self.rearrange::<S>(panel, &depth, block, n_columns);
                for column in (0..n_columns).step_by(width) {
                    let weight = &panel[column * (depth.len() + 1)..][..width * depth.len()];
                    let n_columns = width.min(n_columns - column);
                    let column = block + column;
                    self.strip(simd, &Strip { weight, stride: width, depth: depth.clone(), column, n_columns });
                }
            }
        }
    }
}

impl<T: Stored> Tiles<'_, T> {
    /// Writes strips of columns, two registers wide, one after the other; the last is filled up with zeros.
    #[inline(always)]
    fn rearrange<S: Simd>(&self, panel: &mut [f32], depth: &Range<usize>, column: usize, n_columns: usize) {
        let width = 2 * S::F32_LANES;
        for (i, k) in depth.clone().enumerate() {
            let row = &self.weight[k * self.stride + column..][..n_columns];
            for line in (0..n_columns).step_by(LINE / size_of::<T>()) {
                prefetch(row.as_ptr().wrapping_add(AHEAD * self.stride + line));
            }
            for (strip, from) in row.chunks(width).enumerate() {
                // A row more, lest the strips' pieces of a row compete for the same place in the cache.
                let to = &mut panel[(strip * (depth.len() + 1) + i) * width..][..width];
                match T::as_f32(from) {
                    Some(from) if from.len() == width => {
                        let (to, from) = (S::as_mut_simd_f32s(to).0, S::as_simd_f32s(from).0);
                        for (to, from) in to.iter_mut().zip(from) {
                            *to = *from;
                        }
                    }
                    _ => {
                        widen_here(&mut to[..from.len()], from);
                        to[from.len()..].fill(0.0);
                    }
                }
            }
        }
    }

    /// All rows, as many at a time as there are registers for their results.
    #[inline(always)]
    fn strip<S: Simd>(&self, simd: S, strip: &Strip<'_>) {
        let n = strip.n_columns / S::F32_LANES;
        match (n, n * S::F32_LANES == strip.n_columns) {
            (2, true) => self.rows::<S, 2, true>(simd, strip),
            (1, true) => self.rows::<S, 1, true>(simd, strip),
            _ => self.rows::<S, 2, false>(simd, strip),
        }
    }

    #[inline(always)]
    fn rows<S: Simd, const W: usize, const FULL: bool>(&self, simd: S, strip: &Strip<'_>) {
        let n = self.x.len() / self.d_in.max(1);
        let mut row = 0;
        while (S::F32_LANES >= 16 || W == 1) && row + 8 <= n {
            self.tile::<S, 8, W, FULL>(simd, row, strip);
            row += 8;
        }
        while row + 4 <= n {
            self.tile::<S, 4, W, FULL>(simd, row, strip);
            row += 4;
        }
        while row < n {
            self.tile::<S, 1, W, FULL>(simd, row, strip);
            row += 1;
        }
    }

    /// `R` rows from `row` on, `W` registers of columns: adds the products of some rows of the weight to what is there, or to
    /// the bias if they are the first. Fewer columns unless `FULL`.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const W: usize, const FULL: bool>(&self, simd: S, row: usize, strip: &Strip<'_>) {
        let Strip { weight, stride, column, n_columns, .. } = *strip;
        let (depth, width) = (strip.depth.clone(), W * S::F32_LANES);
        assert!(depth.is_empty() || weight.len() >= (depth.len() - 1) * stride + width, "columns out of bounds");
        let x: [&[f32]; R] = std::array::from_fn(|r| &self.x[(row + r) * self.d_in..][depth.clone()]);
        // SAFETY: the maker of the tiles has these columns of each row to itself.
        let mut out: [&mut [f32]; R] = std::array::from_fn(|r| unsafe {
            self.out.slice(self.out_start + (row + r) * self.out_stride + column, n_columns)
        });
        let start =
            self.bias.map_or([simd.splat_f32s(0.0); W], |bias| load::<S, W, FULL>(&bias[column..][..n_columns]));
        let mut totals: [[S::f32s; W]; R] =
            std::array::from_fn(|r| if depth.start == 0 { start } else { load::<S, W, FULL>(out[r]) });
        // As in `tile.rs`: not a chain of additions.
        let x = std::hint::black_box(x.map(<[f32]>::as_ptr));
        for k in 0..depth.len() {
            // SAFETY: row `k` of the weight has these columns, as just compared, and each row of `x` has a number `k`.
            unsafe {
                let numbers = std::slice::from_raw_parts(weight.as_ptr().add(k * stride), width);
                let numbers = load::<S, W, true>(numbers);
                for r in 0..R {
                    let factor = simd.splat_f32s(*x[r].add(k));
                    for j in 0..W {
                        totals[r][j] = simd.mul_add_f32s(factor, numbers[j], totals[r][j]);
                    }
                }
            }
        }
        for (out, totals) in out.iter_mut().zip(totals) {
            if FULL {
                S::as_mut_simd_f32s(out).0[..W].copy_from_slice(&totals);
            } else {
                let mut buffer = [0.0; COLUMNS];
                S::as_mut_simd_f32s(&mut buffer).0[..W].copy_from_slice(&totals);
                out.copy_from_slice(&buffer[..n_columns]);
            }
        }
    }
}

/// `W` registers of numbers, filled up with zeros unless `FULL`.
#[inline(always)]
fn load<S: Simd, const W: usize, const FULL: bool>(numbers: &[f32]) -> [S::f32s; W] {
    let mut buffer = [0.0; COLUMNS];
    let numbers = if FULL {
        numbers
    } else {
        buffer[..numbers.len()].copy_from_slice(numbers);
        &buffer
    };
    let (registers, _) = S::as_simd_f32s(numbers);
    std::array::from_fn(|j| registers[j])
}

/// Asks for the cache line at `address`, which need not exist.
#[inline(always)]
fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
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
    const SIZES: [(usize, usize, usize); 15] = [
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
