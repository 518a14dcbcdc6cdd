//! What the policy samples: whether its answers end, and whether its log-probabilities are those it samples by.

use std::collections::{BTreeMap, BTreeSet};

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

/// Temperatures of sampling: beyond the first bounds it warns, beyond the second it fails.
const TEMPERATURES: [[f64; 2]; 2] = [[0.5, 1.5], [0.1, 2.0]];

/// Whether answers are sampled about as the SFT model learned them.
pub(crate) fn temperature_fits(temperature: f64) -> Check {
    let within = |[low, high]: [f64; 2]| (low..=high).contains(&temperature);
    let verdict = match TEMPERATURES.map(within) {
        [true, _] => Verdict::Pass,
        [false, true] => Verdict::Warn,
        [false, false] => Verdict::Fail,
    };
    let [low, high] = TEMPERATURES[usize::from(verdict == Verdict::Fail)];
    let limit = if temperature < low { low } else { high };
    let reason = format!("answers are sampled at temperature {temperature}");
    Check::measured(&about::TEMPERATURE, verdict, temperature, limit, reason)
}

/// Loss of held-out answers against that by frequencies: at most the first passes, above the second it fails.
const KNOWN: [f64; 2] = [0.9, 0.95];

/// Different answers of those to one prompt: at least the first, or it warns; at least the second, or it fails.
const DIFFERENT: [f64; 2] = [4.0, 2.0];

/// Whether the answers to one prompt differ; `by_prompt` are those to each.
pub(crate) fn answers_differ(by_prompt: &[&[Response]]) -> Check {
    let about = &about::ANSWERS_DIFFER;
    let distinct = |answers: &&[Response]| {
        let different: BTreeSet<&[u32]> = answers.iter().map(|answer| &*answer.ids).collect();
        different.len() as f64
    };
    let counts: Vec<f64> = by_prompt.iter().map(distinct).collect();
    let Some(mean) = Interval::of(&counts) else { return Check::skipped(about, "no answer was sampled") };
    let verdict = match mean.mean {
        n if n >= DIFFERENT[0] => Verdict::Pass,
        n if n >= DIFFERENT[1] => Verdict::Warn,
        _ => Verdict::Fail,
    };
    let n = by_prompt[0].len();
    let reason = format!("of {n} answers to a prompt, {:.1} are different", mean.mean);
    Check::measured(about, verdict, mean.mean, DIFFERENT[0], reason)
}

/// Whether the policy predicts answers better than frequencies of tokens do; `log_probs` are of the tokens of `answers`.
///
/// `Σ −ln p_policy / Σ −ln p_frequency`, each a mean over the tokens of an answer and then over the answers, with the frequencies in all the other answers and a share for tokens
/// that are not among them: `p(w) = (c(w) + T/V) / (N + T)` for `T` different tokens among `N`, of `V` there are.
///
/// # Source
/// Witten and Bell, IEEE Transactions on Information Theory 37 (4), 1991, method C.
pub(crate) fn answers_known(answers: &[Vec<u32>], log_probs: &[Vec<f32>], vocab_size: usize) -> Check {
    let about = &about::HELD_OUT_LOSS;
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for &id in answers.iter().flatten() {
        *counts.entry(id).or_default() += 1;
    }
    let n_all: usize = counts.values().sum();
    // Nats a token of one answer, by both.
    let losses = |answer: &Vec<u32>, log_probs: &Vec<f32>| {
        let mut own: BTreeMap<u32, usize> = BTreeMap::new();
        for &id in answer {
            *own.entry(id).or_default() += 1;
        }
        let n_different = counts.iter().filter(|(id, n)| own.get(id).is_none_or(|own| own < n)).count() as f64;
        let n_others = (n_all - answer.len()) as f64;
        let frequency =
            |id: &u32| ((counts[id] - own[id]) as f64 + n_different / vocab_size as f64) / (n_others + n_different);
        let n = answer.len() as f64;
        let by_policy = -log_probs.iter().map(|&log_prob| f64::from(log_prob)).sum::<f64>() / n;
        [by_policy, -answer.iter().map(|id| frequency(id).ln()).sum::<f64>() / n]
    };
    let losses: Vec<[f64; 2]> =
        answers.iter().zip(log_probs).map(|(answer, log_probs)| losses(answer, log_probs)).collect();
    if answers.len() < 2 {
        return Check::skipped(about, "there are no two held-out answers");
    }
    let mean = |i: usize| losses.iter().map(|losses| losses[i]).sum::<f64>() / losses.len() as f64;
    let (policy, frequencies) = (mean(0), mean(1));
    let share = policy / frequencies;
    let verdict = match share {
        share if share <= KNOWN[0] => Verdict::Pass,
        share if share <= KNOWN[1] => Verdict::Warn,
        _ => Verdict::Fail,
    };
    let reason = format!(
        "{} preferred answers have {policy:.3} nats a token, by token frequencies {frequencies:.3}",
        answers.len()
    );
    Check::measured(about, verdict, share, KNOWN[usize::from(verdict == Verdict::Fail)], reason)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_known_where_they_are_likelier_than_by_frequencies() {
        // Of four tokens one is as frequent as the other; ids 2 and 3 are never seen.
        let answers = vec![vec![0, 1]; 9];
        let check = |log_prob: f32| answers_known(&answers, &vec![vec![log_prob; 2]; 9], 4);
        // c = 8, T = 2, N = 16, V = 4: (8 + 2/4) / 18.
        let frequencies = -(8.5_f64 / 18.0).ln();
        let share = check(-0.5).value.unwrap_or(f64::NAN);
        assert!((share - 0.5 / frequencies).abs() < 1e-12, "{share}");
        assert_eq!(
            [-0.6, -0.7, -0.74].map(|log_prob| check(log_prob).verdict),
            [Verdict::Pass, Verdict::Warn, Verdict::Fail]
        );
        assert_eq!(check(f32::NAN).verdict, Verdict::Fail);
        assert_eq!(answers_known(&answers[..1], &[vec![-9.0; 2]], 4).value, None, "one says nothing of others");
    }

    #[test]
    fn a_token_of_one_answer_alone_is_not_impossible() {
        let answers = vec![vec![0], vec![0], vec![3]];
        let share = answers_known(&answers, &[vec![-1.0], vec![-1.0], vec![-1.0]], 4).value.unwrap_or(f64::NAN);
        // For each of the first two c = 1, T = 2, N = 2, for the last c = 0, T = 1, N = 2, of V = 4.
        let expected = -3.0 / (2.0 * (1.5_f64 / 4.0).ln() + (0.25_f64 / 3.0).ln());
        assert!((share - expected).abs() < 1e-12, "{share} {expected}");
    }

    #[test]
    fn temperatures_far_from_one_are_named() {
        let verdicts = [0.05, 0.3, 0.7, 1.0, 1.8, 5.0].map(|temperature| temperature_fits(temperature).verdict);
        let expected = [Verdict::Fail, Verdict::Warn, Verdict::Pass, Verdict::Pass, Verdict::Warn, Verdict::Fail];
        assert_eq!(verdicts, expected);
    }
}
