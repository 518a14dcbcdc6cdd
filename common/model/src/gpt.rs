//! The decoder-only transformer.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, bf16};
use rayon::prelude::*;

use super::adapter::{Adapters, trains_beside_trunk};
use super::block::{Blank, Block, Dropout, Norm, Pass};
use super::cache::Kept;
use super::params::{Output, Parameter, parameters};
use super::positions::sinusoid_table;
use super::recompute::recomputed;
use super::{Cache, GptConfig, HostTensor, Layout, NamedError, NamedTensors, NormPlacement, Positions};
use base::rng::{Rng, Streams};
use kernels::{self, Angles, Heads, Kernels, Precision, StepWeights};

/// A decoder-only transformer with either preset's architecture or any mixture of their switches.
///
/// Token embedding plus position, `n_layers` blocks, with pre-norm a final LayerNorm, and an output layer that
/// shares the token embedding's weights or has its own.
///
/// # Source
/// Vaswani et al., arXiv:1706.03762 (preset `transformer`); Radford et al. 2019, GPT-2 (preset `gpt2`).
#[derive(Module, Debug)]
pub struct Gpt {
    /// `[vocab_size, d_model]`
    token_embedding: Param<Tensor<2>>,
    /// `[max_seq_len, d_model]`, with learned positions only
    position_embedding: Option<Param<Tensor<2>>>,
    /// `[max_seq_len, d_model]`, with fixed positions only; no parameter
    sinusoids: Option<Tensor<2>>,
    blocks: Vec<Block>,
    /// With pre-norm only.
    final_norm: Option<Norm>,
    /// `[vocab_size, d_model]`, where not tied
    head: Option<Param<Tensor<2>>>,
    #[module(skip)]
    adapters: Option<Adapters>,
    #[module(skip)]
    config: GptConfig,
    #[module(skip)]
    kernels: Kernels,
    #[module(skip)]
    precision: Precision,
    #[module(skip)]
    recompute: bool,
}

impl Gpt {
    /// A model with random weights, the same on every backend.
    ///
    /// `gpt2`: all weights N(0, 0.02), those that project into the residual stream `N(0, 0.02/√(2·n_layers))`.
    /// `transformer` (that is, post-norm): linear layers Glorot-uniform; tied embeddings `N(0, 1/√d_model)`, so that
    /// output logits begin with unit variance; untied ones `N(0, 1)`, so that they begin as long as the sinusoids they
    /// are added to, which have length `√(d_model/2)` and are not scaled down. Biases are 0, norms the identity.
    ///
    /// # Panics
    /// If `config` is invalid, see [`GptConfig::validate`].
    ///
    /// # Source
    /// GPT-2: Radford et al. 2019, section 2.3, with nanoGPT's reading of the residual scale. Glorot & Bengio 2010,
    /// as in tensor2tensor's transformer.
    pub fn new(config: &GptConfig, streams: &Streams, device: &Device) -> Self {
        if let Err(error) = config.validate() {
            panic!("{error}");
        }
        let parameters: Vec<_> = parameters(config, Output::Logits).collect();
        let initial = |p: Parameter<'_>| (p.path(), HostTensor { shape: p.shape(), data: p.initial_values(streams) });
        let values = parameters.into_par_iter().map(initial).collect();
        Self::from_named(config, values, device).expect("the table has every path and shape")
    }

    /// A model with the given weights.
    ///
    /// # Errors
    /// If a tensor is missing, unused or has another shape than `config` asks for.
    ///
    /// # Panics
    /// If `config` is invalid, see [`GptConfig::validate`].
    pub fn from_named(config: &GptConfig, named: NamedTensors, device: &Device) -> Result<Self, NamedError> {
        super::named::load(Self::blank(config, device), named)
    }

    /// [`from_named`](Self::from_named) with weights in bf16 among the others, which stay so: a model that is not trained.
    ///
    /// # Errors
    /// As `from_named`.
    ///
    /// # Panics
    /// As `from_named`.
    pub fn from_both(
        config: &GptConfig,
        named: NamedTensors,
        narrow: NamedTensors<bf16>,
        device: &Device,
    ) -> Result<Self, NamedError> {
        super::named::load_both(Self::blank(config, device), named, narrow, |_| true)
    }

    /// The same model with its matrices in bf16, rounded to the nearest: one that is not trained.
    #[must_use]
    pub fn narrowed(self) -> Self {
        super::named::narrow(self)
    }

    /// Whether its matrices are in bf16.
    pub fn is_narrow(&self) -> bool {
        self.token_embedding.val().dtype() == DType::BF16
    }

    /// A model whose parameters have their shapes only, to be [loaded](super::named::load).
    pub(super) fn blank(config: &GptConfig, device: &Device) -> Self {
        if let Err(error) = config.validate() {
            panic!("{error}");
        }
        let d_model = config.d_model;
        let blank = Blank::new(device);
        let table = |n| blank.param([n, d_model]);
        Self {
            token_embedding: table(config.vocab_size),
            position_embedding: (config.positions == Positions::Learned).then(|| table(config.max_seq_len)),
            sinusoids: (config.positions == Positions::Sinusoidal).then(|| {
                let table = sinusoid_table(config.max_seq_len, d_model);
                Tensor::from_data(TensorData::new(table, [config.max_seq_len, d_model]), device)
            }),
            blocks: (0..config.n_layers).map(|_| Block::blank(config, &blank)).collect(),
            final_norm: (config.norm == NormPlacement::Pre).then(|| Norm::blank(d_model, config.norm_kind, &blank)),
            head: (!config.tie_embeddings).then(|| table(config.vocab_size)),
            adapters: None,
            config: config.clone(),
            kernels: Kernels::default(),
            precision: Precision::default(),
            recompute: false,
        }
    }

    /// Hidden states of every position, after the last norm.
    ///
    /// # Shapes
    /// - `ids`: `[batch, seq]`, each in `0..vocab_size`
    /// - returns `[batch, seq, d_model]`
    ///
    /// # Panics
    /// If a position reaches `max_seq_len` or `layout` was made for another batch.
    pub fn hidden(&self, ids: Tensor<2, Int>, layout: &Layout) -> Tensor<3> {
        self.hidden_with_dropout(ids, layout, None)
    }

    /// [`hidden`](Self::hidden) with dropout at the configured probability, drawn from `rng`.
    ///
    /// Dropout acts on the embeddings, on the attention weights and on what each branch adds to the residual stream.
    ///
    /// # Source
    /// Vaswani et al., section 5.4; GPT-2 drops at the same places.
    pub fn hidden_with_dropout(&self, ids: Tensor<2, Int>, layout: &Layout, rng: Option<&mut Rng>) -> Tensor<3> {
        let [batch, seq] = ids.dims();
        let positions = layout.positions(seq);
        let probability = self.config.dropout;
        let of_adapters = self.adapters.as_ref().map_or(0.0, |adapters| adapters.lora.dropout);
        let dropout = rng.filter(|_| probability > 0.0 || of_adapters > 0.0).map(|rng| Dropout { probability, rng });
        let mut pass = Pass {
            kernels: self.kernels,
            precision: self.precision,
            eps: self.config.layer_norm_eps,
            first_key: layout.first_key_tensor(batch, seq, &ids.device()),
            in_blocks: dropout.is_none()
                && self.precision == Precision::F32
                && self.config.has_fused_blocks(self.adapters.is_some()),
            dropout,
            rotary: self.rotary(positions.as_deref(), 0, [batch, seq], &ids.device()),
        };
        let x = self.embed(ids, positions.as_deref(), 0);
        self.run_blocks(x, &mut pass, None)
    }

    /// Hidden states of new positions, appended to each row of `cache` behind its earlier ones.
    ///
    /// The same numbers as [`hidden`](Self::hidden) over the whole sequence gives for these positions: several at
    /// once for a prompt, one at a time after it. Prompts of different lengths are padded behind, and their rows then
    /// [cut](Cache::truncate) to their own lengths.
    ///
    /// # Shapes
    /// - `ids`: `[batch, seq]`
    /// - returns `[batch, seq, d_model]`
    ///
    /// # Panics
    /// If `cache` has no room left or holds another number of rows.
    pub fn decode(&self, ids: Tensor<2, Int>, cache: &mut Cache) -> Tensor<3> {
        let [batch, seq] = ids.dims();
        assert_eq!(batch, cache.n_rows(), "a batch of {batch} for a cache of {} rows", cache.n_rows());
        let longest = cache.lens.iter().max().copied().unwrap_or(0);
        assert!(longest + seq <= cache.capacity(), "{longest} + {seq} exceed the cache's {}", cache.capacity());
        let start = cache.lens.first().copied().unwrap_or(0);
        let positions: Option<Vec<usize>> = cache
            .lens
            .iter()
            .any(|&len| len != start)
            .then(|| cache.lens.iter().flat_map(|&len| len..len + seq).collect());
        let x = self.embed(ids, positions.as_deref(), start);
        let mut pass = Pass {
            kernels: self.kernels,
            precision: self.precision,
            eps: self.config.layer_norm_eps,
            first_key: None,
            dropout: None,
            in_blocks: false,
            rotary: self.rotary(positions.as_deref(), start, [batch, seq], &x.device()),
        };
        let hidden = self.run_blocks(x, &mut pass, Some(&mut Kept::Rows(&mut *cache)));
        cache.lens.iter_mut().for_each(|len| *len += seq);
        hidden
    }

    /// [`decode`](Self::decode) of several sequences in one pass, each by as many positions as there are, with a cache of one
    /// row each. At least `n_rows` rows are computed, spare ones if need be.
    ///
    /// The hidden states of a sequence keep their bits however it is cut at multiples of [`CHUNK`](super::CHUNK) and whatever
    /// is read beside it, as far as products of that many rows do.
    ///
    /// # Shapes
    /// - returns `[n, d_model]` for `n` positions or spare rows, sequence after sequence
    ///
    /// # Panics
    /// If a cache has no room left or not one row, or there is no position.
    pub fn decode_parts(&self, parts: &mut [(&[u32], &mut Cache)], n_rows: usize) -> Tensor<2> {
        let mut ids: Vec<i32> = parts.iter().flat_map(|(ids, _)| ids.iter().map(|&id| id as i32)).collect();
        let mut positions: Vec<usize> = Vec::with_capacity(ids.len());
        for (ids, cache) in parts.iter() {
            let &[cached] = cache.lens() else { panic!("a cache of {} rows for one sequence", cache.n_rows()) };
            assert!(cached + ids.len() <= cache.capacity(), "{} positions exceed the cache", cached + ids.len());
            positions.extend(cached..cached + ids.len());
        }
        let n = ids.len().max(n_rows);
        ids.resize(n, 0);
        positions.resize(n, 0);
        let device = self.device();
        let x = self.embed(Tensor::from_data(TensorData::new(ids, [1, n]), &device), Some(&positions), 0);
        let mut pass = Pass {
            kernels: self.kernels,
            precision: self.precision,
            eps: self.config.layer_norm_eps,
            first_key: None,
            dropout: None,
            in_blocks: false,
            rotary: self.rotary(Some(&positions), 0, [1, n], &device),
        };
        let mut kept = Kept::Parts(parts.iter_mut().map(|(ids, cache)| (&mut **cache, ids.len())).collect());
        let hidden = self.run_blocks(x, &mut pass, Some(&mut kept));
        for (ids, cache) in parts {
            cache.lens[0] += ids.len();
        }
        hidden.reshape([n, self.config.d_model])
    }

    /// Output logits of hidden states.
    ///
    /// # Shapes
    /// - `hidden`: `[batch, seq, d_model]`
    /// - returns `[batch, seq, vocab_size]`
    pub fn logits(&self, hidden: Tensor<3>) -> Tensor<3> {
        let [batch, seq, d_model] = hidden.dims();
        let head = self.head_weight();
        let [vocab_size, _] = head.dims();
        let (hidden, head) =
            (self.precision.narrow(hidden.reshape([batch * seq, d_model])), self.precision.narrow(head));
        self.precision.widen(kernels::logits(self.kernels, hidden, head)).reshape([batch, seq, vocab_size])
    }

    /// Logits of every position: [`logits`](Self::logits) of [`hidden`](Self::hidden).
    pub fn forward(&self, ids: Tensor<2, Int>, layout: &Layout) -> Tensor<3> {
        self.logits(self.hidden(ids, layout))
    }

    /// The output layer's weights, `[vocab_size, d_model]`: the token embedding where tied.
    pub fn head_weight(&self) -> Tensor<2> {
        self.head.as_ref().unwrap_or(&self.token_embedding).val()
    }

    /// The architecture.
    pub const fn config(&self) -> &GptConfig {
        &self.config
    }

    /// The device the weights are on.
    pub fn device(&self) -> Device {
        self.token_embedding.val().device()
    }

    /// Which kernels the model computes with.
    pub const fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// The same model computing with `kernels`.
    #[must_use]
    pub fn with_kernels(mut self, kernels: Kernels) -> Self {
        self.kernels = kernels;
        self
    }

    /// Float type of the model's computations.
    pub const fn precision(&self) -> Precision {
        self.precision
    }

    /// The same model computing in `precision`; its weights stay in f32, and so do the numbers it gives.
    ///
    /// Matrix products and what lies between them are in `precision`; the residual stream, norms, softmax and
    /// log-probabilities are in f32.
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// The same model keeping the input of each block alone until the backward pass, which computes the rest again; the
    /// numbers are the same.
    #[must_use]
    pub fn with_checkpoints(mut self, checkpoint_activations: bool) -> Self {
        self.recompute = checkpoint_activations;
        self
    }

    /// The same model without output weights of its own: the trunk of a [`ScalarGpt`](super::ScalarGpt).
    #[must_use]
    pub(super) fn without_head(mut self) -> Self {
        self.head = None;
        self
    }

    /// The same model with its weights frozen and `adapters` beside them, on `device`; those that it had are dropped.
    ///
    /// The weights are shared with `self` and not copied. On an autodiff device the adapters are trained, and nothing
    /// else takes a gradient.
    ///
    /// # Errors
    /// If `named` are not the tensors of the adapters in their shapes.
    ///
    /// # Source
    /// Hu et al., arXiv:2106.09685.
    pub fn with_adapters(self, adapters: &Adapters, named: NamedTensors, device: &Device) -> Result<Self, NamedError> {
        let blank = self.blank_adapters(adapters, device);
        super::named::load_where(blank, named, trains_beside_trunk)
    }

    /// [`with_adapters`](Self::with_adapters) before the adapters are loaded.
    pub(super) fn blank_adapters(self, adapters: &Adapters, device: &Device) -> Self {
        let frozen = self.frozen(device);
        let blank = Blank::new(device);
        let blocks = frozen.blocks.into_iter().enumerate();
        let blocks =
            blocks.map(|(i, block)| block.with_adapters(&format!("blocks.{i}"), Some(adapters), &blank)).collect();
        Self { blocks, adapters: Some(adapters.clone()), ..frozen }
    }

    /// The same model, its weights shared and without gradients, on `device` with or without autodiff.
    #[must_use]
    pub fn frozen(self, device: &Device) -> Self {
        let frozen = super::named::freeze(self, device);
        Self { sinusoids: frozen.sinusoids.map(|table| super::named::on(table, device)), ..frozen }
    }

    /// The adapters beside frozen weights; `None` for a model of which all weights are its own.
    pub const fn adapters(&self) -> Option<&Adapters> {
        self.adapters.as_ref()
    }

    /// All weights by path, on the host.
    pub fn to_named(&self) -> NamedTensors {
        super::named::collect(self)
    }

    /// The weights that training changes, by path, on the host: the adapters where there are any, else all.
    pub fn to_trained(&self) -> NamedTensors {
        match self.adapters {
            Some(_) => super::named::collect_where(self, trains_beside_trunk),
            None => self.to_named(),
        }
    }

    /// The same model with other values of the weights that training changes, see [`to_trained`](Self::to_trained).
    ///
    /// # Errors
    /// If a tensor is missing, unused or has another shape.
    pub fn with_trained(self, named: NamedTensors) -> Result<Self, NamedError> {
        let wanted: fn(&str) -> bool = if self.adapters.is_some() { trains_beside_trunk } else { |_| true };
        super::named::load_where(self, named, wanted)
    }

    /// The weights as the kernels' [`Stepper`](kernels::Stepper) reads them.
    pub(super) fn step_weights(&self) -> StepWeights {
        let positions = self.position_embedding.as_ref().map(Param::val).or_else(|| self.sinusoids.clone());
        StepWeights {
            tokens: self.token_embedding.val(),
            positions,
            blocks: self.blocks.iter().map(Block::step_weights).collect(),
            final_norm: self.final_norm.as_ref().map(Norm::step_weights),
            head: self.head_weight(),
            heads: Heads { queries: self.config.n_heads, keys: self.config.n_kv_heads() },
            activation: self.config.activation,
            eps: self.config.layer_norm_eps,
            is_parallel: self.config.parallel && self.final_norm.is_some(),
        }
    }

    /// Token embedding plus position; `positions` is `None` where token `t` stands at `start + t`.
    fn embed(&self, ids: Tensor<2, Int>, positions: Option<&[usize]>, start: usize) -> Tensor<3> {
        let [_, seq] = ids.dims();
        let max_seq_len = self.config.max_seq_len;
        let last = positions.map_or(start + seq, |p| p.iter().max().map_or(0, |&p| p + 1));
        assert!(last <= max_seq_len, "position {} lies outside the context of {max_seq_len}", last - 1);
        let position_table = match (&self.position_embedding, &self.sinusoids) {
            (Some(learned), _) => learned.val(),
            (None, Some(fixed)) => fixed.clone(),
            (None, None) => return kernels::lookup(self.kernels, self.token_embedding.val(), ids),
        };
        kernels::embed(self.kernels, self.token_embedding.val(), position_table, ids, positions, start)
    }

    /// Cosines and sines of the angles of rotary positions, computed in double precision.
    fn rotary(
        &self,
        positions: Option<&[usize]>,
        start: usize,
        [batch, seq]: [usize; 2],
        device: &Device,
    ) -> Option<Angles> {
        if self.config.positions != Positions::Rotary {
            return None;
        }
        let frequencies = self.config.rotary.frequencies(self.config.n_rotated());
        let (n_rows, positions) = match positions {
            Some(positions) => (batch, positions.to_vec()),
            None => (1, (start..start + seq).collect()),
        };
        let table = |of: fn(f64) -> f64| {
            let angles = positions.iter().flat_map(|&p| frequencies.iter().map(move |f| p as f64 * f));
            let numbers: Vec<f32> = angles.map(|angle| of(angle) as f32).collect();
            Tensor::from_data(TensorData::new(numbers, [n_rows, seq, frequencies.len()]), device)
        };
        Some(Angles { cos: table(f64::cos), sin: table(f64::sin) })
    }

    /// All blocks and the final norm.
    fn run_blocks(&self, x: Tensor<3>, pass: &mut Pass<'_>, mut cache: Option<&mut Kept<'_>>) -> Tensor<3> {
        let mut x = pass.drop(x);
        let activation = self.config.activation;
        let recomputes = self.recompute && x.is_autodiff();
        if recomputes && !x.is_tracked() {
            // What is not on the tape cannot lead back to the weights that are.
            x = x.require_grad();
        }
        let Some(final_norm) = &self.final_norm else {
            for (layer, block) in self.blocks.iter().enumerate() {
                x = if recomputes {
                    let [x] = recomputed(block.clone(), [x], pass, move |block: &Block, [x], pass| {
                        [block.post_norm(x, activation, pass, None, layer)]
                    });
                    x
                } else {
                    block.post_norm(x, activation, pass, cache.as_deref_mut(), layer)
                };
            }
            return x;
        };
        let form = if self.config.parallel { Block::parallel } else { Block::pre_norm };
        let mut state = self.blocks[0].first_norm().forward_keeping(x, pass);
        for (layer, block) in self.blocks.iter().enumerate() {
            let next = self.blocks.get(layer + 1).map_or(final_norm, Block::first_norm);
            state = if recomputes {
                let part = (block.clone(), next.clone());
                let run = move |(block, next): &(Block, Norm), [normed, x]: [_; 2], pass: &mut Pass<'_>| {
                    form(block, (normed, x), activation, next, pass, None, layer).into()
                };
                recomputed(part, state.into(), pass, run).into()
            } else {
                form(block, state, activation, next, pass, cache.as_deref_mut(), layer)
            };
        }
        state.0
    }
}
