//! Estimators of the divergence between policy and reference.
//!
//! All three take, for one response, the log-probabilities that policy and reference give to the sampled tokens, policy
//! first, and return one number per token, in nats. Averaged over samples of the policy, k1 and k3 are unbiased for
//! `KL(policy ‖ ref_policy)` and k2 nearly so. k1 is what PPO's rewards charge and what `objective/kl` sums; a single
//! sequence may be negative, a mean that is clearly negative means that the log-probabilities do not belong to the
//! tokens that were sampled.
//!
//! # Source
//! J. Schulman, "Approximating KL Divergence", 2020, <http://joschu.net/blog/kl-approx.html>.

/// Per-token estimate `log π − log π_ref`: unbiased, of either sign.
///
/// # Panics
/// If the slices differ in length.
pub fn k1(log_probs: &[f32], ref_log_probs: &[f32]) -> Vec<f32> {
    per_token(log_probs, ref_log_probs, |log_ratio| -log_ratio)
}

/// Per-token estimate `½·(log π_ref − log π)²`: never negative, biased, of low variance.
///
/// # Panics
/// If the slices differ in length.
pub fn k2(log_probs: &[f32], ref_log_probs: &[f32]) -> Vec<f32> {
    per_token(log_probs, ref_log_probs, |log_ratio| 0.5 * log_ratio * log_ratio)
}

/// Per-token estimate `π_ref/π − 1 − log(π_ref/π)`: unbiased and never negative.
///
/// # Panics
/// If the slices differ in length.
pub fn k3(log_probs: &[f32], ref_log_probs: &[f32]) -> Vec<f32> {
    // `exp_m1` because near equality, where training begins, `exp(x) − 1 − x` would be all rounding.
    per_token(log_probs, ref_log_probs, |log_ratio| log_ratio.exp_m1() - log_ratio)
}

/// Applies `estimate` to `log π_ref − log π` of each token, in f64.
fn per_token(log_probs: &[f32], ref_log_probs: &[f32], estimate: fn(f64) -> f64) -> Vec<f32> {
    assert_eq!(log_probs.len(), ref_log_probs.len(), "one log-probability of each model per response token");
    log_probs
        .iter()
        .zip(ref_log_probs)
        .map(|(&policy, &reference)| estimate(f64::from(reference) - f64::from(policy)) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::testing::assert_close;
    use proptest::prelude::*;

    /// One rounding to f32 of a result computed in f64.
    const ONE_ROUNDING: f32 = 1e-6;

    #[test]
    fn estimators_match_hand_worked_tokens() {
        // log π_ref − log π = [ln 2, −ln 2].
        let (log_probs, ref_log_probs) = ([0.25_f32.ln(), 0.5_f32.ln()], [0.5_f32.ln(), 0.25_f32.ln()]);
        let ln_2 = std::f32::consts::LN_2;
        assert_close(&k1(&log_probs, &ref_log_probs), &[-ln_2, ln_2], ONE_ROUNDING);
        assert_close(&k2(&log_probs, &ref_log_probs), &[0.240_226_5; 2], ONE_ROUNDING);
        assert_close(&k3(&log_probs, &ref_log_probs), &[1.0 - ln_2, ln_2 - 0.5], ONE_ROUNDING);
    }

    #[test]
    fn k3_keeps_its_digits_near_equality() {
        // x²/2 with x = 2⁻¹⁰ (exact in f32); 1 + x would leave three digits of it in f32.
        let log_ratio = 2.0_f32.powi(-10);
        let estimate = k3(&[0.0], &[log_ratio])[0];
        let expected = 0.5 * log_ratio * log_ratio * (1.0 + log_ratio / 3.0);
        assert!((estimate / expected - 1.0).abs() < 1e-6, "{estimate} {expected}");
    }

    #[test]
    fn k1_and_k3_average_to_the_divergence_and_k2_to_about_it() {
        // Averages over the policy's own distribution, exact because all three tokens are enumerated.
        let (policy, reference) = ([0.5_f32, 0.3, 0.2], [0.4_f32, 0.4, 0.2]);
        let log = |p: &[f32; 3]| p.map(f32::ln);
        let mean = |estimates: Vec<f32>| estimates.iter().zip(&policy).map(|(k, p)| k * p).sum::<f32>();
        let exact: f32 = policy.iter().zip(&reference).map(|(p, q)| p * (p / q).ln()).sum();
        assert_close(&[mean(k1(&log(&policy), &log(&reference)))], &[exact], ONE_ROUNDING);
        assert_close(&[mean(k3(&log(&policy), &log(&reference)))], &[exact], ONE_ROUNDING);
        assert_close(&[mean(k2(&log(&policy), &log(&reference)))], &[exact], 0.1 * exact);
    }

    proptest! {
        #[test]
        fn k2_and_k3_are_never_negative(
            tokens in prop::collection::vec((-12.0_f32..0.0, -12.0_f32..0.0), 0..30),
        ) {
            let (log_probs, ref_log_probs): (Vec<f32>, Vec<f32>) = tokens.into_iter().unzip();
            prop_assert!(k2(&log_probs, &ref_log_probs).iter().all(|&k| k >= 0.0));
            prop_assert!(k3(&log_probs, &ref_log_probs).iter().all(|&k| k >= 0.0));
        }

        #[test]
        fn equal_models_diverge_by_nothing(log_probs in prop::collection::vec(-12.0_f32..0.0, 0..30)) {
            for estimator in [k1, k2, k3] {
                prop_assert!(estimator(&log_probs, &log_probs).iter().all(|&k| k == 0.0));
            }
        }
    }
}
