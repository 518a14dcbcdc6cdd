//! A step of decoding over plain slices: the bodies of the operations one by one, without tensors between them.

use burn::backend::{DispatchDevice, Flex};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;

use super::activation::{bias_activation_rows, gate_into};
use super::decode::attend_to_rows;
use super::few::{self, times_transposed};
use super::linear::add_numbers;
use super::norm::{add_and_normalize_rows, normalize_rows};
use super::rotary::turn_heads;
use super::stored::{widen, with_numbers};
use super::thin::{self, Adapted, Thin};
use super::{contiguous, floats, is_whole, matrix_dims};
use crate::low_rank::{self, LowRank};
use crate::step::{StepBlock, StepLinear, StepNorm, StepWeights};
use crate::{Activation, Heads};

/// Something about a model has no body here.
#[derive(Debug, Clone, Copy)]
pub struct NoBody;

/// A model's weights and the buffers of a step.
#[derive(Debug)]
pub struct Model {
    tokens: FlexTensor,
    positions: Option<FlexTensor>,
    blocks: Vec<Block>,
    final_norm: Option<Norm>,
    head: FlexTensor,
    heads: Heads,
    activation: Activation,
    eps: f32,
    is_parallel: bool,
    buffers: Buffers,
}

#[derive(Debug)]
struct Linear {
    layer: Adapted,
    bias: Option<FlexTensor>,
}

#[derive(Debug)]
struct Norm {
    gamma: FlexTensor,
    beta: Option<FlexTensor>,
}

#[derive(Debug)]
struct Block {
    norm_1: Norm,
    qkv: Linear,
    qk_norms: Option<[Norm; 2]>,
    proj: Linear,
    norm_2: Norm,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

/// What lies between the operations; each grows to what it has to hold.
#[derive(Debug, Default)]
struct Buffers {
    /// The residual stream, and what a block adds to it.
    x: Vec<f32>,
    branch: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    mixed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    active: Vec<f32>,
    /// A second branch, a second sum, heads before they are normalised.
    other: Vec<f32>,
    /// `x A` of an adapter.
    hidden: Vec<f32>,
    /// Means and scales of a norm, which only a backward pass reads.
    statistics: Vec<f32>,
}

impl Model {
    /// # Errors
    /// Where an operation has no fused body, or none for its weights.
    pub fn new(weights: StepWeights) -> Result<Self, NoBody> {
        let StepWeights { tokens, positions, blocks, final_norm, head, heads, activation, eps, is_parallel } = weights;
        let blocks: Vec<Block> = blocks.into_iter().map(Block::new).collect::<Result<_, _>>()?;
        let has_body = |block: &Block| match &block.gate {
            Some(_) => activation == Activation::Silu,
            // Else the bias would be added, or something beside the weight, before the activation is asked for.
            None => activation.is_fused() && block.up.bias.is_some() && block.up.layer.thin.is_none(),
        };
        if !blocks.iter().all(has_body) {
            return Err(NoBody);
        }
        Ok(Self {
            tokens: matrix(tokens)?,
            positions: positions.map(numbers).transpose()?,
            blocks,
            final_norm: final_norm.map(Norm::new).transpose()?,
            head: matrix(head)?,
            heads,
            activation,
            eps: eps as f32,
            is_parallel,
            buffers: Buffers::default(),
        })
    }

    /// See [`Stepper::step`](crate::Stepper::step).
    pub fn step(
        &mut self,
        ids: &[u32],
        cached: &[usize],
        angles: Option<[&[f32]; 2]>,
        cache: &mut [[FlexTensor; 2]],
    ) -> Vec<f32> {
        let n = ids.len();
        assert!((1..=few::ROWS).contains(&n) && cached.len() == n, "{n} tokens for {} rows", cached.len());
        assert_eq!(cache.len(), self.blocks.len(), "one part of the cache for each block");
        let mut buffers = std::mem::take(&mut self.buffers);
        self.embed(&mut buffers.x, ids, cached);
        match self.blocks.first() {
            Some(first) if self.final_norm.is_some() => first.norm_1.normalize(&mut buffers, self.eps),
            _ => buffers.normed.clone_from(&buffers.x),
        }
        for (i, (block, cache)) in self.blocks.iter().zip(cache).enumerate() {
            block.qkv.times(&mut buffers.qkv, &buffers.normed, &mut buffers.hidden);
            self.place(block, &mut buffers, angles);
            self.attend(&mut buffers, cached, cache);
            block.proj.times(&mut buffers.branch, &buffers.mixed, &mut buffers.hidden);
            let next = match &self.final_norm {
                Some(final_norm) => self.blocks.get(i + 1).map_or(final_norm, |next| &next.norm_1),
                None => &block.norm_2,
            };
            if self.is_parallel {
                std::mem::swap(&mut buffers.branch, &mut buffers.other);
                block.norm_2.normalize(&mut buffers, self.eps);
                self.feed_forward(block, &mut buffers);
                add_numbers(&mut buffers.branch, &buffers.other);
            } else {
                let norm = if self.final_norm.is_some() { &block.norm_2 } else { &block.norm_1 };
                self.add(norm, &mut buffers);
                self.feed_forward(block, &mut buffers);
            }
            self.add(next, &mut buffers);
        }
        let (_, d_model) = matrix_dims(&self.head);
        let head = contiguous(&self.head);
        let logits = with_numbers!(head of head => times_transposed(&buffers.normed, head, d_model));
        self.buffers = buffers;
        logits
    }

    /// `x = tokens[id] + positions[position]`, of each row.
    fn embed(&self, x: &mut Vec<f32>, ids: &[u32], positions: &[usize]) {
        let (_, d) = matrix_dims(&self.tokens);
        let x = sized(x, ids.len() * d);
        let tokens = contiguous(&self.tokens);
        with_numbers!(tokens of tokens => {
            for (x, &id) in x.chunks_exact_mut(d).zip(ids) {
                widen(x, &tokens[id as usize * d..][..d]);
            }
        });
        let Some(table) = &self.positions else { return };
        let table = contiguous(table);
        for (x, position) in x.chunks_exact_mut(d).zip(positions) {
            add_numbers(x, &floats(&table)[position * d..][..d]);
        }
    }

    /// Normalises queries and keys and turns them to their positions, where the model does so.
    fn place(&self, block: &Block, buffers: &mut Buffers, angles: Option<[&[f32]; 2]>) {
        let (Heads { queries, keys }, Buffers { qkv, other, statistics, .. }) = (self.heads, buffers);
        let d_head = self.d_head(block);
        let width = (queries + 2 * keys) * d_head;
        let n = qkv.len() / width;
        for (i, position) in qkv.chunks_exact_mut(width).enumerate() {
            if let Some([q_norm, k_norm]) = &block.qk_norms {
                let heads = sized(other, (queries + keys) * d_head);
                heads.copy_from_slice(&position[..(queries + keys) * d_head]);
                let (of_queries, of_keys) = position.split_at_mut(queries * d_head);
                let (from_queries, from_keys) = heads.split_at(queries * d_head);
                let parts = [(q_norm, of_queries, from_queries), (k_norm, &mut of_keys[..keys * d_head], from_keys)];
                for (norm, to, from) in parts {
                    norm.rows(to, sized(statistics, 2 * from.len() / d_head), from, self.eps);
                }
            }
            if let Some([cos, sin]) = angles {
                let half = cos.len() / n;
                let heads = &mut position[..(queries + keys) * d_head];
                turn_heads(heads, d_head, &cos[i * half..][..half], &sin[i * half..][..half], 1.0);
            }
        }
    }

    fn d_head(&self, block: &Block) -> usize {
        self.heads.d_head(matrix_dims(&block.qkv.layer.weight).1)
    }

    /// `mixed = softmax(QKᵀ/√d_head)·V` over what each row's query sees; new keys and values are kept.
    fn attend(&self, buffers: &mut Buffers, cached: &[usize], kept: &mut [FlexTensor; 2]) {
        let [_, n_kv_heads, d_head, capacity] = kept[0].layout().shape().dims();
        let Buffers { qkv, mixed, .. } = buffers;
        let width = (self.heads.queries + 2 * self.heads.keys) * d_head;
        assert_eq!((n_kv_heads, qkv.len()), (self.heads.keys, cached.len() * width), "the cache is another model's");
        assert!(cached.iter().all(|&cached| cached < capacity), "{cached:?} and one more exceed {capacity} positions");
        let out = sized(mixed, cached.len() * self.heads.queries * d_head);
        for part in kept.iter_mut() {
            if !is_whole(part) {
                *part = part.to_contiguous();
            }
        }
        attend_to_rows(out, qkv, kept.each_mut().map(FlexTensor::storage_mut), (self.heads, d_head), cached);
    }

    /// `branch = W₂·act(W₁·normed + b₁) + b₂`, with a gate where there is one.
    fn feed_forward(&self, block: &Block, buffers: &mut Buffers) {
        let Buffers { branch, normed, gate, up, active, hidden, .. } = buffers;
        if let Some(of_gate) = &block.gate {
            of_gate.times(gate, normed, hidden);
            block.up.times(up, normed, hidden);
            gate_into(sized(active, up.len()), gate, up);
        } else {
            let bias = block.up.bias.as_ref().map(contiguous).expect("compared when the model was made ready");
            block.up.times_without_bias(up, normed, hidden);
            bias_activation_rows(sized(active, up.len()), up, floats(&bias), self.activation);
        }
        block.down.times(branch, active, hidden);
    }

    /// `x = branch + x`, `normed = norm(x)`; with post-norm the stream goes on from the norm.
    fn add(&self, norm: &Norm, buffers: &mut Buffers) {
        let Buffers { x, branch, normed, other, statistics, .. } = buffers;
        let (gamma, beta) = (contiguous(&norm.gamma), norm.beta.as_ref().map(contiguous));
        let (gamma, beta) = (floats(&gamma), beta.as_deref().map(floats));
        let n = x.len();
        let statistics = sized(statistics, 2 * n / gamma.len());
        let outs = (sized(normed, n), sized(other, n));
        add_and_normalize_rows(outs, statistics, (branch, x), gamma, beta, self.eps);
        if self.final_norm.is_some() {
            std::mem::swap(x, other);
        } else {
            x.copy_from_slice(normed);
        }
    }
}

impl Linear {
    fn new(StepLinear { layer: low_rank::Adapted { weight, low_rank }, bias }: StepLinear) -> Result<Self, NoBody> {
        let thin = low_rank.map(|LowRank { a, b, parts, scale }| {
            Ok(Thin { a: numbers(a)?, b: numbers(b)?, parts, scale: scale as f32 })
        });
        let layer = Adapted { weight: matrix(weight)?, thin: thin.transpose()? };
        Ok(Self { layer, bias: bias.map(numbers).transpose()? })
    }

    /// `out = x W + b`, and what stands beside the weight.
    fn times(&self, out: &mut Vec<f32>, x: &[f32], hidden: &mut Vec<f32>) {
        let bias = self.bias.as_ref().map(contiguous);
        self.product(out, x, bias.as_deref().map(floats), hidden);
    }

    fn times_without_bias(&self, out: &mut Vec<f32>, x: &[f32], hidden: &mut Vec<f32>) {
        self.product(out, x, None, hidden);
    }

    fn product(&self, out: &mut Vec<f32>, x: &[f32], bias: Option<&[f32]>, hidden: &mut Vec<f32>) {
        let (d_in, d_out) = matrix_dims(&self.layer.weight);
        let n = x.len() / d_in;
        let hidden = sized(hidden, n * self.layer.n_hidden());
        thin::few_rows_into(sized(out, n * d_out), hidden, x, &self.layer, bias);
    }
}

impl Norm {
    fn new(StepNorm { gamma, beta }: StepNorm) -> Result<Self, NoBody> {
        Ok(Self { gamma: numbers(gamma)?, beta: beta.map(numbers).transpose()? })
    }

    /// `normed = norm(x)`.
    fn normalize(&self, Buffers { x, normed, statistics, .. }: &mut Buffers, eps: f32) {
        let (_, d) = matrix_dims(&self.gamma);
        self.rows(sized(normed, x.len()), sized(statistics, 2 * x.len() / d), x, eps);
    }

    fn rows(&self, out: &mut [f32], statistics: &mut [f32], x: &[f32], eps: f32) {
        let (gamma, beta) = (contiguous(&self.gamma), self.beta.as_ref().map(contiguous));
        normalize_rows(out, statistics, x, floats(&gamma), beta.as_deref().map(floats), eps);
    }
}

impl Block {
    fn new(block: StepBlock) -> Result<Self, NoBody> {
        let StepBlock { norm_1, qkv, qk_norms, proj, norm_2, gate, up, down } = block;
        let qk_norms = qk_norms.map(|[q_norm, k_norm]| Ok([Norm::new(q_norm)?, Norm::new(k_norm)?]));
        Ok(Self {
            norm_1: Norm::new(norm_1)?,
            qkv: Linear::new(qkv)?,
            qk_norms: qk_norms.transpose()?,
            proj: Linear::new(proj)?,
            norm_2: Norm::new(norm_2)?,
            gate: gate.map(Linear::new).transpose()?,
            up: Linear::new(up)?,
            down: Linear::new(down)?,
        })
    }
}

/// A matrix as it is stored.
fn matrix(x: Tensor<2>) -> Result<FlexTensor, NoBody> {
    let x = primitive(x)?;
    if matches!(x.dtype(), DType::F32 | DType::BF16) { Ok(x) } else { Err(NoBody) }
}

/// A tensor in f32.
fn numbers<const D: usize>(x: Tensor<D>) -> Result<FlexTensor, NoBody> {
    let x = primitive(x)?;
    if x.dtype() == DType::F32 { Ok(x) } else { Err(NoBody) }
}

/// The tensor, if it is on the flex backend, without autodiff, and its numbers lie in order.
fn primitive<const D: usize>(x: Tensor<D>) -> Result<FlexTensor, NoBody> {
    if !matches!(x.device().as_dispatch(), DispatchDevice::Flex(_)) {
        return Err(NoBody);
    }
    x.try_into_primitive::<Flex>().ok().filter(FlexTensor::is_contiguous).ok_or(NoBody)
}

/// The first `n` numbers of a buffer, which grows to hold them and is cut to them.
fn sized(buffer: &mut Vec<f32>, n: usize) -> &mut [f32] {
    buffer.resize(n, 0.0);
    buffer
}
