//! The configuration of this stage.

use anyhow::{bail, ensure};
use common::capacity::Settings;
use common::cli::StageArgs;
use common::group::Share;
use common::kernels::TrunkPrecision;
use common::model::LoraConfig;
use common::optim::{AdamStyle, OptimizerConfig, RlhfDefaults};
use common::reduce::Reduce;
use common::rng::Streams;
use common::score::{Ensemble, Sampling, TooLong};
use common::session::{self, Amount, DataConfig, RunConfig};
use common::tokenizer::Tokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::dialect::{
    Dialect, Estimator, KlEstimator, KlPlace, LossMean, MissingEos, ScorePosition, Switches, ValueInit, Variance,
    Whiten,
};
use crate::ptx::PtxConfig;

/// The least number of responses in a minibatch whose rewards are whitened.
///
/// # Source
/// lm-human-preferences, `train_policy.py:74`, which whitens no fewer.
const LEAST_WHITENED: usize = 8;

/// `ppo.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PpoConfig {
    /// Random seed of the prompt order, sampling and minibatches.
    pub seed: u64,
    /// Prompts to train and evaluate on. Paths are relative to the folder of the configuration; `$DATA/` begins a path in the
    /// folder of `--data` or `KINDLING_DATA`.
    pub data: DataConfig<TooLong>,
    /// Pretraining text whose loss is measured, and with `ppo.ptx_coef` learned from beside the scores (PPO-ptx).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ptx: Option<PtxConfig>,
    /// Train low-rank adapters beside frozen weights, of the policy and of the value model: the reference policy, and a reward model
    /// that is an adapter on the same base, then share them. Without this section all weights are trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// AdamW of the policy and its learning-rate schedule, which falls linearly to 0 by default.
    #[serde(with = "RlhfDefaults")]
    #[schemars(with = "OptimizerConfig")]
    pub optimizer: OptimizerConfig,
    /// AdamW of the value model and its learning-rate schedule, which falls linearly to 0 by default.
    #[serde(with = "RlhfDefaults")]
    #[schemars(with = "OptimizerConfig")]
    pub value_optimizer: OptimizerConfig,
    /// Training length and batch sizes.
    pub train: TrainConfig,
    /// Rollouts, rewards, advantages and the clipped objectives. A switch that is left out is as `dialect` and `estimator` set it.
    #[serde(deserialize_with = "ppo_section")]
    pub ppo: PpoSection,
    /// Intervals of logging, evaluation and checkpoints, in PPO steps. The best evaluation is the one with the highest
    /// `val/score − kl_coef·val/kl`.
    #[serde(deserialize_with = "run_section")]
    pub run: RunConfig,
}

/// The defaults of `[run]`: a step is an iteration, so they are smaller than those of other stages.
fn run_defaults() -> RunConfig {
    RunConfig { log_every: 1, eval_every: 10, save_every: 10, ..RunConfig::default() }
}

fn run_section<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<RunConfig, D::Error> {
    run_defaults().or_given(deserializer)
}

fn ppo_section<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<PpoSection, D::Error> {
    Ok(PpoSection::deserialize(deserializer)?.resolved())
}

impl Default for PpoConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            data: DataConfig::default(),
            ptx: None,
            lora: None,
            optimizer: OptimizerConfig::rlhf(),
            value_optimizer: OptimizerConfig::rlhf(),
            train: TrainConfig::default(),
            ppo: PpoSection::default().resolved(),
            run: run_defaults(),
        }
    }
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Number of PPO steps; each samples a batch of responses and makes all updates on it.
    #[schemars(range(min = 1, max = 1_000_000_000_000_u64))]
    pub steps: u64,
    /// Number of responses in a step, to as many prompts, or to `batch_size / ppo.samples_per_prompt` of them.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub batch_size: usize,
    /// Number of responses computed at once, sorted by length to save padding, with gradients accumulated over the
    /// minibatch; divides `batch_size / ppo.minibatches`, which is the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub micro_batch_size: Option<usize>,
    /// Whether the backward pass computes the activations inside each block again, instead of keeping them from the forward
    /// pass: the same numbers in less memory, and a third more time for a step.
    pub checkpoint_activations: bool,
    /// Whether each of several processes keeps the moments of its part of the parameters alone (ZeRO-1): the same weights to the
    /// byte, and less memory.
    pub shard_optimizer: bool,
    /// How the gradients of several processes are summed.
    pub reduce: Reduce,
    /// Number of responses decoded at once: fewer need less memory for keys and values, more are faster.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub rollout_batch_size: usize,
    /// Whether responses' log-probabilities keep their last bits whatever is decoded beside them: then several processes train
    /// the weights of one, to the bit. At most 64 responses are decoded at once, and prompts are read one by one.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub batch_invariant: bool,
    /// Number of held-out prompts in an evaluation during training; 0 takes all, as the last evaluation does.
    pub eval_prompts: usize,
    /// Number of held-out answers written to `samples.jsonl` at every evaluation.
    pub n_samples: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 100,
            batch_size: 64,
            micro_batch_size: None,
            checkpoint_activations: false,
            shard_optimizer: false,
            reduce: Reduce::default(),
            rollout_batch_size: 256,
            batch_invariant: false,
            eval_prompts: 64,
            n_samples: 4,
        }
    }
}

/// `[ppo]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PpoSection {
    /// The implementation whose choices the switches take that are not set; `ppo dialects` prints them with their sources.
    pub dialect: Dialect,
    /// Estimator of the advantages. `rloo` and `grpo` whiten neither rewards nor advantages; `grpo` charges k3 in the loss, takes the mean over responses and the sample variance.
    pub estimator: Estimator,
    /// Number of responses to a prompt in a step; divides `train.batch_size`. At least 2 for `rloo` and `grpo`.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub samples_per_prompt: usize,
    /// Maximum number of tokens in a response, `<|end|>` included.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub response_length: usize,
    /// Sampling temperature; log-probabilities are taken at the same temperature.
    #[schemars(range(min = 0.001, max = 1000))]
    pub temperature: f64,
    /// Score of a response that was cut off before `<|end|>`, in place of the reward model's or as `missing_eos` says.
    #[schemars(range(min = -1_000_000, max = 1_000_000))]
    pub missing_eos_score: f64,
    /// How the scores of several reward models (`--reward-model`, repeated) become one; `"mean"` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ensemble: Option<Ensemble>,
    /// KL coefficient: reward lost per nat of divergence from the reference policy. With `kl_target`, its initial value.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub kl_coef: f64,
    /// Target of the adaptive KL coefficient, in nats per response; without it the coefficient is fixed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1e-6, max = 1_000_000))]
    pub kl_target: Option<f64>,
    /// Time constant of the adaptive KL coefficient, in responses.
    #[schemars(range(min = 1e-3, max = 1e12))]
    pub kl_horizon: f64,
    /// Discount factor γ per token; 1 because a response is one decision in many tokens.
    #[schemars(range(min = 0, max = 1))]
    pub gamma: f64,
    /// λ of generalised advantage estimation: 1 relies on the returns alone, 0 on the values.
    #[schemars(range(min = 0, max = 1))]
    pub lambda: f64,
    /// Number of passes over the responses of a step (PPO epochs).
    #[schemars(range(min = 1, max = 1_000_000))]
    pub epochs: u64,
    /// Number of minibatches, and so of optimiser steps, in a pass; divides `train.batch_size`.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub minibatches: usize,
    /// Clip range ε of the policy: probability ratios are clipped to `1 ± clip_range`.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub clip_range: f64,
    /// Largest difference from 1 that probability ratios may have before the first update of a step; it should be rounding
    /// alone.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub ratio_tolerance: f64,
    /// What an alarm does: a metric beyond its limit, of those that docs/doctor.md lists.
    pub on_alarm: OnAlarm,
    /// Where the score joins the rewards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_position: Option<ScorePosition>,
    /// What `missing_eos_score` does to the score of a response that was cut off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing_eos: Option<MissingEos>,
    /// Estimator of the divergence from the reference that is charged; `objective/kl` is k1 always.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_estimator: Option<KlEstimator>,
    /// Where the divergence from the reference is charged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_place: Option<KlPlace>,
    /// Largest absolute value of a token's divergence as it is charged, in nats; 0 sets no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub kl_clip: Option<f64>,
    /// Whether rewards are scaled to variance 1 before advantages are estimated, over the same tokens as advantages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub whiten_rewards: Option<bool>,
    /// Which tokens advantages are whitened over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub whiten_advantages: Option<Whiten>,
    /// The divisor of the variance of whitening, and of a group's rewards in `grpo`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub whiten_variance: Option<Variance>,
    /// How the losses of tokens become that of a minibatch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_mean: Option<LossMean>,
    /// Clip range of the value model: values are clipped to within this distance of the old ones, in units of the score.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub value_clip_range: Option<f64>,
    /// Factor on the value model's loss; its optimiser is its own, so that only ε and the clip of its gradient feel it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub value_loss_coef: Option<f64>,
    /// Largest absolute value of a score as it is trained on; 0 sets no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub reward_clip: Option<f64>,
    /// Largest absolute value of the logarithm of a probability ratio; 0 sets no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub log_ratio_clip: Option<f64>,
    /// Probability ratio at which a token of negative advantage stops adding to the loss: above 1, or 0 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub dual_clip: Option<f64>,
    /// Initial weights of the value model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value_init: Option<ValueInit>,
    /// Where ε of both optimisers stands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adam_style: Option<AdamStyle>,
    /// Added to `temperature` wherever that is used.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    pub temperature_eps: Option<f64>,
    /// Factor on the mean loss of a token of pretraining text, which is added to the policy's and needs `[ptx]`; 0 leaves it out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub ptx_coef: Option<f64>,
    /// Decay, per step, of a moving average of the policy, which is evaluated and handed on in its place; 0 keeps none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub policy_ema: Option<f64>,
}

impl PpoSection {
    /// The value of every switch: as it is set, or else as dialect and estimator say.
    pub fn switches(&self) -> Switches {
        let of = Switches::of(self.dialect, self.estimator);
        Switches {
            score_position: self.score_position.unwrap_or(of.score_position),
            missing_eos: self.missing_eos.unwrap_or(of.missing_eos),
            kl_estimator: self.kl_estimator.unwrap_or(of.kl_estimator),
            kl_place: self.kl_place.unwrap_or(of.kl_place),
            kl_clip: self.kl_clip.unwrap_or(of.kl_clip),
            whiten_rewards: self.whiten_rewards.unwrap_or(of.whiten_rewards),
            whiten_advantages: self.whiten_advantages.unwrap_or(of.whiten_advantages),
            whiten_variance: self.whiten_variance.unwrap_or(of.whiten_variance),
            loss_mean: self.loss_mean.unwrap_or(of.loss_mean),
            value_clip_range: self.value_clip_range.unwrap_or(of.value_clip_range),
            value_loss_coef: self.value_loss_coef.unwrap_or(of.value_loss_coef),
            reward_clip: self.reward_clip.unwrap_or(of.reward_clip),
            log_ratio_clip: self.log_ratio_clip.unwrap_or(of.log_ratio_clip),
            dual_clip: self.dual_clip.unwrap_or(of.dual_clip),
            value_init: self.value_init.unwrap_or(of.value_init),
            adam_style: self.adam_style.unwrap_or(of.adam_style),
            temperature_eps: self.temperature_eps.unwrap_or(of.temperature_eps),
            ptx_coef: self.ptx_coef.unwrap_or(of.ptx_coef),
            policy_ema: self.policy_ema.unwrap_or(of.policy_ema),
        }
    }

    /// The same section with every switch set.
    #[must_use]
    pub fn resolved(self) -> Self {
        let all = self.switches();
        Self {
            score_position: Some(all.score_position),
            missing_eos: Some(all.missing_eos),
            kl_estimator: Some(all.kl_estimator),
            kl_place: Some(all.kl_place),
            kl_clip: Some(all.kl_clip),
            whiten_rewards: Some(all.whiten_rewards),
            whiten_advantages: Some(all.whiten_advantages),
            whiten_variance: Some(all.whiten_variance),
            loss_mean: Some(all.loss_mean),
            value_clip_range: Some(all.value_clip_range),
            value_loss_coef: Some(all.value_loss_coef),
            reward_clip: Some(all.reward_clip),
            log_ratio_clip: Some(all.log_ratio_clip),
            dual_clip: Some(all.dual_clip),
            value_init: Some(all.value_init),
            adam_style: Some(all.adam_style),
            temperature_eps: Some(all.temperature_eps),
            ptx_coef: Some(all.ptx_coef),
            policy_ema: Some(all.policy_ema),
            ..self
        }
    }

    /// The temperature of sampling and of every log-probability.
    pub fn temperature(&self) -> f64 {
        self.temperature + self.switches().temperature_eps
    }
}

/// What an alarm does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnAlarm {
    /// Warn, and go on.
    #[default]
    Warn,
    /// Save, and end the run with an error.
    Stop,
}

impl Default for PpoSection {
    fn default() -> Self {
        Self {
            dialect: Dialect::default(),
            estimator: Estimator::default(),
            samples_per_prompt: 1,
            response_length: 64,
            temperature: 1.0,
            missing_eos_score: -1.0,
            ensemble: None,
            kl_coef: 0.05,
            kl_target: None,
            kl_horizon: 10_000.0,
            gamma: 1.0,
            lambda: 0.95,
            epochs: 4,
            minibatches: 1,
            clip_range: 0.2,
            ratio_tolerance: 1e-3,
            on_alarm: OnAlarm::default(),
            score_position: None,
            missing_eos: None,
            kl_estimator: None,
            kl_place: None,
            kl_clip: None,
            whiten_rewards: None,
            whiten_advantages: None,
            whiten_variance: None,
            loss_mean: None,
            value_clip_range: None,
            value_loss_coef: None,
            reward_clip: None,
            log_ratio_clip: None,
            dual_clip: None,
            value_init: None,
            adam_style: None,
            temperature_eps: None,
            ptx_coef: None,
            policy_ema: None,
        }
    }
}

impl PpoConfig {
    /// Reads the configuration that `args` name, with absolute paths.
    ///
    /// # Errors
    /// If it cannot be read or is not valid.
    pub fn load(args: &StageArgs) -> anyhow::Result<Self> {
        session::load_config(args, Self::validate, Self::sources_mut)
    }

    /// Checks the constraints that the types do not express.
    ///
    /// # Errors
    /// Naming the key that is out of range.
    pub fn validate(&self) -> anyhow::Result<()> {
        self.lora.as_ref().map_or(Ok(()), LoraConfig::validate)?;
        self.optimizer.validate()?;
        self.value_optimizer.validate()?;
        self.data.validate("prompts")?;
        self.run.validate()?;
        let TrainConfig { batch_size, micro_batch_size, .. } = self.train;
        let minibatches = self.ppo.minibatches;
        ensure!(
            minibatches > 0 && batch_size % minibatches == 0,
            "`ppo.minibatches` {minibatches} does not divide `train.batch_size` {batch_size}"
        );
        let minibatch = batch_size / minibatches;
        let micro = micro_batch_size.unwrap_or(minibatch);
        ensure!(
            micro > 0 && minibatch.is_multiple_of(micro),
            "`train.micro_batch_size` {micro} does not divide the {minibatch} responses of a minibatch"
        );
        self.validate_switches(minibatch)
    }

    /// Checks that estimator and switches make sense together, with `minibatch` responses in a minibatch.
    fn validate_switches(&self, minibatch: usize) -> anyhow::Result<()> {
        let PpoSection { estimator, samples_per_prompt, .. } = self.ppo;
        let switches = self.ppo.switches();
        let batch_size = self.train.batch_size;
        ensure!(
            batch_size.is_multiple_of(samples_per_prompt),
            "`ppo.samples_per_prompt` {samples_per_prompt} does not divide `train.batch_size` {batch_size}"
        );
        ensure!(
            estimator.has_critic() || samples_per_prompt > 1,
            "without a value model a response is compared with others to its prompt, but `ppo.samples_per_prompt` is 1\n\
             hint: set it to 4, say"
        );
        ensure!(
            switches.kl_place == KlPlace::Reward || switches.kl_estimator != KlEstimator::K1,
            "`ppo.kl_estimator` \"k1\" in the loss (`ppo.kl_place`) holds nothing back: its expected gradient is 0\n\
             hint: take \"k3\" or \"k2\", or `ppo.kl_place = \"reward\"`"
        );
        ensure!(
            estimator.has_critic() || !switches.whiten_rewards,
            "`ppo.whiten_rewards` is for `ppo.estimator` \"gae\": otherwise rewards count by their sum alone"
        );
        ensure!(
            !switches.whiten_rewards || minibatch >= LEAST_WHITENED,
            "`ppo.whiten_rewards` needs at least {LEAST_WHITENED} responses in a minibatch, found {minibatch}"
        );
        ensure!(
            switches.dual_clip == 0.0 || switches.dual_clip > 1.0,
            "`ppo.dual_clip` must be above 1, or 0 for no limit, found {}",
            switches.dual_clip
        );
        self.validate_ptx()
    }

    /// The same configuration for a run with `n` reward models, which names how their scores become one. A run that `resumes`
    /// has to have those that it began with, which is said later.
    ///
    /// # Errors
    /// If it names a way for a single one.
    pub(crate) fn with_reward_models(mut self, n: usize, resumes: bool) -> anyhow::Result<Self> {
        if n > 1 {
            self.ppo.ensemble = Some(self.ppo.ensemble.unwrap_or_default());
        } else if let Some(ensemble) = self.ppo.ensemble.filter(|_| !resumes) {
            bail!(
                "`ppo.ensemble` is \"{ensemble}\", but there is one reward model\n\
                 hint: give each with a `--reward-model` of its own, or leave `ppo.ensemble` out"
            );
        }
        Ok(self)
    }

    /// The settings that decide how much memory an update needs.
    pub fn memory(&self, trunk: TrunkPrecision) -> Settings {
        Settings {
            micro_batch_size: self.micro_batch_size(),
            checkpoint_activations: self.train.checkpoint_activations,
            trunk,
            shard_optimizer: self.train.shard_optimizer,
            reduce: self.train.reduce,
            share: Share::WHOLE,
        }
    }

    /// The portions of a minibatch.
    pub fn minibatch(&self) -> Amount {
        let batch_size = self.train.batch_size / self.ppo.minibatches;
        Amount { epochs: None, steps: None, batch_size, micro_batch_size: Some(self.micro_batch_size()) }
    }

    /// Responses computed at a time.
    pub fn micro_batch_size(&self) -> usize {
        self.train.micro_batch_size.unwrap_or(self.train.batch_size / self.ppo.minibatches)
    }

    /// How the policy answers prompts.
    pub fn sampling<'a>(&self, streams: Streams, tokenizer: &'a Tokenizer) -> Sampling<'a> {
        let (temperature, length) = (self.ppo.temperature(), self.ppo.response_length);
        let mut sampling = Sampling::new(temperature, length, streams, tokenizer, self.train.rollout_batch_size);
        sampling.batch_invariant = self.train.batch_invariant;
        sampling.past_end = self.ppo.switches().score_position == ScorePosition::FixedEnd;
        sampling
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_key_of_a_section_leaves_the_defaults_of_its_others() {
        let parse = |text: &str| common::config::parse::<PpoConfig>(text, Path::new("ppo.toml"), &[]);
        let given = parse("[run]\nkeep_best = true\n").expect("valid").run;
        assert_eq!(given, RunConfig { keep_best: true, ..PpoConfig::default().run });
        let optimizer = parse("[optimizer]\nlr = 0.5\n").expect("valid").optimizer;
        assert_eq!(optimizer, OptimizerConfig { lr: 0.5, ..PpoConfig::default().optimizer });
        let unknown = parse("[run]\nlog_evry = 1\n").expect_err("unknown").to_string();
        assert!(unknown.contains("line 2") && unknown.contains("did you mean `log_every`?"), "{unknown}");
    }

    fn parsed(text: &str, overrides: &[&str]) -> PpoConfig {
        let overrides: Vec<String> = overrides.iter().map(|&flag| flag.to_owned()).collect();
        common::config::parse(text, Path::new("ppo.toml"), &overrides).expect("valid")
    }

    #[test]
    fn a_dialect_sets_every_switch_and_one_that_is_set_beside_it_wins() {
        for dialect in Dialect::ALL {
            let text = format!("[ppo]\ndialect = \"{}\"\nreward_clip = 2.5\n", dialect.name());
            let ppo = parsed(&text, &["ppo.whiten_variance=sample"]).ppo;
            let expected = Switches {
                reward_clip: 2.5,
                whiten_variance: Variance::Sample,
                ..Switches::of(dialect, Estimator::Gae)
            };
            assert_eq!(ppo.switches(), expected);
            let set = ppo.switches().differing_from(&Switches::of(dialect, Estimator::Gae)).expect("plain values");
            let is_sample = Switches::of(dialect, Estimator::Gae).whiten_variance == Variance::Sample;
            assert_eq!(set, if is_sample { vec!["reward_clip"] } else { vec!["reward_clip", "whiten_variance"] });
        }
        assert_eq!(parsed("", &[]), PpoConfig::default());
        assert_eq!(parsed("[ppo]\nepochs = 1", &["ppo.dialect=trl"]).ppo.temperature(), 1.0 + 1e-7);
    }

    #[test]
    fn the_resolved_configuration_has_every_switch_and_reads_back_as_itself() {
        let config = parsed("[ppo]\ndialect = \"verl\"\nestimator = \"grpo\"\nsamples_per_prompt = 4\n", &[]);
        let text = common::config::to_toml(&config).expect("writable");
        for row in crate::dialect::rows() {
            assert!(text.contains(&format!("\n{} = ", row.name)), "{} is not in {text}", row.name);
        }
        assert_eq!(parsed(&text, &[]), config);
        assert_eq!((config.ppo.kl_place, config.ppo.dual_clip), (Some(KlPlace::Loss), Some(3.0)));
    }

    #[test]
    fn what_makes_no_sense_together_is_refused_by_name() {
        for (flags, named) in [
            (&["ppo.estimator=rloo"][..], "`ppo.samples_per_prompt` is 1"),
            (&["ppo.samples_per_prompt=3"], "does not divide `train.batch_size` 64"),
            (&["ppo.kl_place=loss"], "`ppo.kl_estimator` \"k1\" in the loss"),
            (&["ppo.estimator=grpo", "ppo.samples_per_prompt=4", "ppo.kl_estimator=k1"], "\"k1\" in the loss"),
            (&["ppo.estimator=rloo", "ppo.samples_per_prompt=4", "ppo.whiten_rewards=true"], "`ppo.whiten_rewards`"),
            (&["ppo.dialect=lm-human-preferences", "ppo.minibatches=16"], "at least 8 responses"),
            (&["ppo.dual_clip=0.5"], "`ppo.dual_clip` must be above 1"),
            (&["ppo.ptx_coef=27.8"], "`ppo.ptx_coef` is 27.8, but there is no pretraining text"),
            (&["ppo.ptx_coef=27.8", "ptx.seq_len=8"], "`ptx.data.train` names no file"),
            (&["ptx.data.val=a.txt"], "`ptx.data.train` names no file"),
        ] {
            let config = PpoConfig {
                data: DataConfig { train: vec!["a".into()], val: vec!["b".into()], ..DataConfig::default() },
                ..parsed("", flags)
            };
            let error = config.validate().expect_err("refused").to_string();
            assert!(error.contains(named), "{flags:?}: {error}");
        }
        let of_data = DataConfig { train: vec!["a".into()], val: vec!["b".into()], ..DataConfig::default() };
        for dialect in Dialect::ALL {
            let config = parsed("", &[&format!("ppo.dialect={}", dialect.name())]);
            PpoConfig { data: of_data.clone(), ..config }.validate().expect("a dialect makes sense");
        }
    }
}
