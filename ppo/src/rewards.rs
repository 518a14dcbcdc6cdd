//! The reward of each response token: one score for the response, less the price of leaving the reference.

use crate::dialect::{KlPlace, MissingEos, Switches};
use crate::kl::{self, k1};

/// Per-token rewards of one response: the KL penalty everywhere, the score on the last token.
///
/// `r_t = −β·(log π(a_t) − log π_ref(a_t))`, plus `score` where `t` is the last token.
/// The response is the sampled tokens up to and including the first `<|end|>`, or all of them where there is none.
/// So the KL is charged for the choice of `<|end|>` too, and the score arrives at `<|end|>` where there is one.
///
/// # Shapes
/// - `log_probs`, `ref_log_probs`: `[response_len]`, of the sampled tokens, at the sampling temperature, in nats
/// - `score`: the reward model's number for the whole response, after [`score_that_counts`]
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
    with_score(charged(&k1(log_probs, ref_log_probs), kl_coef), score, false)
}

/// [`kl_shaped`] as `switches` say.
///
/// With `place_after` the score is the reward of one place more, after the last token: `[response_len + 1]`. Nothing is
/// charged where the price is part of the loss.
///
/// # Panics
/// As [`kl_shaped`].
pub fn shaped(
    log_probs: &[f32],
    ref_log_probs: &[f32],
    score: f32,
    kl_coef: f32,
    place_after: bool,
    switches: &Switches,
) -> Vec<f32> {
    let price = if switches.kl_place == KlPlace::Reward { kl_coef } else { 0.0 };
    let kl = kl::estimate(switches.kl_estimator, log_probs, ref_log_probs, switches.kl_clip as f32);
    with_score(charged(&kl, price), score, place_after)
}

fn charged(kl: &[f32], kl_coef: f32) -> Vec<f32> {
    kl.iter().map(|kl| -kl_coef * kl).collect()
}

fn with_score(mut rewards: Vec<f32>, score: f32, place_after: bool) -> Vec<f32> {
    let last = rewards.last_mut().expect("a response has at least one token");
    if place_after {
        rewards.push(score);
    } else {
        *last += score;
    }
    rewards
}

/// The score that counts: the reward model's where the response ended, and where it did not as `missing_eos` says; then
/// clipped to `reward_clip`.
///
/// A response cut off by the length limit is a fragment, and what the reward model says of fragments is not to be
/// trusted; a fixed low score teaches the policy to end. It replaces the score after normalisation, so −1 is one
/// standard deviation below the mean of the initial policy.
///
/// # Source
/// lm-human-preferences and "The N+ Implementation Details of RLHF with PPO" (arXiv:2403.17031) replace the score
/// by −1. TRL subtracts a penalty instead.
pub fn score_that_counts(score: f32, ended: bool, missing_eos_score: f32, switches: &Switches) -> f32 {
    let score = match switches.missing_eos {
        _ if ended => score,
        MissingEos::Replace => missing_eos_score,
        MissingEos::Subtract => score + missing_eos_score,
        MissingEos::None => score,
    };
    let clip = switches.reward_clip as f32;
    if clip > 0.0 { score.clamp(-clip, clip) } else { score }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::{Dialect, Estimator};
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
    fn a_response_that_was_cut_off_scores_as_the_dialect_says() {
        let counts = |dialect, ended| score_that_counts(2.5, ended, -1.0, &Switches::of(dialect, Estimator::Gae));
        for dialect in Dialect::ALL {
            assert_eq!(counts(dialect, true), 2.5);
        }
        assert_eq!(counts(Dialect::Kindling, false), -1.0);
        assert_eq!(counts(Dialect::Trl, false), 1.5);
        assert_eq!(counts(Dialect::Verl, false), 2.5);
        let clipped = Switches::of(Dialect::DeepSpeedChat, Estimator::Gae);
        assert_eq!(score_that_counts(-7.0, true, -1.0, &clipped), -5.0);
    }

    #[test]
    fn a_place_after_the_last_token_takes_the_score_alone() {
        let switches = Switches::of(Dialect::NPlus, Estimator::Gae);
        let rewards = shaped(&[-1.0, -1.25], &[-1.5, -1.0], 2.0, 0.5, true, &switches);
        assert_close(&rewards, &[-0.25, 0.125, 2.0], 0.0);
        let in_loss = Switches { kl_place: KlPlace::Loss, ..switches };
        assert_close(&shaped(&[-1.0, -1.25], &[-1.5, -1.0], 2.0, 0.5, false, &in_loss), &[0.0, 2.0], 0.0);
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
