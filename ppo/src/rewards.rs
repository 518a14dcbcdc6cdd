//! The reward of each response token: one score for the response, less the price of leaving the reference.

use crate::kl::k1;

/// Per-token rewards of one response: the KL penalty everywhere, the score on the last token.
///
/// `r_t = −β·(log π(a_t) − log π_ref(a_t))`, plus `score` where `t` is the last token.
/// The response is the sampled tokens up to and including the first `<|end|>`, or all of them where there is none.
/// So the KL is charged for the choice of `<|end|>` too, and the score arrives at `<|end|>` where there is one.
///
/// # Shapes
/// - `log_probs`, `ref_log_probs`: `[response_len]`, of the sampled tokens, at the sampling temperature, in nats
/// - `score`: the reward model's number for the whole response, after [`score_of_ended`]
/// - `kl_coef`: β, reward per nat
/// - returns `[response_len]`, not whitened
///
/// # Panics
/// If the slices are empty (no token could carry the score) or differ in length.
///
/// # Source
/// Ziegler et al., arXiv:1909.08593, equation 2. lm-human-preferences charges KL on tokens after the end of the text
/// too, and TRL adds the score one place later, on the first padding token; there is neither here. `OpenRLHF` and
/// `DeepSpeed-Chat` do as here.
pub fn kl_shaped(log_probs: &[f32], ref_log_probs: &[f32], score: f32, kl_coef: f32) -> Vec<f32> {
    let mut rewards: Vec<f32> = k1(log_probs, ref_log_probs).into_iter().map(|kl| -kl_coef * kl).collect();
    let last = rewards.last_mut().expect("a response has at least one token");
    *last += score;
    rewards
}

/// The score that counts: the reward model's where the response ended, `missing_eos_score` where it did not.
///
/// A response cut off by the length limit is a fragment, and what the reward model says of fragments is not to be
/// trusted; a fixed low score teaches the policy to end. It replaces the score after normalisation, so −1 is one
/// standard deviation below the mean of the initial policy.
///
/// # Source
/// lm-human-preferences and "The N+ Implementation Details of RLHF with PPO" (arXiv:2403.17031) replace the score
/// by −1. TRL subtracts a penalty instead.
pub fn score_of_ended(score: f32, ended: bool, missing_eos_score: f32) -> f32 {
    if ended { score } else { missing_eos_score }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::testing::assert_close;
    use proptest::prelude::*;

    #[test]
    fn kl_shaped_matches_a_hand_worked_response() {
        // KL = [0.5, −0.25, 0], β = 0.5; the score 2 lands on the last token.
        let rewards = kl_shaped(&[-1.0, -1.25, -2.0], &[-1.5, -1.0, -2.0], 2.0, 0.5);
        assert_close(&rewards, &[-0.25, 0.125, 2.0], 0.0);
    }

    #[test]
    fn the_last_token_pays_its_kl_beside_the_score() {
        assert_close(&kl_shaped(&[-1.0], &[-3.0], 1.0, 0.25), &[0.5], 0.0);
    }

    #[test]
    #[should_panic(expected = "at least one token")]
    fn an_empty_response_has_nowhere_to_put_the_score() {
        kl_shaped(&[], &[], 1.0, 0.05);
    }

    #[test]
    fn only_unended_responses_lose_their_score() {
        assert_eq!(score_of_ended(2.5, true, -1.0), 2.5);
        assert_eq!(score_of_ended(2.5, false, -1.0), -1.0);
    }

    proptest! {
        #[test]
        fn rewards_sum_to_the_score_less_the_priced_divergence(
            tokens in prop::collection::vec((-8.0_f32..0.0, -8.0_f32..0.0), 1..50),
            score in -3.0_f32..3.0,
            kl_coef in 0.0_f32..0.5,
        ) {
            let (log_probs, ref_log_probs): (Vec<f32>, Vec<f32>) = tokens.into_iter().unzip();
            let total: f32 = kl_shaped(&log_probs, &ref_log_probs, score, kl_coef).iter().sum();
            let kl: f32 = k1(&log_probs, &ref_log_probs).iter().sum();
            assert_close(&[total], &[score - kl_coef * kl], 1e-3);
        }

        #[test]
        fn without_a_price_only_the_last_token_is_rewarded(
            log_probs in prop::collection::vec(-8.0_f32..0.0, 1..50),
            score in -3.0_f32..3.0,
        ) {
            let mut expected = vec![0.0; log_probs.len()];
            *expected.last_mut().expect("not empty") = score;
            assert_close(&kl_shaped(&log_probs, &vec![-1.0; log_probs.len()], score, 0.0), &expected, 0.0);
        }
    }
}
