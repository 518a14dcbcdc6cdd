//! A row of a table for each token, or the sum of two, and the gradients.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::gemm::SharedMut;
use super::linear::add_numbers;
use super::stored::{Stored, widen, with_numbers};
use super::{contiguous, exclusive, floats, indices, matrix_dims, tensor, unset};

/// Tokens handled by one task of the forward.
const TOKENS: usize = 256;

/// Columns handled by one task of the backward.
const COLUMNS: usize = 32;

/// Which row of its table each token takes, in order.
pub type Rows = Vec<usize>;

/// The ids as rows of a table of `n_rows`.
///
/// # Panics
/// If an id is not below `n_rows`.
pub fn rows_of(ids: &FlexTensor, n_rows: usize) -> Rows {
    let rows = indices(ids);
    let wrong = rows.iter().find(|&&row| row >= n_rows);
    assert!(wrong.is_none(), "id {wrong:?} in a table of {n_rows} rows");
    rows
}

/// `out_i = tokens[ids_i] + position_table[positions_i]`, of the shape `[batch, seq, d]`.
pub fn forward(
    tokens: &FlexTensor,
    position_table: &FlexTensor,
    ids: &Rows,
    positions: &Rows,
    shape: [usize; 2],
) -> FlexTensor {
    let (_, d) = matrix_dims(tokens);
    let (tokens, position_table) = (contiguous(tokens), contiguous(position_table));
    let out = with_numbers!(tokens of tokens => placed(tokens, floats(&position_table), d, ids, positions));
    tensor(out, [shape[0], shape[1], d])
}

fn placed<T: Stored>(tokens: &[T], position_table: &[f32], d: usize, ids: &Rows, positions: &Rows) -> Vec<f32> {
    let mut out = unset(ids.len() * d);
    let rows = ids.par_chunks(TOKENS).zip(positions.par_chunks(TOKENS));
    out.par_chunks_mut((TOKENS * d).max(1)).zip(rows).for_each(|(out, (ids, positions))| {
        for ((out, id), position) in out.chunks_exact_mut(d).zip(ids).zip(positions) {
            widen(out, &tokens[id * d..][..d]);
            add_numbers(out, &position_table[position * d..][..d]);
        }
    });
    out
}

/// `out_i = tokens[ids_i]`, of the shape `[batch, seq, d]`.
pub fn lookup(tokens: &FlexTensor, ids: &Rows, shape: [usize; 2]) -> FlexTensor {
    let (_, d) = matrix_dims(tokens);
    let tokens = contiguous(tokens);
    let mut out = unset(ids.len() * d);
    with_numbers!(tokens of tokens => {
        for (out, id) in out.chunks_exact_mut(d.max(1)).zip(ids) {
            widen(out, &tokens[id * d..][..d]);
        }
    });
    tensor(out, [shape[0], shape[1], d])
}

/// Adds row `i` of `grad` to row `rows_i` of the gradient of a table, which begins as `total` or as zeros.
///
/// A task has its own columns and takes the tokens in their order, so that every sum has one order.
pub fn backward(n_rows: usize, total: Option<FlexTensor>, rows: &Rows, grad: &FlexTensor) -> FlexTensor {
    let (_, d) = matrix_dims(grad);
    let grad = contiguous(grad);
    let grad = floats(&grad);
    let mut total = total.map_or_else(|| tensor(vec![0.0; n_rows * d], [n_rows, d]), exclusive);
    let shared = SharedMut::new(total.storage_mut::<f32>());
    (0..d.div_ceil(COLUMNS)).into_par_iter().for_each(|i| {
        let first = i * COLUMNS;
        let n = COLUMNS.min(d - first);
        for (row, grad) in rows.iter().zip(grad.chunks_exact(d)) {
            // SAFETY: tasks have different columns.
            let to = unsafe { shared.slice(row * d + first, n) };
            add_numbers(to, &grad[first..first + n]);
        }
    });
    total
}
