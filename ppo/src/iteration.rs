//! One step: sample, score, estimate, learn.

use std::time::Instant;

use burn::module::Module;
use common::corpus::Windows;
use common::group::Group;
use common::rng::Streams;
use common::score::{EncodedPrompt, FrozenModels, Response, Sampling, ScoreError, UNWATCHED};

use crate::config::PpoConfig;
use crate::learner::Learner;
use crate::targets::Experience;
use crate::update::{Update, UpdateMetrics};

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

/// The settings and frozen models that all steps share.
pub struct Iteration<'a> {
    /// The configuration.
    pub config: &'a PpoConfig,
    /// How prompts are answered.
    pub sampling: &'a Sampling<'a>,
    /// Reference policy and reward model.
    pub frozen: &'a FrozenModels<'a>,
    /// Seeds the order of the minibatches.
    pub streams: Streams,
}

/// The result of a step.
pub struct StepOutput {
    /// The models after the updates.
    pub learner: Learner,
    /// The experience of the step.
    pub batch: Vec<Experience>,
    /// Means over the updates.
    pub update: UpdateMetrics,
    /// How long the parts took.
    pub seconds: Seconds,
}

impl Iteration<'_> {
    /// The processes that share the work.
    const fn group(&self) -> &Group {
        &self.sampling.group
    }

    /// Makes step `step` on `prompts`: row `i` samples from stream `step · prompts.len() + i`. The same prompt stands
    /// `ppo.samples_per_prompt` times in a row. `text` has the pretraining windows of each update, or nothing.
    ///
    /// # Errors
    /// If sampling, scoring or the updates fail.
    pub fn run(
        &self,
        learner: Learner,
        prompts: &[EncodedPrompt],
        step: u64,
        kl_coef: f32,
        text: &[Windows],
    ) -> anyhow::Result<StepOutput> {
        let clock = Instant::now();
        let responses = self.sampling.answer(&learner.policy.valid(), prompts, step * prompts.len() as u64)?;
        let rollout = clock.elapsed().as_secs_f64();

        let clock = Instant::now();
        let batch = self.experience(&learner, prompts, responses, kl_coef)?;
        let score = clock.elapsed().as_secs_f64();

        let clock = Instant::now();
        let Self { config, streams, .. } = *self;
        let (learner, metrics) =
            learner.update_in(self.group(), &batch, &Update { config, streams, step, kl_coef, text })?;
        let update = clock.elapsed().as_secs_f64();
        Ok(StepOutput { learner, batch, update: metrics, seconds: Seconds { rollout, score, update } })
    }

    /// Turns `responses` to `prompts` into experience: scores, divergence, values, advantages.
    ///
    /// # Errors
    /// If scoring fails.
    pub fn experience(
        &self,
        learner: &Learner,
        prompts: &[EncodedPrompt],
        responses: Vec<Response>,
        kl_coef: f32,
    ) -> Result<Vec<Experience>, ScoreError> {
        let rollouts = self.frozen.rollouts_in(self.group(), prompts, responses, self.sampling.config.temperature)?;
        let values =
            learner.values(self.group(), &rollouts, &self.config.ppo, self.config.micro_batch_size(), UNWATCHED)?;
        Ok(Experience::of_batch(rollouts, values, kl_coef, &self.config.ppo))
    }
}
