//! The backward steps of blocks whose norms have no offset and whose layers have no biases.

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn_flex::FlexTensor;

use super::steps::{Kept, register, register_all};
use crate::flex::branch::{self, NormState};
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

impl Backward<Flex, 4> for ProjectAddRmsNormBackward {
    /// `x`, the weight, the norm's state, and the gradient of the sum.
    type State = (FlexTensor, FlexTensor, NormState, Kept);

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (x, weight, state, kept) = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let (layer, norm) = branch::project_backward(&x, &weight, state, &grad, kept.take());
        register_all!(grads, ops.parents, [layer.x, layer.weight, norm.sum, norm.gamma]);
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

impl Backward<Flex, 6> for GatedMlpBackward {
    type State = GatedMlpState;

    fn backward(self, ops: Ops<Self::State, 6>, grads: &mut Gradients, _: &mut Checkpointer) {
        let GatedMlpState { x, weights, hidden, norm, kept } = ops.state;
        let grad = grads.consume::<Flex>(&ops.node);
        let (x, [gate, up, down], norm) =
            branch::gated_mlp_backward(&x, weights.each_ref(), hidden, norm, &grad, kept.take());
        register_all!(grads, ops.parents, [x, gate, up, down, norm.sum, norm.gamma]);
    }
}

/// State for the backward of the gated feed-forward layer.
#[derive(Debug, Clone)]
pub(super) struct GatedMlpState {
    pub(super) x: FlexTensor,
    /// Of the gate, up and down.
    pub(super) weights: [FlexTensor; 3],
    /// The gate and what it lets through.
    pub(super) hidden: [FlexTensor; 2],
    pub(super) norm: NormState,
    pub(super) kept: Kept,
}
