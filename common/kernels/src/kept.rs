//! Gradients of tensors that an operation hands on beside its result.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::Backend;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::tensor::FloatTensor;

/// The gradient of a tensor that an operation hands on beside its result: it waits here for the operation's own
/// backward, which runs later and adds it in a pass that it makes anyway. Burn's sum would be a pass of its own.
#[derive(Debug, Clone)]
pub(crate) struct Kept<B: Backend>(Arc<Mutex<Option<FloatTensor<B>>>>);

impl<B: Backend> Default for Kept<B> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<B: Backend> Kept<B> {
    pub(crate) fn take(&self) -> Option<FloatTensor<B>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The backward of the tensor handed on. Its node is a child of the operation's result, so that this runs first.
#[derive(Debug)]
pub(crate) struct KeptBackward<B>(PhantomData<B>);

impl<B> KeptBackward<B> {
    pub(crate) const NEW: Self = Self(PhantomData);
}

impl<B: Backend> Backward<B, 1> for KeptBackward<B> {
    type State = Kept<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        *ops.state.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(grad);
    }
}
