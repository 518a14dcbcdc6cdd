//! From rollouts to the targets of the updates: rewards, advantages and returns.
//!
//! An estimator is one function from the rewards of a batch's tokens to their advantages, and its arm in
//! [`Experience::of_batch`].

use common::score::Rollout;

use crate::advantage::{gae, whiten};
use crate::config::{Estimator, PpoSection};
use crate::rewards::{kl_shaped, score_of_ended};

/// A rollout with its targets.
#[derive(Debug, Clone, PartialEq)]
pub struct Experience {
    /// The rollout.
    pub rollout: Rollout,
    /// The score that counts: [`score_of_ended`] of the reward model's.
    pub score: f32,
    /// By how much each response token was better than expected, as the policy loss takes it.
    pub advantages: Vec<f32>,
    /// Targets of the value model, where the estimator has one.
    pub critic: Option<ValueTargets>,
}

/// Targets of the value model, one number per response token.
#[derive(Debug, Clone, PartialEq)]
pub struct ValueTargets {
    /// The values before the updates.
    pub values: Vec<f32>,
    /// `advantages + values` before whitening: the returns that the values estimate.
    pub returns: Vec<f32>,
}

impl Experience {
    /// Turns a batch of rollouts into experience, by the configured estimator.
    ///
    /// `values` are those of each response's tokens before the updates; `kl_coef` is the price of a nat of divergence.
    ///
    /// # Panics
    /// If the estimator needs values and there are none.
    pub fn of_batch(
        rollouts: Vec<Rollout>,
        values: Option<Vec<Vec<f32>>>,
        kl_coef: f32,
        config: &PpoSection,
    ) -> Vec<Self> {
        let counted = |rollout: &Rollout| {
            let score = score_of_ended(rollout.score, rollout.response.ended, config.missing_eos_score as f32);
            (score, kl_shaped(&rollout.response.log_probs, &rollout.ref_log_probs, score, kl_coef))
        };
        let (scores, rewards): (Vec<f32>, Vec<Vec<f32>>) = rollouts.iter().map(counted).unzip();
        let targets = match config.estimator {
            Estimator::Gae => of_gae(&rewards, values.expect("the estimator `gae` has a value model"), config),
        };
        let learned_from = rollouts.into_iter().zip(scores).zip(targets);
        learned_from
            .map(|((rollout, score), Targets { advantages, critic })| Self { rollout, score, advantages, critic })
            .collect()
    }

    /// Response tokens.
    pub fn n_tokens(&self) -> usize {
        self.advantages.len()
    }
}

/// An estimator's result for one response.
struct Targets {
    advantages: Vec<f32>,
    critic: Option<ValueTargets>,
}

/// Generalised advantage estimation: advantages and returns of each response, then advantages whitened over all
/// response tokens of the batch.
fn of_gae(rewards: &[Vec<f32>], values: Vec<Vec<f32>>, config: &PpoSection) -> Vec<Targets> {
    let (gamma, lambda) = (config.gamma as f32, config.lambda as f32);
    let mut batch: Vec<Targets> = rewards
        .iter()
        .zip(values)
        .map(|(rewards, values)| {
            let advantages = gae(rewards, &values, gamma, lambda);
            let returns = advantages.iter().zip(&values).map(|(advantage, value)| advantage + value).collect();
            Targets { advantages, critic: Some(ValueTargets { values, returns }) }
        })
        .collect();
    let flat: Vec<f32> = batch.iter().flat_map(|targets| targets.advantages.iter().copied()).collect();
    let mut whitened = whiten(&flat, true).into_iter();
    for advantage in batch.iter_mut().flat_map(|targets| &mut targets.advantages) {
        *advantage = whitened.next().expect("whitening keeps the number of tokens");
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::score::{EncodedPrompt, Response};
    use common::testing::assert_close;

    fn rollout(log_probs: &[f32], ref_log_probs: &[f32], score: f32, ended: bool) -> Rollout {
        Rollout {
            prompt: EncodedPrompt { ids: vec![0, 1], text: "p".into() },
            response: Response {
                ids: vec![5; log_probs.len()],
                log_probs: log_probs.to_vec(),
                text: "r".into(),
                ended,
            },
            ref_log_probs: ref_log_probs.to_vec(),
            score,
            gold: None,
        }
    }

    #[test]
    fn experience_matches_a_hand_worked_batch() {
        // First: KL = [0.5, 0], β = 1: rewards [−0.5, 1]; λ = 1: A = [0.5 − 0.25, 1 − 0.5] = [0.25, 0.5].
        // Second: reward 0, value 0.25: A = −0.25. Mean 1/6, E[A²] = 0.125: variance 0.125 − 1/36 = 0.097222.
        // The second did not end: its score of 3 counts as the configured 0.
        let rollouts = vec![rollout(&[-1.0, -1.0], &[-1.5, -1.0], 1.0, true), rollout(&[-1.0], &[-1.0], 3.0, false)];
        let config = PpoSection { lambda: 1.0, missing_eos_score: 0.0, ..PpoSection::default() };
        let batch = Experience::of_batch(rollouts, Some(vec![vec![0.25, 0.5], vec![0.25]]), 1.0, &config);
        let returns = |i: usize| batch[i].critic.as_ref().expect("values were given").returns.clone();
        assert_close(&returns(0), &[0.5, 1.0], 0.0);
        assert_close(&returns(1), &[0.0], 0.0);
        assert_close(&batch[0].advantages, &[0.267_261, 1.069_045], 1e-5);
        assert_close(&batch[1].advantages, &[-1.336_306], 1e-5);
        assert_eq!((batch[0].score, batch[1].score, batch[1].rollout.score), (1.0, 0.0, 3.0));
    }
}
