//! Keys and values of earlier positions, kept between decoding steps.

use burn::tensor::{Int, Tensor, TensorData};

use super::Gpt;

/// Positions that there is room for are a multiple of this, so that each row of keys begins where a cache line does.
const ALIGNED: usize = 16;

/// The keys and values of every layer for a batch whose rows are padded on the left.
///
/// All rows stand at the same index [`len`](Cache::len), so that one step appends one column for the whole batch;
/// rows of different lengths differ in how much padding they begin with.
#[derive(Debug, Clone)]
pub struct Cache {
    pub(super) layers: Vec<LayerCache>,
    pub(super) n_pads: Vec<usize>,
    pub(super) len: usize,
    pub(super) capacity: usize,
}

/// One layer's part of a [`Cache`]: keys `[batch, n_heads, d_head, capacity]`, values `[batch, n_heads, capacity, d_head]`.
#[derive(Debug, Clone)]
pub(super) struct LayerCache {
    /// Taken out while the layer runs, so that it is the only owner and can be written in place.
    pub(super) keys_values: Option<(Tensor<4>, Tensor<4>)>,
}

impl Cache {
    /// An empty cache for rows that begin with `n_pads[b]` tokens of padding, with room for `capacity` positions.
    ///
    /// A row may leave (see [`keep_rows`](Self::keep_rows)) before the end, so the capacity may go beyond where the
    /// least padded rows meet the end of the model's context.
    ///
    /// # Panics
    /// If even the row with the most padding would not fit into the model's context.
    pub fn new(gpt: &Gpt, n_pads: &[usize], capacity: usize) -> Self {
        let config = gpt.config();
        let most_padding = n_pads.iter().max().copied().unwrap_or(0);
        assert!(
            capacity <= config.max_seq_len + most_padding,
            "{} positions exceed the context of {}",
            capacity - most_padding,
            config.max_seq_len
        );
        let (batch, n_heads, d_head) = (n_pads.len(), config.n_heads, config.d_head());
        let room = capacity.next_multiple_of(ALIGNED);
        let device = gpt.device();
        let zeros = |shape: [usize; 4]| gpt.precision().narrow(Tensor::zeros(shape, &device));
        let layer = || (zeros([batch, n_heads, d_head, room]), zeros([batch, n_heads, room, d_head]));
        let layers = (0..config.n_layers).map(|_| LayerCache { keys_values: Some(layer()) }).collect();
        Self { layers, n_pads: n_pads.to_vec(), len: 0, capacity }
    }

    /// How many positions are filled, padding included.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing has been appended yet.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many positions fit.
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many rows the cache holds.
    pub fn batch(&self) -> usize {
        self.n_pads.len()
    }

    /// Keeps the rows `rows`, in that order; a row may be named twice (beams) or not at all (finished sequences).
    ///
    /// # Panics
    /// If a row does not exist.
    pub fn keep_rows(&mut self, rows: &[usize]) {
        if rows.iter().copied().eq(0..self.batch()) {
            return;
        }
        let indices: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        self.n_pads = rows.iter().map(|&row| self.n_pads[row]).collect();
        for layer in &mut self.layers {
            layer.keys_values = layer.keys_values.take().map(|(keys, values)| {
                let data = TensorData::new(indices.clone(), [indices.len()]);
                let indices = Tensor::<1, Int>::from_data(data, &keys.device());
                (keys.select(0, indices.clone()), values.select(0, indices))
            });
        }
    }
}
