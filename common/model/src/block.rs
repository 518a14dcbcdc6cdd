//! The layers of a block, and what one forward pass hands through them.

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData, assert_shape};
use rayon::prelude::*;

use super::cache::LayerCache;
use super::{Activation, Cache, GptConfig};
use base::rng::Rng;
use kernels::{self, Affine, Kernels, NormWeights, Precision};

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
    /// `[d_model, 3·d_model]`: queries, keys and values side by side, each with its heads in order
    qkv: Linear,
    proj: Linear,
    n_heads: usize,
}

/// The position-wise feed-forward layer: up, non-linearity, down.
#[derive(Module, Debug)]
struct Mlp {
    up: Linear,
    down: Linear,
}

/// `y = x·W + b` with `W: [d_in, d_out]`.
#[derive(Module, Debug)]
struct Linear {
    weight: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
}

/// LayerNorm with gain and offset.
#[derive(Module, Debug)]
pub(super) struct Norm {
    gamma: Param<Tensor<1>>,
    beta: Param<Tensor<1>>,
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
}

/// Dropout whose masks come from a host stream, so that every backend drops the same numbers.
pub(super) struct Dropout<'a> {
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
        let (d_model, d_ff) = (config.d_model, config.d_ff);
        Self {
            norm_1: Norm::blank(d_model, blank),
            attention: Attention {
                qkv: Linear::blank(d_model, 3 * d_model, blank),
                proj: Linear::blank(d_model, d_model, blank),
                n_heads: config.n_heads,
            },
            norm_2: Norm::blank(d_model, blank),
            mlp: Mlp { up: Linear::blank(d_model, d_ff, blank), down: Linear::blank(d_ff, d_model, blank) },
        }
    }

    /// `x₁ = norm₁(x + attention(x))`, then `norm₂(x₁ + mlp(x₁))`.
    pub(super) fn post_norm(
        &self,
        x: Tensor<3>,
        activation: Activation,
        pass: &mut Pass<'_>,
        cache: Option<&mut Cache>,
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
        cache: Option<&mut Cache>,
        layer: usize,
    ) -> (Tensor<3>, Tensor<3>) {
        let qkv = self.attention.qkv.forward(pass.precision.narrow(normed), pass);
        let mixed = self.attention.mix(qkv, pass, cache, layer);
        let (normed, x) = self.attention.finish(mixed, x, &self.norm_2, pass);
        self.mlp.forward(normed, activation, x, next, pass)
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
    /// - `qkv`: `[batch, seq, 3·d_model]`
    /// - returns `[batch, seq, d_model]`
    fn mix(&self, qkv: Tensor<3>, pass: &mut Pass<'_>, cache: Option<&mut Cache>, layer: usize) -> Tensor<3> {
        let [batch, seq, width] = qkv.dims();
        let mixed = match cache {
            None => {
                let dropout_mask = pass.mask::<4>([batch, self.n_heads, seq, seq], &qkv.device());
                kernels::attention(pass.kernels, qkv, pass.first_key.clone(), self.n_heads, dropout_mask)
            }
            Some(cache) => {
                let LayerCache { keys_values } = &mut cache.layers[layer];
                let (keys, values) = keys_values.take().expect("each layer's cache is put back after use");
                let (mixed, keys, values) = kernels::attention_cached(pass.kernels, qkv, keys, values, &cache.lens);
                *keys_values = Some((keys, values));
                mixed
            }
        };
        assert_shape!(mixed, [batch, seq, width / 3]);
        mixed
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
            return kernels::project_add_norm(pass.kernels, mixed, self.proj.weights(), residual, norm.weights(pass));
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
            let (up, down, norm) = (self.up.weights(), self.down.weights(), norm.weights(pass));
            return kernels::mlp_add_norm(pass.kernels, x, up, activation, down, residual, norm);
        }
        // [batch, seq, d_ff]
        let Pass { kernels, precision, .. } = *pass;
        let up = kernels::linear(kernels, precision.narrow(x), precision.narrow(self.up.weight.val()), None);
        let active = kernels::bias_activation(kernels, up, precision.narrow(self.up.bias.val()), activation);
        let down = precision.widen(self.down.forward(active, pass));
        norm.add(pass.drop(down), residual, pass)
    }
}

impl Linear {
    fn blank(d_in: usize, d_out: usize, blank: &Blank) -> Self {
        Self { weight: blank.param([d_in, d_out]), bias: blank.param([d_out]) }
    }

    fn weights(&self) -> Affine {
        Affine { weight: self.weight.val(), bias: self.bias.val() }
    }

    /// In the precision of the pass, `x` and what is returned.
    fn forward(&self, x: Tensor<3>, pass: &Pass<'_>) -> Tensor<3> {
        let (weight, bias) = (pass.precision.narrow(self.weight.val()), pass.precision.narrow(self.bias.val()));
        kernels::linear(pass.kernels, x, weight, Some(bias))
    }

    /// The result in the precision of the pass, and `x` again for the residual addition.
    fn forward_keeping(&self, x: Tensor<3>, pass: &Pass<'_>) -> (Tensor<3>, Tensor<3>) {
        if pass.in_blocks {
            return kernels::linear_keeping(pass.kernels, x, self.weights());
        }
        (self.forward(pass.precision.narrow(x.clone()), pass), x)
    }
}

impl Norm {
    pub(super) fn blank(d_model: usize, blank: &Blank) -> Self {
        Self { gamma: blank.param([d_model]), beta: blank.param([d_model]) }
    }

    fn weights(&self, pass: &Pass<'_>) -> NormWeights {
        NormWeights { gamma: self.gamma.val(), beta: self.beta.val(), eps: pass.eps }
    }

    /// The result, and `x` again for the residual addition.
    pub(super) fn forward_keeping(&self, x: Tensor<3>, pass: &Pass<'_>) -> (Tensor<3>, Tensor<3>) {
        kernels::layer_norm_keeping(pass.kernels, x, self.weights(pass))
    }

    /// `(LayerNorm(branch + residual), branch + residual)`.
    fn add(&self, branch: Tensor<3>, residual: Tensor<3>, pass: &Pass<'_>) -> (Tensor<3>, Tensor<3>) {
        kernels::add_layer_norm(pass.kernels, branch, residual, self.gamma.val(), self.beta.val(), pass.eps)
    }
}

impl Pass<'_> {
    /// A mask of zeros and `1/(1 − p)`, or `None` where nothing is dropped.
    ///
    /// A number is dropped where the stream's next [`Rng::uniform`] is below `p`; they are drawn in parts, in parallel.
    fn mask<const D: usize>(&mut self, shape: [usize; D], device: &Device) -> Option<Tensor<D>> {
        const PART: usize = 1 << 14;
        let dropout = self.dropout.as_mut()?;
        let keep = 1.0 / (1.0 - dropout.probability) as f32;
        // `uniform` is the upper 53 bits over 2⁵³.
        let threshold = (dropout.probability * (1u64 << 53) as f64).ceil() as u64;
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

    /// `x` with some of its numbers zeroed.
    pub(super) fn drop(&mut self, x: Tensor<3>) -> Tensor<3> {
        match self.mask(x.dims(), &x.device()) {
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
            };
            let mask = pass.mask([3, 7, 1999], &Device::flex()).expect("something is dropped");
            let keep = 1.0 / (1.0 - probability) as f32;
            let draw = |_| if one_by_one.uniform() < probability { 0.0 } else { keep };
            let expected: Vec<f32> = (0..3 * 7 * 1999).map(draw).collect();
            assert_eq!(mask.try_into_vec_as::<f32>().expect("on the host"), expected);
            assert_eq!(rng.next_u64(), one_by_one.next_u64());
        }
    }
}
