//! The backward steps of the fused operations: what each saves, and which function of `flex` computes its gradients.

use burn::backend::Flex;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn_flex::FlexTensor;

use super::Traced;
use crate::flex::branch::{self, NormGrads, NormState};
use crate::flex::rotary::{self, Direction};
use crate::flex::thin::{self, Adapted, Wanted};
use crate::flex::{self, activation, attention, embedding, linear, log_probs, norm};
use crate::{Activation, Heads};

/// Gives `grad()` to a parent that needs a gradient.
macro_rules! register {
    ($grads:expr, $parent:expr, $grad:expr) => {
        if let Some(parent) = $parent {
            $grads.register::<Flex>(parent.id, $grad);
        }
    };
}
pub(super) use register;

/// Gives each parent that needs a gradient its own, in the order of the parents.
macro_rules! register_all {
    ($grads:expr, $parents:expr, $values:expr) => {
        for (parent, grad) in $parents.into_iter().zip($values) {
            register!($grads, parent, grad);
        }
    };
}
pub(super) use register_all;

/// [`register_all`], where gradients that nobody needs may not have been computed.
macro_rules! register_some {
    ($grads:expr, $parents:expr, $values:expr) => {
        for (parent, grad) in $parents.into_iter().zip($values) {
            if let Some(grad) = grad {
                register!($grads, parent, grad);
            }
        }
    };
}
pub(super) use register_some;

/// The gradient of a tensor handed on, on the only backend that has fused operations.
pub(super) type Kept = crate::kept::Kept<Flex>;

#[derive(Debug)]
pub(super) struct ProjectAddNormBackward;

impl Backward<Flex, 6> for ProjectAddNormBackward {
    type State = ProjectState;

    fn backward(self, ops: Ops<Self::State, 6>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&ops.node);
        let [x, weight, ..] = &ops.parents;
        let (layer, norm) = ops.state.backward(&grad, Wanted { x: x.is_some(), weight: weight.is_some() });
        let values = [layer.x, layer.weight, Some(layer.bias), Some(norm.sum), Some(norm.gamma), Some(norm.beta)];
        register_some!(grads, ops.parents, values);
    }
}

/// State for the backward of a linear layer with the addition and the norm after it.
#[derive(Debug, Clone)]
pub(super) struct ProjectState {
    pub(super) x: FlexTensor,
    pub(super) layer: Adapted,
    /// `x A` of what stands beside the weight.
    pub(super) hidden: FlexTensor,
    pub(super) norm: NormState,
    /// The gradient of the sum.
    pub(super) kept: Kept,
}

impl ProjectState {
    pub(super) fn backward(self, grad: &FlexTensor, wanted: Wanted) -> (thin::Grads, NormGrads) {
        let Self { x, layer, hidden, norm, kept } = self;
        branch::project_backward(&x, &layer, &hidden, norm, grad, kept.take(), wanted)
    }
}

#[derive(Debug)]
pub(super) struct MlpAddNormBackward;

/// The place of the residual among the parents of the feed-forward layer.
const RESIDUAL: usize = 5;

impl Backward<Flex, 8> for MlpAddNormBackward {
    type State = MlpState;

    fn backward(self, ops: Ops<Self::State, 8>, grads: &mut Gradients, _: &mut Checkpointer) {
        let mut parents = ops.parents;
        let MlpState { x, weights: [up, down], activation, hidden, same, norm, kept } = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let ([up, down], norm) =
            branch::mlp_backward(&x, [&up, &down], activation, hidden, same, norm, &grad, kept.take());
        if same {
            parents[RESIDUAL] = None; // its gradient is in that of x
        }
        let values = [up.x, up.weight, up.bias, down.weight, down.bias, norm.sum, norm.gamma, norm.beta];
        register_all!(grads, parents, values);
    }
}

/// State for the backward of the feed-forward layer.
#[derive(Debug, Clone)]
pub(super) struct MlpState {
    pub(super) x: FlexTensor,
    pub(super) weights: [FlexTensor; 2],
    pub(super) activation: Activation,
    pub(super) hidden: FlexTensor,
    /// Whether the residual is `x` itself.
    pub(super) same: bool,
    pub(super) norm: NormState,
    pub(super) kept: Kept,
}

#[derive(Debug)]
pub(super) struct EmbedBackward;

impl Backward<Flex, 2> for EmbedBackward {
    type State = EmbedState;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [tokens_node, positions_node] = ops.parents;
        let EmbedState { tokens, position_table, ids, positions } = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        register_rows(grads, tokens_node.map(|node| node.id), &tokens, &ids, &grad);
        register_rows(grads, positions_node.map(|node| node.id), &position_table, &positions, &grad);
    }
}

#[derive(Debug)]
pub(super) struct LookupBackward;

impl Backward<Flex, 1> for LookupBackward {
    /// The table, for the reason that [`EmbedState`] has, and its rows.
    type State = (Traced, embedding::Rows);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node] = ops.parents;
        let (tokens, ids) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        register_rows(grads, node.map(|node| node.id), &tokens, &ids, &grad);
    }
}

/// Adds row `i` of `grad` to row `rows_i` of the table's gradient, if the table needs one.
fn register_rows(
    grads: &mut Gradients,
    node: Option<NodeId>,
    table: &Traced,
    rows: &embedding::Rows,
    grad: &FlexTensor,
) {
    if let Some(node) = node {
        let [n_rows, _] = table.primitive().layout().shape().dims();
        let earlier = grads.remove::<Flex>(table);
        grads.register::<Flex>(node, embedding::backward(n_rows, earlier, rows, grad));
    }
}

/// State for the backward of the embedding.
///
/// The tables are here to find the gradients that they have already, as output weights say, and to add to these in
/// place. A step should not hold on to its parents in general, lest abandoned graphs stay; these are leaves, which the
/// model holds on to anyway.
#[derive(Debug, Clone)]
pub(super) struct EmbedState {
    pub(super) tokens: Traced,
    pub(super) position_table: Traced,
    pub(super) ids: embedding::Rows,
    pub(super) positions: embedding::Rows,
}

#[derive(Debug)]
pub(super) struct LinearBackward;

impl Backward<Flex, 5> for LinearBackward {
    type State = LinearState;

    fn backward(self, ops: Ops<Self::State, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let LinearState { x, layer, hidden, kept } = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let kept = kept.take();
        if layer.thin.is_some() {
            let [x_node, weight, ..] = &ops.parents;
            let wanted = Wanted { x: x_node.is_some(), weight: weight.is_some() };
            let thin::Grads { x, weight, bias, thin: [a, b] } = thin::backward(&x, &layer, &hidden, &grad, wanted);
            register_some!(grads, ops.parents, [x, weight, Some(bias), a, b]);
            return;
        }
        if let ([Some(x_node), None, None, ..], None) = (&ops.parents, &kept) {
            // Frozen.
            grads.register::<Flex>(x_node.id, linear::backward_x(&layer.weight, &grad));
            return;
        }
        let affine = branch::affine_backward(&x, &layer.weight, &grad, kept);
        register_all!(grads, ops.parents, [affine.x, affine.weight, affine.bias]);
    }
}

/// State for the backward of a linear layer.
#[derive(Debug, Clone)]
pub(super) struct LinearState {
    pub(super) x: FlexTensor,
    pub(super) layer: Adapted,
    /// `x A` of what stands beside the weight.
    pub(super) hidden: FlexTensor,
    /// What else `x` gets; nothing where something stands beside the weight.
    pub(super) kept: Kept,
}

#[derive(Debug)]
pub(super) struct LinearNoBiasBackward;

impl Backward<Flex, 4> for LinearNoBiasBackward {
    type State = LinearState;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let LinearState { x, layer, hidden, .. } = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        if layer.thin.is_some() {
            let [x_node, weight, ..] = &ops.parents;
            let wanted = Wanted { x: x_node.is_some(), weight: weight.is_some() };
            let thin::Grads { x, weight, thin: [a, b], .. } = thin::backward(&x, &layer, &hidden, &grad, wanted);
            register_some!(grads, ops.parents, [x, weight, a, b]);
            return;
        }
        let [x_node, weight_node, ..] = ops.parents;
        register!(grads, weight_node, linear::backward_weight(&x, &grad));
        drop(x);
        register!(grads, x_node, linear::backward_x(&layer.weight, &grad));
    }
}

#[derive(Debug)]
pub(super) struct BiasActivationBackward;

impl Backward<Flex, 2> for BiasActivationBackward {
    /// `x`, the bias, and which function.
    type State = (FlexTensor, FlexTensor, Activation);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (x, bias, activation) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let (x_grad, bias_grad) = activation::backward(&x, &bias, activation, &grad);
        register_all!(grads, ops.parents, [x_grad, bias_grad]);
    }
}

#[derive(Debug)]
pub(super) struct LayerNormBackward;

impl Backward<Flex, 3> for LayerNormBackward {
    /// `x`, gamma, the statistics of the rows, and what else `x` gets.
    type State = (FlexTensor, FlexTensor, FlexTensor, Kept);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (x, gamma, statistics, kept) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let (x_grad, gamma_grad, beta_grad) = norm::backward(&x, &gamma, &statistics, &grad, kept.take(), true);
        register_all!(grads, ops.parents, [x_grad, gamma_grad].into_iter().chain(beta_grad));
    }
}

/// The layer norm of a sum.
#[derive(Debug)]
pub(super) struct AddLayerNormBackward;

impl Backward<Flex, 4> for AddLayerNormBackward {
    /// As [`LayerNormBackward`]'s.
    type State = (FlexTensor, FlexTensor, FlexTensor, Kept);

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (sum, gamma, statistics, kept) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let (sum_grad, gamma_grad, beta_grad) = norm::backward(&sum, &gamma, &statistics, &grad, kept.take(), true);
        register_all!(grads, ops.parents, [sum_grad.clone(), sum_grad, gamma_grad].into_iter().chain(beta_grad));
    }
}

#[derive(Debug)]
pub(super) struct AttentionBackward;

impl Backward<Flex, 1> for AttentionBackward {
    type State = AttentionState;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node] = ops.parents;
        let AttentionState { qkv, first_key, heads, out, lse } = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        register!(grads, node, attention::backward(&qkv, &first_key, heads, &out, &lse, &grad));
    }
}

#[derive(Debug)]
pub(super) struct RotateBackward;

impl Backward<Flex, 1> for RotateBackward {
    /// The heads, and the cosines and sines of the angles.
    type State = (Heads, FlexTensor, FlexTensor);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node] = ops.parents;
        let (heads, cos, sin) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        register!(grads, node, rotary::rotate(grad, heads, &cos, &sin, Direction::Back));
    }
}

/// State for the backward of attention.
#[derive(Debug, Clone)]
pub(super) struct AttentionState {
    pub(super) qkv: FlexTensor,
    pub(super) first_key: Vec<usize>,
    pub(super) heads: Heads,
    pub(super) out: FlexTensor,
    pub(super) lse: FlexTensor,
}

#[derive(Debug)]
pub(super) struct LogProbsBackward;

impl Backward<Flex, 2> for LogProbsBackward {
    type State = LogProbsState;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let LogProbsState { hidden, head, targets, scale, lse } = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let [hidden_node, head_node] = ops.parents;
        let (hidden_grad, head_grad) =
            log_probs::backward(&hidden, &head, &targets, scale, &lse, &grad, head_node.is_some());
        register!(grads, hidden_node, hidden_grad);
        if let (Some(node), Some(head_grad)) = (head_node, head_grad) {
            grads.register::<Flex>(node.id, head_grad);
        }
    }
}

/// State for the backward of the log-probabilities.
#[derive(Debug, Clone)]
pub(super) struct LogProbsState {
    pub(super) hidden: FlexTensor,
    pub(super) head: FlexTensor,
    pub(super) targets: FlexTensor,
    pub(super) scale: f64,
    pub(super) lse: FlexTensor,
}

#[derive(Debug)]
pub(super) struct CrossEntropyBackward;

impl Backward<Flex, 2> for CrossEntropyBackward {
    /// The gradients for an output gradient of 1; none of a head that is frozen.
    type State = (FlexTensor, Option<FlexTensor>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [hidden_node, head_node] = ops.parents;
        let (hidden_grad, head_grad) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        register!(grads, hidden_node, flex::scaled(hidden_grad, &grad));
        if let (Some(node), Some(head_grad)) = (head_node, head_grad) {
            grads.register::<Flex>(node.id, flex::scaled(head_grad, &grad));
        }
    }
}

#[derive(Debug)]
pub(super) struct LogitsBackward;

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
