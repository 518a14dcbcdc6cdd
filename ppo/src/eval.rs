//! Held-out prompts answered by a policy: scores, divergence, and the comparison with the reference.

use anyhow::Context;
use common::checkpoint::{self, Checkpoint, Stage};
use common::cli::print_json;
use common::config;
use common::data::records::OnBadRecord;
use common::exit::UsageError;
use common::interrupt::Interrupt;
use common::pace::Pace;
use common::rng::Streams;
use common::score::{FrozenModels, Prompts, Rollout, Sampling, TooLong};
use common::stats::{Interval, win};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::cli::EvalArgs;
use crate::config::{PpoConfig, PpoSection};

/// Tokens of an answer where neither flag nor checkpoint says.
const DEFAULT_MAX_TOKENS: usize = 128;

/// The results of `ppo eval`. Each number's 95 % interval stands beside it, over prompts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// The reward model's score of the policy's answers, cut-off ones included as they are.
    pub score_mean: Interval,
    /// The same of the reference's answers.
    pub score_reference_mean: Interval,
    /// How often the policy's answer to a prompt scores higher than the reference's; ties count half.
    pub win_rate: Interval,
    /// KL from the reference in nats: k1 summed over an answer of the policy.
    pub kl_mean: Interval,
    /// Tokens of the policy's answers, `<|end|>` counted.
    pub length_mean: Interval,
    /// How often the policy's answer ends by `<|end|>`.
    pub eos_rate: Interval,
    /// Number of prompts.
    pub prompts: usize,
}

impl Serialize for Evaluation {
    /// `x` a number, `x_interval` its two bounds.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, Interval { mean, low, high, .. }) in [
            ("score_mean", self.score_mean),
            ("score_reference_mean", self.score_reference_mean),
            ("win_rate", self.win_rate),
            ("kl_mean", self.kl_mean),
            ("length_mean", self.length_mean),
            ("eos_rate", self.eos_rate),
        ] {
            map.serialize_entry(name, &mean)?;
            map.serialize_entry(&format!("{name}_interval"), &[low, high])?;
        }
        map.serialize_entry("prompts", &self.prompts)?;
        map.end()
    }
}

impl Evaluation {
    /// Compares responses of the policy with those of the reference to the same prompts; `None` of no prompts.
    fn of_rollouts(policy: &[Rollout], reference: &[Rollout]) -> Option<Self> {
        let over = |rollouts: &[Rollout], value: fn(&Rollout) -> f64| rollouts.iter().map(value).collect::<Vec<_>>();
        let score = |rollout: &Rollout| f64::from(rollout.score);
        let wins: Vec<f64> = policy.iter().zip(reference).map(|(a, b)| win(score(a), score(b))).collect();
        Some(Self {
            score_mean: Interval::of(&over(policy, score))?,
            score_reference_mean: Interval::of(&over(reference, score))?,
            win_rate: Interval::of_rate(&wins)?,
            kl_mean: Interval::of(&over(policy, Rollout::kl))?,
            length_mean: Interval::of(&over(policy, |rollout| rollout.response.ids.len() as f64))?,
            eos_rate: Interval::of_rate(&over(policy, |rollout| f64::from(u8::from(rollout.response.ended))))?,
            prompts: policy.len(),
        })
    }
}

/// Carries out `ppo eval`: one JSON object on stdout.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    let given = [&args.checkpoint, &args.reference].into_iter().chain(&args.reward_model).map(|dir| &**dir);
    args.runtime.check_base(given)?;
    // Nothing is to be saved: a signal ends the program at once.
    print_json(&evaluate(args, Interrupt::never())?)
}

/// Lets a policy and its reference answer the same prompts, with the same random numbers, and compares the answers.
///
/// # Errors
/// If a checkpoint or the prompts cannot be used, the models do not share a tokenizer, or `interrupt` ends it.
pub fn evaluate(args: &EvalArgs, interrupt: Interrupt) -> anyhow::Result<Evaluation> {
    let opening = args.runtime.opening();
    let open = |dir| checkpoint::init_from(dir, opening)?.of_stage(&Stage::LANGUAGE_MODELS);
    let policy = open(&args.checkpoint).context("failed to load the policy")?;
    let reference = open(&args.reference).context("failed to load the reference policy")?;
    let open = |dir| checkpoint::open_reward_model(dir, opening, &policy);
    let reward_models: Result<Vec<Checkpoint>, _> = args.reward_model.iter().map(|dir| open(dir)).collect();
    let reward_models = reward_models.context("failed to load the reward model")?;
    checkpoint::ensure_same_tokenizer(&policy, &reference)?;
    if let (Some(ensemble), [_]) = (args.ensemble, &args.reward_model[..]) {
        let message = format!("`--ensemble {ensemble}` needs several reward models: repeat `--reward-model`");
        return Err(UsageError(message).into());
    }
    let tokenizer = policy.require_tokenizer()?;
    let trained = ppo_section(&policy)?;
    let temperature = args.temperature.or(trained.as_ref().map(PpoSection::temperature)).unwrap_or(1.0);
    if !(temperature > 0.0 && temperature.is_finite()) {
        let reason = format!("invalid `--temperature`: expected a number above 0, found `{temperature}`");
        return Err(UsageError(reason).into());
    }
    let max_tokens = args.max_tokens.or(trained.as_ref().map(|ppo| ppo.response_length)).unwrap_or(DEFAULT_MAX_TOKENS);
    let contexts =
        [&policy, &reference].into_iter().chain(&reward_models).map(|model| model.model_config().max_seq_len);
    let max_seq_len = contexts.min().unwrap_or(0);
    let files = std::slice::from_ref(&args.data);
    let prompts = Prompts::read(files, tokenizer, max_seq_len, max_tokens, OnBadRecord::Fail.into(), TooLong::Fail)?;

    let runtime = args.runtime.open()?;
    let mut members = reward_models.iter().map(|model| runtime.scalar(model));
    let reward_model = members.next().context("no reward model was named")??;
    let frozen = FrozenModels {
        reference: runtime.gpt(&reference)?,
        reward_model,
        further: members.collect::<Result<_, _>>()?,
        ensemble: args.ensemble.or(trained.and_then(|ppo| ppo.ensemble)).unwrap_or_default(),
        gold: None,
        batch_size: args.batch_size.get(),
    };
    let policy = runtime.gpt(&policy)?;
    let streams = Streams::new(args.seed).of("evaluation");
    let sampling = Sampling::new(temperature, max_tokens, streams, tokenizer, args.batch_size.get());
    let n = prompts.encoded.len();
    let rollouts = |model, what: &str| -> anyhow::Result<Vec<Rollout>> {
        let pace = Pace::new(what, n, "answers", interrupt);
        let responses = sampling.answer_counted(model, &prompts.encoded, 0, &|n| pace.done(n))?;
        drop(pace);
        let pace = Pace::new("scoring answers", frozen.n_watched(n), "of reference and reward model", interrupt);
        Ok(frozen.rollouts_watched(&prompts.encoded, responses, temperature, &|n| pace.done(n))?)
    };
    let (of_policy, of_reference) = (rollouts(&policy, "policy")?, rollouts(&frozen.reference, "reference")?);
    Evaluation::of_rollouts(&of_policy, &of_reference).context("no prompt is left to use")
}

/// How a checkpoint of this stage was trained; `None` of another stage.
fn ppo_section(checkpoint: &Checkpoint) -> anyhow::Result<Option<PpoSection>> {
    if checkpoint.stage() != Some(Stage::Ppo) {
        return Ok(None);
    }
    let path = checkpoint.dir().join(checkpoint::CONFIG_FILE);
    let config: PpoConfig = config::load(&path, &[])
        .context("failed to read with which temperature and response length the policy was trained")?;
    Ok(Some(config.ppo))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_printed_object_has_a_number_and_an_interval_each() {
        let one = Interval { mean: 0.5, low: 0.25, high: 0.75, n: 3 };
        let all = Evaluation {
            score_mean: one,
            score_reference_mean: one,
            win_rate: one,
            kl_mean: one,
            length_mean: one,
            eos_rate: one,
            prompts: 3,
        };
        let printed = serde_json::to_value(all).expect("plain numbers");
        for name in ["score_mean", "score_reference_mean", "win_rate", "kl_mean", "length_mean", "eos_rate"] {
            assert_eq!(printed[name], 0.5, "{name}");
            assert_eq!(printed[format!("{name}_interval")], serde_json::json!([0.25, 0.75]), "{name}");
        }
    }
}
