//! `ppo doctor`: what can be known before a run of whether its SFT model, reward model, data and settings are sound.
//!
//! [`examine`] reads what `ppo train` would read, makes the first rollout and measures. Each check is a function of
//! numbers, so that a fault can be planted in them: [`tokens`], [`policy`], [`scores`], [`preferences`], [`repeats`].
//! What a check means, its limit and their source stand in [`about`]. A check that cannot be made warns and says why.

mod about;
mod policy;
mod preferences;
mod repeats;
mod report;
mod scores;
mod tokens;
mod words;

use std::io::Write as _;

use anyhow::{Context, bail};
use burn::module::Module;
use common::capacity::{self, Lengths};
use common::checkpoint::{self, Checkpoint, CheckpointError, Preview, Stage};
use common::cli::print_json;
use common::conversation;
use common::data::order::Order;
use common::group::Group;
use common::interrupt::Interrupt;
use common::model::{Gpt, LoraConfig};
use common::pace::Pace;
use common::rng::Streams;
use common::runtime::Runtime;
use common::score::{
    EncodedPrompt, FrozenModels, Prompts, Response, Rollout, Sampling, ScoreError, Watch, log_probs,
    log_probs_and_entropy, of_response_tokens_watched, score_rows_watched,
};
use common::tokenizer::Tokenizer;

pub use crate::alarms::ALL as ALARMS;
pub(crate) use about::checks;
pub use about::{ALL, About, Blame};
pub use policy::{cached_is_uncached, kl_of_itself, ratio_is_one, values_finite};
pub use report::{Check, Report, Verdict, significant};
pub(crate) use scores::{Answered, orders};

use crate::cli::DoctorArgs;
use crate::config::PpoConfig;
use crate::dialect::MissingEos;
use crate::learner::Learner;
use crate::models::Models;
use crate::needs;
use preferences::{Scored, Sources};
use scores::BEST_OF;
use tokens::chain;

/// Prompts that are answered once each, for rates over independent answers.
const N_PROMPTS: usize = 128;

/// Prompts that are answered [`BEST_OF`] times each.
const N_HEADROOM_PROMPTS: usize = 16;

/// Answers whose log-probabilities are computed again.
const N_RECOMPUTED: usize = 32;

/// Answers that are damaged.
const N_DAMAGED: usize = 128;

/// Carries out `ppo doctor`: one line a check on stdout, or one JSON object.
pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    args.runtime.check_base([&*args.policy, &*args.reward_model])?;
    // Nothing is to be saved: a signal ends the program at once.
    let report = examine(args, Interrupt::never())?;
    if args.json {
        print_json(&report)?;
    } else {
        std::io::stdout().write_all(report.text().as_bytes()).context("failed to write the result")?;
    }
    let failed: Vec<String> = report.with(Verdict::Fail).map(|check| format!("`{}`", check.id)).collect();
    if failed.is_empty() {
        return Ok(());
    }
    bail!("{} of {} checks failed: {}", failed.len(), report.checks.len(), failed.join(", "))
}

/// Examines what a run would start from.
///
/// # Errors
/// If the configuration or the device cannot be used, or `interrupt` ends it; what is wrong with models and data is in the
/// report.
pub fn examine(args: &DoctorArgs, interrupt: Interrupt) -> anyhow::Result<Report> {
    let config = config(args)?;
    args.runtime.check_trunk(config.lora.as_ref())?;
    let runtime = args.runtime.open()?;
    let mut examination = Examination { args, config: &config, runtime: &runtime, interrupt, checks: Vec::new() };
    let examined = examination.run();
    // What was broken off failed for no other reason.
    if interrupt.requested() {
        return Err(interrupt.stopped().into());
    }
    examined?;
    Ok(Report::complete(examination.checks))
}

/// The configuration of the run, with the prompts of `--data` in place of its own.
fn config(args: &DoctorArgs) -> anyhow::Result<PpoConfig> {
    let mut config: PpoConfig = match &args.config {
        Some(path) => common::config::load(path, &args.overrides)?,
        None => common::config::parse("", std::path::Path::new("the defaults"), &args.overrides)?,
    };
    config.data.train.clone_from(&args.data);
    config.data.val.clone_from(&args.data);
    config.validate().context("invalid config")?;
    // No more rows at once than the run samples, whose memory this may not exceed.
    config.train.rollout_batch_size = config.train.rollout_batch_size.min(config.train.batch_size);
    Ok(config)
}

struct Examination<'a> {
    args: &'a DoctorArgs,
    config: &'a PpoConfig,
    runtime: &'a Runtime,
    interrupt: Interrupt,
    checks: Vec<Check>,
}

impl Examination<'_> {
    fn run(&mut self) -> anyhow::Result<()> {
        tracing::info!("reading the models and the data");
        let Some((mut policy, mut reward_model)) = self.open() else { return Ok(()) };
        self.go_on()?;
        let tokenizer = policy.require_tokenizer()?.clone();
        let max_seq_len = policy.model_config().max_seq_len.min(reward_model.model_config().max_seq_len);
        let read = tokens::prompts(self.config, &tokenizer, max_seq_len);
        self.checks.push(read.check);
        let texts: Vec<String> = read.messages.iter().flatten().map(|message| message.content.clone()).collect();
        self.go_on()?;
        self.checks.push(tokens::round_trip(&tokenizer, &texts));
        self.checks.push(tokens::template(&tokenizer, &read.messages));
        self.checks.push(tokens::pad_is_not_end(&self.args.policy, &tokenizer, &reward_model));
        self.go_on()?;
        let sources = Sources::find(&reward_model, self.args.train_pairs.as_deref(), self.args.pairs.as_deref())?;
        self.checks.extend(preferences::data_checks(&sources));
        if let Some(prompts) = &read.prompts
            && !self.fits_memory(prompts)
        {
            return Ok(());
        }
        self.go_on()?;
        let Some(models) = self.load(&mut policy, &mut reward_model) else { return Ok(()) };
        let (learner, frozen) = models.split(self.config, None);
        self.go_on()?;
        let answered = self.preferences(&frozen, &tokenizer, sources);
        self.go_on()?;
        if let Some(answered) = &answered {
            self.answers_known(&learner, &tokenizer, answered)?;
            self.go_on()?;
        }
        let sampled = match &read.prompts {
            Some(prompts) => self.samples(&frozen, &learner, &tokenizer, prompts)?,
            None => Vec::new(),
        };
        self.go_on()?;
        let answered = answered.unwrap_or_else(|| Answered::ended(&sampled));
        let answered = &answered[..answered.len().min(N_DAMAGED)];
        let pace = self.pace("scoring damaged answers", scores::n_rows(answered, &frozen), "rows");
        let wins = scores::orders(&frozen, &tokenizer, answered, &|n| pace.done(n))?;
        self.checks.extend(scores::order_checks(wins));
        Ok(())
    }

    /// Ends the examination where the user asked to stop.
    fn go_on(&self) -> anyhow::Result<()> {
        if self.interrupt.requested() { Err(self.interrupt.stopped().into()) } else { Ok(()) }
    }

    /// How far a long part of the examination is, which the user may end.
    fn pace(&self, what: &str, n: usize, things: &'static str) -> Pace {
        Pace::new(what, n, things, self.interrupt)
    }

    /// Policy and reward model, if both load and read the same tokens.
    fn open(&mut self) -> Option<(Checkpoint, Checkpoint)> {
        let opening = self.args.runtime.opening();
        let policy = checkpoint::init_from(&self.args.policy, opening);
        let policy = policy.and_then(|policy| policy.of_stage(&[Stage::Sft, Stage::Dpo]));
        let policy = policy.and_then(|policy| policy.require_tokenizer().cloned().map(|_| policy));
        let policy = match policy {
            Ok(policy) => policy,
            Err(error) => {
                self.failed(&about::POLICY_LOADS, error);
                return None;
            }
        };
        self.passed(&about::POLICY_LOADS, "the policy loads, and all of its weights are finite");
        match checkpoint::open_reward_model(&self.args.reward_model, opening, &policy) {
            Ok(reward_model) => {
                self.passed(&about::REWARD_MODEL_LOADS, "the reward model loads, and all of its weights are finite");
                self.passed(&about::SAME_TOKENIZER, "policy and reward model read the same tokens");
                Some((policy, reward_model))
            }
            Err(error @ (CheckpointError::Partners { .. } | CheckpointError::SmallerVocabulary { .. })) => {
                self.failed(&about::SAME_TOKENIZER, error);
                None
            }
            Err(error) => {
                self.failed(&about::REWARD_MODEL_LOADS, error);
                None
            }
        }
    }

    fn passed(&mut self, about: &About, reason: &str) {
        self.checks.push(Check::stated(about, Verdict::Pass, reason));
    }

    fn failed(&mut self, about: &About, error: impl Into<anyhow::Error>) {
        self.checks.push(Check::stated(about, Verdict::Fail, chain(error)));
    }

    /// Whether the run fits into memory, or nobody knows.
    fn fits_memory(&mut self, prompts: &Prompts) -> bool {
        const GIB: f64 = (1_u64 << 30) as f64;
        let preview = |dir| Preview::open(dir, self.args.runtime.base());
        let about = &about::MEMORY;
        let (Ok(policy), Ok(reward_model)) = (preview(&self.args.policy), preview(&self.args.reward_model)) else {
            return true;
        };
        let (true, Some(available)) = (self.runtime.is_on_host(), capacity::available()) else {
            self.checks.push(Check::skipped(about, "how much memory the device has is not known"));
            return true;
        };
        let lengths = prompts.encoded.iter().map(|prompt| prompt.ids.len()).collect();
        let lengths = Lengths::of(policy.config.max_seq_len, lengths);
        let kernels = self.runtime.effective_kernels();
        let settings = self.config.memory(self.runtime.trunk);
        let needed = needs::needs(self.config, &policy, &[&reward_model], &lengths, kernels, settings);
        let (needed, available) = (needed.peak() / GIB, available / GIB);
        let reason = format!("the run needs about {needed:.2} GiB, {available:.2} GiB are available");
        let check = Check::at_most(about, needed, available, reason);
        let fits = check.verdict == Verdict::Pass;
        self.checks.push(check);
        fits || !self.config.run.check_memory
    }

    /// The models as `ppo train` loads them.
    fn load(&mut self, policy: &mut Checkpoint, reward_model: &mut Checkpoint) -> Option<Models> {
        let lora: Option<&LoraConfig> = self.config.lora.as_ref();
        let models = policy
            .check_lora(lora)
            .map_err(anyhow::Error::from)
            .and_then(|()| Models::load(self.config, policy, std::slice::from_mut(reward_model), None, self.runtime));
        match models {
            Ok(models) => {
                self.passed(&about::MODELS_LOAD, "policy, reference, reward model and value model load together");
                Some(models)
            }
            Err(error) => {
                self.failed(&about::MODELS_LOAD, error);
                None
            }
        }
    }

    /// The checks of held-out pairs; returns their preferred answers.
    fn preferences(
        &mut self,
        frozen: &FrozenModels<'_>,
        tokenizer: &Tokenizer,
        Sources { training, held_out }: Sources,
    ) -> Option<Vec<Answered>> {
        let pairs = match held_out {
            Ok(pairs) => pairs,
            Err(why) => {
                self.checks.extend(preferences::skipped(&why));
                return None;
            }
        };
        tracing::info!("scoring held-out pairs");
        let pace = self.pace("held-out pairs", Scored::n_answers(&pairs), "answers");
        match Scored::of(&frozen.reward_model, tokenizer, pairs, frozen.batch_size, &|n| pace.done(n)) {
            Ok(scored) => {
                self.checks.extend(scored.checks(&training));
                Some(scored.answered())
            }
            Err(error) => {
                self.failed(&about::ACCURACY, error);
                None
            }
        }
    }

    /// The checks of the first rollout; returns it.
    fn samples(
        &mut self,
        frozen: &FrozenModels<'_>,
        learner: &Learner,
        tokenizer: &Tokenizer,
        prompts: &Prompts,
    ) -> anyhow::Result<Vec<Rollout>> {
        let streams = Streams::new(self.config.seed).of("doctor");
        let sampling = self.config.sampling(streams, tokenizer);
        let mut order = Order::new(prompts.encoded.len(), streams, "order");
        let n = prompts.encoded.len().min(N_PROMPTS);
        let chosen: Vec<EncodedPrompt> =
            (0..n as u64).map(|position| prompts.encoded[order.item(position)].clone()).collect();
        tracing::info!("answering {n} prompts once, {} of them {BEST_OF} times", n.min(N_HEADROOM_PROMPTS));
        let policy = learner.policy.valid();
        let pace = self.pace("answering", n, "prompts");
        let responses = match sampling.answer_counted(&policy, &chosen, 0, &|n| pace.done(n)) {
            Ok(responses) => responses,
            Err(error) => {
                self.failed(&about::ANSWERS_END, error);
                return Ok(Vec::new());
            }
        };
        self.checks.push(policy::answers_end(&responses));
        let temperature = self.config.ppo.temperature();
        self.checks.push(policy::temperature_fits(temperature));
        drop(pace);
        let pace = self.pace("scoring answers", frozen.n_watched(n), "of reference and reward model");
        let rollouts = match frozen.rollouts_watched(&chosen, responses, temperature, &|n| pace.done(n)) {
            Ok(rollouts) => rollouts,
            Err(error @ (ScoreError::NotFinite | ScoreError::MemberNotFinite { .. })) => {
                self.failed(&about::SCORE_SCALE, error);
                return Ok(Vec::new());
            }
            Err(error) => return Err(error.into()),
        };
        drop(pace);
        self.same_log_probs(learner, &rollouts)?;
        let pace = self.pace("values", rollouts.len(), "answers");
        let values =
            learner.values(&Group::alone(), &rollouts, &self.config.ppo, frozen.batch_size, &|n| pace.done(n))?;
        drop(pace);
        if let Some(values) = values {
            self.checks.push(policy::values_finite(&values));
        }
        let scores = |of: &[Rollout]| of.iter().map(|rollout| f64::from(rollout.score)).collect::<Vec<f64>>();
        self.checks.push(scores::scale(&scores(&rollouts)));
        let ended: Vec<Rollout> = rollouts.iter().filter(|rollout| rollout.response.ended).cloned().collect();
        if self.config.ppo.switches().missing_eos == MissingEos::Replace {
            self.checks.push(scores::missing_eos(&scores(&ended), self.config.ppo.missing_eos_score));
        } else {
            self.passed(&about::MISSING_EOS, "in this dialect an answer that is cut off keeps its own score");
        }
        self.several(frozen, &policy, &sampling, &chosen)?;
        Ok(rollouts)
    }

    /// The checks of several answers to each of the first prompts.
    fn several(
        &mut self,
        frozen: &FrozenModels<'_>,
        policy: &Gpt,
        sampling: &Sampling<'_>,
        prompts: &[EncodedPrompt],
    ) -> anyhow::Result<()> {
        let repeated: Vec<EncodedPrompt> =
            prompts.iter().take(N_HEADROOM_PROMPTS).flat_map(|prompt| vec![prompt.clone(); BEST_OF]).collect();
        let pace = self.pace("answering several times", repeated.len(), "answers");
        let responses = sampling.answer_counted(policy, &repeated, N_PROMPTS as u64, &|n| pace.done(n))?;
        drop(pace);
        let answers: Vec<&[Response]> = responses.chunks(BEST_OF).collect();
        self.checks.push(policy::answers_differ(&answers));
        let rows: Vec<Vec<u32>> = repeated
            .iter()
            .zip(&responses)
            .map(|(prompt, response)| [&*prompt.ids, response.answer()].concat())
            .collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let pace = self.pace("scoring several answers", rows.len(), "answers");
        let best_of = score_rows_watched(&frozen.reward_model, &rows, frozen.batch_size, &|n| pace.done(n))?;
        let by_prompt: Vec<Vec<f64>> =
            best_of.chunks(BEST_OF).map(|scores| scores.iter().map(|&score| f64::from(score)).collect()).collect();
        self.checks.push(scores::headroom(&by_prompt));
        Ok(())
    }

    /// How well the policy predicts preferred answers that it was not trained on.
    fn answers_known(&mut self, learner: &Learner, tokenizer: &Tokenizer, answered: &[Answered]) -> anyhow::Result<()> {
        let policy = learner.policy.valid();
        let config = policy.config();
        let encoded: Vec<(&[u32], Vec<u32>)> = answered
            .iter()
            .filter_map(|answered| {
                let response = conversation::encode_response(tokenizer, &answered.answer).ok()?;
                (answered.prompt.len() + response.len() <= config.max_seq_len).then_some((&*answered.prompt, response))
            })
            .take(N_PROMPTS)
            .collect();
        let ids: Vec<(&[u32], &[u32])> = encoded.iter().map(|(prompt, response)| (*prompt, &**response)).collect();
        let pace = self.pace("held-out answers", ids.len(), "answers");
        let log_probs = of_response_tokens_watched(&ids, self.config.micro_batch_size(), &|n| pace.done(n), |batch| {
            log_probs(&policy, batch, 1.0)
        })?;
        let answers: Vec<Vec<u32>> = encoded.into_iter().map(|(_, response)| response).collect();
        self.checks.push(policy::answers_known(&answers, &log_probs, config.vocab_size));
        Ok(())
    }

    /// Log-probabilities of sampled tokens by the reference, without the cache, and as training takes them.
    fn same_log_probs(&mut self, learner: &Learner, rollouts: &[Rollout]) -> anyhow::Result<()> {
        let (tolerance, temperature) = (self.config.ppo.ratio_tolerance, self.config.ppo.temperature());
        self.checks.push(policy::kl_of_itself(rollouts, tolerance));
        let some = &rollouts[..rollouts.len().min(N_RECOMPUTED)];
        let sampled: Vec<&[f32]> = some.iter().map(|rollout| rollout.response.log_probs.as_slice()).collect();
        let ids: Vec<(&[u32], &[u32])> = some.iter().map(Rollout::ids).collect();
        let batch_size = self.config.micro_batch_size();
        let policy = learner.policy.valid();
        let pace = self.pace("log-probabilities again", 2 * ids.len(), "answers");
        let watch: Watch<'_> = &|n| pace.done(n);
        let uncached =
            of_response_tokens_watched(&ids, batch_size, watch, |batch| log_probs(&policy, batch, temperature))?;
        self.checks.push(policy::cached_is_uncached(&sampled, &uncached, tolerance));
        let trained = of_response_tokens_watched(&ids, batch_size, watch, |batch| {
            log_probs_and_entropy(&learner.policy, batch, temperature).0.inner()
        })?;
        self.checks.push(policy::ratio_is_one(&sampled, &trained, tolerance));
        Ok(())
    }
}
