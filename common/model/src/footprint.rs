//! Memory that a model takes: its weights, the activations that a training step keeps, and a cache.
//!
//! In bytes, and all in f32 but for the matrices of a frozen trunk. The terms follow from the table of parameters and from
//! what each operation's backward pass keeps; they were found with an allocator that counts.

use kernels::{Activation, Kernels, TrunkPrecision};

use crate::hf::Class;
use crate::params::{Output, Role, parameters, score_head};
use crate::{Adapters, GptConfig, NormPlacement, Positions};

/// Bytes of a number.
const F32: f64 = 4.0;

/// Bytes of the weights, matrices in the type of `trunk`, and of fixed positions.
pub fn weights(config: &GptConfig, output: Output, trunk: TrunkPrecision) -> f64 {
    let fixed = if config.positions == Positions::Sinusoidal { config.max_seq_len * config.d_model } else { 0 };
    weights_where(config, output, trunk, |_| true) + F32 * fixed as f64
}

/// Bytes of what reading a model leaves behind: files of `class` have matrices apart that lie side by side in ours, and what
/// they took is too small for those.
pub fn loading(class: Class, config: &GptConfig, output: Output, trunk: TrunkPrecision) -> f64 {
    match class {
        Class::Llama | Class::Mistral | Class::Qwen2 | Class::Qwen3 => {
            weights_where(config, output, trunk, |role| matches!(role, Role::Linear { packed: 2.., .. }))
        }
        Class::Gpt2 | Class::OpenAiGpt | Class::GptNeox | Class::Kindling => 0.0,
    }
}

/// Bytes of the weights of the roles that are `wanted`.
fn weights_where(config: &GptConfig, output: Output, trunk: TrunkPrecision, wanted: impl Fn(Role) -> bool) -> f64 {
    let one_layer = GptConfig { n_layers: 1, ..config.clone() };
    let parameters = parameters(&one_layer, output).filter(|parameter| wanted(parameter.role()));
    let sizes = parameters.map(|parameter| {
        let copies = if parameter.block().is_some() { config.n_layers } else { 1 };
        let is_narrow = trunk == TrunkPrecision::Bf16 && parameter.role().may_be_narrow();
        let bytes = if is_narrow { F32 / 2.0 } else { F32 };
        bytes * parameter.shape().iter().map(|&size| size as f64).product::<f64>() * copies as f64
    });
    sizes.sum()
}

/// Bytes of what is trained beside frozen weights: adapters, and a reward model's head.
pub fn adapters(config: &GptConfig, output: Output, adapters: &Adapters) -> f64 {
    let places: usize = adapters.places(config, output).flat_map(|place| place.shapes).map(|[a, b]| a * b).sum();
    let head: usize = if output == Output::Score { score_head(config).shape().iter().product() } else { 0 };
    F32 * (places + head) as f64
}

/// Bytes of the keys and values of `rows` sequences of up to `capacity` tokens, each key head once.
pub fn cache(config: &GptConfig, rows: usize, capacity: usize) -> f64 {
    F32 * 2.0 * (rows * capacity) as f64 * (config.n_layers * config.n_kv_heads() * config.d_head()) as f64
}

/// How a model is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Computation {
    /// The operations.
    pub kernels: Kernels,
    /// Whether blocks keep their inputs alone until the backward pass.
    pub checkpoints: bool,
    /// Whether there are adapters beside its linear layers.
    pub has_adapters: bool,
    /// Whether they drop some of their inputs.
    pub adapters_drop: bool,
}

/// A batch as a model reads it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Batch {
    /// Sequences.
    pub rows: f64,
    /// Tokens of the longest.
    pub seq: f64,
}

impl Batch {
    /// Tokens, padding included.
    pub fn tokens(self) -> f64 {
        self.rows * self.seq
    }
}

/// Bytes of the activations of one training step on a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Activations {
    /// When the backward pass begins.
    pub at_most: f64,
    /// When it ends: those of a single block.
    pub at_the_end: f64,
}

/// The activations of a training step.
///
/// Per block and token, in numbers, with `A = n_heads · d_head` and `K = n_kv_heads · d_head`:
/// - the inputs of the two branches `2d`; each norm `d` fused, else `2d`
/// - queries, keys and values as attention reads them, and its result: `2A + 2K` fused, else `4A`; normalised queries and
///   keys `2 · (A + K)` more
/// - weights of attention, plain `3 · n_heads · seq`, with dropout `4 · n_heads · seq`; fused without dropout none
/// - the feed-forward layer `f` to `6f`, see [`kept_by_mlp`]
/// - masks of dropout `2d`
///
/// Outside the blocks: embedding, last norm and loss `5d`; plain, `3 · vocab_size` for the logits. With checkpoints a
/// block keeps its input alone: `d` after a norm, `2d` before one, and one block at a time the terms above.
pub fn activations(config: &GptConfig, computation: Computation, batch: Batch, output: Output) -> Activations {
    let numbers = batch.tokens();
    let block = kept_by_block(config, computation, batch.seq);
    let (n_layers, d) = (config.n_layers as f64, config.d_model as f64);
    let has_logits = computation.kernels == Kernels::Plain && output == Output::Logits;
    let logits = if has_logits { 3.0 * config.vocab_size as f64 } else { 0.0 };
    let inputs = match config.norm {
        NormPlacement::Post => d,
        NormPlacement::Pre => 2.0 * d,
    };
    let blocks = if computation.checkpoints { (n_layers - 1.0) * inputs + block } else { n_layers * block };
    Activations { at_most: F32 * numbers * (blocks + 5.0 * d + logits), at_the_end: F32 * numbers * (block + 5.0 * d) }
}

/// The most that a forward pass without gradients holds: of one block.
pub fn inference(config: &GptConfig, computation: Computation, batch: Batch) -> f64 {
    F32 * batch.tokens() * (kept_by_block(config, computation, batch.seq) + 2.0 * config.d_model as f64)
}

fn kept_by_block(config: &GptConfig, computation: Computation, seq: f64) -> f64 {
    let (d, f) = (config.d_model as f64, config.d_ff as f64);
    let (heads, of_heads) = (config.n_heads as f64, (config.n_heads * config.d_head()) as f64);
    let (fused, drops) = (computation.kernels == Kernels::Fused, config.dropout > 0.0);
    let in_one_piece =
        fused && !drops && !computation.adapters_drop && config.has_fused_blocks(computation.has_adapters);
    let norm = if fused { d } else { 2.0 * d };
    let of_keys = if fused && !drops { (config.n_kv_heads() * config.d_head()) as f64 } else { of_heads };
    let scores = match (fused, drops) {
        (_, true) => 4.0 * heads * seq,
        (true, false) => 0.0,
        (false, false) => 3.0 * heads * seq,
    };
    let qk_norm =
        if config.qk_norm { 2.0 * ((config.n_heads + config.n_kv_heads()) * config.d_head()) as f64 } else { 0.0 };
    let masks = if drops { 2.0 * d } else { 0.0 };
    2.0 * d
        + 2.0 * norm
        + 2.0 * (of_heads + of_keys)
        + qk_norm
        + scores
        + masks
        + kept_by_mlp(config, fused, in_one_piece) * f
}

/// How many tensors as wide as the feed-forward layer it keeps.
fn kept_by_mlp(config: &GptConfig, fused: bool, in_one_piece: bool) -> f64 {
    match config.activation {
        _ if config.gated && in_one_piece => 2.0,
        Activation::Silu if config.gated && fused => 3.0,
        _ if config.gated => 5.0,
        Activation::Relu | Activation::GeluTanh if in_one_piece => 1.0,
        Activation::Relu => 2.0,
        Activation::GeluTanh if fused => 2.0,
        Activation::GeluTanh => 6.0,
        Activation::Gelu | Activation::Silu => 4.0,
    }
}
