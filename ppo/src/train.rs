//! The start of a run, and one step of it.

use std::path::PathBuf;

use anyhow::Context;
use common::checkpoint::{self, Checkpoint, Stage};
use common::corpus::{Tokenising, Windows};
use common::data::order::Order;
use common::group::Group;
use common::interrupt::Interrupt;
use common::logging::grouped;
use common::metrics::{self, Recorder};
use common::model::NamedTensors;
use common::optim::GradNorm;
use common::rng::Streams;
use common::score::{EncodedPrompt, Gold, Prompts, Sampling};
use common::session::{Contents, Exported, Outcome, Plan, Restored, Session, Step, Training};
use common::stats::Interval;

use crate::alarms::Alarms;
use crate::cli::TrainArgs;
use crate::config::{OnAlarm, PpoConfig};
use crate::data;
use crate::dialect::{Dialect, Switches};
use crate::doctor::About;
use crate::iteration::{Iteration, StepOutput};
use crate::kl::AdaptiveController;
use crate::learner::Learner;
use crate::measured::{HeldOut, Measured};
use crate::models::Models;
use crate::needs;
use crate::ptx::Text;
use crate::targets::Experience;

/// Every sampled response, in the output directory.
const ROLLOUTS_FILE: &str = "rollouts.jsonl";

/// Trains a policy against a reward model; `gold` is only reported.
///
/// # Errors
/// Whatever stands in the way: configuration, data, models that do not fit together, the output directory, a ratio that
/// is not 1 before the first update, a loss that is not finite.
pub fn train(args: &TrainArgs, group: &Group, interrupt: Interrupt, gold: Option<Gold<'_>>) -> anyhow::Result<Outcome> {
    let config = PpoConfig::load(&args.stage)?.with_reward_models(args.reward_model.len(), args.stage.resume)?;
    config.minibatch().check_ranks(group.size(), "")?;
    if !group.is_alone() && !config.train.batch_invariant {
        tracing::info!(
            "responses are decoded in other batches than by one process, which may change the last bits of their \
             log-probabilities; `train.batch_invariant = true` keeps them"
        );
    }
    args.stage.runtime.check_trunk(config.lora.as_ref())?;
    let set = config.ppo.switches().differing_from(&Switches::of(config.ppo.dialect, config.ppo.estimator))?;
    if config.ppo.dialect != Dialect::Kindling && !set.is_empty() {
        let (dialect, set) = (config.ppo.dialect.name(), set.join("`, `"));
        tracing::info!("dialect `{dialect}`, except for what the configuration sets otherwise: `{set}`");
    }
    let runtime = args.stage.runtime.open()?.sharing(group, config.train.shard_optimizer);
    let streams = Streams::new(config.seed);
    needs::check(&config, args, group, &runtime)?;
    let (mut initial, mut reward_models) = open_models(args)?;
    initial.check_lora(config.lora.as_ref())?;
    let tokenizer = &initial.require_tokenizer()?.clone();
    let contexts = std::iter::once(&initial).chain(&reward_models).map(|model| model.model_config().max_seq_len);
    let max_seq_len = contexts.min().unwrap_or(0);
    let read = |files: &[PathBuf]| config.read_prompts(files, tokenizer, max_seq_len);
    let training = read(&config.data.train).context("failed to read the training prompts")?;
    let held_out = read(&config.data.val).context("failed to read the held-out prompts")?;
    let quiet = args.stage.runtime.process.hides_bars() || !group.is_first();
    let tokenising = Tokenising::new(group, interrupt, quiet).of_section("ptx.data");
    let text = Text::open(&config, tokenizer, initial.model_config().max_seq_len, &tokenising)?;
    let mut parents = vec![("--policy", &initial)];
    parents.extend(reward_models.iter().map(|model| ("--reward-model", model)));
    let plan = Plan {
        stage: Stage::Ppo,
        parents: &parents,
        data: config.sources(),
        tokenizer,
        tokenizer_dir: None,
        config: &config,
        run: &config.run,
        runtime: &runtime,
        total_steps: config.train.steps,
        group,
    };
    let (session, mut restored) = Session::start(&args.stage, &plan, interrupt)?;
    let mut kl_coef = config.ppo.kl_coef as f32;
    if restored.is_some() {
        let saved = session.progress().stage["kl_coef"].as_f64();
        kl_coef = saved.context("`state/state.json` lacks `kl_coef`")? as f32;
        if group.is_first() {
            metrics::truncate_after(&args.stage.out.join(ROLLOUTS_FILE), session.progress().step)?;
        }
    }
    let mut alarms = Alarms::new(config.train.batch_size);
    if restored.is_some() {
        alarms.replay(&args.stage.out)?;
    }
    let decay = config.ppo.switches().policy_ema as f32;
    let average = restored.as_mut().filter(|_| decay > 0.0).map(Restored::average).transpose()?;
    let models = Models::load(&config, &mut initial, &mut reward_models, restored, &runtime)?;
    let (learner, frozen) = models.split(&config, gold);
    if let Some(ensemble) = config.ppo.ensemble {
        tracing::info!("{} reward models score every response; what counts is \"{ensemble}\"", reward_models.len());
    }
    tracing::info!(
        "policy of {}, {} training prompts, {} held out",
        Exported::Lm(&learner.policy).parameters(),
        grouped(training.encoded.len()),
        grouped(held_out.encoded.len())
    );
    let sampling = |streams| Sampling { group: group.clone(), ..config.sampling(streams, tokenizer) };
    let average = (decay > 0.0).then(|| average.unwrap_or_else(|| learner.policy.to_trained()));
    session.drive(Ppo {
        learner,
        average,
        kl_coef,
        alarms,
        kl_error: 0.0,
        controller: config
            .ppo
            .kl_target
            .map(|target| AdaptiveController::new(kl_coef, target as f32, config.ppo.kl_horizon as f32)),
        iteration: Iteration { config: &config, sampling: &sampling(streams), frozen: &frozen, streams },
        held_out: HeldOut {
            prompts: &held_out,
            frozen: &frozen,
            sampling: sampling(streams.of("held-out")),
            config: &config,
        },
        order: Order::new(training.encoded.len(), streams, "order"),
        training: &training,
        text,
        config: &config,
    })
}

/// The initial policy and the reward models of a run.
///
/// # Errors
/// If one of them cannot be used, or their tokenizers differ.
pub fn open_models(args: &TrainArgs) -> anyhow::Result<(Checkpoint, Vec<Checkpoint>)> {
    let opening = args.stage.runtime.opening();
    let initial =
        checkpoint::init_from(&args.policy, opening).and_then(|policy| policy.of_stage(&[Stage::Sft, Stage::Dpo]));
    let initial = initial.context("failed to load the initial policy")?;
    let open = |dir: &PathBuf| checkpoint::open_reward_model(dir, opening, &initial);
    let reward_models: Result<Vec<Checkpoint>, _> = args.reward_model.iter().map(open).collect();
    let reward_models = reward_models.context("failed to load the reward model")?;
    Ok((initial, reward_models))
}

/// Moves `average` towards `weights`: `decay·average + (1 − decay)·weights`.
///
/// # Source
/// Ouyang et al., arXiv:2203.02155, appendix C.4; `OpenRLHF`, `utils/deepspeed/deepspeed.py:503`, which averages after every
/// optimiser step, here after every step of a batch.
fn average_in(average: &mut NamedTensors, weights: &NamedTensors, decay: f32) {
    for (name, average) in average {
        for (average, weight) in average.data.iter_mut().zip(&weights[name].data) {
            *average = decay * *average + (1.0 - decay) * weight;
        }
    }
}

/// A policy that is being trained.
struct Ppo<'a> {
    learner: Learner,
    /// The moving average of the policy's weights, where one is kept.
    average: Option<NamedTensors>,
    /// Reward per nat away from the reference, at present.
    kl_coef: f32,
    alarms: Alarms,
    /// Standard error of the last step's mean divergence.
    kl_error: f64,
    controller: Option<AdaptiveController>,
    iteration: Iteration<'a>,
    held_out: HeldOut<'a>,
    order: Order,
    training: &'a Prompts,
    /// Pretraining text, where there is some.
    text: Option<Text>,
    config: &'a PpoConfig,
}

impl Training for Ppo<'_> {
    fn step(mut self, step: u64, recorder: &Recorder) -> anyhow::Result<(Self, Step)> {
        let batch_size = self.config.train.batch_size as u64;
        let n_samples = self.config.ppo.samples_per_prompt;
        let n_prompts = batch_size / n_samples as u64;
        let first = step * n_prompts;
        let prompts: Vec<EncodedPrompt> = (first..first + n_prompts)
            .flat_map(|position| vec![self.training.encoded[self.order.item(position)].clone(); n_samples])
            .collect();
        let n_updates = self.config.ppo.epochs * self.config.ppo.minibatches as u64;
        let text: Vec<Windows> = match &mut self.text {
            Some(text) => text.of_step(step, n_updates)?,
            None => Vec::new(),
        };
        let output = self.iteration.run(self.learner, &prompts, step, self.kl_coef, &text)?;
        let lr = self.config.optimizer.lr_at(step, self.config.train.steps);
        let measured = Measured::of(&output, self.kl_coef, lr);
        let StepOutput { learner, batch, update, .. } = output;
        self.learner = learner;
        if let Some(average) = &mut self.average {
            average_in(average, &self.learner.policy.to_trained(), self.config.ppo.switches().policy_ema as f32);
        }
        for experience in &batch {
            let line = data::line(&experience.rollout, experience.score);
            recorder.append_to(ROLLOUTS_FILE, step + 1, &line)?;
        }
        if let Some(controller) = &mut self.controller {
            self.kl_coef = controller.update(measured.kl as f32, batch.len());
        }
        let divergences: Vec<f64> = batch.iter().map(|experience| experience.rollout.kl()).collect();
        self.kl_error = Interval::of(&divergences).map_or(0.0, |kl| kl.standard_error());
        let n_tokens: usize = batch.iter().map(Experience::n_tokens).sum();
        let step = Step {
            tokens: n_tokens as u64,
            grad_norm: GradNorm::Host(update.grad_norms()),
            metrics: Box::new(|| Ok(measured.metrics)),
        };
        Ok((self, step))
    }

    fn evaluate(&self, session: &mut Session) -> anyhow::Result<()> {
        let text = self.text.as_ref();
        let Some(average) = &self.average else { return self.held_out.evaluate(session, &self.learner.policy, text) };
        self.held_out.evaluate(session, &self.learner.policy.clone().with_trained(average.clone())?, text)
    }

    /// The policy that training starts from is evaluated too.
    fn begin(&self, session: &mut Session) -> anyhow::Result<()> {
        self.evaluate(session)
    }

    fn watch(&mut self, step: u64, logged: &[(&str, f64)]) -> Option<String> {
        let mut ends = None;
        for alarm in self.alarms.hear(step, logged, self.kl_error) {
            let (says, About { stage, meaning, hint, .. }) = (alarm.says(), alarm.about);
            tracing::warn!("{says} (stage {stage}). {meaning} {hint}");
            ends = ends
                .or_else(|| Some(format!("{says}, and `ppo.on_alarm` is \"stop\"; this step is saved\nhint: {hint}")));
        }
        ends.filter(|_| self.config.ppo.on_alarm == OnAlarm::Stop)
    }

    fn contents(&self) -> Contents<'_> {
        self.learner.contents(self.average.as_ref(), self.kl_coef)
    }
}
