//! The cross-entropy of windows: with gradient in training, as a sum over held-out text.

use anyhow::{Context, ensure};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::{TokenSet, Windows};
use crate::group::Group;
use crate::loss;
use crate::model::Gpt;
use crate::rng::Rng;

/// Batches that are evaluated before their sums are added: a text of any length takes no more memory.
const TOGETHER: usize = 1 << 14;

/// The cross-entropy of the windows' targets, summed and divided by `n_targets`; dropout is drawn from `dropout`.
///
/// # Shapes
/// - returns `[1]`, in nats
pub fn loss(gpt: &Gpt, windows: &Windows, n_targets: usize, dropout: Option<&mut Rng>) -> Tensor<1> {
    let (inputs, targets) = windows.tensors(&gpt.device());
    let hidden = gpt.hidden_with_dropout(inputs, &windows.layout(), dropout);
    let [batch, seq, d_model] = hidden.dims();
    loss::cross_entropy(gpt, hidden.reshape([batch * seq, d_model]), targets, n_targets)
}

/// Cross-entropy summed over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Evaluation {
    /// Sum of `−log p(token)` in nats.
    pub nats: f64,
    /// How many tokens were predicted.
    pub tokens: usize,
}

impl Evaluation {
    /// Mean over tokens, in nats.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// Adds what was measured of further tokens.
    pub fn add(&mut self, other: Self) {
        self.nats += other.nats;
        self.tokens += other.tokens;
    }
}

/// Mean loss over `n_windows` windows spread over `text`, or all of them with 0.
///
/// # Errors
/// If the text or the device cannot be read, a rank has ended, or the loss is not finite.
pub fn evaluate_windows(
    group: &Group,
    gpt: &Gpt,
    text: &TokenSet,
    n_windows: usize,
    batch_size: usize,
) -> anyhow::Result<Evaluation> {
    let mut all = Evaluation::default();
    let n = text.n_spread(n_windows);
    let n_batches = n.div_ceil(batch_size);
    for first in (0..n_batches).step_by(TOGETHER) {
        let of_batch = |i: usize| {
            let start = (first + i) * batch_size;
            let starts = (start..n.min(start + batch_size)).map(|i| text.spread(i, n));
            evaluate_batch(gpt, &text.windows(starts)?)
        };
        let of_batches = group.map_shared(TOGETHER.min(n_batches - first), of_batch)?;
        for of_batch in of_batches {
            all.add(of_batch);
        }
    }
    ensure!(all.nats.is_finite(), "the held-out loss is {}", all.nats);
    Ok(all)
}

/// The loss of windows that are computed at once.
///
/// # Errors
/// If the device cannot be read.
pub fn evaluate_batch(gpt: &Gpt, windows: &Windows) -> anyhow::Result<Evaluation> {
    let (inputs, targets) = windows.tensors(&gpt.device());
    let hidden = gpt.hidden(inputs, &windows.layout());
    let [batch, seq, d_model] = hidden.dims();
    let log_probs = loss::token_log_probs(gpt, hidden.reshape([batch * seq, d_model]), targets, 1.0);
    let log_probs = log_probs.try_into_vec_as::<f32>().context("failed to read the loss from the device")?;
    Ok(Evaluation { nats: -log_probs.iter().map(|&p| f64::from(p)).sum::<f64>(), tokens: batch * seq })
}
