//! Log-probabilities and cross-entropy of chosen tokens: the objectives that stages share.

use burn::tensor::{Int, Tensor};

use crate::Gpt;

/// Log-probabilities of `targets`, in nats.
///
/// `log softmax(W·h / T)[target]`; the temperature divides as `T + 1e-7`, except that exactly 1 leaves the logits alone.
/// With fused kernels the `[n, vocab_size]` logits never exist as a whole.
///
/// # Shapes
/// - `hidden`: `[n, d_model]`, each the state *before* its target
/// - `targets`: `[n]`
/// - returns `[n]`
///
/// # Source
/// The offset is that of TRL's PPO and of "The N+ Implementation Details" (arXiv:2403.17031), in rollouts, reference and
/// update alike. lm-human-preferences, `policy.py`, divides by the bare temperature.
pub fn token_log_probs(gpt: &Gpt, hidden: Tensor<2>, targets: Tensor<1, Int>, temperature: f64) -> Tensor<1> {
    let (hidden, head) = (gpt.precision().narrow(hidden), gpt.precision().narrow(gpt.head_weight()));
    kernels::token_log_probs(gpt.kernels(), hidden, head, targets, temperature)
}

/// [`token_log_probs`] with the entropy of each predicted distribution in nats, which carries no gradient.
///
/// # Shapes
/// - returns `([n], [n])`
pub fn token_log_probs_and_entropy(
    gpt: &Gpt,
    hidden: Tensor<2>,
    targets: Tensor<1, Int>,
    temperature: f64,
) -> (Tensor<1>, Tensor<1>) {
    let (hidden, head) = (gpt.precision().narrow(hidden), gpt.precision().narrow(gpt.head_weight()));
    kernels::token_log_probs_and_entropy(gpt.kernels(), hidden, head, targets, temperature)
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
