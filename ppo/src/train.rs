//! The training loop.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use burn::module::Module;
use common::checkpoint::{self, Checkpoint, Stage};
use common::data::order::Order;
use common::interrupt::Interrupt;
use common::metrics::{self, Recorder, names};
use common::model::Gpt;
use common::optim::GradNorm;
use common::rng::Streams;
use common::runtime::Runtime;
use common::session::{Contents, Exported, Outcome, Plan, Restored, Session, Step, Training};
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
    let config = PpoConfig::load(&args.stage)?;
    let runtime = args.stage.runtime.open()?;
    let streams = Streams::new(config.seed);
    let initial = checkpoint::init_from(&args.policy).context("failed to load the initial policy")?;
    initial.expect_stage(&[Stage::Sft]).context("failed to load the initial policy")?;
    let reward_model = open_reward_model(&args.reward_model, &initial)?;
    let tokenizer = initial.require_tokenizer()?;
    let max_seq_len = initial.model_config().max_seq_len.min(reward_model.model_config().max_seq_len);
    let read = |files: &[PathBuf]| {
        let (bad, long) = (config.data.read_options(), config.data.on_too_long);
        Prompts::read(files, tokenizer, max_seq_len, config.ppo.response_length, bad, long)
    };
    let training = read(&config.data.train).context("failed to read the training prompts")?;
    let held_out = read(&config.data.val).context("failed to read the held-out prompts")?;
    let plan = Plan {
        stage: Stage::Ppo,
        parents: &[("--policy", &initial), ("--reward-model", &reward_model)],
        data: config.data.sources(),
        tokenizer,
        config: &config,
        run: &config.run,
        runtime: &runtime,
        total_steps: config.train.steps,
    };
    let (session, restored) = Session::start(&args.stage, &plan, interrupt)?;
    let mut kl_coef = config.ppo.kl_coef as f32;
    if restored.is_some() {
        let saved = session.progress().stage["kl_coef"].as_f64();
        kl_coef = saved.context("`state/state.json` lacks `kl_coef`")? as f32;
        metrics::truncate_after(&args.stage.out.join(ROLLOUTS_FILE), session.progress().step)?;
    }
    let learner = Learner::start(&config, &initial, &reward_model, restored, &runtime.autodiff())?;
    let judge = Judge {
        reference: runtime.gpt(&initial)?,
        reward_model: runtime.scalar(&reward_model)?,
        gold,
        missing_eos_score: config.ppo.missing_eos_score as f32,
        batch_size: config.micro_batch_size(),
    };
    tracing::info!(
        "{} parameters of the policy, {} training prompts, {} held-out ones",
        learner.policy.num_params(),
        training.encoded.len(),
        held_out.encoded.len()
    );
    let sampling = Sampling::new(config.ppo.temperature, config.ppo.response_length, streams, tokenizer);
    session.drive(Ppo {
        learner,
        kl_coef,
        controller: config
            .ppo
            .kl_target
            .map(|target| AdaptiveController::new(kl_coef, target as f32, config.ppo.kl_horizon as f32)),
        iteration: Iteration { config: &config, sampling: &sampling, judge: &judge, streams },
        held_out: HeldOut { prompts: &held_out, judge: &judge, sampling: &sampling, config: &config },
        order: Order::new(training.encoded.len(), streams, "order"),
        training: &training,
        config: &config,
    })
}

/// A policy that is being trained.
struct Ppo<'a> {
    learner: Learner,
    /// Reward per nat away from the reference, at present.
    kl_coef: f32,
    controller: Option<AdaptiveController>,
    iteration: Iteration<'a>,
    held_out: HeldOut<'a>,
    order: Order,
    training: &'a Prompts,
    config: &'a PpoConfig,
}

impl Training for Ppo<'_> {
    fn step(mut self, step: u64, recorder: &Recorder) -> anyhow::Result<(Self, Step)> {
        let batch_size = self.config.train.batch_size as u64;
        let first = step * batch_size;
        let prompts: Vec<Prompt> = (first..first + batch_size)
            .map(|position| self.training.encoded[self.order.item(position)].clone())
            .collect();
        let Done { learner, batch, update, seconds } =
            self.iteration.run(self.learner, &prompts, step, self.kl_coef)?;
        self.learner = learner;
        for experience in &batch {
            recorder.append_to(ROLLOUTS_FILE, step + 1, &experience.rollout.to_json())?;
        }
        let measured = Measured::of(&batch);
        let lr = self.config.optimizer.lr_at(step, self.config.train.steps);
        let metrics = measured.metrics(self.kl_coef, &update, seconds, lr);
        if let Some(controller) = &mut self.controller {
            self.kl_coef = controller.update(measured.kl as f32, batch.len());
        }
        let n_tokens: usize = batch.iter().map(|experience| experience.values.len()).sum();
        let step = Step {
            tokens: n_tokens as u64,
            grad_norm: GradNorm::Host(update.policy_grad_norm + update.value_grad_norm),
            metrics: Box::new(|| Ok(metrics)),
        };
        Ok((self, step))
    }

    fn evaluate(&self, session: &mut Session) -> anyhow::Result<()> {
        self.held_out.evaluate(session, &self.learner.policy)
    }

    /// The policy that training starts from is evaluated too.
    fn begin(&self, session: &mut Session) -> anyhow::Result<()> {
        self.evaluate(session)
    }

    fn contents(&self) -> Contents<'_> {
        self.learner.contents(self.kl_coef)
    }
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
                let value_config = &config.value_optimizer;
                Self {
                    policy: restored.gpt(runtime)?,
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

    /// What a checkpoint holds of them, with the price of divergence.
    fn contents(&self, kl_coef: f32) -> Contents<'_> {
        let mut contents = Contents {
            value: Some(&self.value),
            stage: json!({ "kl_coef": kl_coef }),
            ..Contents::new(Exported::Lm(&self.policy), &self.policy_optimizer)
        };
        contents.optimizers.push(("value_optimizer", &self.value_optimizer));
        contents
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
