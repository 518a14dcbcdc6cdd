//! The updates on one batch of rollouts: epochs × minibatches × micro-batches.

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor};
use common::corpus::{self, Windows};
use common::group::Group;
use common::kernels;
use common::optim::{GradNorm, Grads};
use common::reduce::{GradSum, in_order};
use common::rng::Streams;
use common::score::{ResponseBatch, by_length, log_probs_and_entropy, values};

use crate::config::PpoConfig;
use crate::dialect::KlPlace;
use crate::learner::{Critic, Learner, valued_ids};
use crate::loss::{Clips, MinibatchSize, Weights, clipped_policy_loss, kl_loss, weighted_value_loss};
use crate::targets::{Experience, ValueTargets};

/// Means over all minibatches of a step, but for the maximum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UpdateMetrics {
    /// Clipped policy loss, with the price of divergence where that is part of it.
    pub policy_loss: f64,
    /// Fraction of response tokens whose ratio was clipped.
    pub clip_frac: f64,
    /// `½·mean((log ratio)²)` in nats.
    pub approx_kl: f64,
    /// Mean probability ratio.
    pub ratio_mean: f64,
    /// Largest probability ratio.
    pub ratio_max: f64,
    /// Mean entropy of a next-token distribution, in nats.
    pub entropy: f64,
    /// Global norm of the policy's gradient before clipping.
    pub grad_norm: f64,
    /// The same of the value model, where there is one.
    pub value: Option<ValueMetrics>,
    /// Mean cross-entropy of a token of pretraining text, in nats, where some is learned from.
    pub ptx_loss: Option<f64>,
}

/// Means over all minibatches of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ValueMetrics {
    /// Clipped value loss.
    pub loss: f64,
    /// Fraction of response tokens whose value was clipped.
    pub clip_frac: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
}

impl UpdateMetrics {
    /// Sum of the gradients' norms, which is finite where all are.
    pub(crate) fn grad_norms(&self) -> f64 {
        self.grad_norm + self.value.map_or(0.0, |value| value.grad_norm)
    }
}

/// What all updates of a step share.
#[derive(Debug, Clone, Copy)]
pub struct Update<'a> {
    /// The configuration.
    pub config: &'a PpoConfig,
    /// Seeds the order of the minibatches.
    pub streams: Streams,
    /// The step, of `config.train.steps`.
    pub step: u64,
    /// The price of a nat of divergence where that is part of the loss.
    pub kl_coef: f32,
    /// The pretraining windows of each update; nothing where the scores alone are learned from.
    pub text: &'a [Windows],
}

impl Learner {
    /// Makes the updates of step `step` of `config.train.steps`; a nat of divergence costs `kl_coef` where that is part of
    /// the loss.
    ///
    /// Every epoch draws a fresh permutation of the responses and cuts it into `ppo.minibatches` equal parts, one
    /// optimiser step each. Losses are means over the response tokens of a minibatch, however it is cut into
    /// micro-batches.
    ///
    /// # Errors
    /// If, before the first update, a ratio is further from 1 than `ppo.ratio_tolerance`.
    pub fn update(
        self,
        batch: &[Experience],
        config: &PpoConfig,
        streams: Streams,
        step: u64,
        kl_coef: f32,
    ) -> anyhow::Result<(Self, UpdateMetrics)> {
        self.update_in(&Group::alone(), batch, &Update { config, streams, step, kl_coef, text: &[] })
    }

    /// The updates on the same batch on every process of `group`, which shares the micro-batches: the same weights and
    /// numbers to the bit.
    ///
    /// # Errors
    /// As [`update`](Self::update), and if a process has ended.
    ///
    /// # Panics
    /// If there is text, but not of each update.
    pub fn update_in(
        mut self,
        group: &Group,
        batch: &[Experience],
        update: &Update<'_>,
    ) -> anyhow::Result<(Self, UpdateMetrics)> {
        let &Update { config, streams, step, text, .. } = update;
        let mut texts = text.iter();
        let n_updates = config.ppo.epochs as usize * config.ppo.minibatches;
        assert!(text.is_empty() || text.len() == n_updates, "text of {} updates for {n_updates}", text.len());
        let n_steps = config.train.steps;
        let lrs = (config.optimizer.lr_at(step, n_steps), config.value_optimizer.lr_at(step, n_steps));
        let mut sums = Sums::default();
        for epoch in 0..config.ppo.epochs {
            let order = streams.get("minibatches", step * config.ppo.epochs + epoch).permutation(batch.len());
            for minibatch in order.chunks(batch.len() / config.ppo.minibatches) {
                let minibatch: Vec<&Experience> = minibatch.iter().map(|&i| &batch[i]).collect();
                let own = Experience::of_minibatch(&minibatch, &config.ppo);
                let minibatch = own.as_ref().map_or(minibatch, |own| own.iter().collect());
                let (policy_grads, value_grads) = self.gradients(group, &minibatch, update, texts.next(), &mut sums)?;
                self = self.descend(policy_grads, value_grads, lrs, &mut sums).with_shared_weights(group)?;
            }
        }
        Ok((self, sums.metrics(!text.is_empty())?))
    }

    /// The gradients of a minibatch, accumulated over its micro-batches of all processes, longest responses first; those of
    /// the policy with those of `text`, of which each micro-batch has a part.
    fn gradients(
        &self,
        group: &Group,
        minibatch: &[&Experience],
        &Update { config, kl_coef, .. }: &Update<'_>,
        text: Option<&Windows>,
        sums: &mut Sums,
    ) -> anyhow::Result<(Grads, Grads)> {
        let counts = Counts::of(minibatch);
        let lengths = minibatch.iter().map(|e| e.rollout.prompt.ids.len() + e.rollout.response.ids.len());
        let mut policy_grads = GradSum::new(group, config.train.reduce);
        let mut value_grads = self.critic.as_ref().map(|_| GradSum::new(group, config.train.reduce));
        let (mut all_means, mut ratio_maxima) = (Vec::new(), Vec::new());
        let parts = by_length(lengths, config.micro_batch_size());
        for i in group.share().of(parts.len()) {
            let (part, text) = (&parts[i], text.map(|text| part_of(text, i, parts.len())));
            let part = MicroBatch::new(part.iter().map(|&i| minibatch[i]).collect(), counts);
            let of_policy = || part.policy_gradients(self, config, kl_coef);
            let of_value = || self.critic.as_ref().map(|critic| part.value_gradients(critic, config));
            let (policy, value) = if self.policy.is_narrow() {
                // Memory is short: the activations of one model at a time.
                (of_policy(), of_value())
            } else {
                kernels::join(&self.policy.device(), of_policy, of_value)
            };
            if sums.n_updates() == 0 {
                part.check_ratio(policy.log_probs, config.ppo.ratio_tolerance)?;
            }
            policy_grads.add(policy.grads);
            let mut means = policy.means;
            if let (Some(value), Some(value_grads)) = (value, &mut value_grads) {
                value_grads.add(value.grads);
                means.extend(value.means);
            }
            if let Some((text, n_targets)) = text {
                // One backward pass after the other: the activations of both are never there at once.
                let (grads, loss) = self.text_gradients(&text, n_targets, config.ppo.switches().ptx_coef);
                if let Some(grads) = grads {
                    policy_grads.add(grads);
                }
                means.push(loss);
            }
            all_means.push(Tensor::cat(means, 0));
            ratio_maxima.push(policy.ratio_max);
        }
        for (means, ratio_max) in in_order(group, all_means)?.into_iter().zip(in_order(group, ratio_maxima)?) {
            sums.add(means, ratio_max);
        }
        let value_grads = match (value_grads, &self.critic) {
            (Some(grads), Some(critic)) => grads.total(&critic.optimizer)?,
            _ => Grads::default(),
        };
        Ok((policy_grads.total(&self.policy_optimizer)?, value_grads))
    }

    /// The gradients of `coef` times the cross-entropy of `text`, divided by the `n_targets` of the whole update, and that
    /// without `coef`, `[1]`; no gradients of no text.
    ///
    /// # Source
    /// Ouyang et al., arXiv:2203.02155, equation 2.
    fn text_gradients(&self, text: &Windows, n_targets: usize, coef: f64) -> (Option<Grads>, Tensor<1>) {
        if text.rows.is_empty() {
            return (None, Tensor::zeros([1], &self.policy.device().inner()));
        }
        let loss = corpus::loss(&self.policy, text, n_targets, None);
        let value = loss.clone().inner();
        let gradients = self.policy_optimizer.scaled(loss * coef).backward();
        (Some(Grads::take(&self.policy, gradients)), value)
    }

    /// One step of each optimiser at the learning rates of policy and value model.
    fn descend(self, policy_grads: Grads, value_grads: Grads, lrs: (f64, f64), sums: &mut Sums) -> Self {
        let Self { policy, mut policy_optimizer, critic } = self;
        let device = policy.device();
        let ((policy, policy_norm), critic) = kernels::join(
            &device,
            || policy_optimizer.step(policy, policy_grads, lrs.0),
            || {
                critic.map(|Critic { model, mut optimizer }| {
                    let (model, norm) = optimizer.step(model, value_grads, lrs.1);
                    (Critic { model, optimizer }, norm)
                })
            },
        );
        sums.policy_norms.push(policy_norm);
        let critic = critic.map(|(critic, norm)| {
            sums.value_norms.push(norm);
            critic
        });
        Self { policy, policy_optimizer, critic }
    }

    /// The same models with what other processes have moved.
    fn with_shared_weights(self, group: &Group) -> anyhow::Result<Self> {
        let Self { policy, policy_optimizer, critic } = self;
        let policy = policy_optimizer.share_weights(group, policy)?;
        let critic = critic.map(|Critic { model, optimizer }| -> anyhow::Result<Critic> {
            Ok(Critic { model: optimizer.share_weights(group, model)?, optimizer })
        });
        Ok(Self { policy, policy_optimizer, critic: critic.transpose()? })
    }
}

/// Part `i` of `n` of the windows of an update, about as many in each, and how many targets the whole has.
fn part_of(text: &Windows, i: usize, n: usize) -> (Windows, usize) {
    let n_rows = text.rows.len();
    (text.part(i * n_rows / n..(i + 1) * n_rows / n), text.n_targets())
}

/// The sums behind a step's metrics, kept on the device so that no update waits for it.
#[derive(Default)]
struct Sums {
    /// `[5]`, two more with a value model and one more with text, in the order in which [`Sums::metrics`] reads them.
    means: Option<Tensor<1>>,
    /// `[1]`
    ratio_max: Option<Tensor<1>>,
    policy_norms: Vec<GradNorm>,
    value_norms: Vec<GradNorm>,
}

impl Sums {
    fn n_updates(&self) -> usize {
        self.policy_norms.len()
    }

    /// Adds a micro-batch's part of its minibatch's means.
    fn add(&mut self, means: Tensor<1>, ratio_max: Tensor<1>) {
        self.means = Some(match self.means.take() {
            Some(sum) => sum + means,
            None => means,
        });
        self.ratio_max = Some(match self.ratio_max.take() {
            Some(max) => max.max_pair(ratio_max),
            None => ratio_max,
        });
    }

    fn metrics(self, has_text: bool) -> anyhow::Result<UpdateMetrics> {
        let n_updates = self.n_updates() as f64;
        let host = |tensor: Option<Tensor<1>>| {
            let tensor = tensor.context("a step makes at least one update")?;
            tensor.try_into_vec_as::<f32>().context("failed to read the device")
        };
        let means: Vec<f64> = host(self.means)?.iter().map(|&sum| f64::from(sum) / n_updates).collect();
        Ok(UpdateMetrics {
            policy_loss: means[0],
            clip_frac: means[1],
            approx_kl: means[2],
            ratio_mean: means[3],
            entropy: means[4],
            ratio_max: f64::from(host(self.ratio_max)?[0]),
            grad_norm: GradNorm::mean(&self.policy_norms),
            value: (!self.value_norms.is_empty()).then(|| ValueMetrics {
                loss: means[5],
                clip_frac: means[6],
                grad_norm: GradNorm::mean(&self.value_norms),
            }),
            ptx_loss: has_text.then(|| means[means.len() - 1]),
        })
    }
}

/// Gradients and metrics of the policy from one micro-batch.
struct PolicyGradients {
    grads: Grads,
    /// Of shape `[1]`, in the order of [`Sums::metrics`].
    means: Vec<Tensor<1>>,
    ratio_max: Tensor<1>,
    /// `[n_tokens]`
    log_probs: Tensor<1>,
}

/// The same of the value model.
struct ValueGradients {
    grads: Grads,
    means: Vec<Tensor<1>>,
}

/// The size of a whole minibatch, the denominator of every mean.
#[derive(Clone, Copy)]
struct Counts {
    responses: usize,
    /// Response tokens.
    tokens: usize,
    /// Rewards, and so values: one more than tokens for a response with a place after its last.
    values: usize,
}

impl Counts {
    fn of(minibatch: &[&Experience]) -> Self {
        Self {
            responses: minibatch.len(),
            tokens: minibatch.iter().map(|experience| experience.n_tokens()).sum(),
            values: minibatch.iter().map(|experience| experience.rewards.len()).sum(),
        }
    }
}

/// The responses of one micro-batch.
struct MicroBatch<'a> {
    experiences: Vec<&'a Experience>,
    batch: ResponseBatch,
    minibatch: Counts,
}

impl<'a> MicroBatch<'a> {
    fn new(experiences: Vec<&'a Experience>, minibatch: Counts) -> Self {
        let batch = ResponseBatch::new(experiences.iter().map(|experience| experience.rollout.ids()));
        Self { experiences, batch, minibatch }
    }

    /// How much each number counts, of which a response has `length` and the minibatch `numbers`.
    fn weights(
        &self,
        device: &Device,
        config: &PpoConfig,
        numbers: usize,
        length: fn(&Experience) -> usize,
    ) -> Weights {
        let size =
            MinibatchSize { responses: self.minibatch.responses, numbers, response_length: config.ppo.response_length };
        let lengths: Vec<usize> = self.experiences.iter().map(|experience| length(experience)).collect();
        Weights::of_responses(config.ppo.switches().loss_mean, &lengths, size, device)
    }

    /// The numbers of the response tokens, `[n_tokens]`.
    fn flat(&self, device: &Device, numbers: fn(&Experience) -> &[f32]) -> Tensor<1> {
        let flat: Vec<f32> = self.experiences.iter().flat_map(|experience| numbers(experience)).copied().collect();
        Tensor::from_floats(flat.as_slice(), device)
    }

    fn policy_gradients(&self, learner: &Learner, config: &PpoConfig, kl_coef: f32) -> PolicyGradients {
        let device = learner.policy.device();
        let switches = config.ppo.switches();
        let n_tokens = self.minibatch.tokens;
        let weights = self.weights(&device, config, n_tokens, Experience::n_tokens);
        // [n_tokens]
        let (log_probs, entropy) = log_probs_and_entropy(&learner.policy, &self.batch, config.ppo.temperature());
        let mut loss = clipped_policy_loss(
            log_probs.clone(),
            self.flat(&device, |experience| &experience.rollout.response.log_probs),
            self.flat(&device, |experience| &experience.advantages),
            Clips::of(config.ppo.clip_range, &switches),
            &weights,
            n_tokens,
        );
        if switches.kl_place == KlPlace::Loss {
            let ref_log_probs = self.flat(&device, |experience| &experience.rollout.ref_log_probs);
            let clip = switches.kl_clip as f32;
            let kl = kl_loss(log_probs.clone(), ref_log_probs, switches.kl_estimator, clip, &weights);
            loss.loss = loss.loss + kl * kl_coef;
        }
        let gradients = learner.policy_optimizer.scaled(loss.loss.clone()).backward();
        PolicyGradients {
            grads: Grads::take(&learner.policy, gradients),
            means: vec![
                loss.loss.inner(),
                loss.clip_frac,
                loss.approx_kl,
                loss.ratio_mean,
                entropy.inner().sum().div_scalar(n_tokens as f32),
            ],
            ratio_max: loss.ratio_max,
            log_probs: log_probs.inner(),
        }
    }

    fn value_gradients(&self, critic: &Critic, config: &PpoConfig) -> ValueGradients {
        fn targets(experience: &Experience) -> &ValueTargets {
            experience.critic.as_ref().expect("an estimator with a value model gives it targets")
        }
        let device = critic.model.device();
        let switches = config.ppo.switches();
        let n_values = self.minibatch.values;
        let loss = weighted_value_loss(
            self.values(critic),
            self.flat(&device, |experience| &targets(experience).values),
            self.flat(&device, |experience| &targets(experience).returns),
            switches.value_clip_range as f32,
            &self.weights(&device, config, n_values, |experience| experience.rewards.len()),
            n_values,
        );
        let gradients = critic.optimizer.scaled(loss.priced(switches.value_loss_coef)).backward();
        ValueGradients { grads: Grads::take(&critic.model, gradients), means: vec![loss.loss.inner(), loss.clip_frac] }
    }

    /// Values of the states before the response tokens, and after the last where that is the place of the score, `[n_values]`.
    fn values(&self, critic: &Critic) -> Tensor<1> {
        let is_after = |experience: &Experience| experience.rewards.len() > experience.n_tokens();
        if !self.experiences.iter().any(|experience| is_after(experience)) {
            return values(&critic.model, &self.batch);
        }
        let ids: Vec<Vec<u32>> = self.experiences.iter().map(|e| valued_ids(&e.rollout, is_after(e))).collect();
        let prompts = self.experiences.iter().map(|experience| &*experience.rollout.prompt.ids);
        values(&critic.model, &ResponseBatch::new(prompts.zip(ids.iter().map(Vec::as_slice))))
    }

    /// Checks that the policy, not yet updated, gives the sampled tokens the probability they were sampled with.
    ///
    /// Sampling goes through the key/value cache token by token, training through whole padded rows. Both must be the
    /// same function: with another temperature, position, mask or dropout, PPO would optimise a ratio of two models.
    ///
    /// # Source
    /// Huang et al., "The 37 Implementation Details of Proximal Policy Optimization", 2022, on debugging: the ratio is
    /// 1 in the first minibatch of the first epoch.
    fn check_ratio(&self, log_probs: Tensor<1>, tolerance: f64) -> anyhow::Result<()> {
        let log_probs = log_probs.try_into_vec_as::<f32>().context("failed to read the device")?;
        let sampled = self.experiences.iter().flat_map(|experience| {
            let of_response = experience.rollout.response.log_probs.iter().enumerate();
            of_response.map(move |(t, log_prob)| (&experience.rollout, t, *log_prob))
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
                    rollout.response.ids.len(),
                    rollout.prompt.text
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::group::threads;
    use common::kernels::Kernels;
    use common::model::{Gpt, NamedTensors};
    use common::optim::AdamW;
    use common::score::{EncodedPrompt, Response, Rollout};
    use common::testing::{assert_close, tiny_config};

    /// Sums of some hundred f32 products, in another order.
    const REORDERED: f32 = 1e-5;

    const VOCAB_SIZE: usize = 40;

    fn learner() -> Learner {
        let policy = Gpt::new(&tiny_config(VOCAB_SIZE), &Streams::new(4), &Device::flex().autodiff());
        let policy_optimizer = AdamW::new(&PpoConfig::default().optimizer, Kernels::Plain);
        Learner { policy, policy_optimizer, critic: None }
    }

    /// Two prompts with two answers each, as if another policy had given them.
    fn batch() -> Vec<Experience> {
        let experience = |i: u32| {
            let n = 2 + i as usize;
            let response = Response {
                ids: (0..n as u32).map(|t| 7 + t * (i + 1)).collect(),
                log_probs: vec![-3.5; n],
                ended: true,
                ..Response::default()
            };
            Experience {
                rollout: Rollout {
                    prompt: EncodedPrompt { ids: vec![1, 2 + i], text: String::new() },
                    response,
                    ref_log_probs: vec![-3.6; n],
                    score: 0.5,
                    member_scores: Vec::new(),
                    gold: None,
                },
                score: 0.5,
                rewards: vec![0.0; n],
                advantages: vec![0.5 - i as f32; n],
                critic: None,
            }
        };
        (0..4).map(experience).collect()
    }

    fn config(micro_batch_size: usize, ptx_coef: f64) -> PpoConfig {
        let mut config = PpoConfig::default();
        (config.train.batch_size, config.train.micro_batch_size) = (4, Some(micro_batch_size));
        (config.ppo.ptx_coef, config.ppo.ratio_tolerance) = (Some(ptx_coef), f64::INFINITY);
        config
    }

    fn text(n: u32) -> Windows {
        let row = |i: u32| (0..9).map(|t| (t * (i + 3) + 2) % VOCAB_SIZE as u32).collect();
        Windows { rows: (0..n).map(row).collect(), seq_len: 8, bos: None }
    }

    /// The gradients of one update on [`batch`], and the mean loss on the text.
    fn gradients(group: &Group, config: &PpoConfig, text: Option<&Windows>) -> (NamedTensors, Option<f64>) {
        let (learner, batch) = (learner(), batch());
        let minibatch: Vec<&Experience> = batch.iter().collect();
        let update = Update { config, streams: Streams::new(1), step: 0, kl_coef: 0.1, text: &[] };
        let mut sums = Sums::default();
        let (grads, _) = learner.gradients(group, &minibatch, &update, text, &mut sums).expect("computable");
        let named = grads.to_named();
        sums.policy_norms.push(GradNorm::Host(1.0));
        (named, sums.metrics(text.is_some()).expect("readable").ptx_loss)
    }

    #[test]
    fn text_adds_its_gradient_times_the_coefficient_however_it_is_cut() {
        const COEF: f32 = 2.5;
        let (alone, windows, learner) = (Group::alone(), text(5), learner());
        let loss = corpus::loss(&learner.policy, &windows, windows.n_targets(), None);
        let value = loss.clone().inner().into_scalar::<f32>();
        let of_text = Grads::take(&learner.policy, loss.backward()).to_named();
        let (of_scores, none) = gradients(&alone, &config(2, 0.0), None);
        assert_eq!(none, None);
        // Two, four and one micro-batches, over which five windows are spread unevenly.
        for micro in [2, 1, 4] {
            let (both, measured) = gradients(&alone, &config(micro, COEF.into()), Some(&windows));
            assert_close(&[measured.expect("there is text") as f32], &[value], REORDERED);
            assert!(of_text.keys().eq(both.keys()));
            for (path, both) in both {
                let sum = of_scores[&path].data.iter().zip(&of_text[&path].data).map(|(ppo, lm)| ppo + COEF * lm);
                assert_close(&both.data, &sum.collect::<Vec<f32>>(), REORDERED);
            }
        }
    }

    #[test]
    fn text_of_two_ranks_is_that_of_one() {
        // Three windows for four micro-batches, so that one has none.
        let (config, windows) = (config(1, 2.5), text(3));
        let one = gradients(&Group::alone(), &config, Some(&windows));
        for of_rank in threads(2, |group| gradients(&group, &config, Some(&windows))) {
            assert!(of_rank == one, "{:?} and {:?}", of_rank.1, one.1);
        }
    }

    #[test]
    #[should_panic(expected = "text of 1 updates for 4")]
    fn there_is_text_of_every_update_or_of_none() {
        let config = config(1, 1.0);
        let update = Update { config: &config, streams: Streams::new(1), step: 0, kl_coef: 0.1, text: &[text(2)] };
        drop(learner().update_in(&Group::alone(), &batch(), &update));
    }
}
