//! The fused operations as a backend extension, and how they are differentiated.
//!
//! Only the forward operations are part of the trait. Their gradients are computed by the functions of `flex`, called
//! from the steps registered here, and are themselves not differentiable.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, Backend, Flex, backend_extension};
use burn_flex::FlexTensor;

use super::flex::{self, activation, adamw, attention, decode, linear, log_probs, norm};
use super::{Activation, AdamWStep};

/// The operations that have a fused body, on tensors whose shapes the functions of the parent module have checked.
#[backend_extension(Flex, Autodiff)]
pub trait FusedOps: Backend {
    /// See [`super::linear`].
    fn fused_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`super::linear`], without a bias: a backend extension takes no optional tensors.
    fn fused_linear_no_bias(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`super::bias_activation`].
    fn fused_bias_activation(
        x: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        activation: Activation,
    ) -> FloatTensor<Self>;

    /// See [`super::layer_norm`].
    fn fused_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self>;

    /// See [`super::add_layer_norm`].
    fn fused_add_layer_norm(
        x: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::attention`]; `first_key` has `batch · seq` entries.
    fn fused_attention(qkv: FloatTensor<Self>, first_key: Vec<usize>, n_heads: usize) -> FloatTensor<Self>;

    /// See [`super::attention_cached`].
    fn fused_attention_cached(
        qkv: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        cached: usize,
        first_key: &[usize],
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::token_log_probs`]; `scale` is one over the temperature.
    fn fused_token_log_probs(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::cross_entropy`]; `weight` is one over the denominator.
    fn fused_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weight: f64,
    ) -> FloatTensor<Self>;

    /// See [`super::logits`].
    fn fused_logits(hidden: FloatTensor<Self>, head: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`super::adamw_update`].
    fn fused_adamw(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

/// A tensor of the autodiff backend that needs no gradient.
fn untracked<C: CheckpointStrategy>(tensor: FlexTensor) -> FloatTensor<Autodiff<Flex, C>> {
    <Autodiff<Flex, C> as AutodiffBackend>::from_inner(tensor)
}

/// Gives `grad()` to a parent that needs a gradient.
macro_rules! register {
    ($grads:expr, $parent:expr, $grad:expr) => {
        if let Some(parent) = $parent {
            $grads.register::<Flex>(parent.id, $grad);
        }
    };
}

#[derive(Debug)]
struct LinearBackward;

impl Backward<Flex, 3> for LinearBackward {
    /// `x`, needed for the gradient of the weight, and the weight, needed for that of `x`.
    type State = (FlexTensor, FlexTensor);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, weight_node, bias_node] = ops.parents;
        let (x, weight) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        register!(grads, bias_node, linear::backward_bias(&grad));
        register!(grads, weight_node, linear::backward_weight(&x, &grad));
        drop(x);
        register!(grads, x_node, linear::backward_x(&weight, &grad));
    }
}

#[derive(Debug)]
struct LinearNoBiasBackward;

impl Backward<Flex, 2> for LinearNoBiasBackward {
    /// As [`LinearBackward`]'s.
    type State = (FlexTensor, FlexTensor);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, weight_node] = ops.parents;
        let (x, weight) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        register!(grads, weight_node, linear::backward_weight(&x, &grad));
        drop(x);
        register!(grads, x_node, linear::backward_x(&weight, &grad));
    }
}

#[derive(Debug)]
struct BiasActivationBackward;

impl Backward<Flex, 2> for BiasActivationBackward {
    /// `x`, the bias, and which function.
    type State = (FlexTensor, FlexTensor, Activation);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, bias_node] = ops.parents;
        let (x, bias, activation) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let (x_grad, bias_grad) = activation::backward(&x, &bias, activation, &grad);
        register!(grads, x_node, x_grad);
        register!(grads, bias_node, bias_grad);
    }
}

#[derive(Debug)]
struct LayerNormBackward;

impl Backward<Flex, 3> for LayerNormBackward {
    /// `x`, gamma, and the statistics of the rows.
    type State = (FlexTensor, FlexTensor, FlexTensor);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, gamma_node, beta_node] = ops.parents;
        let (x, gamma, statistics) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let (x_grad, gamma_grad, beta_grad) = norm::backward(&x, &gamma, &statistics, &grad);
        register!(grads, x_node, x_grad);
        register!(grads, gamma_node, gamma_grad);
        register!(grads, beta_node, beta_grad);
    }
}

/// The addition before a layer norm: both terms get the gradient of the sum.
#[derive(Debug)]
struct AddBackward;

impl Backward<Flex, 2> for AddBackward {
    type State = ();

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, residual_node] = ops.parents;
        let grad = grads.consume::<Flex>(&ops.node);
        register!(grads, x_node, grad.clone());
        register!(grads, residual_node, grad);
    }
}

#[derive(Debug)]
struct AttentionBackward;

impl Backward<Flex, 1> for AttentionBackward {
    type State = AttentionState;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node] = ops.parents;
        let AttentionState { qkv, first_key, n_heads, out, lse } = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        register!(grads, node, attention::backward(&qkv, &first_key, n_heads, &out, &lse, &grad));
    }
}

/// What the backward of attention needs.
#[derive(Debug, Clone)]
struct AttentionState {
    qkv: FlexTensor,
    first_key: Vec<usize>,
    n_heads: usize,
    out: FlexTensor,
    lse: FlexTensor,
}

#[derive(Debug)]
struct LogProbsBackward;

impl Backward<Flex, 2> for LogProbsBackward {
    type State = LogProbsState;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [hidden_node, head_node] = ops.parents;
        let LogProbsState { hidden, head, targets, scale, lse } = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let (hidden_grad, head_grad) = log_probs::backward(&hidden, &head, &targets, scale, &lse, &grad);
        register!(grads, hidden_node, hidden_grad);
        register!(grads, head_node, head_grad);
    }
}

/// What the backward of the log-probabilities needs.
#[derive(Debug, Clone)]
struct LogProbsState {
    hidden: FlexTensor,
    head: FlexTensor,
    targets: FlexTensor,
    scale: f64,
    lse: FlexTensor,
}

#[derive(Debug)]
struct CrossEntropyBackward;

impl Backward<Flex, 2> for CrossEntropyBackward {
    /// The gradients for an output gradient of 1.
    type State = (FlexTensor, FlexTensor);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [hidden_node, head_node] = ops.parents;
        let (hidden_grad, head_grad) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        register!(grads, hidden_node, flex::scaled(hidden_grad, &grad));
        register!(grads, head_node, flex::scaled(head_grad, &grad));
    }
}

#[derive(Debug)]
struct LogitsBackward;

impl Backward<Flex, 2> for LogitsBackward {
    /// The hidden states and the head.
    type State = (FlexTensor, FlexTensor);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [hidden_node, head_node] = ops.parents;
        let (hidden, head) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        // logits = hidden · headᵀ: the gradients are grad · head and gradᵀ · hidden.
        register!(grads, hidden_node, linear::forward(&grad, &head, None));
        register!(grads, head_node, linear::backward_weight(&grad, &hidden));
    }
}

/// Registers `$backward` for an output that was computed from `$nodes`, with the state it needs if it is tracked.
macro_rules! finish {
    ($backward:expr, [$($input:expr),+], $state:expr, $out:expr) => {
        match $backward.prepare::<C>([$($input.node()),+]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish($state, $out),
            OpsKind::UnTracked(prep) => prep.finish($out),
        }
    };
}

impl<C: CheckpointStrategy> FusedOps for Autodiff<Flex, C> {
    fn fused_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        let out = linear::forward(x.primitive(), weight.primitive(), Some(bias.primitive()));
        let state = (x.primitive().clone(), weight.primitive().clone());
        finish!(LinearBackward, [x, weight, bias], state, out)
    }

    fn fused_linear_no_bias(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let out = linear::forward(x.primitive(), weight.primitive(), None);
        let state = (x.primitive().clone(), weight.primitive().clone());
        finish!(LinearNoBiasBackward, [x, weight], state, out)
    }

    fn fused_bias_activation(
        x: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        activation: Activation,
    ) -> FloatTensor<Self> {
        let out = activation::forward(x.primitive(), bias.primitive(), activation);
        let state = (x.primitive().clone(), bias.primitive().clone(), activation);
        finish!(BiasActivationBackward, [x, bias], state, out)
    }

    fn fused_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        let out = norm::forward(x.primitive(), gamma.primitive(), beta.primitive(), eps);
        let state = (x.primitive().clone(), gamma.primitive().clone(), out.statistics);
        finish!(LayerNormBackward, [x, gamma, beta], state, out.normed)
    }

    fn fused_add_layer_norm(
        x: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (out, sum) =
            norm::add_forward(x.primitive(), residual.primitive(), gamma.primitive(), beta.primitive(), eps);
        let sum = finish!(AddBackward, [x, residual], (), sum);
        let state = (sum.primitive().clone(), gamma.primitive().clone(), out.statistics);
        let normed = finish!(LayerNormBackward, [sum, gamma, beta], state, out.normed);
        (normed, sum)
    }

    fn fused_attention(qkv: FloatTensor<Self>, first_key: Vec<usize>, n_heads: usize) -> FloatTensor<Self> {
        let (out, lse) = attention::forward(qkv.primitive(), &first_key, n_heads);
        let state = AttentionState { qkv: qkv.primitive().clone(), first_key, n_heads, out: out.clone(), lse };
        finish!(AttentionBackward, [qkv], state, out)
    }

    fn fused_attention_cached(
        qkv: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        cached: usize,
        first_key: &[usize],
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (keys, values) = (keys.into_primitive(), values.into_primitive());
        let (out, keys, values) = decode::attention_cached(qkv.primitive(), keys, values, cached, first_key);
        (untracked::<C>(out), untracked::<C>(keys), untracked::<C>(values))
    }

    fn fused_token_log_probs(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let out = log_probs::forward(hidden.primitive(), head.primitive(), &targets, scale);
        let state = LogProbsState {
            hidden: hidden.primitive().clone(),
            head: head.primitive().clone(),
            targets,
            scale,
            lse: out.lse,
        };
        let log_probs = finish!(LogProbsBackward, [hidden, head], state, out.of_targets);
        (log_probs, untracked::<C>(out.entropy))
    }

    fn fused_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weight: f64,
    ) -> FloatTensor<Self> {
        match CrossEntropyBackward.prepare::<C>([hidden.node(), head.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let out =
                    log_probs::cross_entropy_with_gradients(hidden.primitive(), head.primitive(), &targets, weight);
                prep.finish((out.hidden_grad, out.head_grad), out.loss)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(log_probs::cross_entropy(hidden.primitive(), head.primitive(), &targets, weight))
            }
        }
    }

    fn fused_logits(hidden: FloatTensor<Self>, head: FloatTensor<Self>) -> FloatTensor<Self> {
        let out = linear::logits(hidden.primitive(), head.primitive());
        let state = (hidden.primitive().clone(), head.primitive().clone());
        finish!(LogitsBackward, [hidden, head], state, out)
    }

    fn fused_adamw(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (param, m, v) =
            adamw::update(param.into_primitive(), grad.primitive(), m.into_primitive(), v.into_primitive(), &step);
        (untracked::<C>(param), untracked::<C>(m), untracked::<C>(v))
    }
}
