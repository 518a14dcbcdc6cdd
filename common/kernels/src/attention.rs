//! Attention over the packed projection, and the positions of its queries and keys.

// Without the flex backend there is nothing to choose.
#![cfg_attr(not(feature = "flex"), allow(unused_variables))]

use burn::tensor::{Int, Tensor};

use super::tap::{self, Call, Operation};
use super::{Kernels, plain};

#[cfg(feature = "flex")]
use super::autodiff::FusedOps as _;
#[cfg(feature = "flex")]
use super::is_fused;
#[cfg(feature = "flex")]
use burn::backend::Dispatch;

/// Heads of a projection: queries, keys and values side by side, each head after head.
///
/// # Source
/// Grouped queries: Ainslie et al., arXiv:2305.13245.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Of queries.
    pub queries: usize,
    /// Of keys, and as many of values; each serves as many heads of queries, neighbours, as there are for it.
    pub keys: usize,
}

impl From<usize> for Heads {
    /// As many heads of keys as of queries.
    fn from(n_heads: usize) -> Self {
        Self { queries: n_heads, keys: n_heads }
    }
}

impl Heads {
    /// Width of a head in a projection of `width` columns.
    ///
    /// # Panics
    /// If the columns do not hold these heads.
    pub fn d_head(self, width: usize) -> usize {
        let Self { queries, keys } = self;
        assert!(keys > 0 && queries % keys == 0, "{queries} heads of queries for {keys} of keys");
        let n_heads = queries + 2 * keys;
        assert_eq!(width % n_heads, 0, "{width} columns do not hold queries, keys and values of {self:?}");
        width / n_heads
    }

    /// Heads of queries for each of keys.
    pub fn group(self) -> usize {
        self.queries / self.keys
    }
}

/// Causal multi-head self-attention over the packed projection.
///
/// Query `t` of row `b` sees keys `first_key[b][t]..=t`: 0 for a row padded behind, the start of the document in a packed
/// one. Scores are divided by `√d_head`.
///
/// # Shapes
/// - `qkv`: `[batch, seq, (queries + 2 · keys) · d_head]`, see [`Heads`]
/// - `first_key`: `[batch, seq]`, at most `t` in column `t`; `None` = 0 everywhere
/// - `dropout`: `[batch, queries, seq, seq]`, factors on the attention weights (0 or `1 / (1 − p)`); always plain
/// - returns `[batch, seq, queries · d_head]`
///
/// # Panics
/// If the shapes do not fit; fused, also if `first_key[b][t] > t`, where plain gives NaN rather than wait for the device.
///
/// # Source
/// Vaswani et al., arXiv:1706.03762. The fused version keeps a tile of scores at a time and recomputes them in the
/// backward from the saved log-sum-exp, as Dao et al., arXiv:2205.14135.
pub fn attention(
    kernels: Kernels,
    qkv: Tensor<3>,
    first_key: Option<Tensor<2, Int>>,
    heads: impl Into<Heads>,
    dropout: Option<Tensor<4>>,
) -> Tensor<3> {
    let heads = heads.into();
    let [batch, seq, width] = qkv.dims();
    let _ = heads.d_head(width);
    if let Some(first_key) = &first_key {
        assert_eq!(first_key.dims(), [batch, seq], "first_key does not fit qkv");
    }
    tap::call(|| Call::new(Operation::Attention { first_key: first_key.clone(), heads }, [(&qkv).into()]));
    #[cfg(feature = "flex")]
    if dropout.is_none() && is_fused(kernels, &qkv) {
        let first_key = first_key.map_or_else(|| vec![0; batch * seq], first_keys);
        return Tensor::from_dispatch(Dispatch::fused_attention(qkv.into_dispatch(), first_key, heads));
    }
    plain::attention(&qkv, first_key, heads, dropout)
}

/// Attention of new positions over a cache of keys and values, for decoding; not differentiable.
///
/// The keys and values of row `b`'s new positions are written at indices `cached[b]..cached[b] + new`, in place if
/// nobody else holds the cache. New position `i` then sees keys `0..=cached[b] + i` of its row. There are as many heads of
/// queries as `qkv` has columns for.
///
/// # Shapes
/// - `qkv`: `[batch, new, (queries + 2 · n_kv_heads) · d_head]`, see [`Heads`]
/// - `keys`: `[batch, n_kv_heads, d_head, capacity]`, `values`: `[batch, n_kv_heads, capacity, d_head]`; what lies beyond
///   a row's positions has no weight, but must be finite
/// - `cached`: `[batch]`, how many positions each row holds already
/// - returns `([batch, new, queries · d_head], keys, values)`
///
/// # Panics
/// If the shapes do not fit or a row's `cached + new > capacity`.
pub fn attention_cached(
    kernels: Kernels,
    qkv: Tensor<3>,
    keys: Tensor<4>,
    values: Tensor<4>,
    cached: &[usize],
) -> (Tensor<3>, Tensor<4>, Tensor<4>) {
    let [batch, new, width] = qkv.dims();
    let [_, n_kv_heads, d_head, capacity] = keys.dims();
    let heads = Heads { queries: (width / d_head).saturating_sub(2 * n_kv_heads), keys: n_kv_heads };
    assert!(heads.queries > 0 && heads.d_head(width) == d_head, "qkv does not fit the cache");
    assert_eq!(keys.dims(), [batch, n_kv_heads, d_head, capacity], "the cache has another batch");
    assert_eq!(values.dims(), [batch, n_kv_heads, capacity, d_head], "keys and values do not fit each other");
    assert_eq!(cached.len(), batch, "one number of cached positions a row");
    let longest = cached.iter().max().copied().unwrap_or(0);
    assert!(longest + new <= capacity, "{longest} + {new} positions do not fit a cache of {capacity}");
    #[cfg(feature = "flex")]
    if is_fused(kernels, &qkv) {
        let (out, keys, values) =
            Dispatch::fused_attention_cached(qkv.into_dispatch(), keys.into_dispatch(), values.into_dispatch(), cached);
        return (Tensor::from_dispatch(out), Tensor::from_dispatch(keys), Tensor::from_dispatch(values));
    }
    plain::attention_cached(&qkv, keys, values, cached, heads)
}

/// Cosines and sines of the angles of positions, each `[batch or 1, seq, n_rotated / 2]`.
#[derive(Debug, Clone)]
pub struct Angles {
    /// Of every angle.
    pub cos: Tensor<3>,
    /// Of every angle.
    pub sin: Tensor<3>,
}

/// Turns pairs of channels of each query and key by the angles of its position: channel `i` of a head with channel
/// `i + n/2` of the first `n`, where `n` is twice the width of the tables; the channels behind stay, and so do the values.
///
/// Fused, the projection is changed in place if nobody else holds it, and so is its gradient.
///
/// # Shapes
/// - `qkv`: `[batch, seq, (queries + 2 · keys) · d_head]`, see [`Heads`]; the result too
///
/// # Panics
/// If the shapes do not fit.
///
/// # Source
/// Su et al., arXiv:2104.09864, with the pairs of transformers' `rotate_half`.
pub fn rotate(kernels: Kernels, qkv: Tensor<3>, heads: Heads, angles: &Angles) -> Tensor<3> {
    let [batch, seq, width] = qkv.dims();
    let [n_rows, n_positions, half] = angles.cos.dims();
    assert!(n_rows == 1 || n_rows == batch, "angles of {n_rows} rows for {batch}");
    assert_eq!((n_positions, angles.sin.dims()), (seq, angles.cos.dims()), "angles that do not fit qkv");
    assert!(2 * half <= heads.d_head(width), "{half} pairs in a head of {}", heads.d_head(width));
    tap::call(|| Call::new(Operation::Rotate { heads, angles: angles.clone() }, [(&qkv).into()]));
    #[cfg(feature = "flex")]
    if is_fused(kernels, &qkv) {
        let (cos, sin) = (angles.cos.clone().into_dispatch(), angles.sin.clone().into_dispatch());
        return Tensor::from_dispatch(Dispatch::fused_rotate(qkv.into_dispatch(), heads, cos, sin));
    }
    plain::rotate(&qkv, heads, angles)
}

/// The first key of each position on the host.
///
/// # Panics
/// If a query's first key comes after the query.
#[cfg(feature = "flex")]
fn first_keys(first_key: Tensor<2, Int>) -> Vec<usize> {
    let [_, seq] = first_key.dims();
    let check = |(i, first): (usize, i64)| {
        let query = i % seq;
        assert!((0..=query as i64).contains(&first), "query {query} with first key {first} sees no key");
        first as usize
    };
    first_key.into_data().iter::<i64>().enumerate().map(check).collect()
}
