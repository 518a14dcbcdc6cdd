//! Rows into columns, a square of registers at a time.

use rayon::prelude::*;

use super::simd::{Level, level};

/// Rows and columns of a square: the numbers of a cache line.
pub const SIDE: usize = 16;

/// Writes the transpose of `from: [rows, cols]` to `to: [cols, rows]`, shared out among threads if it is large.
pub fn transpose_on_all_threads(to: &mut [f32], from: &[f32], rows: usize, cols: usize) {
    /// Numbers handled by one task.
    const TASK: usize = 1 << 14;
    let n_cols = (TASK / rows.max(1)).max(1).next_multiple_of(SIDE);
    to.par_chunks_mut((n_cols * rows).max(1)).enumerate().for_each(|(i, to)| {
        transpose_columns(to, from, rows, cols, i * n_cols);
    });
}

/// Writes the columns of `from: [rows, cols]` from `first` on to the rows of `to`, as many as it has.
pub fn transpose_columns(to: &mut [f32], from: &[f32], rows: usize, cols: usize, first: usize) {
    let n_cols = to.len().checked_div(rows).unwrap_or(0);
    for start_row in (0..rows).step_by(SIDE) {
        let n_rows = SIDE.min(rows - start_row);
        for start_col in (0..n_cols).step_by(SIDE) {
            let n_cols = SIDE.min(n_cols - start_col);
            let to = &mut to[start_col * rows + start_row..];
            let from = &from[start_row * cols + first + start_col..];
            if n_rows == SIDE && n_cols == SIDE {
                transpose_square(to, rows, from, cols);
            } else {
                for col in 0..n_cols {
                    for row in 0..n_rows {
                        to[col * rows + row] = from[row * cols + col];
                    }
                }
            }
        }
    }
}

/// Writes a transposed square of [`SIDE`] by [`SIDE`] numbers; rows lie `to_stride` and `from_stride` apart.
///
/// # Panics
/// If a square does not lie within its slice.
#[inline(always)]
pub fn transpose_square(to: &mut [f32], to_stride: usize, from: &[f32], from_stride: usize) {
    let last = SIDE - 1;
    assert!(to.len() >= last * to_stride + SIDE && from.len() >= last * from_stride + SIDE, "a square out of bounds");
    #[cfg(target_arch = "x86_64")]
    if level() == Level::V4 {
        // SAFETY: the processor has the instructions; both squares lie within their slices, just checked.
        unsafe { transpose_square_v4(to.as_mut_ptr(), to_stride, from.as_ptr(), from_stride) };
        return;
    }
    // Read whole before anything is written: the compiler keeps it in registers.
    let mut square = [[0.0f32; SIDE]; SIDE];
    for (row, square) in square.iter_mut().enumerate() {
        square.copy_from_slice(&from[row * from_stride..][..SIDE]);
    }
    for col in 0..SIDE {
        let to = &mut to[col * to_stride..][..SIDE];
        for row in 0..SIDE {
            to[row] = square[row][col];
        }
    }
}

/// [`transpose_square`] in sixteen registers: neighbours are interleaved, then pairs, then quarters of registers twice.
///
/// The compiler's own code for the loops above moves single numbers and takes more than twice as long.
///
/// # Safety
/// The processor has AVX-512F; both squares may be accessed, and that of `to` is nobody else's.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_square_v4(to: *mut f32, to_stride: usize, from: *const f32, from_stride: usize) {
    use std::arch::x86_64::{
        _mm512_castpd_ps as from_pairs, _mm512_castps_pd as as_pairs, _mm512_loadu_ps, _mm512_setzero_ps,
        _mm512_shuffle_f32x4, _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
        _mm512_unpacklo_ps,
    };
    /// The even quarters of two registers.
    const EVEN: i32 = 0x88;
    /// The odd ones.
    const ODD: i32 = 0xdd;
    let mut a = [_mm512_setzero_ps(); SIDE];
    for (row, a) in a.iter_mut().enumerate() {
        // SAFETY: a row of the square, by the caller's promise; unaligned loads need no alignment.
        *a = unsafe { _mm512_loadu_ps(from.add(row * from_stride)) };
    }
    let mut b = [_mm512_setzero_ps(); SIDE];
    for i in (0..SIDE).step_by(2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    // Quarter `q` of register `i + c` then has column `4 q + c` of the rows `i..i + 4`.
    for i in (0..SIDE).step_by(4) {
        let [p, q, r, s] = [as_pairs(b[i]), as_pairs(b[i + 1]), as_pairs(b[i + 2]), as_pairs(b[i + 3])];
        a[i] = from_pairs(_mm512_unpacklo_pd(p, r));
        a[i + 1] = from_pairs(_mm512_unpackhi_pd(p, r));
        a[i + 2] = from_pairs(_mm512_unpacklo_pd(q, s));
        a[i + 3] = from_pairs(_mm512_unpackhi_pd(q, s));
    }
    for c in 0..4 {
        b[c] = _mm512_shuffle_f32x4::<EVEN>(a[c], a[4 + c]);
        b[4 + c] = _mm512_shuffle_f32x4::<ODD>(a[c], a[4 + c]);
        b[8 + c] = _mm512_shuffle_f32x4::<EVEN>(a[8 + c], a[12 + c]);
        b[12 + c] = _mm512_shuffle_f32x4::<ODD>(a[8 + c], a[12 + c]);
    }
    for c in 0..8 {
        let (low, high) = (_mm512_shuffle_f32x4::<EVEN>(b[c], b[8 + c]), _mm512_shuffle_f32x4::<ODD>(b[c], b[8 + c]));
        // SAFETY: rows of the square that may be written, by the caller's promise.
        unsafe {
            _mm512_storeu_ps(to.add(c * to_stride), low);
            _mm512_storeu_ps(to.add((8 + c) * to_stride), high);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_shapes_are_transposed() {
        for (rows, cols) in [(16, 16), (1, 1), (32, 48), (17, 40), (5, 100), (100, 5), (200, 333), (20_000, 70)] {
            let from: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
            let mut to = vec![f32::NAN; rows * cols];
            transpose_on_all_threads(&mut to, &from, rows, cols);
            for (i, x) in to.iter().enumerate() {
                assert_eq!(*x, from[(i % rows) * cols + i / rows], "{rows} {cols} {i}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "out of bounds")]
    fn a_square_must_lie_within_its_slice() {
        transpose_square(&mut [0.0; 256], 16, &[0.0; 255], 16);
    }
}
