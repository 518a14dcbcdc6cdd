//! One step of decoding: a new position of each row through a whole model, in one call.
//!
//! A small model's step is hundreds of operations of a microsecond or two; handing each its tensors and making a tensor of
//! its result takes as long as computing it. The plain version is the model's own forward pass, operation by operation.

// Without the flex backend there is nothing to choose.
#![cfg_attr(not(feature = "flex"), allow(unused_variables))]

use burn::tensor::Tensor;

use super::{Activation, Adapted, Heads, Kernels};

#[cfg(feature = "flex")]
use super::flex;
#[cfg(feature = "flex")]
use burn::backend::Flex;
#[cfg(feature = "flex")]
use burn_flex::FlexTensor;

/// A linear layer with all that it may have.
#[derive(Debug, Clone)]
pub struct StepLinear {
    /// The weight, and what stands beside it.
    pub layer: Adapted,
    /// `[d_out]`
    pub bias: Option<Tensor<1>>,
}

/// A layer norm's gain and offset, or the gain of an RMS norm, which has no offset.
#[derive(Debug, Clone)]
pub struct StepNorm {
    /// `[d]`
    pub gamma: Tensor<1>,
    /// `[d]`
    pub beta: Option<Tensor<1>>,
}

/// A block's layers.
#[derive(Debug, Clone)]
pub struct StepBlock {
    /// Before attention, or with post-norm behind its residual addition.
    pub norm_1: StepNorm,
    /// Queries, keys and values side by side, see [`Heads`].
    pub qkv: StepLinear,
    /// Of each head's queries and keys.
    pub qk_norms: Option<[StepNorm; 2]>,
    /// The output projection of attention.
    pub proj: StepLinear,
    /// Before the feed-forward layer, or with post-norm behind its residual addition.
    pub norm_2: StepNorm,
    /// Where the feed-forward layer has a gate.
    pub gate: Option<StepLinear>,
    /// Into the feed-forward layer.
    pub up: StepLinear,
    /// Out of it.
    pub down: StepLinear,
}

/// A model as a step reads it.
#[derive(Debug, Clone)]
pub struct StepWeights {
    /// `[vocab_size, d_model]`
    pub tokens: Tensor<2>,
    /// `[max_seq_len, d_model]`, where positions are added to the tokens
    pub positions: Option<Tensor<2>>,
    /// In order.
    pub blocks: Vec<StepBlock>,
    /// With norms before the layers only.
    pub final_norm: Option<StepNorm>,
    /// `[vocab_size, d_model]`
    pub head: Tensor<2>,
    /// Of queries and keys.
    pub heads: Heads,
    /// Of the feed-forward layers.
    pub activation: Activation,
    /// Added to the variances.
    pub eps: f64,
    /// Whether attention and feed-forward layer of a block both read the block's input.
    pub is_parallel: bool,
}

/// A model made ready for steps. It shares the weights, so that it should not outlive their next change.
#[derive(Debug)]
pub struct Stepper {
    #[cfg(feature = "flex")]
    model: flex::step::Model,
}

/// A layer's keys, `[n_rows, n_kv_heads, d_head, capacity]`, and values, `[n_rows, n_kv_heads, capacity, d_head]`.
pub type KeysValues = (Tensor<4>, Tensor<4>);

impl Stepper {
    /// The most rows of a step.
    pub const MAX_ROWS: usize = *super::BATCH_INVARIANT_ROWS.end();

    /// `None` where there is no fused body: on other backends, on an autodiff device, for other float types and for
    /// activations without a body.
    pub fn new(kernels: Kernels, weights: StepWeights) -> Option<Self> {
        #[cfg(feature = "flex")]
        if kernels == Kernels::Fused {
            return Some(Self { model: flex::step::Model::new(weights).ok()? });
        }
        None
    }

    /// The logits after one more token in each row, and the cache, to which its keys and values were added: the same bits as
    /// those of the fused operations one by one, and as plain as those.
    ///
    /// # Shapes
    /// - `ids`, `cached`: `[n_rows]`, the tokens and how many positions come before each
    /// - `angles`: cosines and sines of rotary positions, `[n_rows, n_rotated / 2]`
    /// - `cache`: of each layer
    /// - returns `n_rows · vocab_size` logits, row after row
    ///
    /// # Panics
    /// If the shapes do not fit, there are more than [`MAX_ROWS`](Self::MAX_ROWS), or an id, or a position in a table or the
    /// cache, is too large.
    pub fn step(
        &mut self,
        ids: &[u32],
        cached: &[usize],
        angles: Option<[&[f32]; 2]>,
        cache: Vec<KeysValues>,
    ) -> (Vec<f32>, Vec<KeysValues>) {
        #[cfg(feature = "flex")]
        {
            let primitive =
                |x: Tensor<4>| x.try_into_primitive::<Flex>().expect("the cache of a model on the flex backend");
            let mut cache: Vec<[FlexTensor; 2]> =
                cache.into_iter().map(|(keys, values)| [keys, values].map(primitive)).collect();
            let logits = self.model.step(ids, cached, angles, &mut cache);
            let cache = cache.into_iter().map(|kept| kept.map(Tensor::from_primitive::<Flex>).into());
            (logits, cache.collect())
        }
        #[cfg(not(feature = "flex"))]
        unreachable!("there is no fused body")
    }
}
