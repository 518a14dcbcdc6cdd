//! Attention of new positions over the cache of keys and values.
//!
//! Keys are kept transposed, all positions' numbers of one dimension side by side: the scores of a query then fill
//! vector registers, and no sum runs across one.

use burn_flex::FlexTensor;

use super::attention::{QUERIES, Tile, attend};
use super::gemm::{Mat, SharedMut};
use super::simd::{add_up, exp, fma, simd};
use super::workers::for_each;
use super::{contiguous, exclusive, floats, tensor, unset, with_scratch};
use crate::Heads;

/// Multiplications below which a task is not worth handing to another thread.
const TASK: usize = 1 << 14;

/// Columns of the output that are summed in registers at a time.
const COLUMNS: usize = 32;

/// Writes the new keys and values into the cache, each row's behind its `cached` earlier positions, then attends to it.
pub fn attention_cached(
    qkv: &FlexTensor,
    keys: FlexTensor,
    values: FlexTensor,
    cached: &[usize],
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let [batch, new, width] = qkv.layout().shape().dims();
    let [_, n_kv_heads, d_head, _] = keys.layout().shape().dims();
    let heads = Heads { queries: width / d_head - 2 * n_kv_heads, keys: n_kv_heads };
    let d_out = heads.queries * d_head;
    let qkv = contiguous(qkv);
    let [mut keys, mut values] = [keys, values].map(exclusive);
    let mut out = unset(batch * new * d_out);
    let cache = [keys.storage_mut(), values.storage_mut()];
    attend_to_rows(&mut out, floats(&qkv), cache, (heads, d_head), cached);
    (tensor(out, [batch, new, d_out]), keys, values)
}

/// [`attention_cached`] over plain slices: of the projection, and of the keys and values of as many rows as `cached` has.
pub fn attend_to_rows(
    out: &mut [f32],
    qkv: &[f32],
    [keys, values]: [&mut [f32]; 2],
    (heads, d_head): (Heads, usize),
    cached: &[usize],
) {
    let Heads { queries: n_heads, keys: n_kv_heads } = heads;
    let (batch, group, d_out) = (cached.len(), heads.group(), n_heads * d_head);
    let width = d_out + 2 * n_kv_heads * d_head;
    let new = qkv.len() / (batch * width).max(1);
    let capacity = keys.len() / (batch * n_kv_heads * d_head).max(1);
    let shared = [out, keys, values].map(SharedMut::new);
    let longest = cached.iter().max().copied().unwrap_or(0) + new;
    let work = (2 * new * longest * d_head * group).max(1);
    let n_each = (TASK / work).max(1);
    for_each((batch * n_kv_heads).div_ceil(n_each), |task| {
        for i in task * n_each..(batch * n_kv_heads).min((task + 1) * n_each) {
            let (row, of_keys) = (i / n_kv_heads, i % n_kv_heads);
            let cached = cached[row];
            let of_cache = i * capacity * d_head;
            let first_head = of_keys * group;
            let start = row * new * d_out + first_head * d_head;
            // SAFETY: each task has its own rows and heads, and touches only these numbers of the two caches.
            let (keys, values) =
                unsafe { (shared[1].slice(of_cache, capacity * d_head), shared[2].slice(of_cache, capacity * d_head)) };
            let qkv = &qkv[row * new * width..];
            let columns = [n_heads + of_keys, n_heads + n_kv_heads + of_keys].map(|head| head * d_head);
            append(qkv, (columns, width), (keys, values), cached, new, d_head);
            let queries = &qkv[first_head * d_head..];
            if new == 1 {
                // SAFETY: as above, of these heads' numbers of that row's output.
                let out = unsafe { shared[0].slice(start, group * d_head) };
                let values = &values[..(cached + 1) * d_head];
                with_scratch(cached + 1, |weights| {
                    for (query, out) in queries.chunks_exact(d_head).zip(out.chunks_exact_mut(d_head)) {
                        attend_one(query, keys, capacity, values, weights, out);
                    }
                });
                continue;
            }
            let n_keys = cached + new;
            with_scratch(n_keys * (QUERIES.min(new) + d_head), |scratch| {
                let (rows, scores) = scratch.split_at_mut(n_keys * d_head);
                // Of a row that begins here, keys and values lie in the projection as they are needed.
                let keys_values = if cached == 0 {
                    (&qkv[columns[0]..], &qkv[columns[1]..], width)
                } else {
                    for (position, row) in rows.chunks_exact_mut(d_head).enumerate() {
                        row.iter_mut()
                            .zip(keys[position..].iter().step_by(capacity))
                            .for_each(|(to, from)| *to = *from);
                    }
                    (&*rows, &*values, d_head)
                };
                for (head, first_query) in (0..group).flat_map(|h| (0..new).step_by(QUERIES).map(move |q| (h, q))) {
                    let n_queries = QUERIES.min(new - first_query);
                    let tile = Tile { first_query: cached + first_query, first: &[0; QUERIES][..n_queries] };
                    let queries = Mat::rows(&queries[first_query * width + head * d_head..], n_queries, d_head, width);
                    let start = start + first_query * d_out + head * d_head;
                    // SAFETY: as above.
                    let out = unsafe { shared[0].mat(start, n_queries, d_head, d_out) };
                    let scores = &mut scores[..tile.n_keys() * n_queries];
                    attend(&tile, queries, keys_values, scores, out, &mut [0.0; QUERIES]);
                }
            });
        }
    });
}

/// Copies keys and values of `new` positions into one head's cache, from position `cached` on.
///
/// `qkv` begins at the row's first position; `place`: the first columns of the key and the value, and the distance from one
/// position to the next.
fn append(
    qkv: &[f32],
    ([of_key, of_value], stride): ([usize; 2], usize),
    (keys, values): (&mut [f32], &mut [f32]),
    cached: usize,
    new: usize,
    d_head: usize,
) {
    let capacity = keys.len() / d_head;
    for position in 0..new {
        let key = &qkv[position * stride + of_key..][..d_head];
        let value = &qkv[position * stride + of_value..][..d_head];
        for (column, number) in keys.chunks_exact_mut(capacity).zip(key) {
            column[cached + position] = *number;
        }
        values[(cached + position) * d_head..][..d_head].copy_from_slice(value);
    }
}

simd! {
    /// One query against `weights.len()` keys and values.
    ///
    /// `keys`: `[d_head, n]`, rows `stride` apart; `values`: `[n, d_head]` without gaps.
    fn attend_one(
        query: &[f32],
        keys: &[f32],
        stride: usize,
        values: &[f32],
        weights: &mut [f32],
        out: &mut [f32],
    ) {
        const N: usize = 16;
        let (d_head, n_keys) = (query.len(), weights.len());
        let scale = 1.0 / (d_head as f32).sqrt();
        weights.fill(0.0);
        let (fours, rest) = query.as_chunks::<4>();
        for (i, query) in fours.iter().enumerate() {
            let row = |j: usize| &keys[(4 * i + j) * stride..][..n_keys];
            let keys = row(0).iter().zip(row(1)).zip(row(2)).zip(row(3));
            for (weight, (((k_0, k_1), k_2), k_3)) in weights.iter_mut().zip(keys) {
                *weight = fma(query[3], *k_3, fma(query[2], *k_2, fma(query[1], *k_1, fma(query[0], *k_0, *weight))));
            }
        }
        for (i, query) in rest.iter().enumerate() {
            let keys = &keys[(4 * fours.len() + i) * stride..][..n_keys];
            for (weight, key) in weights.iter_mut().zip(keys) {
                *weight = fma(*query, *key, *weight);
            }
        }

        let (chunks, others) = weights.as_chunks_mut::<N>();
        let mut highest = [f32::NEG_INFINITY; N];
        for chunk in chunks.iter() {
            for lane in 0..N {
                highest[lane] = if chunk[lane] > highest[lane] { chunk[lane] } else { highest[lane] };
            }
        }
        let highest = highest.iter().chain(others.iter()).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let mut totals = [0.0f32; N];
        for chunk in chunks.iter_mut() {
            for lane in 0..N {
                chunk[lane] = exp((chunk[lane] - highest) * scale);
                totals[lane] += chunk[lane];
            }
        }
        let mut total = add_up(totals);
        for weight in others {
            *weight = exp((*weight - highest) * scale);
            total += *weight;
        }
        let inverse = 1.0 / total;

        for (start, out) in (0..d_head).step_by(COLUMNS).zip(out.chunks_mut(COLUMNS)) {
            if out.len() == COLUMNS {
                // Two sums in turn, so that one addition need not wait for the last.
                let (mut even, mut odd) = ([0.0f32; COLUMNS], [0.0f32; COLUMNS]);
                let (pairs, last) = weights.as_chunks::<2>();
                for (weights, values) in pairs.iter().zip(values.chunks_exact(2 * d_head)) {
                    let (first, second) = (&values[start..start + COLUMNS], &values[d_head + start..][..COLUMNS]);
                    for lane in 0..COLUMNS {
                        even[lane] = fma(weights[0], first[lane], even[lane]);
                        odd[lane] = fma(weights[1], second[lane], odd[lane]);
                    }
                }
                if let [weight] = last {
                    let value = &values[(n_keys - 1) * d_head + start..][..COLUMNS];
                    for lane in 0..COLUMNS {
                        even[lane] = fma(*weight, value[lane], even[lane]);
                    }
                }
                for lane in 0..COLUMNS {
                    out[lane] = (even[lane] + odd[lane]) * inverse;
                }
            } else {
                out.fill(0.0);
                for (weight, value) in weights.iter().zip(values.chunks_exact(d_head)) {
                    for (out, value) in out.iter_mut().zip(&value[start..]) {
                        *out = fma(*weight * inverse, *value, *out);
                    }
                }
            }
        }
    }
}
