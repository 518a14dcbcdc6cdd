//! Where states meet the vocabulary: log-probabilities, entropy, cross-entropy, logits.

// Without the flex backend there is nothing to choose.
#![cfg_attr(not(feature = "flex"), allow(unused_variables))]

use burn::tensor::{Int, Tensor};

use super::tap::{self, Call, Operation};
use super::{Kernels, check_frozen, plain};

#[cfg(feature = "flex")]
use super::autodiff::FusedOps as _;
#[cfg(feature = "flex")]
use super::is_fused;
#[cfg(feature = "flex")]
use burn::backend::Dispatch;

/// Log-probability of each target in nats: `z_{i, target_i} − log Σ_v exp z_{i, v}` with `z = hidden · headᵀ / τ`.
///
/// `τ` is `temperature + 1e-7`, or exactly 1 for a temperature of exactly 1. The gradient flows to `hidden` and `head`.
///
/// # Shapes
/// - `hidden`: `[n, d_model]`, `head`: `[vocab_size, d_model]`, `targets`: `[n]`, ids below `vocab_size`
/// - returns `[n]`
///
/// # Panics
/// If the shapes do not fit or a target is not below `vocab_size`.
///
/// # Source
/// The `+ 1e-7` is that of TRL's PPO and of Huang et al., arXiv:2403.17031; lm-human-preferences, `policy.py`, divides by
/// the bare temperature.
pub fn token_log_probs(
    kernels: Kernels,
    hidden: Tensor<2>,
    head: Tensor<2>,
    targets: Tensor<1, Int>,
    temperature: f64,
) -> Tensor<1> {
    check_targets(&hidden, &head, &targets);
    tap_token_log_probs(&hidden, &head, &targets, temperature);
    #[cfg(feature = "flex")]
    if is_fused(kernels, &hidden) {
        return fused_token_log_probs(hidden, head, targets, temperature).0;
    }
    plain::of_targets(plain::log_probs(hidden, head, inverse(temperature)), targets)
}

/// [`token_log_probs`], and the entropy of each distribution: `−Σ_v p_{i, v} log p_{i, v}`, which has no gradient.
///
/// # Shapes
/// - returns `(log_probs, entropy)`, both `[n]`
///
/// # Panics
/// As [`token_log_probs`].
pub fn token_log_probs_and_entropy(
    kernels: Kernels,
    hidden: Tensor<2>,
    head: Tensor<2>,
    targets: Tensor<1, Int>,
    temperature: f64,
) -> (Tensor<1>, Tensor<1>) {
    check_targets(&hidden, &head, &targets);
    tap_token_log_probs(&hidden, &head, &targets, temperature);
    #[cfg(feature = "flex")]
    if is_fused(kernels, &hidden) {
        return fused_token_log_probs(hidden, head, targets, temperature);
    }
    let log_probs = plain::log_probs(hidden, head, inverse(temperature));
    let entropy = plain::entropy(log_probs.clone());
    (plain::of_targets(log_probs, targets), entropy)
}

/// One pass for both: the entropy needs no second look at the logits.
#[cfg(feature = "flex")]
fn fused_token_log_probs(
    hidden: Tensor<2>,
    head: Tensor<2>,
    targets: Tensor<1, Int>,
    temperature: f64,
) -> (Tensor<1>, Tensor<1>) {
    let (log_probs, entropy) = Dispatch::fused_token_log_probs(
        hidden.into_dispatch(),
        head.into_dispatch(),
        targets.into_dispatch(),
        inverse(temperature),
    );
    (Tensor::from_dispatch(log_probs), Tensor::from_dispatch(entropy))
}

fn tap_token_log_probs(hidden: &Tensor<2>, head: &Tensor<2>, targets: &Tensor<1, Int>, temperature: f64) {
    tap::call(|| {
        Call::new(Operation::TokenLogProbs { targets: targets.clone(), temperature }, [hidden.into(), head.into()])
    });
}

/// Factor on the logits.
fn inverse(temperature: f64) -> f64 {
    if temperature == 1.0 { 1.0 } else { 1.0 / (temperature + 1e-7) }
}

fn check_targets(hidden: &Tensor<2>, head: &Tensor<2>, targets: &Tensor<1, Int>) {
    let ([n, d_model], [_, d_head]) = (hidden.dims(), head.dims());
    assert_eq!(d_model, d_head, "hidden and head differ in d_model");
    assert_eq!(targets.dims(), [n], "one target a row");
    check_frozen(head, hidden.dtype());
}

/// Cross-entropy in nats: `−Σ_i log p_i[target_i] / denominator`, with `p` the softmax of `hidden · headᵀ`.
///
/// The fused version computes the gradients together with the value, so the logits only once: prefer it to summing
/// [`token_log_probs`] wherever the loss is this sum.
///
/// # Shapes
/// - `hidden`: `[n, d_model]`, `head`: `[vocab_size, d_model]`, `targets`: `[n]`, ids below `vocab_size`
/// - returns `[1]`
///
/// # Panics
/// If the shapes do not fit or a target is not below `vocab_size`.
pub fn cross_entropy(
    kernels: Kernels,
    hidden: Tensor<2>,
    head: Tensor<2>,
    targets: Tensor<1, Int>,
    denominator: f64,
) -> Tensor<1> {
    check_targets(&hidden, &head, &targets);
    tap::call(|| {
        Call::new(Operation::CrossEntropy { targets: targets.clone(), denominator }, [(&hidden).into(), (&head).into()])
    });
    #[cfg(feature = "flex")]
    if is_fused(kernels, &hidden) {
        return Tensor::from_dispatch(Dispatch::fused_cross_entropy(
            hidden.into_dispatch(),
            head.into_dispatch(),
            targets.into_dispatch(),
            1.0 / denominator,
        ));
    }
    plain::of_targets(plain::log_probs(hidden, head, 1.0), targets).sum() * (-1.0 / denominator)
}

/// `hidden · headᵀ`.
///
/// # Shapes
/// - `hidden`: `[n, d_model]`, `head`: `[vocab_size, d_model]`
/// - returns `[n, vocab_size]`
///
/// # Panics
/// If the shapes do not fit.
pub fn logits(kernels: Kernels, hidden: Tensor<2>, head: Tensor<2>) -> Tensor<2> {
    assert_eq!(hidden.dims()[1], head.dims()[1], "hidden and head differ in d_model");
    check_frozen(&head, hidden.dtype());
    tap::call(|| Call::new(Operation::Logits, [(&hidden).into(), (&head).into()]));
    #[cfg(feature = "flex")]
    if is_fused(kernels, &hidden) {
        return Tensor::from_dispatch(Dispatch::fused_logits(hidden.into_dispatch(), head.into_dispatch()));
    }
    plain::logits(hidden, head)
}
