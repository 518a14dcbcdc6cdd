//! From rollouts to the targets of the updates: rewards, advantages and returns.
//!
//! An estimator is one function from the rewards of responses to their targets, and its arm in [`estimate`]. What whitens
//! in the minibatch estimates anew in each, see [`Experience::of_minibatch`].

use common::score::Rollout;

use crate::advantage::{gae, group_relative, leave_one_out, whiten_by};
use crate::config::PpoSection;
use crate::dialect::{Estimator, Switches, Whiten};
use crate::rewards::{score_that_counts, shaped};

/// A rollout with its targets.
#[derive(Debug, Clone, PartialEq)]
pub struct Experience {
    /// The rollout.
    pub rollout: Rollout,
    /// The score that counts: [`score_that_counts`] of the reward model's.
    pub score: f32,
    /// The reward of each response token, and of the place after the last where that takes the score; not whitened.
    pub rewards: Vec<f32>,
    /// By how much each response token was better than expected, as the policy loss takes it.
    pub advantages: Vec<f32>,
    /// Targets of the value model, where the estimator has one.
    pub critic: Option<ValueTargets>,
}

/// Targets of the value model, one number per reward.
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
    /// `values` are those of each response's tokens before the updates, and of the place after the last where
    /// [`places_after`] has one; `kl_coef` is the price of a nat of divergence. The rollouts of one prompt stand together.
    ///
    /// # Panics
    /// If the estimator needs values and there are none.
    pub fn of_batch(
        rollouts: Vec<Rollout>,
        values: Option<Vec<Vec<f32>>>,
        kl_coef: f32,
        config: &PpoSection,
    ) -> Vec<Self> {
        let switches = config.switches();
        let after = places_after(&rollouts, config);
        let rewarded = |(rollout, after): (&Rollout, bool)| {
            let score = counted(rollout, config);
            let Rollout { response, ref_log_probs, .. } = rollout;
            (score, shaped(&response.log_probs, ref_log_probs, score, kl_coef, after, &switches))
        };
        let (scores, rewards): (Vec<f32>, Vec<Vec<f32>>) = rollouts.iter().zip(after).map(rewarded).unzip();
        let lengths: Vec<usize> = rollouts.iter().map(|rollout| rollout.response.ids.len()).collect();
        let whole = Switches { whiten_rewards: switches.whiten_rewards && !whitens_late(&switches), ..switches };
        let mut targets = estimate(&rewards, values, &lengths, config, &whole);
        if switches.whiten_advantages == Whiten::Batch {
            whiten_advantages(&mut targets, &switches);
        }
        let learned_from = rollouts.into_iter().zip(scores).zip(rewards).zip(targets);
        learned_from
            .map(|(((rollout, score), rewards), Targets { advantages, critic })| Self {
                rollout,
                score,
                rewards,
                advantages,
                critic,
            })
            .collect()
    }

    /// The experience of a minibatch as it is learned from, where its tokens are whitened by themselves; `None` otherwise.
    ///
    /// # Source
    /// lm-human-preferences, `train_policy.py`, `loss`: rewards and advantages are whitened over the minibatch, and the
    /// returns follow from those rewards.
    pub fn of_minibatch(minibatch: &[&Self], config: &PpoSection) -> Option<Vec<Self>> {
        let switches = config.switches();
        if !whitens_late(&switches) {
            return None;
        }
        let mut own: Vec<Self> = minibatch.iter().map(|&experience| experience.clone()).collect();
        let mut targets: Vec<Targets> = if switches.whiten_rewards {
            let rewards: Vec<Vec<f32>> = own.iter().map(|experience| experience.rewards.clone()).collect();
            let lengths: Vec<usize> = own.iter().map(Self::n_tokens).collect();
            let values = own.iter().map(|experience| experience.critic.as_ref().map(|critic| critic.values.clone()));
            estimate(&rewards, values.collect(), &lengths, config, &switches)
        } else {
            let kept = own.iter().cloned();
            kept.map(|Self { advantages, critic, .. }| Targets { advantages, critic }).collect()
        };
        whiten_advantages(&mut targets, &switches);
        for (experience, Targets { advantages, critic }) in own.iter_mut().zip(targets) {
            (experience.advantages, experience.critic) = (advantages, critic);
        }
        Some(own)
    }

    /// Response tokens.
    pub fn n_tokens(&self) -> usize {
        self.advantages.len()
    }
}

/// The score of a rollout that counts.
pub(crate) fn counted(rollout: &Rollout, config: &PpoSection) -> f32 {
    let missing = config.missing_eos_score as f32;
    score_that_counts(rollout.score, rollout.response.ended, missing, &config.switches())
}

/// Whether each response of a batch has a place after its last token, which takes the score.
pub(crate) fn places_after(rollouts: &[Rollout], config: &PpoSection) -> Vec<bool> {
    let lengths: Vec<usize> = rollouts.iter().map(|rollout| rollout.response.ids.len()).collect();
    config.switches().score_position.has_place_after(&lengths, config.response_length)
}

/// Whether whitening waits for the minibatch.
fn whitens_late(switches: &Switches) -> bool {
    switches.whiten_advantages == Whiten::Minibatch
}

/// An estimator's result for one response.
struct Targets {
    advantages: Vec<f32>,
    critic: Option<ValueTargets>,
}

/// The targets of responses of `lengths` tokens, advantages not whitened.
fn estimate(
    rewards: &[Vec<f32>],
    values: Option<Vec<Vec<f32>>>,
    lengths: &[usize],
    config: &PpoSection,
    switches: &Switches,
) -> Vec<Targets> {
    let group = |of: &dyn Fn(&[f64]) -> Vec<f32>| {
        let sums: Vec<f64> =
            rewards.iter().map(|rewards| rewards.iter().map(|&reward| f64::from(reward)).sum()).collect();
        let advantages = sums.chunks(config.samples_per_prompt).flat_map(of);
        advantages
            .zip(lengths)
            .map(|(advantage, &length)| Targets { advantages: vec![advantage; length], critic: None })
            .collect()
    };
    match config.estimator {
        Estimator::Gae => {
            let values = values.expect("the estimator `gae` has a value model");
            of_gae(rewards, values, lengths, config, switches)
        }
        Estimator::Rloo => group(&leave_one_out),
        Estimator::Grpo => group(&|rewards| group_relative(rewards, switches.whiten_variance)),
    }
}

/// Generalised advantage estimation: advantages and returns of each response, of rewards that are whitened first where
/// `switches` say so.
fn of_gae(
    rewards: &[Vec<f32>],
    values: Vec<Vec<f32>>,
    lengths: &[usize],
    config: &PpoSection,
    switches: &Switches,
) -> Vec<Targets> {
    let (gamma, lambda) = (config.gamma as f32, config.lambda as f32);
    let mut rewards = rewards.to_vec();
    if switches.whiten_rewards {
        whiten_all(rewards.iter_mut(), false, switches);
    }
    let of_response = |((rewards, values), &length): ((&Vec<f32>, Vec<f32>), &usize)| {
        let mut advantages = gae(rewards, &values, gamma, lambda);
        let returns = advantages.iter().zip(&values).map(|(advantage, value)| advantage + value).collect();
        advantages.truncate(length);
        Targets { advantages, critic: Some(ValueTargets { values, returns }) }
    };
    rewards.iter().zip(values).zip(lengths).map(of_response).collect()
}

/// Whitens the advantages of all response tokens together.
fn whiten_advantages(targets: &mut [Targets], switches: &Switches) {
    whiten_all(targets.iter_mut().map(|targets| &mut targets.advantages), true, switches);
}

fn whiten_all<'a>(of_responses: impl Iterator<Item = &'a mut Vec<f32>>, shift_mean: bool, switches: &Switches) {
    let mut all: Vec<&mut f32> = of_responses.flatten().collect();
    let flat: Vec<f32> = all.iter().map(|number| **number).collect();
    for (number, whitened) in all.iter_mut().zip(whiten_by(&flat, shift_mean, switches.whiten_variance)) {
        **number = whitened;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::Dialect;
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
                n_after_end: 0,
            },
            ref_log_probs: ref_log_probs.to_vec(),
            score,
            member_scores: Vec::new(),
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

    /// Two prompts of two answers each, the second answer of the second prompt longer.
    fn groups() -> Vec<Rollout> {
        vec![
            rollout(&[-1.0, -1.0], &[-1.5, -1.0], 1.0, true),
            rollout(&[-1.0], &[-1.0], 3.0, true),
            rollout(&[-1.0], &[-1.0], 0.0, true),
            rollout(&[-1.0; 3], &[-1.0; 3], 2.0, true),
        ]
    }

    fn of_groups(estimator: Estimator) -> Vec<Vec<f32>> {
        let config = PpoSection { estimator, samples_per_prompt: 2, ..PpoSection::default() };
        let batch = Experience::of_batch(groups(), None, 1.0, &config);
        assert!(batch.iter().all(|experience| experience.critic.is_none()));
        batch.into_iter().map(|experience| experience.advantages).collect()
    }

    #[test]
    fn rloo_compares_the_answers_to_a_prompt_by_score_less_divergence() {
        // Sums of rewards: 1 − 0.5, 3; 0, 2.
        let advantages = of_groups(Estimator::Rloo);
        assert_eq!(advantages, [vec![-2.5; 2], vec![2.5], vec![-2.0], vec![2.0; 3]]);
    }

    #[test]
    fn grpo_compares_scores_alone_in_units_of_their_deviation() {
        // The divergence is in the loss: 1, 3 and 0, 2, both with deviation √2.
        let unit = 1.0 / (2.0_f32.sqrt() + 1e-4);
        let advantages = of_groups(Estimator::Grpo);
        assert_close(&advantages.concat(), &[-unit, -unit, unit, -unit, unit, unit, unit], 1e-6);
    }

    #[test]
    fn trl_values_the_place_that_takes_the_score() {
        // Lengths 2 and 1: the second has a place after its token. λ = 1, returns are sums of the rewards to come.
        let rollouts = vec![rollout(&[-1.0, -1.0], &[-1.0, -1.0], 1.0, true), rollout(&[-1.0], &[-1.5], 3.0, true)];
        let config = PpoSection { dialect: Dialect::Trl, lambda: 1.0, ..PpoSection::default() };
        let batch = Experience::of_batch(rollouts, Some(vec![vec![0.25, 0.5], vec![0.25, 1.0]]), 1.0, &config);
        let returns = |i: usize| batch[i].critic.as_ref().expect("values were given").returns.clone();
        assert_close(&returns(0), &[1.0, 1.0], 0.0);
        assert_close(&returns(1), &[2.5, 3.0], 0.0);
        // Before whitening [0.75, 0.5, 2.25], mean 7/6, sample variance 0.895833.
        let all: Vec<f32> = batch.iter().flat_map(|experience| experience.advantages.clone()).collect();
        assert_close(&all, &[-0.440_225, -0.704_361, 1.144_586], 1e-5);
    }

    #[test]
    fn a_minibatch_whitens_its_own_tokens() {
        let config = PpoSection { dialect: Dialect::LmHumanPreferences, lambda: 1.0, ..PpoSection::default() };
        let values = groups().iter().map(|rollout| vec![0.5; rollout.response.ids.len()]).collect();
        let batch = Experience::of_batch(groups(), Some(values), 1.0, &config);
        let own = Experience::of_minibatch(&[&batch[1], &batch[3]], &config).expect("whitens in the minibatch");
        // Rewards [3 | 0, 0, 2]: mean 1.25, variance 1.6875; without shift x → (x − 1.25)/1.299038 + 1.25.
        let whitened = [2.597_114, 0.287_75, 0.287_75, 1.827_35];
        let critic = own[1].critic.as_ref().expect("a value model");
        assert_close(&critic.returns, &[2.402_85, 2.115_1, whitened[3]], 1e-5);
        let advantages = own.iter().flat_map(|experience| experience.advantages.clone());
        let sum: f32 = advantages.clone().sum();
        let squares: f32 = advantages.map(|advantage| advantage * advantage).sum();
        assert_close(&[sum, squares / 4.0], &[0.0, 1.0], 1e-5);
    }
}
