//! A wrong operation on purpose: how tests show that a comparison of backends finds one.

use std::sync::atomic::{AtomicU8, Ordering};

use burn::tensor::Tensor;

/// An operation that can be made wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[repr(u8)]
pub enum Fault {
    /// Layer normalisation, also as a part of the residual addition.
    LayerNorm = 1,
    /// The non-linearity of the feed-forward layer.
    Activation = 2,
    /// Attention, in training and in decoding.
    Attention = 3,
}

static PLANTED: AtomicU8 = AtomicU8::new(0);

/// Makes the plain version of an operation too large by one percent, until this process ends.
pub fn plant(fault: Fault) {
    PLANTED.store(fault as u8, Ordering::Relaxed);
}

/// `x`, or something a little larger if the fault was planted.
pub(super) fn apply<const D: usize>(fault: Fault, x: Tensor<D>) -> Tensor<D> {
    if PLANTED.load(Ordering::Relaxed) == fault as u8 { x * 1.01 } else { x }
}
