//! From rewards and values to advantages: generalised advantage estimation, comparison within a group, whitening.

use crate::dialect::Variance;

/// Added to the variance before its square root, so that equal values whiten to zero and not to infinity.
const WHITEN_EPS: f64 = 1e-8;

/// Added to the deviation of a group's rewards, so that equal rewards give no advantage.
const GROUP_EPS: f64 = 1e-4;

/// Generalised advantage estimates for one response.
///
/// `A_t = δ_t + γλ·A_{t+1}` with `δ_t = r_t + γ·V_{t+1} − V_t`, from the last token back.
/// `V_T = 0`: the episode ends with the response, by end-of-text or by length.
///
/// # Shapes
/// - `rewards`, `values`: `[response_len]`, one entry per sampled token, unpadded
/// - returns `[response_len]`, not whitened; value targets are `advantages + values`
///
/// # Panics
/// If the slices differ in length.
///
/// # Source
/// Schulman et al., arXiv:1506.02438, section 3. γ = 1, λ = 0.95 as in lm-human-preferences.
/// That code gives all responses one fixed length; here each keeps its own.
pub fn gae(rewards: &[f32], values: &[f32], gamma: f32, lambda: f32) -> Vec<f32> {
    assert_eq!(rewards.len(), values.len(), "one reward and one value per response token");
    let mut advantages = vec![0.0; rewards.len()];
    let (mut next_value, mut next_advantage) = (0.0, 0.0);
    for t in (0..rewards.len()).rev() {
        let delta = rewards[t] + gamma * next_value - values[t];
        next_advantage = delta + gamma * lambda * next_advantage;
        next_value = values[t];
        advantages[t] = next_advantage;
    }
    advantages
}

/// Scales values to variance 1 and, with `shift_mean`, to mean 0.
///
/// `(x − μ)·rsqrt(σ² + 1e-8)`, plus `μ` again where `shift_mean` is false; σ² is the population variance.
/// Advantages are whitened with `shift_mean`, over all response tokens of a rollout batch; rewards, where a dialect
/// whitens them, without it, because the sign of a reward means something.
///
/// # Shapes
/// - `values`: `[n_tokens]`, the responses of the batch one after another, unpadded
/// - returns `[n_tokens]`
///
/// # Source
/// `whiten` in lm-human-preferences, `lm_human_preferences/utils/core.py`. TRL's `masked_whiten` divides by `n − 1`
/// instead of `n`; the sums here are f64, so that a long batch loses nothing.
pub fn whiten(values: &[f32], shift_mean: bool) -> Vec<f32> {
    whiten_by(values, shift_mean, Variance::Population)
}

/// [`whiten`] by the variance with the given divisor.
pub fn whiten_by(values: &[f32], shift_mean: bool, divisor: Variance) -> Vec<f32> {
    let (mean, variance) = mean_and_variance(values.iter().map(|&value| f64::from(value)));
    let variance = variance * divisor.correction(values.len());
    let inverse_deviation = 1.0 / (variance + WHITEN_EPS).sqrt();
    let added_back = if shift_mean { 0.0 } else { mean };
    values.iter().map(|&value| ((f64::from(value) - mean) * inverse_deviation + added_back) as f32).collect()
}

impl Variance {
    /// The factor on the population variance of `n` values; 1 of fewer than two, whose variance is 0.
    fn correction(self, n: usize) -> f64 {
        match self {
            Self::Sample if n > 1 => n as f64 / (n - 1) as f64,
            Self::Population | Self::Sample => 1.0,
        }
    }
}

/// Leave-one-out advantages of the responses to one prompt: `A_i = R_i − mean_{j≠i} R_j`.
///
/// # Shapes
/// - `rewards`: `[n_responses]`, at least 2, each summed over its response
///
/// # Panics
/// If there are fewer than two.
///
/// # Source
/// Ahmadian et al., arXiv:2402.14740, section 3.
pub fn leave_one_out(rewards: &[f64]) -> Vec<f32> {
    assert!(rewards.len() > 1, "one of {} responses left out leaves none to compare with", rewards.len());
    let sum: f64 = rewards.iter().sum();
    rewards.iter().map(|&reward| (reward - (sum - reward) / (rewards.len() - 1) as f64) as f32).collect()
}

/// Group-relative advantages of the responses to one prompt: `A_i = (R_i − mean)/(σ + 1e-4)`.
///
/// # Shapes
/// - `rewards`: `[n_responses]`, each summed over its response
///
/// # Source
/// Shao et al., arXiv:2402.03300, section 4.1.2; the 1e-4 and the divisor `n − 1` of σ² as in TRL's `GRPOTrainer`.
pub fn group_relative(rewards: &[f64], divisor: Variance) -> Vec<f32> {
    let (mean, variance) = mean_and_variance(rewards.iter().copied());
    let deviation = (variance * divisor.correction(rewards.len())).sqrt();
    rewards.iter().map(|&reward| ((reward - mean) / (deviation + GROUP_EPS)) as f32).collect()
}

/// The share of the returns' variance that the values predict.
///
/// `1 − Var(R − V) / Var(R)`: 1 for a critic that is right up to a constant, 0 for one whose values are all the same,
/// negative for one worse than that. Zero where the returns do not vary, because there is nothing to explain.
///
/// # Shapes
/// - `values`, `returns`: `[n_tokens]`
///
/// # Panics
/// If the slices differ in length.
///
/// # Source
/// `explained_variance` in `openai/baselines`, `baselines/common/math_util.py`, which gives NaN where the returns do not
/// vary. `val/var_explained` of lm-human-preferences is `1 − mean((V − R)²)/Var(R)`: a constant offset of the critic,
/// which leaves this number alone, lowers that one.
pub fn explained_variance(values: &[f32], returns: &[f32]) -> f32 {
    assert_eq!(values.len(), returns.len(), "one value per return");
    let errors = returns.iter().zip(values).map(|(&r, &v)| f64::from(r) - f64::from(v));
    let (_, unexplained) = mean_and_variance(errors);
    let (_, total) = mean_and_variance(returns.iter().map(|&r| f64::from(r)));
    if total > 0.0 { (1.0 - unexplained / total) as f32 } else { 0.0 }
}

/// Mean and population variance, in two passes; zero and zero for no values.
fn mean_and_variance(values: impl ExactSizeIterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.clone().sum::<f64>() / n;
    let variance = values.map(|value| (value - mean).powi(2)).sum::<f64>() / n;
    (mean, variance)
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::testing::assert_close;
    use proptest::prelude::*;

    /// The hand-worked numbers are sums of few binary fractions, exact in f32.
    const EXACT: f32 = 0.0;
    /// A few hundred f32 roundings on numbers near 10.
    const ROUNDING: f32 = 2e-4;

    #[test]
    fn gae_matches_a_hand_worked_response() {
        // δ = [−0.25, 0.25, 0.5], so A_2 = 0.5, A_1 = 0.25 + 0.5·0.5, A_0 = −0.25 + 0.5·0.5.
        assert_close(&gae(&[0.0, 0.0, 1.0], &[0.5, 0.25, 0.5], 1.0, 0.5), &[0.0, 0.5, 0.5], EXACT);
    }

    #[test]
    fn gae_discounts_the_next_value() {
        // γ = 0.5: δ_1 = 2 − 1 = 1, δ_0 = 1 + 0.5·1 − 2 = −0.5; A_0 = −0.5 + 0.5·0.5·1.
        assert_close(&gae(&[1.0, 2.0], &[2.0, 1.0], 0.5, 0.5), &[-0.25, 1.0], EXACT);
    }

    #[test]
    fn gae_of_one_token_is_reward_minus_value() {
        assert_close(&gae(&[1.5], &[0.5], 0.9, 0.95), &[1.0], EXACT);
        assert!(gae(&[], &[], 1.0, 0.95).is_empty());
    }

    #[test]
    #[should_panic(expected = "one reward and one value per response token")]
    fn gae_refuses_slices_of_different_lengths() {
        gae(&[1.0], &[1.0, 2.0], 1.0, 0.95);
    }

    #[test]
    fn whiten_matches_a_hand_worked_batch() {
        // Mean 4, population variance 8/3 + ... = ((−2)² + 0 + 2²)/3 = 8/3; 2/√(8/3) = 1.224745.
        assert_close(&whiten(&[2.0, 4.0, 6.0], true), &[-1.224_745, 0.0, 1.224_745], 1e-6);
        assert_close(&whiten(&[2.0, 4.0, 6.0], false), &[2.775_255, 4.0, 5.224_745], 1e-6);
    }

    #[test]
    fn whiten_of_equal_values_is_zero() {
        assert_close(&whiten(&[3.0; 5], true), &[0.0; 5], EXACT);
        assert_close(&whiten(&[3.0; 5], false), &[3.0; 5], EXACT);
        assert!(whiten(&[], true).is_empty());
    }

    #[test]
    fn group_advantages_match_hand_worked_responses() {
        // The others' means: 3.5, 2.5, 3, 3.
        assert_close(&leave_one_out(&[1.0, 4.0, 2.5, 2.5]), &[-2.0, 2.0, 0.0, 0.0], 1e-6);
        // Mean 2.5; variance 4.5/3 = 1.5 by n − 1, 4.5/4 by n.
        let deviation = 1.5_f32.sqrt() + 1e-4;
        let expected = [-1.5 / deviation, 1.5 / deviation, 0.0, 0.0];
        assert_close(&group_relative(&[1.0, 4.0, 2.5, 2.5], Variance::Sample), &expected, 1e-6);
        let deviation = 1.125_f32.sqrt() + 1e-4;
        let expected = [-1.5 / deviation, 1.5 / deviation, 0.0, 0.0];
        assert_close(&group_relative(&[1.0, 4.0, 2.5, 2.5], Variance::Population), &expected, 1e-6);
        assert_close(&group_relative(&[3.0, 3.0], Variance::Sample), &[0.0, 0.0], EXACT);
    }

    #[test]
    fn whiten_by_the_sample_variance_matches_a_hand_worked_batch() {
        // Variance 8/2 = 4.
        assert_close(&whiten_by(&[2.0, 4.0, 6.0], true, Variance::Sample), &[-1.0, 0.0, 1.0], 1e-6);
        assert_close(&whiten_by(&[3.0], true, Variance::Sample), &[0.0], EXACT);
    }

    #[test]
    fn explained_variance_of_perfect_and_constant_critics() {
        assert_eq!(explained_variance(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]), 1.0);
        assert_eq!(explained_variance(&[7.0, 7.0, 7.0], &[1.0, 2.0, 3.0]), 0.0);
        // An offset explains as much; lm-human-preferences' 1 − 25/(2/3) would be −36.5.
        assert_eq!(explained_variance(&[6.0, 7.0, 8.0], &[1.0, 2.0, 3.0]), 1.0);
        assert_eq!(explained_variance(&[1.0, 2.0], &[5.0, 5.0]), 0.0);
        // Errors [0, 0, −1, 1]: variance 1/2; returns [0, 2, 1, 3]: variance 5/4.
        assert_close(&[explained_variance(&[0.0, 2.0, 2.0, 2.0], &[0.0, 2.0, 1.0, 3.0])], &[0.6], 1e-6);
    }

    fn responses() -> impl Strategy<Value = (Vec<f32>, Vec<f32>)> {
        (1..40_usize).prop_flat_map(|n| {
            let numbers = || prop::collection::vec(-3.0_f32..3.0, n);
            (numbers(), numbers())
        })
    }

    proptest! {
        #[test]
        fn gae_with_lambda_zero_is_the_one_step_error((rewards, values) in responses(), gamma in 0.5_f32..1.0) {
            let next = |t: usize| values.get(t + 1).copied().unwrap_or(0.0);
            let deltas: Vec<f32> = (0..rewards.len()).map(|t| rewards[t] + gamma * next(t) - values[t]).collect();
            assert_close(&gae(&rewards, &values, gamma, 0.0), &deltas, ROUNDING);
        }

        #[test]
        fn gae_with_lambda_one_is_return_minus_value((rewards, values) in responses(), gamma in 0.5_f32..1.0) {
            let mut discounted = 0.0;
            let mut expected: Vec<f32> = rewards.iter().zip(&values).rev().map(|(r, v)| {
                discounted = r + gamma * discounted;
                discounted - v
            }).collect();
            expected.reverse();
            assert_close(&gae(&rewards, &values, gamma, 1.0), &expected, ROUNDING);
        }

        #[test]
        fn gae_of_a_perfect_critic_is_zero(rewards in prop::collection::vec(-3.0_f32..3.0, 1..40), lambda in 0.0_f32..1.0) {
            let mut values = rewards.clone();
            for t in (0..values.len() - 1).rev() {
                values[t] += values[t + 1];
            }
            assert_close(&gae(&rewards, &values, 1.0, lambda), &vec![0.0; rewards.len()], ROUNDING);
        }

        #[test]
        fn whiten_gives_mean_zero_and_variance_one(values in prop::collection::vec(-50.0_f32..50.0, 2..200)) {
            prop_assume!(values.iter().any(|value| (value - values[0]).abs() > 0.1));
            let white = whiten(&values, true);
            let (mean, variance) = mean_and_variance(white.iter().map(|&w| f64::from(w)));
            prop_assert!(mean.abs() < 1e-4, "mean {mean}");
            prop_assert!((variance - 1.0).abs() < 1e-3, "variance {variance}");
        }

        #[test]
        fn whiten_ignores_scale_and_offset(values in prop::collection::vec(-5.0_f32..5.0, 2..100)) {
            prop_assume!(values.iter().any(|value| (value - values[0]).abs() > 0.5));
            let moved: Vec<f32> = values.iter().map(|value| 4.0 * value + 3.0).collect();
            assert_close(&whiten(&values, true), &whiten(&moved, true), 1e-3);
        }
    }
}
