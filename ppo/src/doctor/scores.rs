//! The reward model on the policy's own answers: scale, headroom, and orders that are obvious.

use common::conversation;
use common::score::{FrozenModels, Rollout, ScoreError, Watch};
use common::stats::{Interval, win};
use common::tokenizer::Tokenizer;

use super::about::{self, About};
use super::report::{Check, Verdict, interval};

/// Answers to a prompt that the headroom is measured on.
pub(super) const BEST_OF: usize = 16;

/// Deviation and mean of the scores: beyond the first bounds it warns, beyond the second it fails.
const DEVIATIONS: [[f64; 2]; 2] = [[0.5, 2.0], [0.1, 10.0]];
const MEANS: [f64; 2] = [0.5, 5.0];

/// Answers from which a mean and a deviation can be read.
const ENOUGH: usize = 16;

/// Gain of the best answer, in deviations: below the first it warns, below the second it fails.
const HEADROOM: [f64; 2] = [0.3, 0.15];

/// Mean and population deviation.
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    (mean, (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n).sqrt())
}

/// Mean and deviation of the scores of sampled answers, which PPO's coefficients assume to be 0 and 1.
pub(crate) fn scale(scores: &[f64]) -> Check {
    if scores.len() < ENOUGH {
        let n = scores.len();
        return Check::skipped(&about::SCORE_SCALE, format!("{n} sampled answers are too few, {ENOUGH} are needed"));
    }
    let (mean, deviation) = moments(scores);
    let within = |i: usize| {
        let [low, high] = DEVIATIONS[i];
        (low..=high).contains(&deviation) && mean.abs() <= MEANS[i]
    };
    let verdict = match (within(0), within(1)) {
        (true, _) => Verdict::Pass,
        (false, true) => Verdict::Warn,
        (false, false) => Verdict::Fail,
    };
    let reason = format!("{} sampled answers score {mean:.3} ± {deviation:.3}, expected 0 ± 1", scores.len());
    // The number that is out of bounds, with the bound; where none is, the deviation.
    let bounds = usize::from(verdict == Verdict::Fail);
    let [low, high] = DEVIATIONS[bounds];
    let beyond_mean = mean.abs() / MEANS[bounds];
    let beyond_deviation = (deviation / high).max(low / deviation);
    let (value, limit) = match verdict {
        Verdict::Warn | Verdict::Fail if beyond_mean > beyond_deviation => (mean, MEANS[bounds].copysign(mean)),
        _ => (deviation, if deviation < low { low } else { high }),
    };
    Check::measured(&about::SCORE_SCALE, verdict, value, limit, reason)
}

/// Whether ending pays better than being cut off.
pub(crate) fn missing_eos(scores_of_ended: &[f64], missing_eos_score: f64) -> Check {
    let about = &about::MISSING_EOS;
    let Some(mean) = Interval::of(scores_of_ended) else { return Check::skipped(about, "no sampled answer ended") };
    let reason = format!("{} ended answers score {}, one that is cut off {missing_eos_score}", mean.n, interval(mean));
    Check::above(about, mean, missing_eos_score, reason)
}

/// What the best of several answers to a prompt gains over their mean; `by_prompt` are the scores of each prompt's.
pub(crate) fn headroom(by_prompt: &[Vec<f64>]) -> Check {
    let (_, deviation) = moments(&by_prompt.concat());
    let about = &about::HEADROOM;
    if !by_prompt.is_empty() && deviation == 0.0 {
        return Check::skipped(about, "all answers have the same score");
    }
    let gain = |scores: &Vec<f64>| {
        let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (best - moments(scores).0) / deviation
    };
    let gains: Vec<f64> = by_prompt.iter().map(gain).collect();
    let Some(gain) = Interval::of(&gains) else { return Check::skipped(about, "no answer was sampled") };
    let verdict = if gain.mean >= HEADROOM[0] {
        Verdict::Pass
    } else if gain.mean >= HEADROOM[1] {
        Verdict::Warn
    } else {
        Verdict::Fail
    };
    let reason = format!("the best of {BEST_OF} answers scores {} deviations above their mean", interval(gain));
    Check::measured(about, verdict, gain.mean, HEADROOM[0], reason)
}

/// A prompt with an answer as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answered {
    /// Token ids, up to where the answer begins.
    pub(crate) prompt: Vec<u32>,
    /// The answer.
    pub(crate) answer: String,
}

impl Answered {
    /// The answers that ended by themselves.
    pub(crate) fn ended(rollouts: &[Rollout]) -> Vec<Self> {
        let ended =
            rollouts.iter().filter(|rollout| rollout.response.ended && !rollout.response.text.trim().is_empty());
        ended
            .map(|rollout| Self { prompt: rollout.prompt.ids.clone(), answer: rollout.response.text.clone() })
            .collect()
    }

    /// Tokens of prompt and answer, its end last.
    fn row(prompt: &[u32], answer: &str, tokenizer: &Tokenizer) -> Option<Vec<u32>> {
        Some([prompt, &conversation::encode_response(tokenizer, answer).ok()?].concat())
    }
}

/// A way in which an answer is made worse; `None` where it cannot be.
type Damage = fn(&[Answered], usize) -> Option<String>;

/// Each with its check.
const DAMAGES: [(&About, Damage); 4] = [
    (&about::ORDER_EMPTY, |_, _| Some(String::new())),
    (&about::ORDER_CUT, |all, i| first_half(&all[i].answer)),
    (&about::ORDER_REPEATED, |all, i| Some(format!("{0} {0}", all[i].answer))),
    (&about::ORDER_OFF_PROMPT, |all, i| {
        let others = (1..all.len()).map(|further| &all[(i + further) % all.len()]);
        let other = others.into_iter().find(|other| other.prompt != all[i].prompt && other.answer != all[i].answer)?;
        Some(other.answer.clone())
    }),
];

/// The first half of an answer, cut between words where it has any.
fn first_half(answer: &str) -> Option<String> {
    let middle = answer.char_indices().nth(answer.chars().count() / 2)?.0;
    let cut = answer[..middle].rfind(char::is_whitespace).unwrap_or(middle);
    (cut > 0).then(|| answer[..cut].to_owned())
}

/// Rows that [`orders`] scores at most, by all reward models.
pub(super) fn n_rows(answered: &[Answered], frozen: &FrozenModels<'_>) -> usize {
    answered.len() * (1 + DAMAGES.len()) * (1 + frozen.further.len())
}

/// For each kind of damage, which answers of `answered` score above their damaged form; `watch` looks on while rows are scored.
///
/// # Errors
/// If the device cannot be read, or `watch` breaks it off.
pub(crate) fn orders(
    frozen: &FrozenModels<'_>,
    tokenizer: &Tokenizer,
    answered: &[Answered],
    watch: Watch<'_>,
) -> Result<Vec<(&'static About, Vec<f64>)>, ScoreError> {
    let max_seq_len = frozen.score_context();
    let fitting =
        |prompt: &[u32], answer: &str| Answered::row(prompt, answer, tokenizer).filter(|row| row.len() <= max_seq_len);
    let mut rows: Vec<Vec<u32>> = Vec::new();
    // Of each damaged answer: its damage, and the place of the row; of the whole answer the place before all of its.
    let mut compared: Vec<(usize, usize, usize)> = Vec::new();
    for (i, Answered { prompt, answer }) in answered.iter().enumerate() {
        let Some(whole) = fitting(prompt, answer) else { continue };
        let at = rows.len();
        rows.push(whole);
        for (kind, (_, damage)) in DAMAGES.iter().enumerate() {
            if let Some(row) = damage(answered, i).and_then(|damaged| fitting(prompt, &damaged)) {
                compared.push((kind, at, rows.len()));
                rows.push(row);
            }
        }
    }
    let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let scores = frozen.scores_watched(&rows, watch)?;
    let of_kind = |kind: usize| {
        let of_kind = compared.iter().filter(|compared| compared.0 == kind);
        of_kind.map(|&(_, whole, damaged)| win(f64::from(scores[whole]), f64::from(scores[damaged]))).collect()
    };
    Ok(DAMAGES.iter().enumerate().map(|(kind, (about, _))| (*about, of_kind(kind))).collect())
}

/// The checks of [`orders`].
pub(crate) fn order_checks(wins: Vec<(&'static About, Vec<f64>)>) -> Vec<Check> {
    wins.into_iter()
        .map(|(about, wins)| match Interval::of_rate(&wins) {
            Some(share) => {
                let reason = format!("of {} answers, {} score above their damaged form", share.n, interval(share));
                Check::above(about, share, 0.5, reason)
            }
            None => Check::skipped(about, "no answer can be damaged like this and fits the context"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_half_ends_between_words() {
        assert_eq!(first_half("one two three four").as_deref(), Some("one two"));
        assert_eq!(first_half("abcd").as_deref(), Some("ab"));
        assert_eq!(first_half("é"), None);
    }

    #[test]
    fn headroom_is_the_best_over_the_mean_in_deviations() {
        // Scores 0 and 2 to each of two prompts: deviation 1, the best lies 1 above the mean.
        let check = headroom(&[vec![0.0, 2.0], vec![2.0, 0.0]]);
        assert_eq!((check.value, check.verdict), (Some(1.0), Verdict::Pass));
        // All of the variance lies between the prompts.
        assert_eq!(headroom(&[vec![0.0; 2], vec![2.0; 2]]).verdict, Verdict::Fail);
        assert_eq!(headroom(&[vec![1.0; 2], vec![1.0; 2]]).value, None, "a matter of the scores");
    }

    #[test]
    fn the_scale_is_that_of_normalised_scores() {
        let scale = |pair: [f64; 2]| scale(&pair.repeat(8));
        assert_eq!(scale([-1.0, 1.0]).verdict, Verdict::Pass);
        assert_eq!(scale([0.0, 2.0]).verdict, Verdict::Warn);
        assert_eq!(scale([-20.0, 20.0]).verdict, Verdict::Fail);
        assert_eq!(scale([0.0, 0.0]).verdict, Verdict::Fail);
        let shown = |pair: [f64; 2]| scale(pair).value.zip(scale(pair).limit);
        assert_eq!(shown([-1.0, 1.0]), Some((1.0, 2.0)));
        assert_eq!(shown([-3.0, 3.0]), Some((3.0, 2.0)));
        assert_eq!(shown([-0.25, 0.25]), Some((0.25, 0.5)));
        assert_eq!(shown([-3.0, -1.0]), Some((-2.0, -0.5)));
        assert_eq!(shown([-2.0, -1.25]), Some((-1.625, -0.5)), "both are out of bounds, the mean by more");
        assert_eq!(shown([6.0, 8.0]), Some((7.0, 5.0)));
        assert_eq!(super::scale(&[9.0; 3]).value, None, "too few to say");
    }

    #[test]
    fn an_answer_to_another_prompt_is_another_answer() {
        let answered = |prompt: u32, answer: &str| Answered { prompt: vec![prompt], answer: answer.to_owned() };
        let all = [answered(1, "a"), answered(1, "b"), answered(2, "a"), answered(2, "c")];
        let off_prompt = DAMAGES[3].1;
        assert_eq!(off_prompt(&all, 0).as_deref(), Some("c"));
        assert_eq!(off_prompt(&all[..2], 0), None);
    }
}
