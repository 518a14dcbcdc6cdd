//! Parts of a model whose intermediate results are not kept for the backward pass, but computed again in it.
//!
//! Burn has a strategy of its own for this, which recomputes single operations that say how; ours, with hand-written
//! backward passes, and matrix products do not. Here a whole part, such as a block of a transformer, is one operation:
//! its backward runs the part's forward a second time, on a tape of its own, and goes back through that.
//!
//! # Source
//! Chen et al., arXiv:1604.06174.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, AutodiffBackend, Backend, DispatchDevice, DispatchKindConversion, DispatchTensor, TensorMetadata,
};
use burn::tensor::{FloatDType, Shape, Tensor};

use super::kept::{Kept, KeptBackward};

/// The parameters of a part of a model as the part computes with them.
#[derive(Debug)]
pub struct Leaves {
    /// Each trained parameter and its copy on the tape of the part; `None` where nothing is recorded.
    pairs: Option<Vec<[DispatchTensor; 2]>>,
}

impl Leaves {
    /// The value of `parameter` for the part.
    pub fn leaf<const D: usize>(&mut self, parameter: Tensor<D>) -> Tensor<D> {
        let value = Tensor::from_inner(parameter.clone().inner());
        match &mut self.pairs {
            Some(pairs) if parameter.is_require_grad() => {
                let leaf = value.require_grad();
                pairs.push([parameter.into_dispatch(), leaf.clone().into_dispatch()]);
                leaf
            }
            _ => value,
        }
    }
}

/// The results of `part`, of which the backward pass keeps `inputs` alone: it computes the part again.
///
/// `part` takes its parameters from [`Leaves::leaf`], and gives the same results whenever it is called. What it returns
/// beside them is that of the first call. Losses and gradients have the same bits as without this function. The gradients
/// of the later results count only together with that of the first, as in [`linear_keeping`](crate::linear_keeping).
///
/// # Shapes
/// - inputs and results are the same number of tensors, usually `[batch, seq, d_model]`
///
/// # Panics
/// If the inputs are on different devices.
pub fn checkpointed<const N: usize, R>(
    inputs: [Tensor<3>; N],
    part: impl Fn(&mut Leaves, [Tensor<3>; N]) -> ([Tensor<3>; N], R) + Send + Sync + 'static,
) -> ([Tensor<3>; N], R) {
    let device = inputs[0].device();
    match device.as_dispatch() {
        DispatchDevice::Autodiff(device) => match &**device {
            #[cfg(feature = "flex")]
            DispatchDevice::Flex(_) => recorded::<burn::backend::Flex, N, R>(inputs, part),
            #[cfg(feature = "ndarray")]
            #[allow(deprecated, reason = "Burn deprecates ndarray; users still compare against it")]
            DispatchDevice::NdArray(_) => recorded::<burn::backend::NdArray, N, R>(inputs, part),
            #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal", feature = "cuda", feature = "cpu"))]
            DispatchDevice::Cube(_) => recorded::<burn::backend::Cube, N, R>(inputs, part),
            #[allow(unreachable_patterns, reason = "all backends that are compiled in are above")]
            device => unreachable!("{device:?} is not compiled in"),
        },
        _ => part(&mut Leaves { pairs: None }, inputs),
    }
}

/// [`checkpointed`] on one backend.
fn recorded<B: Backend, const N: usize, R>(
    inputs: [Tensor<3>; N],
    part: impl Fn(&mut Leaves, [Tensor<3>; N]) -> ([Tensor<3>; N], R) + Send + Sync + 'static,
) -> ([Tensor<3>; N], R)
where
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
{
    // The operations of the autodiff backend, which may be other ones than the inner backend's, without a tape.
    let constants = inputs.each_ref().map(|input| Tensor::from_inner(input.clone().inner()));
    let (results, rest) = part(&mut Leaves { pairs: None }, constants);
    let inputs = inputs.map(traced::<B>);
    let kept: [Kept<B>; N] = std::array::from_fn(|_| Kept::default());
    let state = State {
        inputs: inputs.each_ref().map(|input| input.primitive().clone()),
        part: Part(Arc::new(move |leaves, inputs| part(leaves, inputs).0)),
        kept: kept.clone(),
    };
    let mut results = results.into_iter().map(|result| traced::<B>(result).into_primitive());
    let first = results.next().expect("a part has a result");
    let first = finish(PartBackward(PhantomData), inputs.each_ref().map(Traced::<B>::node), state, first);
    let others: Vec<Traced<B>> = results
        .zip(&kept[1..])
        .map(|(out, kept)| finish(KeptBackward::NEW, [first.node()], kept.clone(), out))
        .collect();
    let mut results = std::iter::once(first).chain(others).map(Tensor::from_primitive::<Autodiff<B>>);
    (std::array::from_fn(|_| results.next().expect("there are as many as before")), rest)
}

/// A tensor with its place in the graph.
type Traced<B> = FloatTensor<Autodiff<B>>;

fn traced<B: Backend>(tensor: Tensor<3>) -> Traced<B>
where
    DispatchTensor: DispatchKindConversion<Autodiff<B>>,
{
    tensor.try_into_primitive::<Autodiff<B>>().expect("all tensors of a part are on one device")
}

/// `out`, computed from `nodes`, with the state that its backward needs if it is tracked.
fn finish<B: Backend, O: Backward<B, N>, const N: usize>(
    backward: O,
    nodes: [NodeGuard; N],
    state: O::State,
    out: FloatTensor<B>,
) -> Traced<B> {
    match backward.prepare::<NoCheckpointing>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(state, out),
        OpsKind::UnTracked(prep) => prep.finish(out),
    }
}

/// A part of a model with `N` inputs and results.
#[derive(Clone)]
struct Part<const N: usize>(Arc<Run<N>>);

type Run<const N: usize> = dyn Fn(&mut Leaves, [Tensor<3>; N]) -> [Tensor<3>; N] + Send + Sync;

impl<const N: usize> fmt::Debug for Part<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Part")
    }
}

/// What the backward of a part starts from.
#[derive(Debug, Clone)]
struct State<B: Backend, const N: usize> {
    inputs: [FloatTensor<B>; N],
    part: Part<N>,
    /// The gradients of the results; the first is not among them.
    kept: [Kept<B>; N],
}

#[derive(Debug)]
struct PartBackward<B>(PhantomData<B>);

impl<B: Backend, const N: usize> Backward<B, N> for PartBackward<B>
where
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
{
    type State = State<B, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let State { inputs, part, kept } = ops.state;
        let mut of_results = kept.map(|kept| kept.take());
        of_results[0] = Some(grads.consume::<B>(&ops.node));
        let mut leaves = Leaves { pairs: Some(Vec::new()) };
        let inputs = inputs.map(|input| Tensor::from_inner(Tensor::from_primitive::<B>(input)).require_grad());
        let mut results = (part.0)(&mut leaves, inputs.clone()).map(traced::<B>);
        for (result, grad) in results.iter_mut().zip(&of_results) {
            if grad.is_none() {
                // Nothing outside used it: its own backward is not to wait for a gradient.
                *result = <Autodiff<B> as AutodiffBackend>::from_inner(result.primitive().clone());
            }
        }
        let root = B::float_zeros(Shape::new([1]), &results[0].primitive().device(), FloatDType::F32);
        let root = finish(SeedBackward(PhantomData), results.each_ref().map(Traced::<B>::node), of_results, root);
        drop(results);
        let mut on_tape = <Autodiff<B> as AutodiffBackend>::backward(root);
        for (parent, input) in ops.parents.into_iter().zip(inputs) {
            if let Some((parent, grad)) = parent.zip(traced::<B>(input).grad_remove(&mut on_tape)) {
                grads.register::<B>(parent.id, grad);
            }
        }
        for [parameter, leaf] in leaves.pairs.into_iter().flatten().map(|pair| pair.map(traced_parameter::<B>)) {
            if let Some(grad) = leaf.grad_remove(&mut on_tape) {
                grads.register::<B>(parameter.id(), grad);
            }
        }
    }
}

fn traced_parameter<B: Backend>(parameter: DispatchTensor) -> Traced<B>
where
    DispatchTensor: DispatchKindConversion<Autodiff<B>>,
{
    // Parameters have any rank, which a dispatched tensor does not tell by its type.
    traced::<B>(Tensor::from_dispatch(parameter))
}

/// The end of a part's tape: gives the results the gradients that came to them from outside.
#[derive(Debug)]
struct SeedBackward<B>(PhantomData<B>);

impl<B: Backend, const N: usize> Backward<B, N> for SeedBackward<B> {
    type State = [Option<FloatTensor<B>>; N];

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        for (parent, grad) in ops.parents.into_iter().zip(ops.state) {
            if let Some((parent, grad)) = parent.zip(grad) {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}
