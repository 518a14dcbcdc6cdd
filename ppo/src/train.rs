//! The training loop.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use burn::module::Module;
use common::checkpoint::{self, Checkpoint, Stage};
use common::config;
use common::data::order::Order;
use common::interrupt::Interrupt;
use common::metrics::{self, names};
use common::model::Gpt;
use common::optim::{AdamW, GradNorm};
use common::rng::Streams;
use common::runtime::Runtime;
use common::session::{Exported, Extras, Origin, Outcome, Restored, Session};
use serde_json::json;

use crate::Gold;
use crate::advantage::explained_variance;
use crate::cli::TrainArgs;
use crate::config::{PpoConfig, ValueInit};
use crate::data::{Prompt, Prompts};
use crate::eval::open_reward_model;
use crate::iteration::{Done, Iteration, Seconds};
use crate::kl::AdaptiveController;
use crate::rollout::{Experience, Judge, Rollout, Sampling};
use crate::update::{Learner, UpdateMetrics};

/// Every sampled response, in the output directory.
const ROLLOUTS_FILE: &str = "rollouts.jsonl";

/// The first stream of held-out answers, far behind those of training. Every evaluation uses the same streams, so that
/// two evaluations differ by their policies and not by luck.
const HELD_OUT_ROW: u64 = 1 << 48;

/// Trains a policy against a reward model; `gold` is only reported.
///
/// # Errors
/// Whatever stands in the way: configuration, data, models that do not fit together, the output directory, a ratio that
/// is not 1 before the first update, a loss that is not finite.
pub fn train(args: &TrainArgs, interrupt: Interrupt, gold: Option<Gold<'_>>) -> anyhow::Result<Outcome> {
    let config = load_config(args)?;
    let runtime = args.stage.runtime.open()?;
    let streams = Streams::new(config.seed);
    let initial = checkpoint::init_from(&args.policy).context("failed to load the initial policy")?;
    initial.expect_stage(&[Stage::Sft]).context("failed to load the initial policy")?;
    let reward_model = open_reward_model(&args.reward_model, &initial)?;
    let tokenizer = initial.require_tokenizer()?.clone();
    let max_seq_len = initial.model_config().max_seq_len.min(reward_model.model_config().max_seq_len);
    let read = |files: &[std::path::PathBuf]| {
        let (bad, long) = (config.data.on_bad_record, config.data.on_too_long);
        Prompts::read(files, &tokenizer, max_seq_len, config.ppo.response_length, bad, long)
    };
    let training = read(&config.data.train).context("failed to read the training prompts")?;
    let held_out = read(&config.data.val).context("failed to read the held-out prompts")?;
    let data: BTreeMap<String, String> = training.sha256.clone().into_iter().chain(held_out.sha256.clone()).collect();
    let origin = Origin {
        stage: Stage::Ppo,
        parents: vec![initial.as_parent(), reward_model.as_parent()],
        data,
        tokenizer: tokenizer.clone(),
        config_toml: config::to_toml(&config)?,
        backend: runtime.label.clone(),
    };
    let (mut session, restored) = Session::start(&args.stage, origin, &config.run, config.train.steps, interrupt)?;
    let resumes = restored.is_some();
    let mut kl_coef = config.ppo.kl_coef as f32;
    if resumes {
        let saved = session.progress().stage["kl_coef"].as_f64();
        kl_coef = saved.context("`state/state.json` lacks `kl_coef`")? as f32;
        metrics::truncate_after(&args.stage.out.join(ROLLOUTS_FILE), session.progress().step)?;
    }
    let mut controller = config
        .ppo
        .kl_target
        .map(|target| AdaptiveController::new(kl_coef, target as f32, config.ppo.kl_horizon as f32));
    let mut learner = Learner::start(&config, &initial, &reward_model, restored, &runtime.autodiff())?;
    let judge = Judge {
        reference: runtime.gpt(&initial)?,
        reward_model: runtime.scalar(&reward_model)?,
        gold,
        missing_eos_score: config.ppo.missing_eos_score as f32,
        batch_size: config.micro_batch_size(),
    };
    let sampling = Sampling::new(config.ppo.temperature, config.ppo.response_length, streams, &tokenizer);
    tracing::info!(
        "{} parameters of the policy, {} training prompts, {} held-out ones",
        learner.policy.num_params(),
        training.encoded.len(),
        held_out.encoded.len()
    );
    let iteration = Iteration { config: &config, sampling: &sampling, judge: &judge, streams };
    let held_out = HeldOut { prompts: &held_out, judge: &judge, sampling: &sampling, config: &config };
    if !resumes {
        held_out.evaluate(&mut session, &learner.policy)?;
    }

    let mut order = Order::new(training.encoded.len(), streams, "order");
    let batch_size = config.train.batch_size as u64;
    while session.goes_on() {
        let step = session.progress().step;
        let first = step * batch_size;
        let prompts: Vec<Prompt> =
            (first..first + batch_size).map(|position| training.encoded[order.item(position)].clone()).collect();
        let done = iteration.run(learner, &prompts, step, kl_coef)?;
        let Done { batch, update, seconds, .. } = done;
        learner = done.learner;

        let n_tokens: usize = batch.iter().map(|experience| experience.values.len()).sum();
        session.count_step(n_tokens as u64, GradNorm::Host(update.policy_grad_norm + update.value_grad_norm))?;
        for experience in &batch {
            session.recorder.append_to(ROLLOUTS_FILE, session.progress().step, &experience.rollout.to_json())?;
        }
        let measured = Measured::of(&batch);
        if session.logs() {
            let lr = config.optimizer.lr_at(step, config.train.steps);
            session.log(&measured.metrics(kl_coef, &update, seconds, lr))?;
        }
        if let Some(controller) = &mut controller {
            kl_coef = controller.update(measured.kl as f32, batch.len());
        }
        if session.evaluates() {
            held_out.evaluate(&mut session, &learner.policy)?;
        }
        if session.saves() {
            session.save(Exported::Lm(&learner.policy), &learner.optimizers(), learner.extras(kl_coef))?;
        }
    }
    session.finish(Exported::Lm(&learner.policy), &learner.optimizers(), learner.extras(kl_coef))
}

/// The configuration with absolute paths.
pub(crate) fn load_config(args: &TrainArgs) -> anyhow::Result<PpoConfig> {
    let path = &args.stage.config;
    let mut config: PpoConfig = config::load(path, &args.stage.overrides)?;
    config.validate().with_context(|| format!("invalid config `{}`", path.display()))?;
    config.data.resolve(&config::PathResolver::new(path, args.stage.data.as_deref()))?;
    Ok(config)
}

impl Learner {
    /// The models and optimisers to begin or to go on with.
    pub(crate) fn start(
        config: &PpoConfig,
        initial: &Checkpoint,
        reward_model: &Checkpoint,
        restored: Option<Restored>,
        runtime: &Runtime,
    ) -> anyhow::Result<Self> {
        Ok(match restored {
            Some(mut restored) => {
                let weights = restored.tensors("weights")?;
                let value_config = &config.value_optimizer;
                Self {
                    policy: runtime.gpt_of(restored.checkpoint.model_config(), weights)?,
                    value: runtime.value(&restored.checkpoint)?,
                    policy_optimizer: restored.optimizer("optimizer", &config.optimizer, runtime)?,
                    value_optimizer: restored.optimizer("value_optimizer", value_config, runtime)?,
                }
            }
            None => Self {
                policy: runtime.gpt(initial)?,
                value: match config.ppo.value_init {
                    ValueInit::RewardModel => runtime.scalar(reward_model)?,
                    ValueInit::ZeroHead => runtime.scalar(reward_model)?.with_zero_head(),
                },
                policy_optimizer: runtime.optimizer(&config.optimizer),
                value_optimizer: runtime.optimizer(&config.value_optimizer),
            },
        })
    }

    fn optimizers(&self) -> [(&'static str, &AdamW); 2] {
        [("optimizer", &self.policy_optimizer), ("value_optimizer", &self.value_optimizer)]
    }

    fn extras(&self, kl_coef: f32) -> Extras<'_> {
        Extras { value: Some(&self.value), stage: json!({ "kl_coef": kl_coef }), ..Extras::default() }
    }
}

/// Means over the responses of a batch.
struct Measured {
    kl: f64,
    entropy: f64,
    score: f64,
    gold: Option<f64>,
    response_length: f64,
    eos_rate: f64,
    explained_variance: f64,
}

impl Measured {
    fn of(batch: &[Experience]) -> Self {
        let rollouts: Vec<&Rollout> = batch.iter().map(|experience| &experience.rollout).collect();
        let flat =
            |numbers: fn(&Experience) -> &[f32]| -> Vec<f32> { batch.iter().flat_map(numbers).copied().collect() };
        Self {
            kl: mean(&rollouts, Rollout::kl),
            entropy: mean(&rollouts, |rollout| -rollout.log_probs.iter().map(|&p| f64::from(p)).sum::<f64>()),
            score: mean(&rollouts, |rollout| f64::from(rollout.score)),
            gold: mean_gold(&rollouts),
            response_length: mean(&rollouts, |rollout| rollout.response.len() as f64),
            eos_rate: mean(&rollouts, |rollout| f64::from(u8::from(rollout.ended))),
            explained_variance: f64::from(explained_variance(
                &flat(|experience| &experience.values),
                &flat(|experience| &experience.returns),
            )),
        }
    }

    /// The line of `metrics.jsonl`.
    fn metrics(&self, kl_coef: f32, update: &UpdateMetrics, seconds: Seconds, lr: f64) -> Vec<(&'static str, f64)> {
        let non_score_reward = -f64::from(kl_coef) * self.kl;
        let mut metrics = vec![
            (names::OBJECTIVE_KL, self.kl),
            (names::OBJECTIVE_KL_COEF, f64::from(kl_coef)),
            (names::OBJECTIVE_ENTROPY, self.entropy),
            (names::OBJECTIVE_SCORE, self.score),
            (names::OBJECTIVE_RLHF_REWARD, self.score + non_score_reward),
            (names::OBJECTIVE_NON_SCORE_REWARD, non_score_reward),
            (names::POLICY_LOSS, update.policy_loss),
            (names::POLICY_APPROX_KL, update.approx_kl),
            (names::POLICY_CLIP_FRAC, update.clip_frac),
            (names::POLICY_RATIO_MEAN, update.ratio_mean),
            (names::POLICY_RATIO_MAX, update.ratio_max),
            (names::POLICY_ENTROPY, update.entropy),
            (names::VALUE_LOSS, update.value_loss),
            (names::VALUE_CLIP_FRAC, update.value_clip_frac),
            (names::VALUE_EXPLAINED_VARIANCE, self.explained_variance),
            (names::ROLLOUT_RESPONSE_LENGTH, self.response_length),
            (names::ROLLOUT_EOS_RATE, self.eos_rate),
            (names::TIMING_ROLLOUT, seconds.rollout),
            (names::TIMING_SCORE, seconds.score),
            (names::TIMING_UPDATE, seconds.update),
            (names::TRAIN_LR, lr),
            (names::TRAIN_GRAD_NORM, update.policy_grad_norm),
            (names::VALUE_GRAD_NORM, update.value_grad_norm),
        ];
        metrics.extend(self.gold.map(|gold| (names::GOLD_SCORE, gold)));
        metrics
    }
}

fn mean(rollouts: &[&Rollout], value: impl Fn(&Rollout) -> f64) -> f64 {
    rollouts.iter().map(|rollout| value(rollout)).sum::<f64>() / rollouts.len() as f64
}

/// Mean true reward, where the recipe knows it.
fn mean_gold(rollouts: &[&Rollout]) -> Option<f64> {
    let sum: f64 = rollouts.iter().map(|rollout| rollout.gold).sum::<Option<f64>>()?;
    Some(sum / rollouts.len() as f64)
}

/// Evaluation along the way.
struct HeldOut<'a> {
    prompts: &'a Prompts,
    judge: &'a Judge<'a>,
    sampling: &'a Sampling<'a>,
    config: &'a PpoConfig,
}

impl HeldOut<'_> {
    /// Answers held-out prompts, logs what the judges say and writes some answers to `samples.jsonl`.
    ///
    /// Best is what scores highest after the price of its divergence at the configured coefficient; the gold score,
    /// which no real project has, plays no part in it.
    fn evaluate(&self, session: &mut Session, policy: &Gpt) -> anyhow::Result<()> {
        let step = session.progress().step;
        let all = &self.prompts.encoded;
        let n =
            if self.config.train.eval_prompts == 0 { all.len() } else { self.config.train.eval_prompts.min(all.len()) };
        let generated = self.sampling.answer(&policy.valid(), &all[..n], HELD_OUT_ROW)?;
        let rollouts = self.judge.judge(&all[..n], generated, self.sampling)?;
        let rollouts: Vec<&Rollout> = rollouts.iter().collect();
        let (score, kl) = (mean(&rollouts, |rollout| f64::from(rollout.score)), mean(&rollouts, Rollout::kl));
        ensure!(kl.is_finite(), "the divergence from the reference is {kl} at step {step}");
        let mut metrics = vec![
            (names::VAL_SCORE, score),
            (names::VAL_KL, kl),
            (names::VAL_RESPONSE_LENGTH, mean(&rollouts, |rollout| rollout.response.len() as f64)),
            (names::VAL_EOS_RATE, mean(&rollouts, |rollout| f64::from(u8::from(rollout.ended)))),
        ];
        metrics.extend(mean_gold(&rollouts).map(|gold| (names::GOLD_VAL_SCORE, gold)));
        session.log(&metrics)?;
        for rollout in rollouts.iter().take(self.config.train.n_samples) {
            tracing::info!("sample: {} → {}", rollout.prompt.text, rollout.text.replace('\n', "⏎"));
            session.recorder.sample(step, &rollout.to_json())?;
        }
        session.note_evaluation(self.config.ppo.kl_coef * kl - score, Exported::Lm(policy));
        Ok(())
    }
}
