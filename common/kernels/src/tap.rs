//! The operations a model calls, one by one with their operands: how a comparison of backends takes a forward pass apart
//! without a second copy of it.
//!
//! While a [recording](record) runs, operations that take several steps at once take them one by one, so that the steps are
//! recorded too, before the whole. At other times a call costs one relaxed load.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{Device, Int, Tensor};

use super::{Activation, Adapted, Affine, Angles, GatedWeights, Heads, Kernels, NormWeights};

/// An operand or a result: its numbers in one row, and its shape.
#[derive(Debug, Clone)]
pub struct Operand {
    /// All numbers, the last axis fastest.
    pub flat: Tensor<1>,
    /// The axes.
    pub shape: Vec<usize>,
}

/// One call of an operation.
#[derive(Debug, Clone)]
pub struct Call {
    /// Which, and what it takes besides its operands.
    pub operation: Operation,
    /// The operands it is differentiable by, in the order of the function's parameters.
    pub operands: Vec<Operand>,
}

/// A function of this crate, with the arguments that are no operands.
#[derive(Debug, Clone)]
pub enum Operation {
    /// [`embed`](super::embed)
    Embed {
        /// `[batch, seq]`
        ids: Tensor<2, Int>,
        /// `[batch · seq]`
        positions: Option<Vec<usize>>,
        /// Position of the first token.
        start: usize,
    },
    /// [`lookup`](super::lookup)
    Lookup {
        /// `[batch, seq]`
        ids: Tensor<2, Int>,
    },
    /// [`linear`](super::linear), with or without a bias
    Linear,
    /// [`bias_activation`](super::bias_activation)
    BiasActivation(Activation),
    /// [`layer_norm`](super::layer_norm)
    LayerNorm {
        /// Added to the variance.
        eps: f64,
    },
    /// [`add_layer_norm`](super::add_layer_norm)
    AddLayerNorm {
        /// Added to the variance.
        eps: f64,
    },
    /// [`project_add_norm`](super::project_add_norm)
    ProjectAddNorm {
        /// Added to the variance.
        eps: f64,
    },
    /// [`mlp_add_norm`](super::mlp_add_norm)
    MlpAddNorm {
        /// Between the two projections.
        activation: Activation,
        /// Added to the variance.
        eps: f64,
    },
    /// [`rms_norm`](super::rms_norm)
    RmsNorm {
        /// Added to the mean square.
        eps: f64,
    },
    /// [`add_rms_norm`](super::add_rms_norm)
    AddRmsNorm {
        /// Added to the mean square.
        eps: f64,
    },
    /// [`project_add_rms_norm`](super::project_add_rms_norm)
    ProjectAddRmsNorm {
        /// Added to the mean square.
        eps: f64,
    },
    /// [`gate`](super::gate)
    Gate(Activation),
    /// [`gated_mlp_add_rms_norm`](super::gated_mlp_add_rms_norm)
    GatedMlpAddRmsNorm {
        /// Added to the mean square.
        eps: f64,
    },
    /// [`attention`](super::attention), without dropout
    Attention {
        /// `[batch, seq]`
        first_key: Option<Tensor<2, Int>>,
        /// Of queries and keys.
        heads: Heads,
    },
    /// [`rotate`](super::rotate)
    Rotate {
        /// Of queries and keys.
        heads: Heads,
        /// Of the positions.
        angles: Angles,
    },
    /// [`logits`](super::logits)
    Logits,
    /// [`token_log_probs`](super::token_log_probs)
    TokenLogProbs {
        /// `[n]`
        targets: Tensor<1, Int>,
        /// Of the distribution.
        temperature: f64,
    },
    /// [`cross_entropy`](super::cross_entropy)
    CrossEntropy {
        /// `[n]`
        targets: Tensor<1, Int>,
        /// Divisor of the sum.
        denominator: f64,
    },
}

static IS_ACTIVE: AtomicBool = AtomicBool::new(false);
static CALLS: Mutex<Vec<Call>> = Mutex::new(Vec::new());

fn calls() -> MutexGuard<'static, Vec<Call>> {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `body` and returns its result with every operation that it called, in order.
///
/// Operations of other threads are recorded too: a process should record one thing at a time.
pub fn record<R>(body: impl FnOnce() -> R) -> (R, Vec<Call>) {
    calls().clear();
    IS_ACTIVE.store(true, Ordering::Relaxed);
    let result = body();
    IS_ACTIVE.store(false, Ordering::Relaxed);
    (result, std::mem::take(&mut calls()))
}

/// Whether calls are recorded, and operations therefore take their steps one by one.
pub(crate) fn is_active() -> bool {
    IS_ACTIVE.load(Ordering::Relaxed)
}

/// Records a call.
pub(crate) fn call(call: impl FnOnce() -> Call) {
    note(prepare(call));
}

/// A call to be [noted](note) when its steps have been.
pub(crate) fn prepare(call: impl FnOnce() -> Call) -> Option<Call> {
    is_active().then(call)
}

/// Records a call that was prepared.
pub(crate) fn note(call: Option<Call>) {
    if let Some(call) = call {
        calls().push(call);
    }
}

impl Call {
    pub(crate) fn new<const N: usize>(operation: Operation, operands: [Operand; N]) -> Self {
        Self { operation, operands: operands.into() }
    }
}

impl<const D: usize> From<&Tensor<D>> for Operand {
    fn from(tensor: &Tensor<D>) -> Self {
        let shape = tensor.dims().to_vec();
        Self { flat: tensor.clone().reshape([shape.iter().product::<usize>()]), shape }
    }
}

impl Operand {
    fn tensor<const D: usize>(&self) -> Tensor<D> {
        let shape: [usize; D] = self.shape.clone().try_into().expect("an operand has as many axes as were recorded");
        self.flat.clone().reshape(shape)
    }

    /// As rows of its last axis, `[.., d]` to `[n, d]`.
    fn rows(&self) -> Tensor<2> {
        let d = self.shape.last().copied().unwrap_or(1);
        self.flat.clone().reshape([self.shape.iter().product::<usize>() / d.max(1), d])
    }

    fn shaped_as<const D: usize>(tensor: &Tensor<D>, shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), ..Self::from(tensor) }
    }
}

impl Operation {
    /// As tables call it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Embed { .. } | Self::Lookup { .. } => "embedding",
            Self::Linear => "linear",
            Self::BiasActivation(_) => "activation",
            Self::LayerNorm { .. } => "layer norm",
            Self::AddLayerNorm { .. } => "addition and layer norm",
            Self::ProjectAddNorm { .. } => "projection, addition and layer norm",
            Self::MlpAddNorm { .. } => "feed-forward, addition and layer norm",
            Self::RmsNorm { .. } => "root-mean-square norm",
            Self::AddRmsNorm { .. } => "addition and root-mean-square norm",
            Self::ProjectAddRmsNorm { .. } => "projection, addition and root-mean-square norm",
            Self::Gate(_) => "gate",
            Self::GatedMlpAddRmsNorm { .. } => "gated feed-forward, addition and root-mean-square norm",
            Self::Attention { .. } => "attention",
            Self::Rotate { .. } => "rotary positions",
            Self::Logits => "logits",
            Self::TokenLogProbs { .. } => "token log-probabilities",
            Self::CrossEntropy { .. } => "cross-entropy",
        }
    }

    /// Calls the operation again on `operands`, which may be on another device than those recorded.
    ///
    /// # Panics
    /// If the operands are not as many and of the shapes that were recorded, or integers cannot be read from the device.
    pub fn apply(&self, kernels: Kernels, operands: &[Operand]) -> Vec<Operand> {
        let device = operands[0].flat.device();
        let x = |i: usize| &operands[i];
        let weight = |i: usize| Adapted::from(x(i).tensor());
        let affine = |i: usize| Affine { weight: x(i).tensor(), bias: x(i + 1).tensor() };
        let norm = |i: usize, eps| NormWeights { gamma: x(i).tensor(), beta: x(i + 1).tensor(), eps };
        let pair = |(normed, sum): (Tensor<2>, Tensor<2>), shape: &[usize]| {
            vec![Operand::shaped_as(&normed, shape), Operand::shaped_as(&sum, shape)]
        };
        match self {
            Self::Embed { ids, positions, start } => {
                let ids = on(ids, &device);
                let embedded = super::embed(kernels, x(0).tensor(), x(1).tensor(), ids, positions.as_deref(), *start);
                vec![(&embedded).into()]
            }
            Self::Lookup { ids } => vec![(&super::lookup(kernels, x(0).tensor(), on(ids, &device))).into()],
            Self::Linear => {
                let bias = operands.get(2).map(Operand::tensor);
                vec![(&super::linear(kernels, x(0).rows(), x(1).tensor(), bias)).into()]
            }
            Self::BiasActivation(activation) => {
                vec![(&super::bias_activation(kernels, x(0).rows(), x(1).tensor(), *activation)).into()]
            }
            Self::LayerNorm { eps } => {
                vec![(&super::layer_norm(kernels, x(0).rows(), x(1).tensor(), x(2).tensor(), *eps)).into()]
            }
            Self::AddLayerNorm { eps } => {
                let (gamma, beta) = (x(2).tensor(), x(3).tensor());
                pair(super::add_layer_norm(kernels, x(0).rows(), x(1).rows(), gamma, beta, *eps), &x(1).shape)
            }
            Self::ProjectAddNorm { eps } => {
                let (residual, norm) = (x(3).rows(), norm(4, *eps));
                pair(super::project_add_norm(kernels, x(0).rows(), affine(1), residual, norm), &x(3).shape)
            }
            Self::MlpAddNorm { activation, eps } => {
                let (up, down, norm) = (affine(1), affine(3), norm(6, *eps));
                let out = super::mlp_add_norm(kernels, x(0).rows(), up, *activation, down, x(5).rows(), norm);
                pair(out, &x(5).shape)
            }
            Self::RmsNorm { eps } => vec![(&super::rms_norm(kernels, x(0).rows(), x(1).tensor(), *eps)).into()],
            Self::AddRmsNorm { eps } => {
                pair(super::add_rms_norm(kernels, x(0).rows(), x(1).rows(), x(2).tensor(), *eps), &x(1).shape)
            }
            Self::ProjectAddRmsNorm { eps } => {
                let (residual, gamma) = (x(2).rows(), x(3).tensor());
                let out = super::project_add_rms_norm(kernels, x(0).rows(), weight(1), residual, gamma, *eps);
                pair(out, &x(2).shape)
            }
            Self::Gate(activation) => {
                vec![(&super::gate(kernels, x(0).rows(), x(1).rows(), *activation)).into()]
            }
            Self::GatedMlpAddRmsNorm { eps } => {
                let weights = GatedWeights { gate: weight(1), up: weight(2), down: weight(3) };
                let (residual, gamma) = (x(4).rows(), x(5).tensor());
                let out = super::gated_mlp_add_rms_norm(kernels, x(0).rows(), weights, residual, gamma, *eps);
                pair(out, &x(4).shape)
            }
            Self::Attention { first_key, heads } => {
                let first_key = first_key.as_ref().map(|first_key| on(first_key, &device));
                vec![(&super::attention(kernels, x(0).tensor(), first_key, *heads, None)).into()]
            }
            Self::Rotate { heads, angles } => {
                let table = |table: &Tensor<3>| Tensor::from_data(table.to_data(), &device);
                let angles = Angles { cos: table(&angles.cos), sin: table(&angles.sin) };
                vec![(&super::rotate(kernels, x(0).tensor(), *heads, &angles)).into()]
            }
            Self::Logits => vec![(&super::logits(kernels, x(0).tensor(), x(1).tensor())).into()],
            Self::TokenLogProbs { targets, temperature } => {
                let targets = on(targets, &device);
                let (log_probs, entropy) =
                    super::token_log_probs_and_entropy(kernels, x(0).tensor(), x(1).tensor(), targets, *temperature);
                vec![(&log_probs).into(), (&entropy.detach()).into()]
            }
            Self::CrossEntropy { targets, denominator } => {
                let targets = on(targets, &device);
                vec![(&super::cross_entropy(kernels, x(0).tensor(), x(1).tensor(), targets, *denominator)).into()]
            }
        }
    }
}

/// The same integers on `device`.
fn on<const D: usize>(integers: &Tensor<D, Int>, device: &Device) -> Tensor<D, Int> {
    Tensor::from_data(integers.to_data(), device)
}
