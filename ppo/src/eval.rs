//! Held-out prompts answered by a policy: scores, divergence, and the comparison with the reference.

use std::io::Write;

use anyhow::Context;
use common::checkpoint::{self, Checkpoint, Stage};
use common::config;
use common::data::records::OnBadRecord;
use common::exit::UsageError;
use common::rng::Streams;
use common::score::{FrozenModels, Prompts, Rollout, Sampling, TooLong};
use serde::Serialize;

use crate::cli::EvalArgs;
use crate::config::{PpoConfig, PpoSection};

/// Two-sided 95 % point of the standard normal distribution.
const Z_95: f64 = 1.959_963_984_540_054;

/// Tokens of an answer where neither flag nor checkpoint says.
const DEFAULT_MAX_TOKENS: usize = 128;

/// A number measured on a sample of prompts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The mean over the prompts.
    pub mean: f64,
    /// Its 95 % interval.
    pub interval: [f64; 2],
}

impl Estimate {
    /// A mean with the normal interval `mean ± 1.96·s/√n`, `s² = Σ(x − mean)²/(n − 1)`; width 0 for one value.
    pub fn of_mean(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        let half_width = Z_95 * (variance / n).sqrt();
        Self { mean, interval: [mean - half_width, mean + half_width] }
    }

    /// A rate with Wilson's interval, which stays within `[0, 1]` and has a width even for 0 and 1. Values lie in
    /// `[0, 1]`; a tie of a win rate is ½, for which the interval is a little too wide.
    ///
    /// # Source
    /// Wilson 1927, "Probable inference, the law of succession, and statistical inference", without continuity
    /// correction.
    pub fn of_rate(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let rate = values.iter().sum::<f64>() / n;
        let z2_n = Z_95 * Z_95 / n;
        let centre = (rate + z2_n / 2.0) / (1.0 + z2_n);
        let half_width = (z2_n * (rate * (1.0 - rate) + z2_n / 4.0)).sqrt() / (1.0 + z2_n);
        Self { mean: rate, interval: [(centre - half_width).max(0.0), (centre + half_width).min(1.0)] }
    }
}

/// What `ppo eval` measures. Each number's 95 % interval stands beside it, over prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(into = "Flat")]
pub struct Evaluation {
    /// The reward model's score of the policy's answers, cut-off ones included as they are.
    pub score_mean: Estimate,
    /// The same of the reference's answers.
    pub score_reference_mean: Estimate,
    /// How often the policy's answer to a prompt scores higher than the reference's; ties count half.
    pub win_rate: Estimate,
    /// KL from the reference in nats: k1 summed over an answer of the policy.
    pub kl_mean: Estimate,
    /// Tokens of the policy's answers, `<|end|>` counted.
    pub length_mean: Estimate,
    /// How often the policy's answer ends by `<|end|>`.
    pub eos_rate: Estimate,
    /// Number of prompts.
    pub prompts: usize,
}

/// [`Evaluation`] as printed: `x` a number, `x_interval` its two bounds.
#[derive(Serialize)]
struct Flat {
    score_mean: f64,
    score_mean_interval: [f64; 2],
    score_reference_mean: f64,
    score_reference_mean_interval: [f64; 2],
    win_rate: f64,
    win_rate_interval: [f64; 2],
    kl_mean: f64,
    kl_mean_interval: [f64; 2],
    length_mean: f64,
    length_mean_interval: [f64; 2],
    eos_rate: f64,
    eos_rate_interval: [f64; 2],
    prompts: usize,
}

impl From<Evaluation> for Flat {
    fn from(all: Evaluation) -> Self {
        Self {
            score_mean: all.score_mean.mean,
            score_mean_interval: all.score_mean.interval,
            score_reference_mean: all.score_reference_mean.mean,
            score_reference_mean_interval: all.score_reference_mean.interval,
            win_rate: all.win_rate.mean,
            win_rate_interval: all.win_rate.interval,
            kl_mean: all.kl_mean.mean,
            kl_mean_interval: all.kl_mean.interval,
            length_mean: all.length_mean.mean,
            length_mean_interval: all.length_mean.interval,
            eos_rate: all.eos_rate.mean,
            eos_rate_interval: all.eos_rate.interval,
            prompts: all.prompts,
        }
    }
}

impl Evaluation {
    /// Compares answers of the policy with answers of the reference to the same prompts.
    fn of_rollouts(policy: &[Rollout], reference: &[Rollout]) -> Self {
        let over = |rollouts: &[Rollout], value: fn(&Rollout) -> f64| rollouts.iter().map(value).collect::<Vec<_>>();
        let score = |rollout: &Rollout| f64::from(rollout.score);
        let wins: Vec<f64> = policy.iter().zip(reference).map(|(a, b)| win(a.score, b.score)).collect();
        Self {
            score_mean: Estimate::of_mean(&over(policy, score)),
            score_reference_mean: Estimate::of_mean(&over(reference, score)),
            win_rate: Estimate::of_rate(&wins),
            kl_mean: Estimate::of_mean(&over(policy, Rollout::kl)),
            length_mean: Estimate::of_mean(&over(policy, |rollout| rollout.response.ids.len() as f64)),
            eos_rate: Estimate::of_rate(&over(policy, |rollout| f64::from(u8::from(rollout.response.ended)))),
            prompts: policy.len(),
        }
    }
}

/// 1 where `ours` is higher, ½ where both are equal, else 0.
fn win(ours: f32, theirs: f32) -> f64 {
    if ours > theirs {
        1.0
    } else if ours == theirs {
        0.5
    } else {
        0.0
    }
}

/// Carries out `ppo eval`: one JSON object on stdout.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    let result = serde_json::to_string(&evaluate(args)?)?;
    writeln!(std::io::stdout(), "{result}").context("failed to write the result")
}

/// Lets a policy and its reference answer the same prompts, with the same random numbers, and compares the answers.
///
/// # Errors
/// If a checkpoint or the prompts cannot be used, or the three models do not share a tokenizer.
pub fn evaluate(args: &EvalArgs) -> anyhow::Result<Evaluation> {
    let policy = Checkpoint::open(&args.checkpoint).context("failed to load the policy")?;
    policy.expect_stage(&[Stage::Ppo, Stage::Sft, Stage::Pretrain]).context("failed to load the policy")?;
    let reference = Checkpoint::open(&args.reference).context("failed to load the reference policy")?;
    reference
        .expect_stage(&[Stage::Sft, Stage::Pretrain, Stage::Ppo])
        .context("failed to load the reference policy")?;
    let reward_model =
        checkpoint::open_reward_model(&args.reward_model, &policy).context("failed to load the reward model")?;
    checkpoint::ensure_same_tokenizer(&policy, &reference)?;
    let tokenizer = policy.require_tokenizer()?;
    let trained = ppo_section(&policy);
    let temperature = args.temperature.or(trained.as_ref().map(|ppo| ppo.temperature)).unwrap_or(1.0);
    if !(temperature > 0.0 && temperature.is_finite()) {
        let reason = format!("invalid `--temperature`: expected a number above 0, found `{temperature}`");
        return Err(UsageError(reason).into());
    }
    let max_tokens = args.max_tokens.or(trained.as_ref().map(|ppo| ppo.response_length)).unwrap_or(DEFAULT_MAX_TOKENS);
    let max_seq_len = [&policy, &reference, &reward_model].map(|model| model.model_config().max_seq_len);
    let max_seq_len = max_seq_len.into_iter().min().unwrap_or(0);
    let files = std::slice::from_ref(&args.data);
    let prompts = Prompts::read(files, tokenizer, max_seq_len, max_tokens, OnBadRecord::Fail.into(), TooLong::Fail)?;

    let runtime = args.runtime.open()?;
    let frozen = FrozenModels {
        reference: runtime.gpt(&reference)?,
        reward_model: runtime.scalar(&reward_model)?,
        gold: None,
        batch_size: args.batch_size.get(),
    };
    let policy = runtime.gpt(&policy)?;
    let sampling = Sampling::new(temperature, max_tokens, Streams::new(args.seed), tokenizer, args.batch_size.get());
    let rollouts = |model| -> anyhow::Result<Vec<Rollout>> {
        let responses = sampling.answer(model, &prompts.encoded, 0)?;
        Ok(frozen.rollouts(&prompts.encoded, responses, temperature)?)
    };
    Ok(Evaluation::of_rollouts(&rollouts(&policy)?, &rollouts(&frozen.reference)?))
}

/// How a checkpoint of this stage was trained.
fn ppo_section(checkpoint: &Checkpoint) -> Option<PpoSection> {
    let path = checkpoint.dir().join(checkpoint::CONFIG_FILE);
    (checkpoint.stage() == Some(Stage::Ppo))
        .then(|| config::load::<PpoConfig>(&path, &[]).ok())
        .flatten()
        .map(|config| config.ppo)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_has_its_normal_interval() {
        // s² = 1 with n − 1 = 2: 1.96/√3 = 1.131586.
        let estimate = Estimate::of_mean(&[1.0, 2.0, 3.0]);
        assert_eq!(estimate.mean, 2.0);
        assert!((estimate.interval[0] - 0.868_414).abs() < 1e-6, "{estimate:?}");
        assert!((estimate.interval[1] - 3.131_586).abs() < 1e-6, "{estimate:?}");
        assert_eq!(Estimate::of_mean(&[0.5]).interval, [0.5, 0.5]);
    }

    #[test]
    fn a_rate_has_wilsons_interval() {
        // 8 of 10: the textbook's [0.4902, 0.9433].
        let values: Vec<f64> = (0..10).map(|i| f64::from(u8::from(i < 8))).collect();
        let estimate = Estimate::of_rate(&values);
        assert!((estimate.interval[0] - 0.490_16).abs() < 1e-4, "{estimate:?}");
        assert!((estimate.interval[1] - 0.943_32).abs() < 1e-4, "{estimate:?}");
        let all = Estimate::of_rate(&[1.0; 20]);
        assert!(all.interval[0] > 0.8 && all.interval[1] == 1.0, "{all:?}");
    }

    #[test]
    fn ties_count_half() {
        assert_eq!([win(1.0, 0.5), win(0.5, 0.5), win(0.0, 0.5)], [1.0, 0.5, 0.0]);
    }

    #[test]
    fn the_printed_object_has_a_number_and_an_interval_each() {
        let one = Estimate { mean: 0.5, interval: [0.25, 0.75] };
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
