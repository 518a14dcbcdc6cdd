//! What the policy samples: whether its answers end, and whether its log-probabilities are those it samples by.

use common::score::{Response, Rollout};
use common::stats::Interval;

use super::about;
use super::report::{Check, Verdict, interval};

/// Share of answers that should end.
const ENDS: f64 = 0.8;

/// Share of answers below which most of a batch says nothing.
const ENDS_AT_LEAST: f64 = 0.5;

/// Whether sampled answers end by themselves.
pub(crate) fn answers_end<'a>(responses: impl IntoIterator<Item = &'a Response>) -> Check {
    let about = &about::ANSWERS_END;
    let ended: Vec<f64> = responses.into_iter().map(|response| f64::from(u8::from(response.ended))).collect();
    let Some(rate) = Interval::of_rate(&ended) else { return Check::skipped(about, "no answer was sampled") };
    let verdict = if rate.mean >= ENDS {
        Verdict::Pass
    } else if rate.high < ENDS_AT_LEAST {
        Verdict::Fail
    } else {
        Verdict::Warn
    };
    Check::measured(about, verdict, rate.mean, ENDS, format!("of {} answers, {} ended", rate.n, interval(rate)))
}

/// Whether the policy diverges from its own reference: k1 of the sampled tokens, mean per token.
pub fn kl_of_itself(rollouts: &[Rollout], tolerance: f64) -> Check {
    let n_tokens: usize = rollouts.iter().map(|rollout| rollout.response.ids.len()).sum();
    let kl = rollouts.iter().map(Rollout::kl).sum::<f64>() / n_tokens.max(1) as f64;
    let reason = format!("{kl:.1e} nats a token over {} answers", rollouts.len());
    let within = Check::at_most(&about::KL_ZERO, kl.abs(), tolerance, reason);
    Check { value: kl.is_finite().then_some(kl), ..within }
}

/// Whether log-probabilities of the whole rows are those that were sampled by, token by token through the cache.
///
/// # Panics
/// If there are not two numbers for each token.
pub fn cached_is_uncached(sampled: &[&[f32]], uncached: &[Vec<f32>], tolerance: f64) -> Check {
    let largest = largest(sampled, uncached, |sampled, uncached| (uncached - sampled).abs());
    let reason = format!("log-probabilities of {} answers differ by {largest:.1e} nats at most", sampled.len());
    Check::at_most(&about::CACHED, largest, tolerance, reason)
}

/// Whether the ratio is 1 before the first update: log-probabilities as training takes them against those sampled by.
///
/// # Panics
/// If there are not two numbers for each token.
pub fn ratio_is_one(sampled: &[&[f32]], trained: &[Vec<f32>], tolerance: f64) -> Check {
    let largest = largest(sampled, trained, |sampled, trained| ((trained - sampled).exp() - 1.0).abs());
    let reason = format!("ratios of {} answers are 1 ± {largest:.1e} before the first update", sampled.len());
    Check::at_most(&about::RATIO, largest, tolerance, reason)
}

/// The largest `difference` of two numbers a token; NaN where one of them is.
///
/// # Panics
/// If there are not two numbers for each token.
fn largest(a: &[&[f32]], b: &[Vec<f32>], difference: fn(f64, f64) -> f64) -> f64 {
    assert_eq!(a.len(), b.len(), "two rows of numbers an answer");
    let pairs = a.iter().zip(b).flat_map(|(a, b)| {
        assert_eq!(a.len(), b.len(), "two numbers a token");
        a.iter().zip(b)
    });
    pairs.map(|(&a, &b)| difference(f64::from(a), f64::from(b))).fold(0.0, |most: f64, x| {
        // `max` would drop a NaN.
        if x > most || x.is_nan() { x } else { most }
    })
}

/// Whether the value model gives every response token a number.
pub fn values_finite(values: &[Vec<f32>]) -> Check {
    let n = values.iter().map(Vec::len).sum::<usize>();
    let n_finite = values.iter().flatten().filter(|value| value.is_finite()).count();
    let verdict = if n_finite == n { Verdict::Pass } else { Verdict::Fail };
    let reason = format!("{n_finite} of {n} values are finite");
    Check::measured(&about::VALUES_FINITE, verdict, n_finite as f64 / n.max(1) as f64, 1.0, reason)
}
