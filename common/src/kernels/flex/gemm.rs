//! Matrix products over strided views, with their bounds checked.

use std::marker::PhantomData;

/// A matrix to read: element `(i, j)` is `data[i · row_stride + j · col_stride]`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A matrix whose rows lie `row_stride` apart, each contiguous.
    ///
    /// # Panics
    /// If it does not lie within `data`.
    pub fn rows(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, row_stride), "[{rows}, {cols}] by {row_stride} in {}", data.len());
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// Numbers of rows and columns.
    pub fn dims(self) -> (usize, usize) {
        (self.rows, self.cols)
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

    /// The same matrix for a shorter time.
    pub fn reborrow(&mut self) -> MatMut<'_> {
        MatMut { lifetime: PhantomData, ..*self }
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

/// What becomes of the numbers already in the output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// They are replaced, without being read.
    Overwrite,
    /// The product is added to them.
    Accumulate,
}

/// Whether one thread or the thread pool computes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread.
    One,
    /// The current pool, if the product is large enough. Each output element is computed by one thread in the same
    /// order of additions, so the number of threads does not change the result (tested below).
    All,
}

/// `out = scale · a b`, or `out += scale · a b`.
///
/// # Panics
/// If the shapes do not fit.
pub fn gemm(out: MatMut<'_>, output: Output, a: Mat<'_>, b: Mat<'_>, scale: f32, threads: Threads) {
    assert_eq!((a.rows, b.cols, a.cols), (out.rows, out.cols, b.rows), "product of matrices that do not fit");
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: `a`, `b` and `out` were checked to lie within their slices for these shapes and strides when they were
    // made, the shapes agree, and `out` is an exclusive borrow, so it overlaps neither.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            a.cols,
            out.data,
            1,
            out.row_stride as isize,
            output == Output::Accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
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
