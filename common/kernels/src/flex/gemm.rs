//! Matrix products over strided views, with their bounds checked.
//!
//! Our own loops, not a library's: operands are rearranged once for all threads, or by each task for itself while they
//! are in its cache, and the same rearranged operand serves several products.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use super::stored::Stored;
use super::tile::{LANES, Start, TILE_ROWS, multiply_panel, pack_columns, pack_rows, widest};
use super::{Numbers, initialise};

/// A matrix to read: element `(i, j)` is `data[i · row_stride + j · col_stride]`.
#[derive(Clone, Copy)]
pub struct Mat<'a, T = f32> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A matrix whose rows lie `row_stride` apart, each contiguous.
    ///
    /// # Panics
    /// If it does not lie within `data`.
    pub fn rows(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, row_stride), "[{rows}, {cols}] by {row_stride} in {}", data.len());
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// Numbers of rows and columns.
    pub fn dims(self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// How far apart neighbours in a column and in a row are.
    pub fn strides(self) -> [usize; 2] {
        [self.row_stride, self.col_stride]
    }

    /// The first element. All others lie in the same slice.
    pub fn as_ptr(&self) -> *const T {
        self.data.as_ptr()
    }

    /// The elements of some rows and columns.
    ///
    /// # Panics
    /// If there are no such rows or columns.
    pub fn part(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        let start = rows.start * self.row_stride + cols.start * self.col_stride;
        Self { data: self.data.get(start..).unwrap_or_default(), rows: rows.len(), cols: cols.len(), ..self }
    }

    /// The same numbers, transposed.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// A matrix to write, each row contiguous.
pub struct MatMut<'a> {
    data: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

impl<'a> MatMut<'a> {
    /// A matrix whose rows lie `row_stride` apart in `data`.
    ///
    /// # Panics
    /// If it does not lie within `data`.
    pub fn rows(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, row_stride), "[{rows}, {cols}] by {row_stride} in {}", data.len());
        Self { data: data.as_mut_ptr(), rows, cols, row_stride, lifetime: PhantomData }
    }

    /// Numbers of rows and columns, and how far apart rows are.
    pub fn shape(&self) -> (usize, usize, usize) {
        (self.rows, self.cols, self.row_stride)
    }

    /// The first element.
    pub fn as_ptr(&self) -> *mut f32 {
        self.data
    }

    /// The elements of some rows and columns.
    ///
    /// # Panics
    /// If there are no such rows or columns.
    pub fn block(&mut self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_> {
        // SAFETY: this matrix is borrowed as long as the result lives, so nobody else reaches its elements.
        unsafe { self.share().block(rows, cols) }
    }

    /// The same matrix for several threads, each with its own elements.
    fn share(&self) -> SharedMat<'_> {
        SharedMat {
            data: self.data,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
            lifetime: PhantomData,
        }
    }

    /// Row `row`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: all rows lie within the exclusive borrow this matrix was made of, and the row just checked is one.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.row_stride), self.cols) }
    }
}

/// A matrix that several threads write, each its own elements.
#[derive(Clone, Copy)]
struct SharedMat<'a> {
    data: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer comes from an exclusive borrow that lives as long as the value, and elements are reached only
// through the unsafe method below, whose callers promise that no two threads touch the same element.
unsafe impl Send for SharedMat<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedMat<'_> {}

impl<'a> SharedMat<'a> {
    /// The elements of some rows and columns.
    ///
    /// # Safety
    /// While the result lives, nobody else reads or writes its elements.
    unsafe fn block(self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'a> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        let empty = rows.is_empty() || cols.is_empty();
        let start = if empty { 0 } else { rows.start * self.row_stride + cols.start };
        // SAFETY: an element of the matrix, just checked, or the start of its slice.
        let data = unsafe { self.data.add(start) };
        MatMut { data, rows: rows.len(), cols: cols.len(), row_stride: self.row_stride, lifetime: PhantomData }
    }
}

/// A slice that several threads write, each its own elements.
#[derive(Clone, Copy)]
pub struct SharedMut<'a> {
    data: *mut f32,
    len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer comes from an exclusive borrow that lives as long as the value, and elements are reached only
// through the unsafe methods below, whose callers promise that no two threads touch the same element.
unsafe impl Send for SharedMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedMut<'_> {}

impl<'a> SharedMut<'a> {
    /// Shares `data` for the rest of its borrow.
    pub fn new(data: &'a mut [f32]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), lifetime: PhantomData }
    }

    /// The matrix that starts at `offset`, its rows `row_stride` apart.
    ///
    /// # Safety
    /// While the result lives, nobody else reads or writes its elements.
    pub unsafe fn mat(self, offset: usize, rows: usize, cols: usize, row_stride: usize) -> MatMut<'a> {
        assert!(offset <= self.len && fits(self.len - offset, rows, cols, row_stride), "matrix out of bounds");
        // SAFETY: `offset` is within the slice, just checked.
        MatMut { data: unsafe { self.data.add(offset) }, rows, cols, row_stride, lifetime: PhantomData }
    }

    /// The elements `offset..offset + n`.
    ///
    /// # Safety
    /// While the result lives, nobody else reads or writes them.
    pub unsafe fn slice(self, offset: usize, n: usize) -> &'a mut [f32] {
        assert!(offset + n <= self.len, "slice out of bounds");
        // SAFETY: within the borrowed slice, just checked; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(offset), n) }
    }
}

/// Treatment of the numbers already in the output.
#[derive(Clone, Copy)]
pub enum Output<'a> {
    /// They are replaced, without being read.
    Overwrite,
    /// The product is added to them.
    Accumulate,
    /// They are replaced by the sum of the product and this row, the same in every row.
    AddRow(&'a [f32]),
}

impl<'a> Output<'a> {
    /// The initial values for the first piece of a product, in the columns `cols`.
    fn start(self, cols: Range<usize>) -> Start<'a> {
        match self {
            Self::Overwrite => Start::Zero,
            Self::Accumulate => Start::Output,
            Self::AddRow(row) => Start::Row(&row[cols]),
        }
    }
}

/// Whether one thread or the thread pool computes; the result is the same (tested below).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread.
    One,
    /// The current pool, if the product is large enough.
    All,
}

/// Multiplications below which a product is not worth sharing out.
const SMALL: usize = 1 << 19;

/// Rows of a block of the output: with [`DEPTH`] columns of the left operand they stay in the second cache. Whole tiles.
const ROWS: usize = 21 * TILE_ROWS;

/// Columns of the left operand, and rows of the right one, that are taken at a time.
const DEPTH: usize = 512;

/// The right operand of a product, rearranged into panels (see [`super::tile`]).
///
/// Blocks of at most [`DEPTH`] rows follow each other; within a block, panels of [`widest`] columns do.
pub struct Packed {
    data: Buffer,
    rows: usize,
    cols: usize,
}

impl Packed {
    /// Rearranges `b`.
    pub fn new<T: Stored>(b: Mat<'_, T>, threads: Threads) -> Self {
        let mut data = Buffer::new(b.rows * padded(b.cols));
        let panels = panels(data.numbers_mut(), b.rows, b.cols);
        if threads == Threads::All && b.rows * b.cols >= SMALL / 4 {
            panels.into_par_iter().for_each(|(panel, span, cols)| pack(panel, b, span, cols));
        } else {
            for (panel, span, cols) in panels {
                pack(panel, b, span, cols);
            }
        }
        Self { data, rows: b.rows, cols: b.cols }
    }

    /// The panel of the rows `span` that starts at column `col`.
    fn panel(&self, span: &Range<usize>, col: usize) -> &[f32] {
        let width = padded(widest().min(self.cols - col));
        let start = span.start * padded(self.cols) + span.len() * col;
        &self.data.numbers()[start..start + span.len() * width]
    }
}

/// `out = scale · a b`, or `out += scale · a b`.
///
/// Each task rearranges what it needs of both operands, in memory that is its thread's own.
///
/// # Panics
/// If the shapes do not fit.
pub fn gemm<T: Stored>(out: MatMut<'_>, output: Output<'_>, a: Mat<'_>, b: Mat<'_, T>, scale: f32, threads: Threads) {
    assert_eq!((a.rows, b.cols, a.cols), (out.rows, out.cols, b.rows), "product of matrices that do not fit");
    let shared = out.share();
    let work = |(rows, cols): Rect| {
        let (a, b) = (a.part(rows.clone(), 0..a.cols), b.part(0..b.rows, cols.clone()));
        // SAFETY: tasks have different elements of the output.
        let out = unsafe { shared.block(rows, cols.clone()) };
        let output = if let Output::AddRow(row) = output { Output::AddRow(&row[cols]) } else { output };
        on_one_thread(out, output, a, b, scale);
    };
    if threads == Threads::One || out.rows * out.cols * a.cols < SMALL {
        work((0..out.rows, 0..out.cols));
    } else {
        rectangles(out.rows, out.cols).into_par_iter().for_each(work);
    }
}

/// [`gemm`] with a right operand that was rearranged before.
///
/// # Panics
/// If the shapes do not fit.
pub fn gemm_packed(out: MatMut<'_>, output: Output<'_>, a: Mat<'_>, b: &Packed, scale: f32, threads: Threads) {
    assert_eq!((a.rows, b.cols, a.cols), (out.rows, out.cols, b.rows), "product of matrices that do not fit");
    let shared = out.share();
    let work = |(rows, cols): Rect| {
        let a = a.part(rows.clone(), 0..a.cols);
        // SAFETY: tasks have different elements of the output.
        let mut out = unsafe { shared.block(rows, cols.clone()) };
        let mut multiply = |span: Range<usize>, col: usize| {
            let end = cols.end.min(col + widest());
            let start = if span.start == 0 { output.start(col..end) } else { Start::Output };
            let out = out.block(0..a.rows, col - cols.start..end - cols.start);
            multiply_panel(out, start, scale, a.part(0..a.rows, span.clone()), b.panel(&span, col));
        };
        let columns = cols.clone().step_by(widest());
        if widest() == LANES {
            // A narrow panel's part of the output stays near until all its depths have been added.
            columns.for_each(|col| depths(a.cols).for_each(|span| multiply(span, col)));
        } else {
            depths(a.cols).for_each(|span| columns.clone().for_each(|col| multiply(span.clone(), col)));
        }
    };
    let blocks = row_blocks(out.rows, out.cols, a.cols, threads);
    if threads == Threads::One || blocks.len() == 1 {
        blocks.into_iter().for_each(work);
    } else {
        blocks.into_par_iter().for_each(work);
    }
}

/// One thread's product, for which it rearranges the operands a piece at a time.
fn on_one_thread<T: Stored>(mut out: MatMut<'_>, output: Output<'_>, a: Mat<'_>, b: Mat<'_, T>, scale: f32) {
    thread_local! {
        static BUFFERS: Cell<[Buffer; 2]> = const { Cell::new([Buffer::EMPTY, Buffer::EMPTY]) };
    }
    // Taken out, not borrowed: should the thread enter a second product meanwhile, that one gets fresh buffers.
    let [mut for_a, mut for_b] = BUFFERS.take();
    for span in depths(a.cols) {
        for_b.resize(span.len() * padded(b.cols));
        for (panel, rows, cols) in panels(for_b.numbers_mut(), span.len(), b.cols) {
            pack(panel, b.part(span.clone(), 0..b.cols), rows, cols);
        }
        for start in (0..a.rows).step_by(ROWS) {
            let rows = start..a.rows.min(start + ROWS);
            let mut a = a.part(rows.clone(), span.clone());
            if a.col_stride > ROWS {
                let stride = padded(rows.len());
                for_a.resize(span.len() * stride);
                pack_rows(for_a.numbers_mut(), stride, rows.len(), a.data, a.col_stride);
                a = Mat::rows(for_a.numbers(), span.len(), rows.len(), stride).t();
            }
            for col in (0..b.cols).step_by(widest()) {
                let cols = col..b.cols.min(col + widest());
                let panel = &for_b.numbers()[span.len() * col..][..span.len() * padded(cols.len())];
                let start = if span.start == 0 { output.start(cols.clone()) } else { Start::Output };
                multiply_panel(out.block(rows.clone(), cols), start, scale, a, panel);
            }
        }
    }
    BUFFERS.set([for_a, for_b]);
}

/// A part of the output: its rows and columns.
type Rect = (Range<usize>, Range<usize>);

/// Cuts an output of `rows` by `cols` into blocks of rows, and these into groups of columns where threads would
/// otherwise go without work.
fn row_blocks(rows: usize, cols: usize, depth: usize, threads: Threads) -> Vec<Rect> {
    let n_threads =
        if threads == Threads::All && rows * cols * depth >= SMALL { rayon::current_num_threads() } else { 1 };
    let n_blocks = rows.div_ceil(ROWS);
    let n_blocks = n_blocks.next_multiple_of(2 * n_threads).min(rows.div_ceil(48).max(1));
    let rows_each = rows.div_ceil(n_blocks).next_multiple_of(TILE_ROWS);
    let n_blocks = rows.div_ceil(rows_each.max(1)).max(1);
    let n_panels = cols.div_ceil(widest());
    let n_groups = if n_threads == 1 { 1 } else { (2 * n_threads).div_ceil(n_blocks).clamp(1, n_panels.max(1)) };
    grid(rows, cols, rows_each, n_panels.div_ceil(n_groups) * widest())
}

/// Cuts an output of `rows` by `cols` into one part for each thread, more or less: of all ways that leave the slowest
/// thread the least to compute and to rearrange.
fn rectangles(rows: usize, cols: usize) -> Vec<Rect> {
    /// Cost of rearranging a row or a column, in multiplications.
    const REARRANGE: usize = 6;
    let n_threads = rayon::current_num_threads();
    let n_panels = cols.div_ceil(widest());
    let (mut best, mut least) = ((rows, cols), usize::MAX);
    for n_row_groups in 1..=(2 * n_threads).min(rows.div_ceil(12)) {
        for n_col_groups in 1..=(2 * n_threads).min(n_panels) {
            let rows_each = rows.div_ceil(n_row_groups).next_multiple_of(TILE_ROWS);
            let cols_each = n_panels.div_ceil(n_col_groups) * widest();
            let rounds = (n_row_groups * n_col_groups).div_ceil(n_threads);
            let cost = rounds * (rows_each * cols_each + REARRANGE * (rows_each + cols_each));
            if cost < least {
                (best, least) = ((rows_each, cols_each), cost);
            }
        }
    }
    grid(rows, cols, best.0, best.1)
}

/// All parts of `rows_each` by `cols_each`.
fn grid(rows: usize, cols: usize, rows_each: usize, cols_each: usize) -> Vec<Rect> {
    let pieces = |n: usize, each: usize| (0..n).step_by(each.max(1)).map(move |start| start..n.min(start + each));
    pieces(rows, rows_each).flat_map(|rows| pieces(cols, cols_each).map(move |cols| (rows.clone(), cols))).collect()
}

/// The inner axis in pieces of about the same size, at most [`DEPTH`]; one piece if it is empty.
fn depths(k: usize) -> impl Iterator<Item = Range<usize>> {
    let each = k.div_ceil(k.div_ceil(DEPTH).max(1)).max(1);
    (0..k.max(1)).step_by(each).map(move |start| start..k.min(start + each))
}

/// `n` filled up to whole registers.
fn padded(n: usize) -> usize {
    n.next_multiple_of(LANES)
}

/// Writes the panel of the rows `span` and the columns `cols` of `b`.
fn pack<T: Stored>(panel: &mut [f32], b: Mat<'_, T>, span: Range<usize>, cols: Range<usize>) {
    let (n, width) = (cols.len(), padded(cols.len()));
    let b = b.part(span, cols);
    if b.col_stride == 1 {
        pack_rows(panel, width, n, b.data, b.row_stride);
    } else {
        pack_columns(panel, width, n, b.data, b.col_stride);
    }
}

/// The panels that `data` holds for an operand of `rows` by `cols`, each with its rows and columns.
fn panels(mut data: &mut [f32], rows: usize, cols: usize) -> Vec<(&mut [f32], Range<usize>, Range<usize>)> {
    let mut panels = Vec::new();
    for span in depths(rows) {
        for col in (0..cols).step_by(widest()) {
            let columns = col..cols.min(col + widest());
            let (panel, rest) = data.split_at_mut(span.len() * padded(columns.len()));
            data = rest;
            panels.push((panel, span.clone(), columns));
        }
    }
    panels
}

/// Room for numbers, aligned to cache lines.
#[derive(Default)]
struct Buffer {
    lines: Vec<Line>,
    len: usize,
}

/// A cache line of numbers.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

impl Numbers for Line {}

impl Buffer {
    const EMPTY: Self = Self { lines: Vec::new(), len: 0 };

    /// Room for `n` numbers of any value.
    fn new(n: usize) -> Self {
        let mut buffer = Self::EMPTY;
        buffer.resize(n);
        buffer
    }

    /// Makes room for `n` numbers of any value.
    fn resize(&mut self, n: usize) {
        let n_lines = n.div_ceil(LANES);
        if self.lines.len() < n_lines {
            self.lines.clear();
            self.lines.reserve_exact(n_lines);
            initialise(&mut self.lines.spare_capacity_mut()[..n_lines]);
            // SAFETY: the capacity is there, and the lines are initialised.
            unsafe { self.lines.set_len(n_lines) };
        }
        self.len = n;
    }

    fn numbers(&self) -> &[f32] {
        // SAFETY: a line is `LANES` numbers without padding, and there are enough lines for `len`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    fn numbers_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Whether `rows` rows of `cols` elements, `row_stride` apart, lie within `len` elements without overlapping.
fn fits(len: usize, rows: usize, cols: usize, row_stride: usize) -> bool {
    rows == 0 || cols == 0 || ((rows == 1 || row_stride >= cols) && (rows - 1) * row_stride + cols <= len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0).collect()
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_product() {
        for (m, k, n) in [(513, 300, 257), (64, 4096, 128), (2000, 65, 511), (127, 1000, 1000)] {
            let (a, b) = (numbers(m * k), numbers(k * n));
            for transposed in [false, true] {
                let product = |threads: usize| {
                    let mut out = vec![f32::NAN; m * n];
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
                    pool.install(|| {
                        let (a, b) = if transposed {
                            (Mat::rows(&a, k, m, m).t(), Mat::rows(&b, n, k, k).t())
                        } else {
                            (Mat::rows(&a, m, k, k), Mat::rows(&b, k, n, n))
                        };
                        gemm(MatMut::rows(&mut out, m, n, n), Output::Overwrite, a, b, 1.0, Threads::All);
                    });
                    out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                };
                let one = product(1);
                assert_eq!(one, product(2), "{m} {k} {n}");
                assert_eq!(one, product(3), "{m} {k} {n}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "in 5")]
    fn a_matrix_must_lie_within_its_slice() {
        let _ = Mat::rows(&[0.0; 5], 2, 3, 3);
    }
}
