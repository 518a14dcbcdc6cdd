//! The innermost loops of a matrix product: panels of one operand rearranged, and blocks of the output kept in
//! registers.
//!
//! A product `out = a b` runs over panels of `b`: up to [`widest`] neighbouring columns, stored row after row without
//! gaps and filled up with zeros to whole registers. A tile of the output has the width of its panel and as many rows
//! as there are registers for; the numbers of `a` are read where they lie and multiplied with whole rows of the panel.
//! Each element of the output is one chain of fused multiplications and additions over the inner axis, whatever the
//! tile it lies in.

use super::gemm::{Mat, MatMut};
use super::simd::{Level, fma, level, simd};
use super::stored::{Stored, transpose_stored, widen_here};
use super::strips::prefetch;

/// Columns that a panel is filled up to a multiple of: one AVX-512 register, two of AVX2.
pub const LANES: usize = 16;

/// Rows of a tile of the output that is as wide as the widest panel.
pub const TILE_ROWS: usize = 6;

/// Most numbers in a tile of the output.
const TILE: usize = 24 * LANES;

/// Columns of a panel, at most: what leaves enough registers for a tile with enough rows.
pub fn widest() -> usize {
    match level() {
        Level::V4 => 4 * LANES,
        Level::V3 | Level::Baseline => LANES,
    }
}

/// The initial values of a product's sums.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    /// Nothing.
    Zero,
    /// The numbers already in the output.
    Output,
    /// This row, in each row of the output.
    Row(&'a [f32]),
}

simd! {
    /// `out = scale · a b`, of the width of one panel, added to what `start` says.
    ///
    /// `panel`: the rows of `b`, each of `out`'s columns filled up to a multiple of [`LANES`].
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn multiply_panel(out: MatMut<'_>, start: Start<'_>, scale: f32, a: Mat<'_>, panel: &[f32]) {
        let (rows, cols, row_stride) = out.shape();
        let (a_rows, k) = a.dims();
        let width = cols.next_multiple_of(LANES);
        assert_eq!((a_rows, panel.len()), (rows, k * width), "a panel that does not fit");
        let mut first = [0.0; 4 * LANES];
        if let Start::Row(row) = start {
            first[..cols].copy_from_slice(row);
        }
        let add = matches!(start, Start::Output);
        let block = Block { data: out.as_ptr(), rows, cols, row_stride, add, first: &first, scale, panel };
        // SAFETY: `a` and `out` are views whose elements lie within their slices, `out` is exclusive, and their
        // shapes and the panel's were just compared.
        unsafe {
            match width / LANES {
                4 => all_rows::<4, TILE_ROWS>(block, a),
                3 => all_rows::<3, 8>(block, a),
                2 => all_rows::<2, 12>(block, a),
                1 if widest() > LANES => all_rows::<1, 12>(block, a),
                1 => all_rows::<1, TILE_ROWS>(block, a),
                other => panic!("a panel of {other} registers"),
            }
        }
    }

    /// Writes `k` rows of a panel, `[k, width]`, from `cols` columns of which each row is contiguous.
    pub fn pack_rows<T: Stored>(panel: &mut [f32], width: usize, cols: usize, from: &[T], row_stride: usize) {
        for (to, p) in panel.chunks_exact_mut(width).zip(0..) {
            let from = &from[p * row_stride..][..cols];
            if cols == width {
                for (to, from) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(from.as_chunks::<LANES>().0) {
                    widen_here(to, from);
                }
            } else {
                widen_here(&mut to[..cols], from);
                to[cols..].fill(0.0);
            }
        }
    }

    /// Writes the rows of a panel, `[k, width]`, from `cols` columns that are contiguous each, `col_stride` apart.
    pub fn pack_columns<T: Stored>(panel: &mut [f32], width: usize, cols: usize, from: &[T], col_stride: usize) {
        let k = panel.len() / width;
        for start in (0..width).step_by(LANES) {
            let n = cols.saturating_sub(start).min(LANES);
            let mut p = 0;
            while n == LANES && p + LANES <= k {
                let to = &mut panel[p * width + start..];
                transpose_stored(to, width, &from[start * col_stride + p..], col_stride);
                p += LANES;
            }
            for p in p..k {
                let to = &mut panel[p * width + start..][..LANES];
                for (lane, to) in to.iter_mut().enumerate() {
                    *to = if lane < n { from[(start + lane) * col_stride + p].widen() } else { 0.0 };
                }
            }
        }
    }
}

/// Repeats `$body` for each row `$i` of the array `$totals`, without a loop: the compiler keeps an array in registers
/// only if every index is a constant.
macro_rules! unrolled {
    ($i:ident, $totals:ident, $row:ident => $body:block) => {
        unrolled!($i, $totals, $row => $body, [0 1 2 3 4 5 6 7 8 9 10 11])
    };
    ($i:ident, $totals:ident, $row:ident => $body:block, [$($index:literal)*]) => {$(
        if let Some($row) = $totals.get_mut($index) {
            let $i = $index;
            $body
        }
    )*};
}

pub(crate) use unrolled;

/// A block of the output.
#[derive(Clone, Copy)]
struct Block<'a> {
    data: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    /// Whether the product is added to what is there, or else to `first`.
    add: bool,
    first: &'a [f32; 4 * LANES],
    scale: f32,
    panel: &'a [f32],
}

/// All rows of a block: tiles of `ROWS` rows, then smaller ones.
///
/// # Safety
/// The elements of `out` may be written and are nobody else's; `a` has as many rows; the panel has a row of `WIDTH`
/// registers, enough for the columns of `out`, for each column of `a`.
#[inline(always)]
unsafe fn all_rows<const WIDTH: usize, const ROWS: usize>(out: Block<'_>, a: Mat<'_>) {
    let mut row = 0;
    // SAFETY: each tile's rows lie within the block's.
    unsafe {
        // Eight rows are left for two tiles of four: one of two would wait for the panel.
        while row + ROWS <= out.rows && (ROWS != TILE_ROWS || out.rows - row != 8) {
            tile_of_block::<WIDTH, ROWS>(out, a, row);
            row += ROWS;
        }
        while row + 4 <= out.rows {
            tile_of_block::<WIDTH, 4>(out, a, row);
            row += 4;
        }
        if row + 2 <= out.rows {
            tile_of_block::<WIDTH, 2>(out, a, row);
            row += 2;
        }
        if row < out.rows {
            tile_of_block::<WIDTH, 1>(out, a, row);
        }
    }
}

/// The tile of the rows `row..row + ROWS`; one that is narrower than its panel goes through a buffer.
///
/// # Safety
/// As of [`all_rows`], and the rows lie within the block.
#[inline(always)]
unsafe fn tile_of_block<const WIDTH: usize, const ROWS: usize>(out: Block<'_>, a: Mat<'_>, row: usize) {
    // SAFETY: the rows are the block's by the caller's promise; the buffer has room for the tile.
    unsafe {
        let to = out.data.add(row * out.row_stride);
        if out.cols == WIDTH * LANES {
            let (start, stride) = if out.add { (to.cast_const(), out.row_stride) } else { (out.first.as_ptr(), 0) };
            tile::<WIDTH, ROWS>(to, out.row_stride, start, stride, out, a, row);
            return;
        }
        let mut buffer = [0.0f32; TILE];
        let start = if out.add { [0.0; 4 * LANES].as_ptr() } else { out.first.as_ptr() };
        tile::<WIDTH, ROWS>(buffer.as_mut_ptr(), WIDTH * LANES, start, 0, out, a, row);
        for (i, from) in buffer.chunks_exact(WIDTH * LANES).take(ROWS).enumerate() {
            let to = std::slice::from_raw_parts_mut(to.add(i * out.row_stride), out.cols);
            for (to, from) in to.iter_mut().zip(from) {
                *to = if out.add { *to + from } else { *from };
            }
        }
    }
}

/// `ROWS` rows, from row `row` of `a` on, of `WIDTH` registers each.
///
/// # Safety
/// `a` has these rows, the block's panel a row of `WIDTH` registers for each column of `a`; and behind `to` lie as many rows of
/// as many registers, `row_stride` apart, that may be written and are nobody else's.
#[inline(always)]
unsafe fn tile<const WIDTH: usize, const ROWS: usize>(
    to: *mut f32,
    row_stride: usize,
    start: *const f32,
    start_stride: usize,
    block: Block<'_>,
    a: Mat<'_>,
    row: usize,
) {
    let mut totals = [[[0.0f32; LANES]; WIDTH]; ROWS];
    let (_, k) = a.dims();
    let scale = block.scale;
    // SAFETY: all reads and writes are those the caller allows; arrays of f32 need the alignment of f32 only.
    unsafe {
        add_products(&mut totals, k, a, row, Panel { next: block.panel.as_ptr() });
        unrolled!(i, totals, totals_of_row => {
            let to = &mut *to.add(i * row_stride).cast::<[[f32; LANES]; WIDTH]>();
            for j in 0..WIDTH {
                let before = *start.add(i * start_stride + j * LANES).cast::<[f32; LANES]>();
                for lane in 0..LANES {
                    to[j][lane] = fma(totals_of_row[j][lane], scale, before[lane]);
                }
            }
        });
    }
}

/// The rows of a right operand, one after the other.
pub trait RightRows<const WIDTH: usize> {
    /// The next row.
    ///
    /// # Safety
    /// There is one more.
    unsafe fn next(&mut self) -> [[f32; LANES]; WIDTH];
}

/// The rows of a panel.
pub struct Panel {
    pub next: *const f32,
}

impl<const WIDTH: usize> RightRows<WIDTH> for Panel {
    #[inline(always)]
    unsafe fn next(&mut self) -> [[f32; LANES]; WIDTH] {
        // SAFETY: promised by the caller; arrays of f32 need the alignment of f32 only.
        let row = unsafe { *self.next.cast::<[[f32; LANES]; WIDTH]>() };
        self.next = self.next.wrapping_add(WIDTH * LANES);
        row
    }
}

/// Adds to `totals` the products of the rows of `a` from row `row` on with the first `k` rows of `right`, in their order.
///
/// # Safety
/// `a` has these rows and `k` columns, and `right` has `k` rows.
#[inline(always)]
pub unsafe fn add_products<const WIDTH: usize, const ROWS: usize, R: RightRows<WIDTH>>(
    totals: &mut [[[f32; LANES]; WIDTH]; ROWS],
    k: usize,
    a: Mat<'_>,
    row: usize,
    mut right: R,
) -> R {
    let [a_row, a_col] = a.strides();
    // SAFETY: the caller promises all that is read.
    unsafe {
        // The compiler may not know how the rows lie: it would find each from the one before, a chain of additions that takes
        // longer than the multiplications of AVX2's tile.
        let rows: [*const f32; ROWS] = std::hint::black_box(std::array::from_fn(|i| a.as_ptr().add((row + i) * a_row)));
        let mut at = 0;
        // A part of them asks for each of as many rows after these, which the next tile multiplies.
        for i in 0..ROWS {
            let mut ahead = a.as_ptr().wrapping_add((row + ROWS + i) * a_row);
            for _ in i * k / ROWS..(i + 1) * k / ROWS {
                prefetch(ahead);
                ahead = ahead.wrapping_add(ROWS);
                let b_row = right.next();
                unrolled!(i, totals, totals_of_row => {
                    let factor = *rows[i].add(at);
                    for j in 0..WIDTH {
                        for lane in 0..LANES {
                            totals_of_row[j][lane] = fma(b_row[j][lane], factor, totals_of_row[j][lane]);
                        }
                    }
                });
                at += a_col;
            }
        }
    }
    right
}
