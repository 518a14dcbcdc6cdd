//! Log-probabilities, cross-entropy and means over chosen tokens: the objectives that stages share.

use burn::tensor::{Int, Tensor};

use crate::Gpt;
use kernels;

/// Natural log-probabilities of `targets` and the entropy of each predicted distribution, in nats.
///
/// `log softmax(W·h / T)[target]`; the temperature divides as `T + 1e-7`, except that exactly 1 leaves the logits alone.
/// The entropy carries no gradient. With fused kernels the `[n, vocab_size]` logits never exist as a whole.
///
/// # Shapes
/// - `hidden`: `[n, d_model]`, each the state *before* its target
/// - `targets`: `[n]`
/// - returns `([n], [n])`
///
/// # Source
/// The temperature's offset is lm-human-preferences', the same in rollouts, reference and update.
pub fn token_log_probs(
    gpt: &Gpt,
    hidden: Tensor<2>,
    targets: Tensor<1, Int>,
    temperature: f64,
) -> (Tensor<1>, Tensor<1>) {
    let (hidden, head) = (gpt.precision().narrow(hidden), gpt.precision().narrow(gpt.head_weight()));
    kernels::token_log_probs(gpt.kernels(), hidden, head, targets, temperature)
}

/// Cross-entropy in nats, summed over tokens and divided by `denominator`.
///
/// With the number of trained tokens as denominator this is their mean; a micro-batch of an accumulated batch passes
/// the whole batch's number, so that the gradients of its parts add up to those of one large batch.
///
/// # Shapes
/// - `hidden`: `[n, d_model]`, `targets`: `[n]`
/// - returns `[1]`
pub fn cross_entropy(gpt: &Gpt, hidden: Tensor<2>, targets: Tensor<1, Int>, denominator: usize) -> Tensor<1> {
    let (hidden, head) = (gpt.precision().narrow(hidden), gpt.precision().narrow(gpt.head_weight()));
    kernels::cross_entropy(gpt.kernels(), hidden, head, targets, denominator as f64)
}

/// Mean of `values` where `mask` is 1: `Σ mask·values / Σ mask`.
///
/// # Shapes
/// - `values`, `mask`: `[n]`, the mask 0 or 1 with at least one 1
/// - returns `[1]`
pub fn masked_mean(values: Tensor<1>, mask: Tensor<1>) -> Tensor<1> {
    (values * mask.clone()).sum() / mask.sum()
}
