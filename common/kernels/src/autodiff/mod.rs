//! The fused operations as a backend extension, and how they are differentiated.
//!
//! Only the forward operations are part of the trait. Their gradients are computed by the functions of `flex`, called
//! from the steps registered here, and are themselves not differentiable.

mod gated;
mod steps;

use std::ops::Range;

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::ops::{Backward, NodeGuard, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, Backend, ExtensionType, Flex, backend_extension};
use burn_flex::FlexTensor;

use super::flex::branch::{self, Affine, NormState};
use super::flex::rotary::{self, Direction};
use super::flex::thin::{self, Adapted, Thin};
use super::flex::{self, activation, attention, decode, embedding, linear, log_probs, norm};
use super::{Activation, Heads};
use crate::kept::KeptBackward;
use gated::{
    AddRmsNormBackward, GateBackward, GatedMlpBackward, GatedMlpState, ProjectAddRmsNormBackward, RmsNormBackward,
};
use steps::{
    AddLayerNormBackward, AttentionBackward, AttentionState, BiasActivationBackward, CrossEntropyBackward,
    EmbedBackward, EmbedState, Kept, LayerNormBackward, LinearBackward, LinearNoBiasBackward, LinearState,
    LogProbsBackward, LogProbsState, LogitsBackward, LookupBackward, MlpAddNormBackward, MlpState,
    ProjectAddNormBackward, ProjectState, RotateBackward,
};

/// The operations that have a fused body, on tensors whose shapes the functions of the parent module have checked.
///
/// Every argument is one tensor, a weight with what stands beside it, or a plain value: the macro finds the tensors to
/// convert by the type of the argument.
#[backend_extension(Flex, Autodiff)]
pub trait FusedOps: Backend {
    /// See [`super::linear`].
    fn fused_linear(
        x: FloatTensor<Self>,
        #[extension_type] weight: Weight<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// See [`super::linear`], without a bias: a backend extension takes no optional tensors.
    fn fused_linear_no_bias(x: FloatTensor<Self>, #[extension_type] weight: Weight<Self>) -> FloatTensor<Self>;

    /// See [`super::linear_keeping`].
    fn fused_linear_keeping(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::project_add_norm`].
    fn fused_project_add_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::mlp_add_norm`].
    fn fused_mlp_add_norm(
        x: FloatTensor<Self>,
        up_weight: FloatTensor<Self>,
        up_bias: FloatTensor<Self>,
        activation: Activation,
        down_weight: FloatTensor<Self>,
        down_bias: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::embed`]; `positions` has an entry for each id.
    fn fused_embed(
        tokens: FloatTensor<Self>,
        position_table: FloatTensor<Self>,
        ids: IntTensor<Self>,
        positions: Vec<usize>,
    ) -> FloatTensor<Self>;

    /// See [`super::lookup`].
    fn fused_lookup(tokens: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self>;

    /// See [`super::bias_activation`].
    fn fused_bias_activation(
        x: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        activation: Activation,
    ) -> FloatTensor<Self>;

    /// See [`super::layer_norm_keeping`].
    fn fused_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::add_layer_norm`].
    fn fused_add_layer_norm(
        x: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::rms_norm_keeping`].
    fn fused_rms_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::add_rms_norm`].
    fn fused_add_rms_norm(
        x: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::project_add_norm`], without bias and offset.
    fn fused_project_add_rms_norm(
        x: FloatTensor<Self>,
        #[extension_type] weight: Weight<Self>,
        residual: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::gate`], of the sigmoid linear unit.
    fn fused_gate(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`super::gated_mlp_add_norm`], of the sigmoid linear unit, without biases and offset.
    fn fused_gated_mlp_add_rms_norm(
        x: FloatTensor<Self>,
        #[extension_type] gate: Weight<Self>,
        #[extension_type] up: Weight<Self>,
        #[extension_type] down: Weight<Self>,
        residual: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`super::attention`]; `first_key` has `batch · seq` entries.
    fn fused_attention(qkv: FloatTensor<Self>, first_key: Vec<usize>, heads: Heads) -> FloatTensor<Self>;

    /// See [`super::rotate`].
    fn fused_rotate(
        qkv: FloatTensor<Self>,
        heads: Heads,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// See [`super::attention_cached`].
    fn fused_attention_cached(
        qkv: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        cached: &[usize],
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
}

/// A weight alone, or with the thin matrices of [`super::LowRank`] beside it.
#[derive(ExtensionType)]
pub enum Weight<B: Backend> {
    Alone(FloatTensor<B>),
    Adapted { weight: FloatTensor<B>, a: FloatTensor<B>, b: FloatTensor<B>, parts: Vec<Range<usize>>, scale: f64 },
}

impl From<Weight<Flex>> for Adapted {
    fn from(weight: Weight<Flex>) -> Self {
        match weight {
            Weight::Alone(weight) => Self { weight, thin: None },
            Weight::Adapted { weight, a, b, parts, scale } => {
                Self { weight, thin: Some(Thin { a, b, parts, scale: scale as f32 }) }
            }
        }
    }
}

impl<C: CheckpointStrategy> Weight<Autodiff<Flex, C>> {
    /// The numbers, and the places in the graph of the weight, `A` and `B`.
    fn with_nodes(self) -> (Adapted, [NodeGuard; 3]) {
        match self {
            Self::Alone(weight) => {
                // Parents are as many as if there were an adapter.
                let none = untracked::<C>(flex::nothing());
                let nodes = [weight.node(), none.node(), none.node()];
                (Adapted { weight: weight.into_primitive(), thin: None }, nodes)
            }
            Self::Adapted { weight, a, b, parts, scale } => {
                let nodes = [weight.node(), a.node(), b.node()];
                let thin = Thin { a: a.into_primitive(), b: b.into_primitive(), parts, scale: scale as f32 };
                (Adapted { weight: weight.into_primitive(), thin: Some(thin) }, nodes)
            }
        }
    }
}

/// A tensor with its place in the graph, whatever the checkpointing.
type Traced = FloatTensor<Autodiff<Flex>>;

/// A tensor of the autodiff backend that needs no gradient.
fn untracked<C: CheckpointStrategy>(tensor: FlexTensor) -> FloatTensor<Autodiff<Flex, C>> {
    <Autodiff<Flex, C> as AutodiffBackend>::from_inner(tensor)
}

/// Registers `$backward` for an output that was computed from `$nodes`, with the state it needs if it is tracked.
macro_rules! finish {
    ($backward:expr, [$($input:expr),+], $state:expr, $out:expr) => {
        finish!($backward, nodes [$($input.node()),+], $state, $out)
    };
    ($backward:expr, nodes $nodes:expr, $state:expr, $out:expr) => {
        match $backward.prepare::<C>($nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish($state, $out),
            OpsKind::UnTracked(prep) => prep.finish($out),
        }
    };
}

impl<C: CheckpointStrategy> FusedOps for Autodiff<Flex, C> {
    fn fused_linear(x: Traced, weight: Weight<Self>, bias: Traced) -> Traced {
        let (layer, [weight, a, b]) = weight.with_nodes();
        let (out, hidden) = thin::forward(x.primitive(), &layer, Some(bias.primitive()));
        let state = LinearState { x: x.primitive().clone(), layer, hidden, kept: Kept::default() };
        finish!(LinearBackward, nodes [x.node(), weight, bias.node(), a, b], state, out)
    }

    fn fused_linear_keeping(x: Traced, weight: Traced, bias: Traced) -> (Traced, Traced) {
        let kept = Kept::default();
        let (layer, [weight, a, b]) = Weight::<Self>::Alone(weight).with_nodes();
        let (out, hidden) = thin::forward(x.primitive(), &layer, Some(bias.primitive()));
        let state = LinearState { x: x.primitive().clone(), layer, hidden, kept: kept.clone() };
        let out = finish!(LinearBackward, nodes [x.node(), weight, bias.node(), a, b], state, out);
        let x = finish!(KeptBackward::<Flex>::NEW, [out], kept, x.into_primitive());
        (out, x)
    }

    fn fused_project_add_norm(
        x: Traced,
        weight: Traced,
        bias: Traced,
        residual: Traced,
        gamma: Traced,
        beta: Traced,
        eps: f64,
    ) -> (Traced, Traced) {
        let kept = Kept::default();
        let layer = Adapted { weight: weight.primitive().clone(), thin: None };
        let norm = branch::Norm { gamma: gamma.primitive(), beta: Some(beta.primitive()), eps };
        let (out, sum, hidden) =
            branch::project(x.primitive(), &layer, Some(bias.primitive()), residual.primitive(), &norm);
        let norm = NormState::new(&sum, gamma.primitive(), out.statistics, true);
        let state = ProjectState { x: x.primitive().clone(), layer, hidden, norm, kept: kept.clone() };
        let normed = finish!(ProjectAddNormBackward, [x, weight, bias, residual, gamma, beta], state, out.normed);
        let sum = finish!(KeptBackward::<Flex>::NEW, [normed], kept, sum);
        (normed, sum)
    }

    fn fused_mlp_add_norm(
        x: Traced,
        up_weight: Traced,
        up_bias: Traced,
        activation: Activation,
        down_weight: Traced,
        down_bias: Traced,
        residual: Traced,
        gamma: Traced,
        beta: Traced,
        eps: f64,
    ) -> (Traced, Traced) {
        let kept = Kept::default();
        let up = Affine { weight: up_weight.primitive(), bias: Some(up_bias.primitive()) };
        let down = Affine { weight: down_weight.primitive(), bias: Some(down_bias.primitive()) };
        let norm = branch::Norm { gamma: gamma.primitive(), beta: Some(beta.primitive()), eps };
        let (out, sum, hidden) = branch::mlp(x.primitive(), &up, activation, &down, residual.primitive(), &norm);
        let state = MlpState {
            x: x.primitive().clone(),
            weights: [up_weight.primitive().clone(), down_weight.primitive().clone()],
            activation,
            hidden,
            same: x.id() == residual.id(),
            norm: NormState::new(&sum, gamma.primitive(), out.statistics, true),
            kept: kept.clone(),
        };
        let parents = [x, up_weight, up_bias, down_weight, down_bias, residual, gamma, beta];
        let nodes = parents.each_ref().map(Traced::node);
        let normed = match MlpAddNormBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(state, out.normed),
            OpsKind::UnTracked(prep) => prep.finish(out.normed),
        };
        let sum = finish!(KeptBackward::<Flex>::NEW, [normed], kept, sum);
        (normed, sum)
    }

    fn fused_embed(tokens: Traced, position_table: Traced, ids: FlexTensor, positions: Vec<usize>) -> Traced {
        let [n_rows, _] = tokens.primitive().layout().shape().dims();
        let shape = ids.layout().shape().dims();
        let ids = embedding::rows_of(&ids, n_rows);
        let out = embedding::forward(tokens.primitive(), position_table.primitive(), &ids, &positions, shape);
        let nodes = [tokens.node(), position_table.node()];
        match EmbedBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(EmbedState { tokens, position_table, ids, positions }, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn fused_lookup(tokens: Traced, ids: FlexTensor) -> Traced {
        let [n_rows, _] = tokens.primitive().layout().shape().dims();
        let rows = embedding::rows_of(&ids, n_rows);
        let out = embedding::lookup(tokens.primitive(), &rows, ids.layout().shape().dims());
        match LookupBackward.prepare::<C>([tokens.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((tokens, rows), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn fused_linear_no_bias(x: Traced, weight: Weight<Self>) -> Traced {
        let (layer, [weight, a, b]) = weight.with_nodes();
        let (out, hidden) = thin::forward(x.primitive(), &layer, None);
        let state = LinearState { x: x.primitive().clone(), layer, hidden, kept: Kept::default() };
        finish!(LinearNoBiasBackward, nodes [x.node(), weight, a, b], state, out)
    }

    fn fused_bias_activation(x: Traced, bias: Traced, activation: Activation) -> Traced {
        let out = activation::forward(x.primitive(), bias.primitive(), activation);
        let state = (x.primitive().clone(), bias.primitive().clone(), activation);
        finish!(BiasActivationBackward, [x, bias], state, out)
    }

    fn fused_layer_norm(x: Traced, gamma: Traced, beta: Traced, eps: f64) -> (Traced, Traced) {
        let kept = Kept::default();
        let out = norm::forward(x.primitive(), gamma.primitive(), Some(beta.primitive()), eps);
        let state = (x.primitive().clone(), gamma.primitive().clone(), out.statistics, kept.clone());
        let normed = finish!(LayerNormBackward, [x, gamma, beta], state, out.normed);
        let x = finish!(KeptBackward::<Flex>::NEW, [normed], kept, x.into_primitive());
        (normed, x)
    }

    fn fused_add_layer_norm(x: Traced, residual: Traced, gamma: Traced, beta: Traced, eps: f64) -> (Traced, Traced) {
        let kept = Kept::default();
        let (out, sum) =
            norm::add_forward(x.primitive(), residual.primitive(), gamma.primitive(), Some(beta.primitive()), eps);
        let state = (sum.clone(), gamma.primitive().clone(), out.statistics, kept.clone());
        let normed = finish!(AddLayerNormBackward, [x, residual, gamma, beta], state, out.normed);
        let sum = finish!(KeptBackward::<Flex>::NEW, [normed], kept, sum);
        (normed, sum)
    }

    fn fused_rms_norm(x: Traced, gamma: Traced, eps: f64) -> (Traced, Traced) {
        let kept = Kept::default();
        let out = norm::forward(x.primitive(), gamma.primitive(), None, eps);
        let state = (x.primitive().clone(), gamma.primitive().clone(), out.statistics, kept.clone());
        let normed = finish!(RmsNormBackward, [x, gamma], state, out.normed);
        let x = finish!(KeptBackward::<Flex>::NEW, [normed], kept, x.into_primitive());
        (normed, x)
    }

    fn fused_add_rms_norm(x: Traced, residual: Traced, gamma: Traced, eps: f64) -> (Traced, Traced) {
        let kept = Kept::default();
        let (out, sum) = norm::add_forward(x.primitive(), residual.primitive(), gamma.primitive(), None, eps);
        let state = (sum.clone(), gamma.primitive().clone(), out.statistics, kept.clone());
        let normed = finish!(AddRmsNormBackward, [x, residual, gamma], state, out.normed);
        let sum = finish!(KeptBackward::<Flex>::NEW, [normed], kept, sum);
        (normed, sum)
    }

    fn fused_project_add_rms_norm(
        x: Traced,
        weight: Weight<Self>,
        residual: Traced,
        gamma: Traced,
        eps: f64,
    ) -> (Traced, Traced) {
        let kept = Kept::default();
        let (layer, [weight, a, b]) = weight.with_nodes();
        let norm = branch::Norm { gamma: gamma.primitive(), beta: None, eps };
        let (out, sum, hidden) = branch::project(x.primitive(), &layer, None, residual.primitive(), &norm);
        let norm = NormState::new(&sum, gamma.primitive(), out.statistics, false);
        let state = ProjectState { x: x.primitive().clone(), layer, hidden, norm, kept: kept.clone() };
        let nodes = [x.node(), weight, residual.node(), gamma.node(), a, b];
        let normed = finish!(ProjectAddRmsNormBackward, nodes nodes, state, out.normed);
        let sum = finish!(KeptBackward::<Flex>::NEW, [normed], kept, sum);
        (normed, sum)
    }

    fn fused_gate(gate: Traced, up: Traced) -> Traced {
        let out = activation::gate(gate.primitive(), up.primitive());
        let state = (gate.primitive().clone(), up.primitive().clone());
        finish!(GateBackward, [gate, up], state, out)
    }

    fn fused_gated_mlp_add_rms_norm(
        x: Traced,
        gate: Weight<Self>,
        up: Weight<Self>,
        down: Weight<Self>,
        residual: Traced,
        gamma: Traced,
        eps: f64,
    ) -> (Traced, Traced) {
        let kept = Kept::default();
        let norm = branch::Norm { gamma: gamma.primitive(), beta: None, eps };
        let [(gate, of_gate), (up, of_up), (down, of_down)] = [gate, up, down].map(Weight::with_nodes);
        let layers = [gate, up, down];
        let (out, sum, hidden) = branch::gated_mlp(x.primitive(), layers.each_ref(), residual.primitive(), &norm);
        let state = GatedMlpState {
            x: x.primitive().clone(),
            layers,
            hidden,
            norm: NormState::new(&sum, gamma.primitive(), out.statistics, false),
            kept: kept.clone(),
        };
        let ([g, ga, gb], [u, ua, ub], [d, da, db]) = (of_gate, of_up, of_down);
        let nodes = [x.node(), g, u, d, residual.node(), gamma.node(), ga, gb, ua, ub, da, db];
        let normed = finish!(GatedMlpBackward, nodes nodes, state, out.normed);
        let sum = finish!(KeptBackward::<Flex>::NEW, [normed], kept, sum);
        (normed, sum)
    }

    fn fused_attention(qkv: Traced, first_key: Vec<usize>, heads: Heads) -> Traced {
        let (out, lse) = attention::forward(qkv.primitive(), &first_key, heads);
        let state = AttentionState { qkv: qkv.primitive().clone(), first_key, heads, out: out.clone(), lse };
        finish!(AttentionBackward, [qkv], state, out)
    }

    fn fused_rotate(qkv: Traced, heads: Heads, cos: Traced, sin: Traced) -> Traced {
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        let node = qkv.node();
        let out = rotary::rotate(qkv.into_primitive(), heads, &cos, &sin, Direction::Forward);
        match RotateBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((heads, cos, sin), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn fused_attention_cached(qkv: Traced, keys: Traced, values: Traced, cached: &[usize]) -> (Traced, Traced, Traced) {
        let (keys, values) = (keys.into_primitive(), values.into_primitive());
        let (out, keys, values) = decode::attention_cached(qkv.primitive(), keys, values, cached);
        (untracked::<C>(out), untracked::<C>(keys), untracked::<C>(values))
    }

    fn fused_token_log_probs(hidden: Traced, head: Traced, targets: FlexTensor, scale: f64) -> (Traced, Traced) {
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

    fn fused_cross_entropy(hidden: Traced, head: Traced, targets: FlexTensor, weight: f64) -> Traced {
        let learns = head.is_tracked();
        match CrossEntropyBackward.prepare::<C>([hidden.node(), head.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (hidden, head) = (hidden.primitive(), head.primitive());
                let out = log_probs::cross_entropy_with_gradients(hidden, head, &targets, weight, learns);
                prep.finish((out.hidden_grad, out.head_grad), out.loss)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(log_probs::cross_entropy(hidden.primitive(), head.primitive(), &targets, weight))
            }
        }
    }

    fn fused_logits(hidden: Traced, head: Traced) -> Traced {
        let out = linear::logits(hidden.primitive(), head.primitive());
        let state = (hidden.primitive().clone(), head.primitive().clone());
        finish!(LogitsBackward, [hidden, head], state, out)
    }
}
