//! The layers of a block, and what one forward pass hands through them.

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData, assert_shape, s};
use rayon::prelude::*;

use super::adapter::{Adapter, Adapters};
use super::cache::Kept;
use super::{Activation, GptConfig, NormKind};
use base::rng::Rng;
use kernels::{
    self, Adapted, Affine, Angles, GatedWeights, Heads, Kernels, NormWeights, Precision, StepBlock, StepLinear,
    StepNorm,
};

/// Attention and feed-forward layer with their norms; the order of the four is [`NormPlacement`](super::NormPlacement)'s.
#[derive(Module, Debug)]
pub(super) struct Block {
    norm_1: Norm,
    attention: Attention,
    norm_2: Norm,
    mlp: Mlp,
}

/// Causal multi-head self-attention.
#[derive(Module, Debug)]
struct Attention {
    /// `[d_model, (n_heads + 2·n_kv_heads)·d_head]`: queries, keys and values side by side, each with its heads in order
    qkv: Linear,
    /// Of the queries of each head, where they are normalised
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    proj: Linear,
    #[module(skip)]
    heads: Heads,
    d_head: usize,
}

/// The position-wise feed-forward layer: up, non-linearity, down.
#[derive(Module, Debug)]
struct Mlp {
    /// Where the hidden state is multiplied by one
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

/// `y = x·W + b` with `W: [d_in, d_out]`, and what an adapter adds.
#[derive(Module, Debug)]
struct Linear {
    weight: Param<Tensor<2>>,
    bias: Option<Param<Tensor<1>>>,
    adapter: Option<Adapter>,
}

/// LayerNorm with gain and offset, or `RMSNorm`, which has no offset.
#[derive(Module, Debug)]
pub(super) struct Norm {
    gamma: Param<Tensor<1>>,
    beta: Option<Param<Tensor<1>>>,
}

/// Inputs of the layers in one forward pass besides their weights.
pub(super) struct Pass<'a> {
    pub(super) kernels: Kernels,
    /// Of the branches; the residual stream and the norms are in f32.
    pub(super) precision: Precision,
    /// Added to the variance in LayerNorm.
    pub(super) eps: f64,
    /// `[batch, seq]`
    pub(super) first_key: Option<Tensor<2, Int>>,
    pub(super) dropout: Option<Dropout<'a>>,
    /// Whether a branch and what follows it are computed together: for many rows, in f32, and where nothing is dropped.
    pub(super) in_blocks: bool,
    /// Of rotary positions.
    pub(super) rotary: Option<Angles>,
}

/// Dropout whose masks come from a host stream, so that every backend drops the same numbers.
pub(super) struct Dropout<'a> {
    /// In the trunk; adapters have their own.
    pub(super) probability: f64,
    pub(super) rng: &'a mut Rng,
}

/// Stands in for every number of a model until it is loaded: one zero, seen in each parameter's shape without taking up
/// memory.
pub(super) struct Blank(Tensor<1>);

impl Blank {
    pub(super) fn new(device: &Device) -> Self {
        Self(Tensor::zeros([1], device))
    }

    pub(super) fn param<const D: usize>(&self, shape: [usize; D]) -> Param<Tensor<D>> {
        Param::from_tensor(self.0.clone().expand(shape))
    }
}

impl Block {
    pub(super) fn blank(config: &GptConfig, blank: &Blank) -> Self {
        let (d_model, d_ff, d_head) = (config.d_model, config.d_ff, config.d_head());
        let norm = |width: usize| Norm::blank(width, config.norm_kind, blank);
        let linear = |d_in: usize, d_out: usize, has_bias: bool| Linear::blank(d_in, d_out, has_bias, blank);
        Self {
            norm_1: norm(d_model),
            attention: Attention {
                qkv: linear(d_model, config.qkv_widths().iter().sum(), config.qkv_bias),
                q_norm: config.qk_norm.then(|| norm(d_head)),
                k_norm: config.qk_norm.then(|| norm(d_head)),
                proj: linear(config.n_heads * d_head, d_model, config.proj_bias),
                heads: Heads { queries: config.n_heads, keys: config.n_kv_heads() },
                d_head,
            },
            norm_2: norm(d_model),
            mlp: Mlp {
                gate: config.gated.then(|| linear(d_model, d_ff, config.mlp_bias)),
                up: linear(d_model, d_ff, config.mlp_bias),
                down: linear(d_ff, d_model, config.mlp_bias),
            },
        }
    }

    /// The same block, at `path` of a [`Gpt`](super::Gpt), with the adapters of that place, not loaded yet, and no others.
    pub(super) fn with_adapters(mut self, path: &str, adapters: Option<&Adapters>, blank: &Blank) -> Self {
        let Self { attention: Attention { qkv, proj, .. }, mlp: Mlp { gate, up, down }, .. } = &mut self;
        let layers = [("attention.qkv", Some(qkv)), ("attention.proj", Some(proj))];
        let layers =
            layers.into_iter().chain([("mlp.gate", gate.as_mut()), ("mlp.up", Some(up)), ("mlp.down", Some(down))]);
        for (name, linear) in layers {
            let Some(linear) = linear else { continue };
            let [d_in, _] = linear.weight.val().dims();
            linear.adapter = adapters.and_then(|adapters| {
                let parts = adapters.parts.get(&format!("{path}.{name}.weight"))?;
                Some(Adapter::blank(d_in, parts, &adapters.lora, blank))
            });
        }
        self
    }

    /// `x₁ = norm₁(x + attention(x))`, then `norm₂(x₁ + mlp(x₁))`.
    pub(super) fn post_norm(
        &self,
        x: Tensor<3>,
        activation: Activation,
        pass: &mut Pass<'_>,
        cache: Option<&mut Kept<'_>>,
        layer: usize,
    ) -> Tensor<3> {
        let (qkv, residual) = self.attention.qkv.forward_keeping(x, pass);
        let mixed = self.attention.mix(qkv, pass, cache, layer);
        let x = self.attention.finish(mixed, residual, &self.norm_1, pass).0;
        self.mlp.forward(x.clone(), activation, x, &self.norm_2, pass).0
    }

    /// `x₁ = x + attention(norm₁(x))`, then `x₂ = x₁ + mlp(norm₂(x₁))`, from and to `(norm(x), x)`: a norm that follows a
    /// residual addition takes the addition along, so this block ends with the norm of the `next` one.
    pub(super) fn pre_norm(
        &self,
        (normed, x): (Tensor<3>, Tensor<3>),
        activation: Activation,
        next: &Norm,
        pass: &mut Pass<'_>,
        cache: Option<&mut Kept<'_>>,
        layer: usize,
    ) -> (Tensor<3>, Tensor<3>) {
        let qkv = self.attention.qkv.forward(pass.precision.narrow(normed), pass);
        let mixed = self.attention.mix(qkv, pass, cache, layer);
        let (normed, x) = self.attention.finish(mixed, x, &self.norm_2, pass);
        self.mlp.forward(normed, activation, x, next, pass)
    }

    /// `x + attention(norm₁(x)) + mlp(norm₂(x))`, from and to `(norm(x), x)` as [`pre_norm`](Self::pre_norm).
    ///
    /// # Source
    /// Wang & Komatsuzaki 2021 (GPT-J); Black et al., arXiv:2204.06745, section 2.1.
    pub(super) fn parallel(
        &self,
        (normed, x): (Tensor<3>, Tensor<3>),
        activation: Activation,
        next: &Norm,
        pass: &mut Pass<'_>,
        cache: Option<&mut Kept<'_>>,
        layer: usize,
    ) -> (Tensor<3>, Tensor<3>) {
        // A node of its own adds what comes to `x` from here before what comes to it from its norm, so that the sum has
        // the same bits where each block has a tape of its own.
        let x = if x.is_tracked() { x * 1.0 } else { x };
        let qkv = self.attention.qkv.forward(pass.precision.narrow(normed), pass);
        let mixed = self.attention.mix(qkv, pass, cache, layer);
        let attended = pass.precision.widen(self.attention.proj.forward(mixed, pass));
        let attended = pass.drop(attended);
        let of_mlp = self.mlp.branch(self.norm_2.forward(x.clone(), pass), activation, pass);
        next.add(attended + pass.drop(of_mlp), x, pass)
    }

    /// The layers as the kernels' [`Stepper`](kernels::Stepper) reads them.
    pub(super) fn step_weights(&self) -> StepBlock {
        let Attention { qkv, q_norm, k_norm, proj, .. } = &self.attention;
        StepBlock {
            norm_1: self.norm_1.step_weights(),
            qkv: qkv.step_weights(),
            qk_norms: q_norm.as_ref().zip(k_norm.as_ref()).map(|(q, k)| [q.step_weights(), k.step_weights()]),
            proj: proj.step_weights(),
            norm_2: self.norm_2.step_weights(),
            gate: self.mlp.gate.as_ref().map(Linear::step_weights),
            up: self.mlp.up.step_weights(),
            down: self.mlp.down.step_weights(),
        }
    }

    /// The first norm, which with pre-norm the block before or the embedding applies.
    pub(super) const fn first_norm(&self) -> &Norm {
        &self.norm_1
    }
}

impl Attention {
    /// `softmax(QKᵀ/√d_head)·V` over what each query sees.
    ///
    /// # Shapes
    /// - `qkv`: `[batch, seq, (n_heads + 2·n_kv_heads)·d_head]`
    /// - returns `[batch, seq, n_heads·d_head]`
    fn mix(&self, qkv: Tensor<3>, pass: &mut Pass<'_>, cache: Option<&mut Kept<'_>>, layer: usize) -> Tensor<3> {
        let qkv = self.placed(qkv, pass);
        let [batch, seq, _] = qkv.dims();
        let n_heads = self.heads.queries;
        let mixed = match cache {
            None => {
                let dropout_mask = pass.mask::<4>(pass.probability(), [batch, n_heads, seq, seq], &qkv.device());
                kernels::attention(pass.kernels, qkv, pass.first_key.clone(), self.heads, dropout_mask)
            }
            Some(kept) => kept.attend(pass.kernels, qkv, layer),
        };
        assert_shape!(mixed, [batch, seq, n_heads * self.d_head]);
        mixed
    }

    /// Queries and keys normalised and turned to their positions, where the model does so; the shape stays.
    fn placed(&self, qkv: Tensor<3>, pass: &Pass<'_>) -> Tensor<3> {
        if pass.rotary.is_none() && self.q_norm.is_none() {
            return qkv;
        }
        let mut qkv = pass.precision.widen(qkv);
        if let (Some(q_norm), Some(k_norm)) = (&self.q_norm, &self.k_norm) {
            let ([batch, seq, width], Heads { queries, keys }) = (qkv.dims(), self.heads);
            let part = |first: usize, n: usize| {
                let columns = first * self.d_head..(first + n) * self.d_head;
                qkv.clone().slice(s![.., .., columns]).reshape([batch, seq, n, self.d_head])
            };
            let (queries, keys, values) = (part(0, queries), part(queries, keys), part(queries + keys, keys));
            let parts = vec![q_norm.forward(queries, pass), k_norm.forward(keys, pass), values];
            qkv = Tensor::cat(parts, 2).reshape([batch, seq, width]);
        }
        if let Some(angles) = &pass.rotary {
            qkv = kernels::rotate(pass.kernels, qkv, self.heads, angles);
        }
        pass.precision.narrow(qkv)
    }

    /// The output projection, what it is added to, and the norm after that: see [`Norm::add`].
    fn finish(
        &self,
        mixed: Tensor<3>,
        residual: Tensor<3>,
        norm: &Norm,
        pass: &mut Pass<'_>,
    ) -> (Tensor<3>, Tensor<3>) {
        if pass.in_blocks {
            if norm.beta.is_some() {
                let (proj, norm) = (self.proj.weights(), norm.weights(pass));
                return kernels::project_add_norm(pass.kernels, mixed, proj, residual, norm);
            }
            let (proj, gamma) = (self.proj.adapted(pass.precision), norm.gamma.val());
            return kernels::project_add_rms_norm(pass.kernels, mixed, proj, residual, gamma, pass.eps);
        }
        let projected = pass.precision.widen(self.proj.forward(mixed, pass));
        norm.add(pass.drop(projected), residual, pass)
    }
}

impl Mlp {
    /// `W₂·act(W₁·x + b₁) + b₂`, what it is added to, and the norm after that: see [`Norm::add`].
    fn forward(
        &self,
        x: Tensor<3>,
        activation: Activation,
        residual: Tensor<3>,
        norm: &Norm,
        pass: &mut Pass<'_>,
    ) -> (Tensor<3>, Tensor<3>) {
        if pass.in_blocks {
            if let Some(gate) = &self.gate {
                let [gate, up, down] = [gate, &self.up, &self.down].map(|layer| layer.adapted(pass.precision));
                let (weights, gamma) = (GatedWeights { gate, up, down }, norm.gamma.val());
                return kernels::gated_mlp_add_rms_norm(pass.kernels, x, weights, residual, gamma, pass.eps);
            }
            let (up, down, norm) = (self.up.weights(), self.down.weights(), norm.weights(pass));
            return kernels::mlp_add_norm(pass.kernels, x, up, activation, down, residual, norm);
        }
        let down = self.branch(x, activation, pass);
        norm.add(pass.drop(down), residual, pass)
    }

    /// `W₂·act(W₁·x + b₁) + b₂`, or with a gate `W₂·(act(G·x) · W₁·x)`, each with the biases that it has.
    fn branch(&self, x: Tensor<3>, activation: Activation, pass: &mut Pass<'_>) -> Tensor<3> {
        let Pass { kernels, precision, .. } = *pass;
        let x = precision.narrow(x);
        // [batch, seq, d_ff]
        let active = match (&self.gate, &self.up.bias) {
            (Some(gate), _) => {
                kernels::gate(kernels, gate.forward(x.clone(), pass), self.up.forward(x, pass), activation)
            }
            (None, Some(bias)) if self.up.adapter.is_none() => {
                let up = kernels::linear(kernels, x, precision.narrow(self.up.weight.val()), None);
                kernels::bias_activation(kernels, up, precision.narrow(bias.val()), activation)
            }
            (None, _) => kernels::activate(self.up.forward(x, pass), activation),
        };
        precision.widen(self.down.forward(active, pass))
    }
}

impl Linear {
    fn blank(d_in: usize, d_out: usize, has_bias: bool, blank: &Blank) -> Self {
        Self { weight: blank.param([d_in, d_out]), bias: has_bias.then(|| blank.param([d_out])), adapter: None }
    }

    /// For the blocks of [`GptConfig::has_gpt_blocks`], which have every bias.
    fn weights(&self) -> Affine {
        Affine { weight: self.weight.val(), bias: self.bias.as_ref().expect("blocks in one piece have biases").val() }
    }

    fn adapted(&self, precision: Precision) -> Adapted {
        let low_rank = self.adapter.as_ref().map(|adapter| adapter.low_rank(precision));
        Adapted { weight: precision.narrow(self.weight.val()), low_rank }
    }

    fn step_weights(&self) -> StepLinear {
        StepLinear { layer: self.adapted(Precision::F32), bias: self.bias.as_ref().map(Param::val) }
    }

    /// In the precision of the pass, `x` and what is returned.
    fn forward(&self, x: Tensor<3>, pass: &mut Pass<'_>) -> Tensor<3> {
        let Pass { kernels, precision, .. } = *pass;
        let bias = self.bias.as_ref().map(|bias| precision.narrow(bias.val()));
        let layer = self.adapted(precision);
        match &self.adapter {
            Some(adapter) if adapter.dropout() > 0.0 && pass.dropout.is_some() => {
                let y = kernels::linear(kernels, x.clone(), layer.weight, bias);
                let x = precision.narrow(pass.drop_at(adapter.dropout(), precision.widen(x)));
                adapter.low_rank(precision).add(kernels, y, x)
            }
            _ => kernels::adapted_linear(kernels, x, layer, bias),
        }
    }

    /// The result in the precision of the pass, and `x` again for the residual addition.
    fn forward_keeping(&self, x: Tensor<3>, pass: &mut Pass<'_>) -> (Tensor<3>, Tensor<3>) {
        if pass.in_blocks {
            return kernels::linear_keeping(pass.kernels, x, self.weights());
        }
        (self.forward(pass.precision.narrow(x.clone()), pass), x)
    }
}

impl Norm {
    pub(super) fn blank(width: usize, kind: NormKind, blank: &Blank) -> Self {
        Self { gamma: blank.param([width]), beta: (kind == NormKind::LayerNorm).then(|| blank.param([width])) }
    }

    /// For the blocks of [`GptConfig::has_gpt_blocks`], whose norms have offsets.
    fn weights(&self, pass: &Pass<'_>) -> NormWeights {
        let beta = self.beta.as_ref().expect("blocks in one piece have offsets").val();
        NormWeights { gamma: self.gamma.val(), beta, eps: pass.eps }
    }

    pub(super) fn step_weights(&self) -> StepNorm {
        StepNorm { gamma: self.gamma.val(), beta: self.beta.as_ref().map(Param::val) }
    }

    /// The norm of each vector along the last axis.
    fn forward<const D: usize>(&self, x: Tensor<D>, pass: &Pass<'_>) -> Tensor<D> {
        match &self.beta {
            Some(beta) => kernels::layer_norm(pass.kernels, x, self.gamma.val(), beta.val(), pass.eps),
            None => kernels::rms_norm(pass.kernels, x, self.gamma.val(), pass.eps),
        }
    }

    /// The result, and `x` again for the residual addition.
    pub(super) fn forward_keeping(&self, x: Tensor<3>, pass: &Pass<'_>) -> (Tensor<3>, Tensor<3>) {
        match &self.beta {
            Some(_) => kernels::layer_norm_keeping(pass.kernels, x, self.weights(pass)),
            None => kernels::rms_norm_keeping(pass.kernels, x, self.gamma.val(), pass.eps),
        }
    }

    /// `(norm(branch + residual), branch + residual)`.
    fn add(&self, branch: Tensor<3>, residual: Tensor<3>, pass: &Pass<'_>) -> (Tensor<3>, Tensor<3>) {
        if let Some(beta) = &self.beta {
            return kernels::add_layer_norm(pass.kernels, branch, residual, self.gamma.val(), beta.val(), pass.eps);
        }
        kernels::add_rms_norm(pass.kernels, branch, residual, self.gamma.val(), pass.eps)
    }
}

impl Pass<'_> {
    /// A mask of zeros and `1/(1 − p)`, or `None` where nothing is dropped.
    ///
    /// A number is dropped where the stream's next [`Rng::uniform`] is below `p`; they are drawn in parts, in parallel.
    fn mask<const D: usize>(&mut self, p: f64, shape: [usize; D], device: &Device) -> Option<Tensor<D>> {
        const PART: usize = 1 << 14;
        let dropout = self.dropout.as_mut().filter(|_| p > 0.0)?;
        let keep = 1.0 / (1.0 - p) as f32;
        // `uniform` is the upper 53 bits over 2⁵³.
        let threshold = (p * (1u64 << 53) as f64).ceil() as u64;
        let mut mask = vec![keep; shape.iter().product()];
        let rng = &*dropout.rng;
        mask.par_chunks_mut(PART).enumerate().for_each(|(i, part)| {
            let (mut rng, mut numbers) = (rng.clone(), vec![0; part.len()]);
            rng.skip_u64(i * PART);
            rng.fill_u64(&mut numbers);
            for (factor, number) in part.iter_mut().zip(numbers) {
                if number >> 11 < threshold {
                    *factor = 0.0;
                }
            }
        });
        dropout.rng.skip_u64(mask.len());
        Some(Tensor::from_data(TensorData::new(mask, shape), device))
    }

    /// The trunk's probability of dropout.
    fn probability(&self) -> f64 {
        self.dropout.as_ref().map_or(0.0, |dropout| dropout.probability)
    }

    /// `x` with some of its numbers zeroed.
    pub(super) fn drop(&mut self, x: Tensor<3>) -> Tensor<3> {
        self.drop_at(self.probability(), x)
    }

    /// `x` with each number zeroed with probability `p`.
    pub(super) fn drop_at(&mut self, p: f64, x: Tensor<3>) -> Tensor<3> {
        match self.mask(p, x.dims(), &x.device()) {
            Some(mask) => x * mask,
            None => x,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::rng::Streams;

    #[test]
    fn a_mask_drops_where_the_streams_numbers_are_below_the_probability() {
        for probability in [0.1, 0.5, 1.0 - 1e-16] {
            let (mut one_by_one, mut rng) = (Streams::new(4).get("dropout", 1), Streams::new(4).get("dropout", 1));
            let dropout = Some(Dropout { probability, rng: &mut rng });
            let mut pass = Pass {
                kernels: Kernels::Plain,
                precision: Precision::F32,
                eps: 1e-5,
                first_key: None,
                dropout,
                in_blocks: false,
                rotary: None,
            };
            let mask = pass.mask(probability, [3, 7, 1999], &Device::flex()).expect("something is dropped");
            let keep = 1.0 / (1.0 - probability) as f32;
            let draw = |_| if one_by_one.uniform() < probability { 0.0 } else { keep };
            let expected: Vec<f32> = (0..3 * 7 * 1999).map(draw).collect();
            assert_eq!(mask.try_into_vec_as::<f32>().expect("on the host"), expected);
            assert_eq!(rng.next_u64(), one_by_one.next_u64());
        }
    }
}
