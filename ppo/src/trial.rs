//! Steps of PPO on random models and prompts, for measuring how long they take.

use common::model::{GptConfig, ScalarGpt};
use common::rng::Streams;
use common::runtime::Runtime;
use common::tokenizer::Tokenizer;

use crate::PpoConfig;
use crate::data::Prompt;
use crate::iteration::{Done, Iteration, Seconds};
use crate::rollout::{Judge, Sampling};
use crate::update::Learner;

/// A policy, its reference, a reward model and a value model with random weights, and random prompts.
///
/// Nothing stops a response before its full length, and the score is that of an answer that did not end; else a step is
/// the one of [`train`](crate::train()).
pub struct Trial<'a> {
    config: PpoConfig,
    sampling: Sampling<'a>,
    judge: Judge<'a>,
    learner: Option<Learner>,
    streams: Streams,
    model: GptConfig,
    prompt_tokens: usize,
}

/// What a step of a [`Trial`] gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measurement {
    /// How long its parts took.
    pub seconds: Seconds,
    /// Sampled tokens.
    pub tokens: usize,
    /// Divergence from the reference before the updates, in nats a response.
    pub kl: f64,
    /// Mean policy loss over the minibatches.
    pub policy_loss: f64,
    /// Mean value loss over the minibatches.
    pub value_loss: f64,
}

impl<'a> Trial<'a> {
    /// Four models of `model`'s size on a device without autodiff.
    ///
    /// `tokenizer` only turns responses into text; tokens it does not know are left out of it.
    ///
    /// # Panics
    /// If `ppo.minibatches` does not divide the batch.
    pub fn new(
        model: &GptConfig,
        config: PpoConfig,
        prompt_tokens: usize,
        tokenizer: &'a Tokenizer,
        runtime: &Runtime,
    ) -> Self {
        assert_eq!(config.train.batch_size % config.ppo.minibatches, 0, "minibatches divide the batch");
        let streams = Streams::new(config.seed);
        let gpt = |seed: u64, runtime: &Runtime| runtime.new_gpt(model, &Streams::new(seed));
        let scalar = |seed: u64, runtime: &Runtime| ScalarGpt::new(gpt(seed, runtime), &Streams::new(seed));
        let autodiff = runtime.autodiff();
        let mut sampling = Sampling::new(config.ppo.temperature, config.ppo.response_length, streams, tokenizer);
        sampling.config.stop.clear();
        Self {
            sampling,
            judge: Judge {
                reference: gpt(config.seed, runtime),
                reward_model: scalar(config.seed + 1, runtime),
                gold: None,
                missing_eos_score: config.ppo.missing_eos_score as f32,
                batch_size: config.micro_batch_size(),
            },
            learner: Some(Learner {
                policy: gpt(config.seed, &autodiff),
                value: scalar(config.seed + 2, &autodiff),
                policy_optimizer: runtime.optimizer(&config.optimizer),
                value_optimizer: runtime.optimizer(&config.value_optimizer),
            }),
            streams,
            model: model.clone(),
            prompt_tokens,
            config,
        }
    }

    /// Makes step `step` on fresh prompts.
    ///
    /// # Errors
    /// As [`train`](crate::train()) does; a trial that failed cannot go on.
    pub fn step(&mut self, step: u64) -> anyhow::Result<Measurement> {
        let batch_size = self.config.train.batch_size as u64;
        let prompts: Vec<Prompt> = (step * batch_size..(step + 1) * batch_size)
            .map(|row| {
                let mut rng = self.streams.get("trial/prompt", row);
                let ids = (0..self.prompt_tokens).map(|_| rng.below(self.model.vocab_size) as u32).collect();
                Prompt { ids, text: String::new() }
            })
            .collect();
        let learner = self.learner.take().ok_or_else(|| anyhow::anyhow!("an earlier step failed"))?;
        let Self { config, sampling, judge, streams, .. } = &*self;
        let iteration = Iteration { config, sampling, judge, streams: *streams };
        let Done { learner, batch, update, seconds } =
            iteration.run(learner, &prompts, step, self.config.ppo.kl_coef as f32)?;
        self.learner = Some(learner);
        let kl: f64 = batch.iter().map(|experience| experience.rollout.kl()).sum();
        Ok(Measurement {
            seconds,
            tokens: batch.iter().map(|experience| experience.values.len()).sum(),
            kl: kl / batch.len() as f64,
            policy_loss: update.policy_loss,
            value_loss: update.value_loss,
        })
    }
}
