//! Attention of new positions over the cache of keys and values.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::attention::{QUERIES, Tile, attend};
use super::gemm::{Mat, SharedMut};
use super::simd::{add_up, exp, fma, simd};
use super::{contiguous, floats, tensor, unset, with_scratch};

/// Multiplications below which a task is not worth handing to another thread.
const TASK: usize = 1 << 16;

/// Columns of the output that are summed in registers at a time.
const COLUMNS: usize = 16;

/// Writes the new keys and values into the cache, then attends to it.
pub fn attention_cached(
    qkv: &FlexTensor,
    keys: FlexTensor,
    values: FlexTensor,
    cached: usize,
    first_key: &[usize],
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let [batch, new, width] = qkv.layout().shape().dims();
    let [_, n_heads, capacity, d_head] = keys.layout().shape().dims();
    let d_model = width / 3;
    let qkv_tensor = contiguous(qkv);
    let qkv = floats(&qkv_tensor);
    let mut caches = [keys, values].map(|cache| {
        let exact = cache.is_contiguous() && cache.bytes().len() == 4 * cache.layout().num_elements();
        if exact { cache } else { contiguous(&cache) }
    });
    for (part, cache) in caches.iter_mut().enumerate() {
        let cache = cache.storage_mut::<f32>();
        for (i, cache) in cache.chunks_exact_mut(capacity * d_head).enumerate() {
            let (row, head) = (i / n_heads, i % n_heads);
            for (position, cache) in cache[cached * d_head..].chunks_exact_mut(d_head).take(new).enumerate() {
                let start = (row * new + position) * width + (part + 1) * d_model + head * d_head;
                cache.copy_from_slice(&qkv[start..start + d_head]);
            }
        }
    }
    let [keys, values] = caches;
    let mut out = unset(batch * new * d_model);
    let shared = SharedMut::new(&mut out);
    let work = (2 * new * (cached + new) * d_head).max(1);
    (0..batch * n_heads).into_par_iter().with_min_len((TASK / work).max(1)).for_each(|i| {
        let (row, head) = (i / n_heads, i % n_heads);
        let span = i * capacity * d_head..(i + 1) * capacity * d_head;
        let (keys, values) = (&floats(&keys)[span.clone()], &floats(&values)[span]);
        let queries = &qkv[row * new * width + head * d_head..];
        let start = row * new * d_model + head * d_head;
        if new == 1 {
            // SAFETY: each task has its own row and head, and writes only that head's numbers of that row.
            let out = unsafe { shared.slice(start, d_head) };
            let first = first_key[row].min(cached) * d_head;
            let end = (cached + 1) * d_head;
            attend_one(&queries[..d_head], &keys[first..end], &values[first..end], out);
            return;
        }
        for first_query in (0..new).step_by(QUERIES) {
            let n_queries = QUERIES.min(new - first_query);
            let mut first = [0; QUERIES];
            for (query, first) in first[..n_queries].iter_mut().enumerate() {
                *first = first_key[row].min(cached + first_query + query);
            }
            let tile = Tile { first_query: cached + first_query, first: &first[..n_queries] };
            let queries = Mat::rows(&queries[first_query * width..], n_queries, d_head, width);
            // SAFETY: as above.
            let out = unsafe { shared.mat(start + first_query * d_model, n_queries, d_head, d_model) };
            with_scratch((cached + new) * n_queries, |scores| {
                attend(&tile, queries, (keys, values, d_head), scores, out, &mut [0.0; QUERIES]);
            });
        }
    });
    (tensor(out, [batch, new, d_model]), keys, values)
}

/// One query against `n` keys and values, each `[n, d_head]` without gaps.
fn attend_one(query: &[f32], keys: &[f32], values: &[f32], out: &mut [f32]) {
    let n_keys = keys.len() / query.len();
    with_scratch(n_keys, |weights| {
        attend_one_body(query, keys, values, weights, out);
    });
}

simd! {
    fn attend_one_body(query: &[f32], keys: &[f32], values: &[f32], weights: &mut [f32], out: &mut [f32]) {
        let d_head = query.len();
        let scale = 1.0 / (d_head as f32).sqrt();
        let mut highest = f32::NEG_INFINITY;
        for (weight, key) in weights.iter_mut().zip(keys.chunks_exact(d_head)) {
            *weight = short_dot(query, key) * scale;
            highest = if *weight > highest { *weight } else { highest };
        }
        let mut total = 0.0;
        for weight in weights.iter_mut() {
            *weight = exp(*weight - highest);
        }
        for weight in weights.iter() {
            total += weight;
        }
        let inverse = 1.0 / total;
        for (start, out) in (0..d_head).step_by(COLUMNS).zip(out.chunks_mut(COLUMNS)) {
            if out.len() == COLUMNS {
                let mut totals = [0.0f32; COLUMNS];
                for (weight, value) in weights.iter().zip(values.chunks_exact(d_head)) {
                    let value = &value[start..start + COLUMNS];
                    for lane in 0..COLUMNS {
                        totals[lane] = fma(*weight, value[lane], totals[lane]);
                    }
                }
                for (out, total) in out.iter_mut().zip(totals) {
                    *out = total * inverse;
                }
            } else {
                out.fill(0.0);
                for (weight, value) in weights.iter().zip(values.chunks_exact(d_head)) {
                    for (out, value) in out.iter_mut().zip(&value[start..]) {
                        *out += weight * value * inverse;
                    }
                }
            }
        }
    }
}

/// A dot product of few numbers, in 16 lanes.
#[inline(always)]
fn short_dot(x: &[f32], y: &[f32]) -> f32 {
    const N: usize = 16;
    let mut totals = [0.0f32; N];
    let (x_chunks, x_rest) = x.as_chunks::<N>();
    let (y_chunks, y_rest) = y.as_chunks::<N>();
    for (x, y) in x_chunks.iter().zip(y_chunks) {
        for lane in 0..N {
            totals[lane] = fma(x[lane], y[lane], totals[lane]);
        }
    }
    for (total, (x, y)) in totals.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *total = fma(*x, *y, *total);
    }
    add_up(totals)
}
