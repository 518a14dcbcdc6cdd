//! One step of PPO: sample, judge, learn.

use std::time::Instant;

use burn::module::Module;
use common::rng::Streams;

use crate::config::PpoConfig;
use crate::data::Prompt;
use crate::rollout::{Experience, Judge, Sampling, of_response_tokens, values};
use crate::update::{Learner, UpdateMetrics};

/// Wall-clock time of the parts of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seconds {
    /// Sampling the responses, with their log-probabilities.
    pub rollout: f64,
    /// Scores, reference log-probabilities, values, advantages.
    pub score: f64,
    /// All epochs over the batch.
    pub update: f64,
}

/// What stays the same from step to step.
pub(crate) struct Iteration<'a> {
    pub(crate) config: &'a PpoConfig,
    pub(crate) sampling: &'a Sampling<'a>,
    pub(crate) judge: &'a Judge<'a>,
    /// Of the minibatches' order.
    pub(crate) streams: Streams,
}

/// What a step leaves behind.
pub(crate) struct Done {
    pub(crate) learner: Learner,
    pub(crate) batch: Vec<Experience>,
    pub(crate) update: UpdateMetrics,
    pub(crate) seconds: Seconds,
}

impl Iteration<'_> {
    /// Step `step` on `prompts`: row `i` samples from stream `step · prompts.len() + i`.
    ///
    /// # Errors
    /// Where sampling, scoring or the updates fail.
    pub(crate) fn run(&self, learner: Learner, prompts: &[Prompt], step: u64, kl_coef: f32) -> anyhow::Result<Done> {
        let clock = Instant::now();
        let generated = self.sampling.answer(&learner.policy.valid(), prompts, step * prompts.len() as u64)?;
        let rollout = clock.elapsed().as_secs_f64();

        let clock = Instant::now();
        let rollouts = self.judge.judge(prompts, generated, self.sampling)?;
        let old_values = {
            let value = learner.value.valid();
            let pairs: Vec<_> = rollouts.iter().map(|r| (&*r.prompt.ids, &*r.response)).collect();
            of_response_tokens(&pairs, self.config.micro_batch_size(), |batch| values(&value, batch))?
        };
        let batch = Experience::of_batch(rollouts, old_values, kl_coef, &self.config.ppo);
        let score = clock.elapsed().as_secs_f64();

        let clock = Instant::now();
        let (learner, metrics) = learner.update(&batch, self.config, self.streams, step)?;
        let update = clock.elapsed().as_secs_f64();
        Ok(Done { learner, batch, update: metrics, seconds: Seconds { rollout, score, update } })
    }
}
