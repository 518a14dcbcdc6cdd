//! The metrics of a step, and evaluation along the way.

use std::ops::ControlFlow;

use anyhow::ensure;
use burn::module::Module;
use common::metrics::names;
use common::model::Gpt;
use common::pace::Pace;
use common::score::{EncodedPrompt, FrozenModels, Prompts, Response, Rollout, Sampling, UNWATCHED};
use common::session::{Exported, Session};

use crate::advantage::explained_variance;
use crate::alarms::{N_ORDERED, repetition};
use crate::config::PpoConfig;
use crate::data;
use crate::doctor::{Answered, orders};
use crate::iteration::StepOutput;
use crate::ptx::Text;
use crate::targets::counted;

/// Means over responses and the scores that count.
struct Means {
    kl: f64,
    score: f64,
    gold: Option<f64>,
    /// Where there are several reward models.
    score_spread: Option<f64>,
    response_length: f64,
    eos_rate: f64,
    repetition: f64,
}

impl Means {
    fn of<'a>(scored: impl Iterator<Item = (&'a Rollout, f32)>) -> Self {
        let scored: Vec<_> = scored.collect();
        let mean = |value: &dyn Fn(&Rollout, f32) -> f64| {
            scored.iter().map(|&(rollout, score)| value(rollout, score)).sum::<f64>() / scored.len() as f64
        };
        let known = |value: fn(&Rollout) -> Option<f64>| -> Option<f64> {
            let known: Vec<f64> = scored.iter().filter_map(|(rollout, _)| value(rollout)).collect();
            (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
        };
        Self {
            kl: mean(&|rollout, _| rollout.kl()),
            score: mean(&|_, score| f64::from(score)),
            gold: known(|rollout| rollout.gold),
            score_spread: known(Rollout::score_spread),
            response_length: mean(&|rollout, _| rollout.response.answer().len() as f64),
            eos_rate: mean(&|rollout, _| f64::from(u8::from(rollout.response.ended))),
            repetition: mean(&|rollout, _| repetition(rollout.response.answer())),
        }
    }
}

/// The metrics of a step.
pub(crate) struct Measured {
    /// Mean divergence from the reference in nats, which the controller of its price looks at.
    pub(crate) kl: f64,
    /// The line of `metrics.jsonl`.
    pub(crate) metrics: Vec<(&'static str, f64)>,
}

impl Measured {
    /// The metrics of a step at the price `kl_coef` and the policy's learning rate `lr`.
    pub(crate) fn of(step: &StepOutput, kl_coef: f32, lr: f64) -> Self {
        let StepOutput { batch, update, seconds, .. } = step;
        let means = Means::of(batch.iter().map(|experience| (&experience.rollout, experience.score)));
        let entropy_of = |rollout: &Rollout| -rollout.response.log_probs.iter().map(|&p| f64::from(p)).sum::<f64>();
        let entropy = batch.iter().map(|experience| entropy_of(&experience.rollout)).sum::<f64>() / batch.len() as f64;
        let non_score_reward = -f64::from(kl_coef) * means.kl;
        let mut metrics = vec![
            (names::OBJECTIVE_KL, means.kl),
            (names::OBJECTIVE_KL_COEF, f64::from(kl_coef)),
            (names::OBJECTIVE_ENTROPY, entropy),
            (names::OBJECTIVE_SCORE, means.score),
            (names::OBJECTIVE_RLHF_REWARD, means.score + non_score_reward),
            (names::OBJECTIVE_NON_SCORE_REWARD, non_score_reward),
            (names::POLICY_LOSS, update.policy_loss),
            (names::POLICY_APPROX_KL, update.approx_kl),
            (names::POLICY_CLIP_FRAC, update.clip_frac),
            (names::POLICY_RATIO_MEAN, update.ratio_mean),
            (names::POLICY_RATIO_MAX, update.ratio_max),
            (names::POLICY_ENTROPY, update.entropy),
            (names::ROLLOUT_RESPONSE_LENGTH, means.response_length),
            (names::ROLLOUT_EOS_RATE, means.eos_rate),
            (names::ROLLOUT_REPETITION, means.repetition),
            (names::TIMING_ROLLOUT, seconds.rollout),
            (names::TIMING_SCORE, seconds.score),
            (names::TIMING_UPDATE, seconds.update),
            (names::TRAIN_LR, lr),
            (names::TRAIN_GRAD_NORM, update.grad_norm),
        ];
        if let Some(value) = &update.value {
            let targets = || batch.iter().filter_map(|experience| experience.critic.as_ref());
            let values: Vec<f32> = targets().flat_map(|targets| targets.values.iter().copied()).collect();
            let returns: Vec<f32> = targets().flat_map(|targets| targets.returns.iter().copied()).collect();
            metrics.extend([
                (names::VALUE_LOSS, value.loss),
                (names::VALUE_CLIP_FRAC, value.clip_frac),
                (names::VALUE_EXPLAINED_VARIANCE, f64::from(explained_variance(&values, &returns))),
                (names::VALUE_GRAD_NORM, value.grad_norm),
            ]);
        }
        metrics.extend(means.score_spread.map(|spread| (names::OBJECTIVE_SCORE_STD_MEMBERS, spread)));
        metrics.extend(update.ptx_loss.map(|loss| (names::TRAIN_PTX_LOSS, loss)));
        metrics.extend(means.gold.map(|gold| (names::GOLD_SCORE, gold)));
        Self { kl: means.kl, metrics }
    }
}

/// Evaluation along the way.
pub(crate) struct HeldOut<'a> {
    pub(crate) prompts: &'a Prompts,
    pub(crate) frozen: &'a FrozenModels<'a>,
    /// Every evaluation draws the same numbers, so that two differ by their policies and not by luck.
    pub(crate) sampling: Sampling<'a>,
    pub(crate) config: &'a PpoConfig,
}

impl HeldOut<'_> {
    /// Answers held-out prompts, logs their scores and divergence, and the loss on held-out text where there is some, and
    /// writes some answers to `samples.jsonl`.
    ///
    /// Best is what scores highest after the price of its divergence at the configured coefficient; the gold score,
    /// which no real project has, plays no part in it.
    pub(crate) fn evaluate(&self, session: &mut Session, policy: &Gpt, text: Option<&Text>) -> anyhow::Result<()> {
        let step = session.progress().step;
        let all = &self.prompts.encoded;
        let n =
            if self.config.train.eval_prompts == 0 { all.len() } else { self.config.train.eval_prompts.min(all.len()) };
        let plain = policy.valid();
        let Some(responses) = self.answers(session, &plain, &all[..n])? else { return Ok(()) };
        let rollouts =
            self.frozen.rollouts_in(&self.sampling.group, &all[..n], responses, self.sampling.config.temperature)?;
        let counts = |rollout: &Rollout| counted(rollout, &self.config.ppo);
        let means = Means::of(rollouts.iter().map(|rollout| (rollout, counts(rollout))));
        ensure!(means.kl.is_finite(), "the divergence from the reference is {} at step {step}", means.kl);
        let mut metrics = vec![
            (names::VAL_SCORE, means.score),
            (names::VAL_KL, means.kl),
            (names::VAL_RESPONSE_LENGTH, means.response_length),
            (names::VAL_EOS_RATE, means.eos_rate),
        ];
        metrics.extend(self.order_accuracy(&rollouts)?.map(|accuracy| (names::VAL_ORDER_ACCURACY, accuracy)));
        metrics.extend(means.score_spread.map(|spread| (names::VAL_SCORE_STD_MEMBERS, spread)));
        if let Some(text) = text {
            metrics.push(text.evaluate(&self.sampling.group, &plain)?);
        }
        metrics.extend(means.gold.map(|gold| (names::GOLD_VAL_SCORE, gold)));
        session.log(&metrics)?;
        for rollout in rollouts.iter().take(self.config.train.n_samples) {
            tracing::info!("sample: {} → {}", rollout.prompt.text, rollout.response.text.replace('\n', "⏎"));
            session.recorder.sample(step, &data::line(rollout, counts(rollout)))?;
        }
        session.note_evaluation(self.config.ppo.kl_coef * means.kl - means.score, Exported::Lm(policy));
        Ok(())
    }

    /// Answers of the policy; `None` where the user asked to stop before the first step: the evaluation before it is made
    /// when the run goes on. A later one belongs to its step, which is finished.
    fn answers(
        &self,
        session: &Session,
        plain: &Gpt,
        prompts: &[EncodedPrompt],
    ) -> anyhow::Result<Option<Vec<Response>>> {
        let is_first = session.progress().step == 0;
        let interrupt = session.interrupt();
        let pace = Pace::new("evaluation", self.sampling.group.share().of(prompts.len()).len(), "answers", interrupt);
        let watch = |n: usize| {
            let asked = pace.done(n);
            if is_first { asked } else { ControlFlow::Continue(()) }
        };
        let responses = self.sampling.answer_counted(plain, prompts, 0, &watch);
        // Every process asks, whether or not it was broken off itself.
        if is_first && session.is_asked_to_stop()? { Ok(None) } else { Ok(Some(responses?)) }
    }

    /// How often the reward model or the ensemble puts the answers above damaged forms of them; `None` where no answer ended.
    fn order_accuracy(&self, rollouts: &[Rollout]) -> anyhow::Result<Option<f64>> {
        let mut answered = Answered::ended(rollouts);
        answered.truncate(N_ORDERED);
        let wins = orders(self.frozen, self.sampling.tokenizer, &answered, UNWATCHED)?;
        let wins: Vec<f64> = wins.into_iter().flat_map(|(_, wins)| wins).collect();
        Ok((!wins.is_empty()).then(|| wins.iter().sum::<f64>() / wins.len() as f64))
    }
}
