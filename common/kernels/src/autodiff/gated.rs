//! The backward steps of blocks whose norms have no offset and whose layers have no biases.

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn_flex::FlexTensor;

use super::steps::{Kept, ProjectState, register, register_all, register_some};
use crate::flex::branch::{self, GatedHidden, NormState};
use crate::flex::thin::{Adapted, Wanted};
use crate::flex::{activation, norm};

#[derive(Debug)]
pub(super) struct RmsNormBackward;

impl Backward<Flex, 2> for RmsNormBackward {
    /// `x`, gamma, the statistics of the rows, and what else `x` gets.
    type State = (FlexTensor, FlexTensor, FlexTensor, Kept);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (x, gamma, statistics, kept) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let (x_grad, gamma_grad, _) = norm::backward(&x, &gamma, &statistics, &grad, kept.take(), false);
        register_all!(grads, ops.parents, [x_grad, gamma_grad]);
    }
}

/// The norm of a sum.
#[derive(Debug)]
pub(super) struct AddRmsNormBackward;

impl Backward<Flex, 3> for AddRmsNormBackward {
    /// As [`RmsNormBackward`]'s.
    type State = (FlexTensor, FlexTensor, FlexTensor, Kept);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (sum, gamma, statistics, kept) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let (sum_grad, gamma_grad, _) = norm::backward(&sum, &gamma, &statistics, &grad, kept.take(), false);
        register_all!(grads, ops.parents, [sum_grad.clone(), sum_grad, gamma_grad]);
    }
}

#[derive(Debug)]
pub(super) struct ProjectAddRmsNormBackward;

impl Backward<Flex, 6> for ProjectAddRmsNormBackward {
    type State = ProjectState;

    fn backward(self, ops: Ops<Self::State, 6>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&ops.node);
        let [x, weight, ..] = &ops.parents;
        let (layer, norm) = ops.state.backward(&grad, Wanted { x: x.is_some(), weight: weight.is_some() });
        let [a, b] = layer.thin;
        register_some!(grads, ops.parents, [layer.x, layer.weight, Some(norm.sum), Some(norm.gamma), a, b]);
    }
}

#[derive(Debug)]
pub(super) struct GateBackward;

impl Backward<Flex, 2> for GateBackward {
    /// The gate and what it lets through.
    type State = (FlexTensor, FlexTensor);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (gate, up) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        register_all!(grads, ops.parents, activation::gate_backward(gate, up, grad));
    }
}

#[derive(Debug)]
pub(super) struct GatedMlpBackward;

impl Backward<Flex, 12> for GatedMlpBackward {
    type State = GatedMlpState;

    fn backward(self, ops: Ops<Self::State, 12>, grads: &mut Gradients, _: &mut Checkpointer) {
        let GatedMlpState { x, layers, hidden, norm, kept } = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let [wants_x, gate, up, down, ..] = ops.parents.each_ref().map(Option::is_some);
        let kept = kept.take();
        let weights = [gate, up, down];
        let (of_mlp, norm) =
            branch::gated_mlp_backward(&x, layers.each_ref(), hidden, norm, &grad, kept, wants_x, weights);
        let ([gate, up, down], [[ga, gb], [ua, ub], [da, db]]) = (of_mlp.weights, of_mlp.thin);
        let [sum, gamma] = [norm.sum, norm.gamma].map(Some);
        register_some!(grads, ops.parents, [of_mlp.x, gate, up, down, sum, gamma, ga, gb, ua, ub, da, db]);
    }
}

/// State for the backward of the gated feed-forward layer.
#[derive(Debug, Clone)]
pub(super) struct GatedMlpState {
    pub(super) x: FlexTensor,
    /// The gate, up and down.
    pub(super) layers: [Adapted; 3],
    pub(super) hidden: GatedHidden,
    pub(super) norm: NormState,
    pub(super) kept: Kept,
}
