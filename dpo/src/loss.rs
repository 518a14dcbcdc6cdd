//! DPO's objectives: of two answers to one prompt, the policy should raise the preferred one's probability more.
//!
//! All take the *log-ratio* `log π(y|x) − log π_ref(y|x)` of whole answers, in nats; β times it is the implicit reward.

use burn::tensor::{Tensor, TensorData, activation::softplus};

/// Difference in log-ratio between the answers of each pair, `h` in the losses.
///
/// `h = l(chosen) − l(rejected)`, each log-ratio divided by its answer's tokens where `n_tokens` are given.
///
/// # Shapes
/// - `log_ratios`: `[2 · n_pairs]`, those of the chosen answers, then those of the rejected ones
/// - `n_tokens`: tokens of the same answers
/// - returns `[n_pairs]`
///
/// # Panics
/// If the lengths differ, or are odd.
pub fn difference(log_ratios: Tensor<1>, n_tokens: Option<&[usize]>) -> Tensor<1> {
    let [n] = log_ratios.dims();
    assert!(n.is_multiple_of(2), "two answers a pair, found {n}");
    let log_ratios = match n_tokens {
        Some(n_tokens) => {
            assert_eq!(n, n_tokens.len(), "one length an answer");
            let lengths: Vec<f32> = n_tokens.iter().map(|&n| n as f32).collect();
            let lengths = Tensor::<1>::from_data(TensorData::new(lengths, [n]), &log_ratios.device());
            log_ratios / lengths // [2 · n_pairs]
        }
        None => log_ratios,
    };
    log_ratios.clone().narrow(0, 0, n / 2) - log_ratios.narrow(0, n / 2, n / 2)
}

/// Negative log-likelihood of each pair's preference under Bradley–Terry, with the implicit reward.
///
/// `−(1 − ε)·log σ(β·h) − ε·log σ(−β·h)`, as softplus, which is finite for every `h`; ln 2 where policy and reference are
/// equal. ε is the probability that a label is wrong.
///
/// # Shapes
/// - `difference`: `[n_pairs]`, see [`difference`]
/// - returns `[n_pairs]`, in nats
///
/// # Source
/// Rafailov et al., arXiv:2305.18290, equation 7; ε: Mitchell, "A note on DPO with noisy preferences", 2023, equation 3.
/// TRL 1.12.0 has ε no more in its `sigmoid`, and the same formula in `aot` over batches of one pair.
pub fn sigmoid_loss(difference: Tensor<1>, beta: f64, label_smoothing: f64) -> Tensor<1> {
    let reward = difference * beta;
    let loss = softplus(-reward.clone(), 1.0);
    if label_smoothing == 0.0 {
        return loss;
    }
    loss * (1.0 - label_smoothing) + softplus(reward, 1.0) * label_smoothing
}

/// Squared distance of each pair's `h` from the margin `1/(2β)`.
///
/// `(h − 1/(2β))²`. Its optimum is finite where the sigmoid loss, of labels that never contradict each other, has none.
///
/// # Shapes
/// - `difference`: `[n_pairs]`, see [`difference`]
/// - returns `[n_pairs]`, in squared nats (per token, of averages)
///
/// # Source
/// Azar et al., arXiv:2310.12036, equation 17, β being its τ. Averages over tokens, as in TRL, which has them from the
/// authors.
pub fn ipo_loss(difference: Tensor<1>, beta: f64) -> Tensor<1> {
    (difference - 0.5 / beta).square()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use common::testing::assert_close;
    use proptest::prelude::*;
    use std::f32::consts::LN_2;

    /// One exp and one log in f32 on numbers near 1.
    const ONE_EXP_ONE_LOG: f32 = 1e-6;

    fn tensor(numbers: &[f32]) -> Tensor<1> {
        Tensor::from_floats(numbers, &Device::flex().autodiff())
    }

    fn host(tensor: Tensor<1>) -> Vec<f32> {
        tensor.try_into_vec_as::<f32>().expect("f32 on the host")
    }

    /// The loss of one difference, and its derivative.
    fn with_gradient(difference: f32, loss: impl Fn(Tensor<1>) -> Tensor<1>) -> (f32, f32) {
        let difference = tensor(&[difference]).require_grad();
        let loss = loss(difference.clone());
        let gradient = difference.grad(&loss.clone().sum().backward()).expect("a gradient");
        (host(loss)[0], host(gradient)[0])
    }

    #[test]
    fn differences_are_of_sums_or_of_averages() {
        let log_ratios = || tensor(&[2.0, -1.0, 0.5, 3.0]);
        assert_close(&host(difference(log_ratios(), None)), &[1.5, -4.0], 0.0);
        assert_close(&host(difference(log_ratios(), Some(&[4, 2, 1, 3]))), &[0.0, -1.5], 0.0);
    }

    #[test]
    fn sigmoid_loss_matches_hand_worked_pairs() {
        // β·h = ln 3: σ = 3/4, so −ln(3/4); the derivative is −β·(1 − σ).
        let h = 3.0_f32.ln() / 0.5;
        let (value, slope) = with_gradient(h, |h| sigmoid_loss(h, 0.5, 0.0));
        assert_close(&[value, slope], &[0.287_682_1, -0.125], ONE_EXP_ONE_LOG);
        // 0.9·(−ln(3/4)) + 0.1·(−ln(1/4)); the derivative is β·(σ − 0.9).
        let (value, slope) = with_gradient(h, |h| sigmoid_loss(h, 0.5, 0.1));
        assert_close(&[value, slope], &[0.258_913_9 + 0.138_629_44, -0.075], ONE_EXP_ONE_LOG);
    }

    #[test]
    fn ipo_loss_matches_a_hand_worked_pair() {
        // 1/(2·0.1) = 5: (2 − 5)² with derivative 2·(2 − 5).
        let (value, slope) = with_gradient(2.0, |h| ipo_loss(h, 0.1));
        assert_close(&[value, slope], &[9.0, -6.0], ONE_EXP_ONE_LOG * 10.0);
    }

    #[test]
    fn huge_differences_stay_finite_in_value_and_gradient() {
        for difference in [-1e5_f32, 1e5] {
            let (value, slope) = with_gradient(difference, |h| sigmoid_loss(h, 1.0, 0.1));
            let wrong = if difference < 0.0 { 0.9 } else { 0.1 };
            assert_close(&[value / 1e5, slope.abs()], &[wrong, wrong], ONE_EXP_ONE_LOG);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_policy_that_is_its_reference_costs_ln_2(beta in 0.001_f64..10.0, label_smoothing in 0.0_f64..0.49) {
            let (value, _) = with_gradient(0.0, |h| sigmoid_loss(h, beta, label_smoothing));
            assert_close(&[value], &[LN_2], ONE_EXP_ONE_LOG);
        }

        #[test]
        fn smoothed_labels_ask_for_the_log_odds_of_being_right(label_smoothing in 0.01_f64..0.49) {
            // The minimum is where σ(β·h) = 1 − ε.
            let h = ((1.0 - label_smoothing) / label_smoothing).ln() as f32 / 0.5;
            let (_, slope) = with_gradient(h, |h| sigmoid_loss(h, 0.5, label_smoothing));
            assert_close(&[slope], &[0.0], ONE_EXP_ONE_LOG);
        }
    }
}
