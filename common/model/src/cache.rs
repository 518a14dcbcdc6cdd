//! Keys and values of earlier positions, kept between decoding steps.

use burn::tensor::{Int, Tensor, TensorData, s};

use super::Gpt;
use kernels::Kernels;

/// Positions that there is room for are a multiple of this, so that each row of keys begins where a cache line does.
const ALIGNED: usize = 16;

/// The keys and values of every layer for a batch of rows, each of its own length.
///
/// Token `t` of a row lies at index `t`, whatever the lengths of the others.
#[derive(Debug, Clone)]
pub struct Cache {
    pub(super) layers: Vec<LayerCache>,
    /// Positions filled, of each row.
    pub(super) lens: Vec<usize>,
    capacity: usize,
}

/// One layer's part of a [`Cache`]: keys `[n_rows, n_kv_heads, d_head, capacity]`, values `[n_rows, n_kv_heads, capacity,
/// d_head]`.
#[derive(Debug, Clone)]
pub(super) struct LayerCache {
    /// Taken out while the layer runs, so that it is the only owner and can be written in place.
    pub(super) keys_values: Option<(Tensor<4>, Tensor<4>)>,
}

impl LayerCache {
    /// Attention of new positions over what is kept and themselves, which are appended behind `cached` positions of each row.
    pub(super) fn attend(&mut self, kernels: Kernels, qkv: Tensor<3>, cached: &[usize]) -> Tensor<3> {
        let (keys, values) = self.keys_values.take().expect("each layer's cache is put back after use");
        let (mixed, keys, values) = kernels::attention_cached(kernels, qkv, keys, values, cached);
        self.keys_values = Some((keys, values));
        mixed
    }
}

/// Positions of a sequence that are attended to together where sequences are read in parts: parts end at its multiples or with
/// their sequences, so that no number depends on how a sequence is cut.
pub const CHUNK: usize = 32;

/// Where a pass finds the keys and values of earlier positions.
pub(super) enum Kept<'a> {
    /// Each row of the batch in a row of one cache.
    Rows(&'a mut Cache),
    /// Sequences one after the other in one row, so many positions of each, with a cache of one row each.
    Parts(Vec<(&'a mut Cache, usize)>),
}

impl Kept<'_> {
    /// Attention of a layer's new positions over the earlier ones and themselves, which are kept; of spare rows, zeros.
    ///
    /// # Shapes
    /// - `qkv`: `[batch, seq, (n_heads + 2·n_kv_heads)·d_head]`
    /// - returns `[batch, seq, n_heads·d_head]`
    pub(super) fn attend(&mut self, kernels: Kernels, qkv: Tensor<3>, layer: usize) -> Tensor<3> {
        let parts = match self {
            Self::Rows(cache) => return cache.layers[layer].attend(kernels, qkv, &cache.lens),
            Self::Parts(parts) => parts,
        };
        let [batch, seq, _] = qkv.dims();
        let mut mixed: Vec<Tensor<3>> = Vec::new();
        let mut at = 0;
        for (cache, n) in parts {
            let (end, mut cached) = (at + *n, cache.lens[0]);
            while at < end {
                let n = (CHUNK - cached % CHUNK).min(end - at);
                let chunk = qkv.clone().slice(s![.., at..at + n]);
                mixed.push(cache.layers[layer].attend(kernels, chunk, &[cached]));
                at += n;
                cached += n;
            }
        }
        if at < seq {
            let first = mixed.first().expect("there is a position");
            let [.., width] = first.dims();
            mixed.push(Tensor::zeros([batch, seq - at, width], (&first.device(), first.dtype())));
        }
        Tensor::cat(mixed, 1)
    }
}

impl Cache {
    /// `n_rows` empty rows with room for `capacity` positions each.
    ///
    /// # Panics
    /// If the model's context is shorter than `capacity`.
    pub fn new(gpt: &Gpt, n_rows: usize, capacity: usize) -> Self {
        let config = gpt.config();
        assert!(capacity <= config.max_seq_len, "{capacity} positions exceed the context of {}", config.max_seq_len);
        let (n_heads, d_head) = (config.n_kv_heads(), config.d_head());
        let room = capacity.next_multiple_of(ALIGNED);
        let device = gpt.device();
        let zeros = |shape: [usize; 4]| gpt.precision().narrow(Tensor::zeros(shape, &device));
        let layer = || (zeros([n_rows, n_heads, d_head, room]), zeros([n_rows, n_heads, room, d_head]));
        let layers = (0..config.n_layers).map(|_| LayerCache { keys_values: (n_rows > 0).then(layer) }).collect();
        Self { layers, lens: vec![0; n_rows], capacity }
    }

    /// How many rows there are.
    pub fn n_rows(&self) -> usize {
        self.lens.len()
    }

    /// How many positions of each row are filled.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// How many positions fit into a row.
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets the positions of a row from `len` on; a row of 0 is as good as new.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn truncate(&mut self, row: usize, len: usize) {
        self.lens[row] = self.lens[row].min(len);
    }

    /// Forgets the positions of a row and the numbers in them.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn clear_row(&mut self, row: usize) {
        self.lens[row] = 0;
        for layer in &mut self.layers {
            layer.keys_values = layer.keys_values.take().map(|(keys, values)| {
                let clear = |tensor: Tensor<4>| {
                    let [_, n_heads, a, b] = tensor.dims();
                    let zeros = Tensor::zeros([1, n_heads, a, b], (&tensor.device(), tensor.dtype()));
                    tensor.slice_assign(s![row..row + 1], zeros)
                };
                (clear(keys), clear(values))
            });
        }
    }

    /// Keeps the rows `rows`, in that order; a row may be named twice (beams) or not at all (finished sequences).
    ///
    /// # Panics
    /// If a row does not exist.
    pub fn keep_rows(&mut self, rows: &[usize]) {
        if rows.iter().copied().eq(0..self.n_rows()) {
            return;
        }
        let indices: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        self.lens = rows.iter().map(|&row| self.lens[row]).collect();
        for layer in &mut self.layers {
            layer.keys_values = layer.keys_values.take().map(|(keys, values)| {
                let data = TensorData::new(indices.clone(), [indices.len()]);
                let indices = Tensor::<1, Int>::from_data(data, &keys.device());
                (keys.select(0, indices.clone()), values.select(0, indices))
            });
        }
    }

    /// Appends the rows of `other`.
    ///
    /// # Panics
    /// If it is another model's, or has another capacity.
    pub fn append(&mut self, other: Self) {
        assert_eq!(self.capacity, other.capacity, "caches of different capacities");
        if self.lens.is_empty() {
            *self = other;
            return;
        }
        self.lens.extend(other.lens);
        for (layer, other) in self.layers.iter_mut().zip(other.layers) {
            layer.keys_values = layer.keys_values.take().zip(other.keys_values).map(|((keys, values), other)| {
                (Tensor::cat(vec![keys, other.0], 0), Tensor::cat(vec![values, other.1], 0))
            });
        }
    }

    /// Puts the rows of `other` in the place of `rows`. It may have a smaller capacity.
    ///
    /// # Panics
    /// If it is another model's, has a larger capacity, or not one row for each of `rows`.
    pub fn replace_rows(&mut self, rows: &[usize], other: &Self) {
        assert!(self.capacity >= other.capacity, "rows of {} for a cache of {}", other.capacity, self.capacity);
        assert_eq!(rows.len(), other.n_rows(), "{} rows for {} slots", other.n_rows(), rows.len());
        for (&row, &len) in rows.iter().zip(&other.lens) {
            self.lens[row] = len;
        }
        for (layer, other) in self.layers.iter_mut().zip(&other.layers) {
            let Some((from_keys, from_values)) = &other.keys_values else { continue };
            let [_, _, room, _] = from_values.dims();
            layer.keys_values = layer.keys_values.take().map(|(mut keys, mut values)| {
                for (i, &row) in rows.iter().enumerate() {
                    let new_keys = from_keys.clone().slice(s![i..i + 1]);
                    let new_values = from_values.clone().slice(s![i..i + 1]);
                    keys = keys.slice_assign(s![row..row + 1, .., .., 0..room], new_keys);
                    values = values.slice_assign(s![row..row + 1, .., 0..room, ..], new_values);
                }
                (keys, values)
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GptConfig;
    use base::rng::Streams;
    use burn::tensor::Device;

    #[test]
    fn the_cache_holds_each_head_of_keys_once() {
        let config = GptConfig { d_model: 48, n_heads: 6, n_kv_heads: Some(2), n_layers: 2, ..GptConfig::llama(20) };
        let gpt = Gpt::new(&config, &Streams::new(1), &Device::flex());
        let mut cache = Cache::new(&gpt, 3, 32);
        let _ = gpt.decode(Tensor::from_data([[1, 2], [3, 4], [5, 6]], &gpt.device()), &mut cache);
        for layer in &cache.layers {
            let (keys, values) = layer.keys_values.as_ref().expect("put back after use");
            assert_eq!((keys.dims(), values.dims()), ([3, 2, 8, 32], [3, 2, 32, 8]));
        }
    }
}
