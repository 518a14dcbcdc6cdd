//! `x W + b` of few rows, the matrix read once as it lies in memory.
//!
//! The output is computed in strips of neighbouring columns, some rows of the matrix at a time. The first tile of a strip reads
//! the matrix, asks for the numbers of the next depth and leaves its own in a panel, from which the other tiles read. Products
//! are added in the order of the matrix's rows, to the bias: one chain of fused multiplications and additions for each result,
//! whatever the number of rows, the tile and the registers.

use super::gemm::{Mat, MatMut};
use super::simd::simd;
use super::stored::Stored;
use super::tile::{LANES, Panel, RightRows, add_products, pack_rows, unrolled, widest};

/// Rows of the matrix that are taken at a time: enough that what a tile loads and stores is little beside its products, and few
/// enough that a strip's panel stays near.
const DEPTH: usize = 128;

/// As many, where one tile has all rows of the output: without a panel fewer are enough, and what is asked for is nearer.
const DEPTH_OF_ONE_TILE: usize = 64;

/// Numbers of a panel.
pub const PANEL: usize = DEPTH * 4 * LANES + TILE;

/// Most numbers in a tile of the output.
const TILE: usize = 24 * LANES;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Columns of a strip for so many rows of the output: as many as leave registers for all rows in one tile, if there are enough
/// registers for that.
pub fn columns(n: usize) -> usize {
    match n {
        7..=8 if widest() == 4 * LANES => 3 * LANES,
        _ => widest(),
    }
}

simd! {
    /// `out = x W + b`, for columns of a matrix `weight` whose rows lie `stride` apart.
    ///
    /// `weight` begins at the first column; `panel` has room for [`PANEL`] numbers.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn multiply<T: Stored>(
        out: MatMut<'_>,
        bias: Option<&[f32]>,
        x: Mat<'_>,
        weight: &[T],
        stride: usize,
        panel: &mut [f32],
    ) {
        let mut out = out;
        let (n, n_columns, _) = out.shape();
        let (rows, d_in) = x.dims();
        assert!(rows == n && bias.is_none_or(|bias| bias.len() == n_columns), "a product that does not fit");
        assert!(d_in == 0 || (d_in - 1) * stride + n_columns <= weight.len(), "a matrix that does not fit");
        assert!(panel.len() >= PANEL, "a panel that is too small");
        let (panel, buffer) = panel.split_at_mut(DEPTH * 4 * LANES);
        let columns = columns(n);
        let most = if columns < widest() { DEPTH_OF_ONE_TILE } else { DEPTH };
        for first in (0..d_in.max(1)).step_by(most) {
            let depth = most.min(d_in - first);
            // The next depth has as many rows or fewer; at the last there is nothing more to ask for.
            let next = if first + most < d_in { first + most } else { first };
            let mut ahead = Ahead::new(&weight[next * stride..], n_columns, columns, stride);
            let x = x.part(0..n, first..first + depth);
            for column in (0..n_columns).step_by(columns) {
                let n_columns = columns.min(n_columns - column);
                let mut first_row = [0.0; 4 * LANES];
                if let Some(bias) = bias {
                    first_row[..n_columns].copy_from_slice(&bias[column..][..n_columns]);
                }
                let start = (first == 0).then_some(&first_row);
                let weight = weight.get(first * stride + column..).unwrap_or_default();
                let out = out.block(0..n, column..column + n_columns);
                let ahead = &mut ahead;
                let strip = Strip { out, start, x, weight, stride, ahead, panel: &mut *panel, buffer: &mut *buffer };
                if n_columns == columns && columns < widest() {
                    strip.multiply_at_once();
                    continue;
                }
                match n_columns.div_ceil(LANES) {
                    4 => strip.multiply::<4>(),
                    3 => strip.multiply::<3>(),
                    2 => strip.multiply::<2>(),
                    _ => strip.multiply::<1>(),
                }
            }
        }
    }
}

/// Some columns of the output, and of some rows of the matrix.
struct Strip<'a, T> {
    out: MatMut<'a>,
    /// Where the sums begin, if not at what is in the output.
    start: Option<&'a [f32; 4 * LANES]>,
    /// As many columns as there are rows of the matrix.
    x: Mat<'a>,
    /// Begins at the first row and column.
    weight: &'a [T],
    stride: usize,
    ahead: &'a mut Ahead<T>,
    panel: &'a mut [f32],
    /// Room for a tile, for a strip whose columns do not fill the registers.
    buffer: &'a mut [f32],
}

impl<T: Stored> Strip<'_, T> {
    /// All of seven or eight rows of a strip that is three registers wide.
    #[inline(always)]
    fn multiply_at_once(mut self) {
        let (n, ..) = self.out.shape();
        // SAFETY: the strip has these rows, and its columns fill the registers.
        unsafe {
            match n {
                7 => self.tile::<3, 7, true, false>(0),
                8 => self.tile::<3, 8, true, false>(0),
                other => panic!("{other} rows at once"),
            }
        }
    }

    /// All rows of a strip that is `WIDTH` registers wide.
    #[inline(always)]
    fn multiply<const WIDTH: usize>(mut self) {
        let (n, n_columns, _) = self.out.shape();
        let (_, depth) = self.x.dims();
        let mut row = 0;
        // SAFETY: the strip has these rows; the first tile reads a matrix whose columns fill the registers, and the others what
        // it or `pack_rows` has left in the panel.
        unsafe {
            if n_columns < WIDTH * LANES || n < 4 {
                let panel = &mut self.panel[..depth * WIDTH * LANES];
                pack_rows(panel, WIDTH * LANES, n_columns, self.weight, self.stride);
            } else if n >= 6 {
                self.tile::<WIDTH, 6, true, true>(row);
                row += 6;
            } else {
                self.tile::<WIDTH, 4, true, true>(row);
                row += 4;
            }
            while row + 6 <= n {
                self.tile::<WIDTH, 6, false, false>(row);
                row += 6;
            }
            if row + 4 <= n {
                self.tile::<WIDTH, 4, false, false>(row);
                row += 4;
            }
            if row + 2 <= n {
                self.tile::<WIDTH, 2, false, false>(row);
                row += 2;
            }
            if row < n {
                self.tile::<WIDTH, 1, false, false>(row);
            }
        }
    }

    /// The rows `row..row + ROWS`. `FIRST` reads the matrix, and fills the panel if others `FOLLOW`, which read the panel.
    ///
    /// # Safety
    /// The strip has these rows. If `FIRST`, its columns fill the registers, else the panel is filled.
    #[inline(always)]
    unsafe fn tile<const WIDTH: usize, const ROWS: usize, const FIRST: bool, const FOLLOW: bool>(
        &mut self,
        row: usize,
    ) {
        let (_, n_columns, row_stride) = self.out.shape();
        let mut totals = [[[0.0f32; LANES]; WIDTH]; ROWS];
        // SAFETY: the output has these rows and columns, which are this strip's alone, and a narrow one is buffered; the rows of
        // the matrix and of the panel are as `multiply` has compared and the caller promises.
        unsafe {
            let to = self.out.as_ptr().add(row * row_stride);
            let is_narrow = n_columns < WIDTH * LANES;
            let (to_registers, stride) =
                if is_narrow { (self.buffer.as_mut_ptr(), WIDTH * LANES) } else { (to, row_stride) };
            if is_narrow && self.start.is_none() {
                for (i, buffer) in self.buffer.chunks_exact_mut(stride).take(ROWS).enumerate() {
                    buffer[..n_columns].copy_from_slice(std::slice::from_raw_parts(to.add(i * row_stride), n_columns));
                }
            }
            let (start, start_stride) = self.start.map_or((to_registers.cast_const(), stride), |row| (row.as_ptr(), 0));
            unrolled!(i, totals, totals => {
                *totals = *start.add(i * start_stride).cast::<[[f32; LANES]; WIDTH]>();
            });
            let (_, depth) = self.x.dims();
            let panel = self.panel.as_mut_ptr();
            if FIRST {
                let right =
                    Lying::<T, FOLLOW> { next: self.weight.as_ptr(), stride: self.stride, ahead: *self.ahead, panel };
                *self.ahead = add_products(&mut totals, depth, self.x, row, right).ahead;
            } else {
                add_products(&mut totals, depth, self.x, row, Panel { next: panel });
            }
            unrolled!(i, totals, totals => {
                *to_registers.add(i * stride).cast::<[[f32; LANES]; WIDTH]>() = *totals;
            });
            if is_narrow {
                for (i, buffer) in self.buffer.chunks_exact(stride).take(ROWS).enumerate() {
                    let to = std::slice::from_raw_parts_mut(to.add(i * row_stride), n_columns);
                    to.copy_from_slice(&buffer[..n_columns]);
                }
            }
        }
    }
}

/// The rows of a matrix as they lie, copied into a panel on the way if `COPY`.
struct Lying<T, const COPY: bool> {
    next: *const T,
    stride: usize,
    ahead: Ahead<T>,
    panel: *mut f32,
}

impl<T: Stored, const WIDTH: usize, const COPY: bool> RightRows<WIDTH> for Lying<T, COPY> {
    #[inline(always)]
    unsafe fn next(&mut self) -> [[f32; LANES]; WIDTH] {
        let mut row = [[0.0f32; LANES]; WIDTH];
        // SAFETY: the matrix and the panel have one more row by the caller's promise.
        unsafe {
            let from = &*self.next.cast::<[[T; LANES]; WIDTH]>();
            for j in 0..WIDTH {
                for lane in 0..LANES {
                    row[j][lane] = from[j][lane].widen();
                }
            }
            if COPY {
                *self.panel.cast::<[[f32; LANES]; WIDTH]>() = row;
                self.panel = self.panel.wrapping_add(WIDTH * LANES);
            }
        }
        self.ahead.ask::<WIDTH>();
        self.next = self.next.wrapping_add(self.stride);
        row
    }
}

/// What is asked for while a depth is multiplied: the next one, each of its rows whole, since memory is fastest in its own order.
#[derive(Clone, Copy)]
struct Ahead<T> {
    next: *const T,
    /// The strip of that row that comes next, of so many.
    strip: usize,
    n_strips: usize,
    /// Numbers of a strip.
    width: usize,
    /// From the end of a row's strips to the next row.
    jump: usize,
}

impl<T> Ahead<T> {
    /// Rows of `n_columns` in strips of `width`, `stride` apart.
    #[inline(always)]
    fn new(rows: &[T], n_columns: usize, width: usize, stride: usize) -> Self {
        let n_strips = n_columns.div_ceil(width);
        Self { next: rows.as_ptr(), strip: 0, n_strips, width, jump: stride.wrapping_sub(n_strips * width) }
    }

    /// Asks for a strip of a row, `WIDTH` registers wide.
    #[inline(always)]
    fn ask<const WIDTH: usize>(&mut self) {
        for line in (0..WIDTH * LANES).step_by(LINE / size_of::<T>()) {
            prefetch(self.next.wrapping_add(line));
        }
        self.strip += 1;
        self.next = self.next.wrapping_add(self.width);
        if self.strip == self.n_strips {
            self.strip = 0;
            self.next = self.next.wrapping_add(self.jump);
        }
    }
}

/// Asks for the cache line at `address`, which need not exist.
#[inline(always)]
pub fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
}
