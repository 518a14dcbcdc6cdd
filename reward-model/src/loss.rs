//! The reward model's objective: of two answers to one prompt, the preferred one should score higher.

use burn::tensor::{Tensor, activation::softplus};

/// Mean negative log-likelihood of the preferences under Bradley–Terry.
///
/// `mean(−log σ(r_c − r_r − m))`, computed as `softplus(−(r_c − r_r − m))`: `log(sigmoid(x))` is −∞ with a gradient
/// of NaN for x below −88 in f32, softplus is finite with gradient −σ(−x) everywhere. Equal scores without a margin
/// cost ln 2. A margin asks for that much more distance where the labeller's preference was strong.
///
/// # Shapes
/// - `chosen`, `rejected`: `[n_pairs]`, the scores of the two answers of each pair
/// - `margin`: `[n_pairs]`, in units of the score; 0 where a pair has none
/// - returns `[1]`, in nats per pair
///
/// # Panics
/// If the shapes differ.
///
/// # Source
/// Stiennon et al., arXiv:2009.01325, section 3.4; Ouyang et al., arXiv:2203.02155, equation 1. The margin:
/// Touvron et al., arXiv:2307.09288, equation 2.
pub fn pairwise_loss(chosen: Tensor<1>, rejected: Tensor<1>, margin: Option<Tensor<1>>) -> Tensor<1> {
    assert_eq!(chosen.dims(), rejected.dims(), "one score of each answer per pair");
    let mut distance = chosen - rejected; // [n_pairs]
    if let Some(margin) = margin {
        assert_eq!(distance.dims(), margin.dims(), "one margin per pair");
        distance = distance - margin;
    }
    softplus(-distance, 1.0).mean()
}

/// Mean square of the pairs' summed scores, which pulls scores towards zero on average.
///
/// `mean((r_c + r_r)²)`. The pairwise loss does not care where zero is, so without this (or the normalisation after
/// training) scores of different prompts may drift apart. Added to the loss times `centring_coef`.
///
/// # Shapes
/// - `chosen`, `rejected`: `[n_pairs]`
/// - returns `[1]`, in squared units of the score
///
/// # Panics
/// If the shapes differ.
///
/// # Source
/// Eisenstein et al., arXiv:2312.09244, section 2; `center_rewards_coefficient` in TRL's `RewardConfig`, which
/// recommends 0.01.
pub fn centring_penalty(chosen: Tensor<1>, rejected: Tensor<1>) -> Tensor<1> {
    assert_eq!(chosen.dims(), rejected.dims(), "one score of each answer per pair");
    (chosen + rejected).square().mean()
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

    /// Loss, and its gradients with respect to the chosen and the rejected scores.
    fn loss(chosen: &[f32], rejected: &[f32], margin: Option<&[f32]>) -> (f32, Vec<f32>, Vec<f32>) {
        let (chosen, rejected) = (tensor(chosen).require_grad(), tensor(rejected).require_grad());
        let loss = pairwise_loss(chosen.clone(), rejected.clone(), margin.map(tensor));
        let gradients = loss.backward();
        let gradient = |scores: Tensor<1>| host(scores.grad(&gradients).expect("a gradient"));
        (host(loss.clone())[0], gradient(chosen), gradient(rejected))
    }

    #[test]
    fn pairwise_loss_matches_hand_worked_pairs() {
        // σ(ln 3) = 3/4 and σ(−ln 3) = 1/4: the mean of −ln(3/4) and −ln(1/4).
        let ln_3 = 3.0_f32.ln();
        let (value, by_chosen, by_rejected) = loss(&[ln_3, 0.0], &[0.0, ln_3], None);
        assert_close(&[value], &[f32::midpoint(0.287_682_1, 1.386_294_4)], ONE_EXP_ONE_LOG);
        // −σ(−x)/2 per pair.
        assert_close(&by_chosen, &[-0.125, -0.375], ONE_EXP_ONE_LOG);
        assert_close(&by_rejected, &[0.125, 0.375], ONE_EXP_ONE_LOG);
    }

    #[test]
    fn a_margin_is_subtracted_from_the_distance() {
        let ln_3 = 3.0_f32.ln();
        let (value, ..) = loss(&[2.0 * ln_3], &[0.0], Some(&[ln_3]));
        assert_close(&[value], &[0.287_682_1], ONE_EXP_ONE_LOG);
        let (value, ..) = loss(&[1.0], &[0.0], Some(&[1.0]));
        assert_close(&[value], &[LN_2], ONE_EXP_ONE_LOG);
    }

    #[test]
    fn huge_distances_stay_finite_in_value_and_gradient() {
        for distance in [1e2_f32, 1e3, 1e4] {
            let (right, by_chosen, _) = loss(&[distance], &[0.0], None);
            // e⁻¹⁰⁰ is still a number in f32, if a subnormal one.
            assert_close(&[right], &[0.0], f32::MIN_POSITIVE);
            assert_close(&by_chosen, &[0.0], f32::MIN_POSITIVE);
            let (wrong, by_chosen, by_rejected) = loss(&[0.0], &[distance], None);
            assert_close(&[wrong], &[distance], 0.0);
            assert_close(&by_chosen, &[-1.0], 0.0);
            assert_close(&by_rejected, &[1.0], 0.0);
        }
    }

    #[test]
    fn small_losses_keep_their_digits() {
        // −log σ(15) = log1p(e⁻¹⁵) = 3.0590e-7, which log(1 + e⁻¹⁵) in f32 would give as 3.5763e-7.
        let (value, ..) = loss(&[15.0], &[0.0], None);
        assert!((value / 3.059_022_7e-7 - 1.0).abs() < 1e-5, "{value}");
    }

    #[test]
    fn centring_penalty_matches_hand_worked_pairs() {
        let (chosen, rejected) = (tensor(&[1.0, 2.0]), tensor(&[-1.0, 1.0]));
        assert_close(&host(centring_penalty(chosen, rejected)), &[4.5], 0.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn equal_scores_cost_ln_2(scores in prop::collection::vec(-100.0_f32..100.0, 1..20)) {
            let (value, by_chosen, _) = loss(&scores, &scores, None);
            assert_close(&[value], &[LN_2], ONE_EXP_ONE_LOG);
            // Half the pull on each answer, so a head that starts at zero learns.
            assert_close(&by_chosen, &vec![-0.5 / scores.len() as f32; scores.len()], ONE_EXP_ONE_LOG);
        }

        #[test]
        fn only_the_distance_counts(chosen in -5.0_f32..5.0, rejected in -5.0_f32..5.0, offset in -5.0_f32..5.0) {
            let (here, ..) = loss(&[chosen], &[rejected], None);
            let (there, ..) = loss(&[chosen + offset], &[rejected + offset], None);
            assert_close(&[here], &[there], 1e-5);
        }

        #[test]
        fn a_pair_and_its_reverse_differ_by_their_distance(distance in -80.0_f32..80.0) {
            // softplus(−x) − softplus(x) = −x.
            let (forth, ..) = loss(&[distance], &[0.0], None);
            let (back, ..) = loss(&[0.0], &[distance], None);
            assert_close(&[back - forth], &[distance], 1e-4);
        }

        #[test]
        fn the_loss_falls_as_the_chosen_score_rises(distance in -10.0_f32..10.0, step in 0.1_f32..3.0) {
            let (before, ..) = loss(&[distance], &[0.0], None);
            let (after, ..) = loss(&[distance + step], &[0.0], None);
            prop_assert!(after < before);
        }
    }
}
