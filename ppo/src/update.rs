//! The updates on one batch of rollouts: epochs × minibatches × micro-batches.

use anyhow::{Context, bail};
use burn::tensor::Tensor;
use common::kernels;
use common::model::{Gpt, ScalarGpt};
use common::optim::{AdamW, GradNorm, Grads};
use common::rng::Streams;
use common::scoring::by_length;

use crate::config::PpoConfig;
use crate::data::ResponseBatch;
use crate::loss::{policy_loss, value_loss};
use crate::rollout::{Experience, log_probs, values};

/// What learns, on an autodiff device: two models, each with its own optimiser.
#[derive(Debug)]
pub(crate) struct Learner {
    pub(crate) policy: Gpt,
    pub(crate) value: ScalarGpt,
    pub(crate) policy_optimizer: AdamW,
    pub(crate) value_optimizer: AdamW,
}

/// Means over all minibatches of a step, but for the maximum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct UpdateMetrics {
    pub(crate) policy_loss: f64,
    pub(crate) clip_frac: f64,
    pub(crate) approx_kl: f64,
    pub(crate) ratio_mean: f64,
    pub(crate) ratio_max: f64,
    pub(crate) entropy: f64,
    pub(crate) value_loss: f64,
    pub(crate) value_clip_frac: f64,
    /// Global norm of the policy's gradient before clipping.
    pub(crate) policy_grad_norm: f64,
    /// The same of the value model.
    pub(crate) value_grad_norm: f64,
}

/// Number of means that are summed on the device.
const N_MEANS: usize = 7;

impl Learner {
    /// Makes the updates of step `step` out of `n_steps`.
    ///
    /// Every epoch draws a fresh permutation of the responses and cuts it into `ppo.minibatches` equal parts, one
    /// optimiser step each. Losses are means over the response tokens of a minibatch, however it is cut into
    /// micro-batches.
    ///
    /// # Errors
    /// If, before the first update, a ratio is further from 1 than `ppo.ratio_tolerance`.
    pub(crate) fn update(
        mut self,
        batch: &[Experience],
        config: &PpoConfig,
        streams: Streams,
        step: u64,
    ) -> anyhow::Result<(Self, UpdateMetrics)> {
        let n_steps = config.train.steps;
        let (policy_lr, value_lr) =
            (config.optimizer.lr_at(step, n_steps), config.value_optimizer.lr_at(step, n_steps));
        let mut means: Option<Tensor<1>> = None;
        let mut ratio_max: Option<Tensor<1>> = None;
        let (mut policy_norms, mut value_norms, mut n_updates) = (Vec::new(), Vec::new(), 0.0);
        for epoch in 0..config.ppo.epochs {
            let order = streams.get("minibatches", step * config.ppo.epochs + epoch).permutation(batch.len());
            for minibatch in order.chunks(batch.len() / config.ppo.minibatches) {
                let minibatch: Vec<&Experience> = minibatch.iter().map(|&i| &batch[i]).collect();
                let minibatch_tokens = minibatch.iter().map(|experience| experience.values.len()).sum();
                let lengths = minibatch.iter().map(|e| e.rollout.prompt.ids.len() + e.rollout.response.len());
                let (mut policy_grads, mut value_grads) = (Grads::default(), Grads::default());
                for part in by_length(lengths, config.micro_batch_size()) {
                    let part = Part::new(part.iter().map(|&i| minibatch[i]).collect());
                    let gradients = self.gradients(&part, config, minibatch_tokens);
                    if n_updates == 0.0 {
                        part.check_ratio(gradients.log_probs, config.ppo.ratio_tolerance)?;
                    }
                    policy_grads = policy_grads.plus(gradients.policy);
                    value_grads = value_grads.plus(gradients.value);
                    means = Some(match means {
                        Some(sum) => sum + gradients.means,
                        None => gradients.means,
                    });
                    ratio_max = Some(match ratio_max {
                        Some(max) => max.max_pair(gradients.ratio_max),
                        None => gradients.ratio_max,
                    });
                }
                let device = self.policy.device();
                let Self { policy, value, mut policy_optimizer, mut value_optimizer } = self;
                let ((policy, policy_norm), (value, value_norm)) = kernels::at_once(
                    &device,
                    || policy_optimizer.step(policy, policy_grads, policy_lr),
                    || value_optimizer.step(value, value_grads, value_lr),
                );
                self = Self { policy, value, policy_optimizer, value_optimizer };
                policy_norms.push(policy_norm);
                value_norms.push(value_norm);
                n_updates += 1.0;
            }
        }
        let host = |tensor: Option<Tensor<1>>| {
            let tensor = tensor.context("a step makes at least one update")?;
            tensor.try_into_vec_as::<f32>().context("failed to read the device")
        };
        let means: Vec<f64> = host(means)?.iter().map(|&sum| f64::from(sum) / n_updates).collect();
        let metrics = UpdateMetrics {
            policy_loss: means[0],
            clip_frac: means[1],
            approx_kl: means[2],
            ratio_mean: means[3],
            entropy: means[4],
            value_loss: means[5],
            value_clip_frac: means[6],
            ratio_max: f64::from(host(ratio_max)?[0]),
            policy_grad_norm: GradNorm::mean(&policy_norms),
            value_grad_norm: GradNorm::mean(&value_norms),
        };
        Ok((self, metrics))
    }

    /// One micro-batch's part of a minibatch's gradients and means.
    fn gradients(&self, part: &Part<'_>, config: &PpoConfig, minibatch_tokens: usize) -> Gradients {
        let device = self.policy.device();
        let flat = |numbers: fn(&Experience) -> &[f32]| -> Tensor<1> {
            let flat: Vec<f32> = part.experiences.iter().flat_map(|experience| numbers(experience)).copied().collect();
            Tensor::from_floats(flat.as_slice(), &device)
        };
        let learn_policy = || {
            let (log_probs, entropy) = log_probs(&self.policy, &part.batch, config.ppo.temperature); // [n_tokens]
            let loss = policy_loss(
                log_probs.clone(),
                flat(|experience| &experience.rollout.log_probs),
                flat(|experience| &experience.advantages),
                config.ppo.clip_range as f32,
                minibatch_tokens,
            );
            let gradients = self.policy_optimizer.scaled(loss.loss.clone()).backward();
            (Grads::take(&self.policy, gradients), loss, log_probs, entropy)
        };
        let learn_value = || {
            let loss = value_loss(
                values(&self.value, &part.batch),
                flat(|experience| &experience.values),
                flat(|experience| &experience.returns),
                config.ppo.value_clip_range as f32,
                minibatch_tokens,
            );
            let gradients = self.value_optimizer.scaled(loss.loss.clone()).backward();
            (Grads::take(&self.value, gradients), loss)
        };
        let ((policy, of_policy, log_probs, entropy), (value, of_value)) =
            kernels::at_once(&device, learn_policy, learn_value);
        let means: [Tensor<1>; N_MEANS] = [
            of_policy.loss.inner(),
            of_policy.clip_frac,
            of_policy.approx_kl,
            of_policy.ratio_mean,
            entropy.inner().sum().div_scalar(minibatch_tokens as f32),
            of_value.loss.inner(),
            of_value.clip_frac,
        ];
        Gradients {
            policy,
            value,
            means: Tensor::cat(means.to_vec(), 0),
            ratio_max: of_policy.ratio_max,
            log_probs: log_probs.inner(),
        }
    }
}

/// What one micro-batch gives.
struct Gradients {
    policy: Grads,
    value: Grads,
    /// `[N_MEANS]`, in the order of [`UpdateMetrics`] as read in [`Learner::update`].
    means: Tensor<1>,
    ratio_max: Tensor<1>,
    /// `[n_tokens]`
    log_probs: Tensor<1>,
}

/// The responses of one micro-batch.
struct Part<'a> {
    experiences: Vec<&'a Experience>,
    batch: ResponseBatch,
}

impl<'a> Part<'a> {
    fn new(experiences: Vec<&'a Experience>) -> Self {
        let batch = ResponseBatch::new(experiences.iter().map(|e| (&*e.rollout.prompt.ids, &*e.rollout.response)));
        Self { experiences, batch }
    }

    /// Checks that the policy, not yet updated, gives the sampled tokens the probability they were sampled with.
    ///
    /// Sampling goes through the key/value cache token by token, training through whole padded rows. Both must be the
    /// same function: with another temperature, position, mask or dropout, PPO would optimise a ratio of two models.
    ///
    /// # Source
    /// Item 33 of "The N Implementation Details of RLHF with PPO": the first ratio of a rollout is 1.
    fn check_ratio(&self, log_probs: Tensor<1>, tolerance: f64) -> anyhow::Result<()> {
        let log_probs = log_probs.try_into_vec_as::<f32>().context("failed to read the device")?;
        let sampled = self.experiences.iter().flat_map(|experience| {
            experience
                .rollout
                .log_probs
                .iter()
                .enumerate()
                .map(move |(t, log_prob)| (&experience.rollout, t, *log_prob))
        });
        for ((rollout, t, old), new) in sampled.zip(log_probs) {
            let ratio = f64::from(new - old).exp();
            // NaN is not within the tolerance either.
            let within = (ratio - 1.0).abs() <= tolerance;
            if !within {
                bail!(
                    "before any update the policy gives a sampled token {ratio:.6} times the probability it was sampled \
                     with (log-probability {new} in training, {old} in sampling; token {t} of {} in the answer to \
                     `{}`), expected 1 ± {tolerance}\nhint: sampling and training disagree about temperature, \
                     positions, padding or kernels; if `--kernels plain` runs, please report the difference",
                    rollout.response.len(),
                    rollout.prompt.text
                );
            }
        }
        Ok(())
    }
}
