//! Causal attention over the packed projection, and its gradient.
//!
//! A tile of [`QUERIES`] queries meets all its keys at once. Scores are kept transposed, one row a key, so that the
//! softmax runs down the columns, a vector register full of queries at a time, and so that every matrix product
//! finds its operands in the layout it reads fastest. Heads are read and written by strides; nothing is transposed.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Output, SharedMut, Threads, gemm};
use super::simd::{dot, exp, simd};
use super::{contiguous, floats, tensor, unset, with_scratch};
use crate::Heads;

/// Queries in a tile.
pub const QUERIES: usize = 64;

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Dims {
    batch: usize,
    seq: usize,
    heads: Heads,
    d_head: usize,
}

impl Dims {
    fn new(qkv: &FlexTensor, heads: Heads) -> Self {
        let [batch, seq, width] = qkv.layout().shape().dims();
        Self { batch, seq, heads, d_head: heads.d_head(width) }
    }

    /// Width of the output, and of the queries.
    fn d_out(self) -> usize {
        self.heads.queries * self.d_head
    }

    /// Width of the projection, the distance between its rows.
    fn stride(self) -> usize {
        (self.heads.queries + 2 * self.heads.keys) * self.d_head
    }

    /// The first columns of a head of queries and of the keys and values that it meets.
    fn columns(self, head: usize) -> [usize; 3] {
        let Heads { queries, keys } = self.heads;
        let of_keys = queries + head / self.heads.group();
        [head, of_keys, of_keys + keys].map(|head| head * self.d_head)
    }

    fn scale(self) -> f32 {
        1.0 / (self.d_head as f32).sqrt()
    }

    /// Queries, keys and values of head `head` of row `row`, each in a slice that starts there; rows are
    /// [`stride`](Self::stride) apart.
    fn head(self, qkv: &[f32], row: usize, head: usize) -> [&[f32]; 3] {
        let start = row * self.seq * self.stride();
        self.columns(head).map(|column| &qkv[start + column..])
    }
}

/// Which keys the queries of a tile see: query `i` sees `first[i]..=first_query + i`.
pub struct Tile<'a> {
    /// The position of the first query.
    pub first_query: usize,
    /// The first key of each query.
    pub first: &'a [usize],
}

impl Tile<'_> {
    fn n_queries(&self) -> usize {
        self.first.len()
    }

    /// The first key that any query sees.
    fn start(&self) -> usize {
        self.first.iter().copied().min().unwrap_or(0)
    }

    /// One past the last key that any query sees.
    fn end(&self) -> usize {
        self.first_query + self.n_queries()
    }

    /// From the first to the last of them.
    pub fn n_keys(&self) -> usize {
        self.end() - self.start()
    }

    /// The keys that all queries see; may be empty.
    fn seen_by_all(&self) -> std::ops::RangeInclusive<usize> {
        self.first.iter().copied().max().unwrap_or(0)..=self.first_query
    }

    /// For each key with its row of `scores`: which queries see it, `None` for all.
    #[inline(always)]
    fn sees(&self, key: usize, query: usize) -> bool {
        key >= self.first[query] && key <= self.first_query + query
    }
}

/// Attention of all positions; returns the output and the log-sum-exp of the scores, `[batch, seq, n_heads]`.
pub fn forward(qkv: &FlexTensor, first_key: &[usize], heads: Heads) -> (FlexTensor, FlexTensor) {
    let dims = Dims::new(qkv, heads);
    let Dims { batch, seq, d_head, .. } = dims;
    let (n_heads, d_out, stride) = (heads.queries, dims.d_out(), dims.stride());
    let qkv = contiguous(qkv);
    let qkv = floats(&qkv);
    let (mut out, mut lse) = (unset(batch * seq * d_out), unset(batch * seq * n_heads));
    let rows = out.par_chunks_mut((seq * d_out).max(1)).zip(lse.par_chunks_mut((seq * n_heads).max(1)));
    rows.enumerate().for_each(|(row, (out, lse))| {
        let tiles = out.par_chunks_mut(QUERIES * d_out).zip(lse.par_chunks_mut(QUERIES * n_heads));
        tiles.enumerate().for_each(|(i, (out, lse))| {
            let first_query = i * QUERIES;
            let n_queries = out.len() / d_out;
            let tile = Tile { first_query, first: &first_key[row * seq + first_query..][..n_queries] };
            let mut tile_lse = [0.0; QUERIES];
            with_scratch(tile.n_keys() * n_queries, |scores| {
                for head in 0..n_heads {
                    let [queries, keys, values] = dims.head(qkv, row, head);
                    attend(
                        &tile,
                        Mat::rows(&queries[first_query * stride..], n_queries, d_head, stride),
                        (keys, values, stride),
                        scores,
                        MatMut::rows(&mut out[head * d_head..], n_queries, d_head, d_out),
                        &mut tile_lse,
                    );
                    for (lse, tile_lse) in lse.chunks_exact_mut(n_heads).zip(&tile_lse) {
                        lse[head] = *tile_lse;
                    }
                }
            });
        });
    });
    (tensor(out, [batch, seq, d_out]), tensor(lse, [batch, seq, n_heads]))
}

/// One tile of queries of one head.
///
/// `keys_values`: keys and values from position 0, and the distance between their rows. `scores`: room for
/// `n_keys · n_queries` numbers. Writes the output and the log-sum-exp of each query.
pub fn attend(
    tile: &Tile<'_>,
    queries: Mat<'_>,
    keys_values: (&[f32], &[f32], usize),
    scores: &mut [f32],
    mut out: MatMut<'_>,
    lse: &mut [f32; QUERIES],
) {
    let (keys, values, stride) = keys_values;
    let (n_queries, n_keys, start) = (tile.n_queries(), tile.n_keys(), tile.start());
    let (_, d_head) = queries.dims();
    let keys = Mat::rows(&keys[start * stride..], n_keys, d_head, stride);
    let values = Mat::rows(&values[start * stride..], n_keys, d_head, stride);
    let scale = 1.0 / (d_head as f32).sqrt();
    // [n_keys, n_queries]
    let out_scores = MatMut::rows(scores, n_keys, n_queries, n_queries);
    gemm(out_scores, Output::Overwrite, keys, queries.t(), scale, Threads::One);
    let mut sums = [0.0; QUERIES];
    softmax_columns(tile, scores, lse, &mut sums);
    let weights = Mat::rows(scores, n_keys, n_queries, n_queries).t();
    gemm(out.block(0..n_queries, 0..d_head), Output::Overwrite, weights, values, 1.0, Threads::One);
    for (query, sum) in sums[..n_queries].iter().enumerate() {
        scale_row(out.row(query), 1.0 / sum);
    }
}

simd! {
    fn scale_row(row: &mut [f32], factor: f32) {
        for x in row {
            *x *= factor;
        }
    }

    /// `rows_i · others_i`, for rows of `d` numbers, `stride` apart.
    fn dot_rows(dots: &mut [f32], rows: &[f32], others: &[f32], d: usize, stride: usize) {
        for (i, total) in dots.iter_mut().enumerate() {
            *total = dot(&rows[i * stride..][..d], &others[i * stride..][..d]);
        }
    }

    /// Turns scores into `exp(score − max)`, 0 where unseen; gives each query's log-sum-exp and sum.
    fn softmax_columns(tile: &Tile<'_>, scores: &mut [f32], lse: &mut [f32; QUERIES], sums: &mut [f32; QUERIES]) {
        let (n, start) = (tile.n_queries(), tile.start());
        let seen_by_all = tile.seen_by_all();
        let mut highest = [f32::NEG_INFINITY; QUERIES];
        let highest = &mut highest[..n];
        let sums = &mut sums[..n];
        for (key, scores) in (start..).zip(scores.chunks_exact_mut(n)) {
            if !seen_by_all.contains(&key) {
                for (query, score) in scores.iter_mut().enumerate() {
                    *score = if tile.sees(key, query) { *score } else { f32::NEG_INFINITY };
                }
            }
            for (highest, score) in highest.iter_mut().zip(scores) {
                *highest = if *score > *highest { *score } else { *highest };
            }
        }
        for scores in scores.chunks_exact_mut(n) {
            for ((sum, highest), score) in sums.iter_mut().zip(&*highest).zip(scores) {
                let weight = exp(*score - highest);
                *score = weight;
                *sum += weight;
            }
        }
        for ((lse, highest), sum) in lse.iter_mut().zip(highest).zip(sums) {
            *lse = *highest + sum.ln();
        }
    }
}

/// Gradient of `qkv`, from the output, its gradient and the log-sum-exp that [`forward`] gave.
///
/// With `P` the weights: `∂V = Pᵀ ∂O`, `∂P = ∂O Vᵀ`, `∂S = P ∘ (∂P − rowsum(∂O ∘ O)) · scale`, `∂Q = ∂S K`, `∂K = ∂Sᵀ Q`.
pub fn backward(
    qkv: &FlexTensor,
    first_key: &[usize],
    heads: Heads,
    out: &FlexTensor,
    lse: &FlexTensor,
    grad: &FlexTensor,
) -> FlexTensor {
    let dims = Dims::new(qkv, heads);
    let Dims { batch, seq, .. } = dims;
    let (qkv, out, lse, grad) = (contiguous(qkv), contiguous(out), contiguous(lse), contiguous(grad));
    let saved = Saved { qkv: floats(&qkv), out: floats(&out), lse: floats(&lse), grad: floats(&grad) };
    let mut qkv_grad = unset(batch * seq * dims.stride());
    let shared = SharedMut::new(&mut qkv_grad);
    (0..batch * heads.keys).into_par_iter().for_each(|i| {
        let (row, of_keys) = (i / heads.keys, i % heads.keys);
        let first_key = &first_key[row * seq..(row + 1) * seq];
        for head in of_keys * heads.group()..(of_keys + 1) * heads.group() {
            // SAFETY: each task has its own row and head of keys with the heads of queries that meet it, and writes only
            // their columns in that row.
            unsafe { backward_head(dims, &saved, first_key, row, head, shared) };
        }
    });
    tensor(qkv_grad, [batch, seq, dims.stride()])
}

/// Inputs of the backward.
struct Saved<'a> {
    qkv: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
    grad: &'a [f32],
}

/// The gradient of one head of queries of one row, added to those of its keys and values unless it is their first.
///
/// # Safety
/// Nobody else touches the columns of the head, and of the keys and values that it meets, in row `row` of `qkv_grad`.
unsafe fn backward_head(
    dims: Dims,
    saved: &Saved<'_>,
    first_key: &[usize],
    row: usize,
    head: usize,
    qkv_grad: SharedMut<'_>,
) {
    let Dims { seq, heads, d_head, .. } = dims;
    let (n_heads, d_out, stride) = (heads.queries, dims.d_out(), dims.stride());
    let [queries, keys, values] = dims.head(saved.qkv, row, head);
    // SAFETY: within the columns of these heads, which are ours; each result is dropped before the next is made.
    let part = |part: usize, start: usize, n: usize| unsafe {
        qkv_grad.mat((row * seq + start) * stride + dims.columns(head)[part], n, d_head, stride)
    };
    if head.is_multiple_of(heads.group()) {
        for kind in [1, 2] {
            let mut all = part(kind, 0, seq);
            (0..seq).for_each(|position| all.row(position).fill(0.0));
        }
    }
    for first_query in (0..seq).step_by(QUERIES) {
        let n_queries = QUERIES.min(seq - first_query);
        let tile = Tile { first_query, first: &first_key[first_query..first_query + n_queries] };
        let (start, n_keys) = (tile.start(), tile.n_keys());
        let position = row * seq + first_query;
        let grad = &saved.grad[position * d_out + head * d_head..];
        let out = &saved.out[position * d_out + head * d_head..];
        let (mut lse, mut delta) = ([0.0; QUERIES], [0.0; QUERIES]);
        for (query, lse) in lse[..n_queries].iter_mut().enumerate() {
            *lse = saved.lse[(position + query) * n_heads + head];
        }
        dot_rows(&mut delta[..n_queries], grad, out, d_head, d_out);
        let grad = Mat::rows(grad, n_queries, d_head, d_out);
        let queries = Mat::rows(&queries[first_query * stride..], n_queries, d_head, stride);
        let keys = Mat::rows(&keys[start * stride..], n_keys, d_head, stride);
        let values = Mat::rows(&values[start * stride..], n_keys, d_head, stride);
        with_scratch(2 * n_keys * n_queries, |scratch| {
            let (weights, slopes) = scratch.split_at_mut(n_keys * n_queries); // both [n_keys, n_queries]
            let tile_mat = |data| MatMut::rows(data, n_keys, n_queries, n_queries);
            gemm(tile_mat(weights), Output::Overwrite, keys, queries.t(), dims.scale(), Threads::One);
            gemm(tile_mat(slopes), Output::Overwrite, values, grad.t(), 1.0, Threads::One);
            score_gradients(&tile, weights, slopes, &lse, &delta, dims.scale());
            let weights = Mat::rows(weights, n_keys, n_queries, n_queries);
            let slopes = Mat::rows(slopes, n_keys, n_queries, n_queries);
            gemm(part(0, first_query, n_queries), Output::Overwrite, slopes.t(), keys, 1.0, Threads::One);
            gemm(part(1, start, n_keys), Output::Accumulate, slopes, queries, 1.0, Threads::One);
            gemm(part(2, start, n_keys), Output::Accumulate, weights, grad, 1.0, Threads::One);
        });
    }
}

simd! {
    /// Turns scores into weights, and gradients of weights into gradients of the unscaled scores.
    fn score_gradients(
        tile: &Tile<'_>,
        weights: &mut [f32],
        slopes: &mut [f32],
        lse: &[f32; QUERIES],
        delta: &[f32; QUERIES],
        scale: f32,
    ) {
        let n = tile.n_queries();
        let seen_by_all = tile.seen_by_all();
        let (lse, delta) = (&lse[..n], &delta[..n]);
        for (key, (weights, slopes)) in (tile.start()..).zip(weights.chunks_exact_mut(n).zip(slopes.chunks_exact_mut(n))) {
            if !seen_by_all.contains(&key) {
                for (query, weight) in weights.iter_mut().enumerate() {
                    *weight = if tile.sees(key, query) { *weight } else { f32::NEG_INFINITY };
                }
            }
            for (((weight, slope), lse), delta) in weights.iter_mut().zip(slopes).zip(lse).zip(delta) {
                *weight = exp(*weight - lse);
                *slope = *weight * (*slope - delta) * scale;
            }
        }
    }
}
