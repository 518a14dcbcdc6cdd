//! Best-of-n: of n answers of the SFT model the one that the reward model scores highest, a policy that nobody has to train.

use common::stats::Interval;
use serde::{Deserialize, Serialize};

use crate::results::ScoredAnswer;

/// What the best of `n` answers come to over the held-out prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestOf {
    /// Answers to choose from.
    pub n: usize,
    /// See [`kl`].
    pub kl: f64,
    /// Gold score, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gold: Option<Interval>,
    /// Gold score if the gold score itself chose among the same answers: what is lost against it is the reward model's doing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gold_of_perfect_choice: Option<Interval>,
    /// The reward model's score.
    pub score: Interval,
    /// Words of an answer.
    pub words: Interval,
    /// Share of answers that stopped by themselves.
    pub ended: Interval,
}

impl BestOf {
    /// Of pools of answers, one a prompt; answers without a score, which did not fit the reward model, are left out. `None` where no
    /// pool has `n` of them.
    pub fn of_pools(pools: &[&[ScoredAnswer]], n: usize) -> Option<Self> {
        let mut best = [const { Vec::new() }; 5];
        for pool in pools {
            let mut scored: Vec<(f64, &ScoredAnswer)> =
                pool.iter().filter_map(|answer| Some((answer.score?, answer))).collect();
            scored.sort_by(|(a, _), (b, _)| a.total_cmp(b));
            if scored.len() < n {
                continue;
            }
            let expected = |value: &dyn Fn(&ScoredAnswer) -> Option<f64>| -> Option<f64> {
                let values = scored.iter().map(|(_, answer)| value(answer)).collect::<Option<Vec<f64>>>();
                values.map(|values| expected_of_best(&values, n))
            };
            best[0].extend(expected(&|answer| answer.gold));
            best[1].extend(expected(&|answer| answer.score));
            best[2].extend(expected(&|answer| Some(answer.text.split_whitespace().count() as f64)));
            best[3].extend(expected(&|answer| Some(f64::from(u8::from(answer.ended)))));
            let golds = scored.iter().map(|(_, answer)| answer.gold).collect::<Option<Vec<f64>>>();
            best[4].extend(golds.map(|mut golds| {
                golds.sort_by(f64::total_cmp);
                expected_of_best(&golds, n)
            }));
        }
        let [gold, score, words, ended, gold_of_perfect_choice] = best.map(|values| Interval::of(&values));
        Some(Self { n, kl: kl(n), gold, gold_of_perfect_choice, score: score?, words: words?, ended: ended? })
    }
}

/// Unbiased estimate of a value of the best of `n` answers, from `N ≥ n` answers in the order of their scores, worst first.
///
/// `Σ_i C(i − 1, n − 1) / C(N, n) · value_i`: the mean over all choices of `n` of them, in which the answer of rank `i` is
/// the best as often as the other `n − 1` lie below it.
///
/// # Panics
/// If `n` is 0 or more than there are values.
///
/// # Source
/// Nakano et al., arXiv:2112.09332; Gao et al., arXiv:2210.10760, which uses it for its curves.
pub fn expected_of_best(values: &[f64], n: usize) -> f64 {
    assert!((1..=values.len()).contains(&n), "the best of {n} out of {}", values.len());
    // C(N − 1, n − 1) / C(N, n), and from rank i + 1 down to i a factor (i − n + 1) / i.
    let mut weight = n as f64 / values.len() as f64;
    let mut sum = 0.0;
    for (i, value) in values.iter().enumerate().skip(n - 1).rev() {
        sum += weight * value;
        weight *= (i + 1 - n) as f64 / i.max(1) as f64;
    }
    sum
}

/// Divergence of best-of-n from the policy that answers, in nats: `log n − (n − 1)/n`.
///
/// An upper bound, exact where no two answers have the same score.
///
/// # Source
/// Stiennon et al., arXiv:2009.01325, appendix G.3; that it is a bound: Beirami et al., arXiv:2401.01879.
pub fn kl(n: usize) -> f64 {
    let n = n as f64;
    n.ln() - (n - 1.0) / n
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mean of the last value over every choice of `n`.
    fn by_all_choices(values: &[f64], n: usize) -> f64 {
        let choices = (0_u32..1 << values.len()).filter(|choice| choice.count_ones() as usize == n);
        let best: Vec<f64> = choices.map(|choice| values[choice.ilog2() as usize]).collect();
        best.iter().sum::<f64>() / best.len() as f64
    }

    #[test]
    fn the_estimate_is_the_mean_over_all_choices() {
        let values = [0.3, -1.0, 0.8, 0.1, 2.0, -0.5, 0.9];
        for n in 1..=values.len() {
            let (estimate, mean) = (expected_of_best(&values, n), by_all_choices(&values, n));
            assert!((estimate - mean).abs() < 1e-12, "best of {n}: {estimate}, {mean}");
        }
        assert!((expected_of_best(&values, 1) - values.iter().sum::<f64>() / 7.0).abs() < 1e-12);
        assert_eq!(expected_of_best(&values, 7), 0.9);
    }

    #[test]
    fn divergences_are_those_of_the_formula() {
        assert_eq!(kl(1), 0.0);
        assert!((kl(4) - (4.0_f64.ln() - 0.75)).abs() < 1e-15 && (kl(16) - 1.835_088_722_239_781).abs() < 1e-12);
    }

    #[test]
    fn answers_are_chosen_by_score_and_measured_by_gold() {
        let answer = |score: Option<f64>, gold: f64, text: &str| ScoredAnswer {
            text: text.to_owned(),
            ended: true,
            tokens: 3,
            gold: Some(gold),
            score,
        };
        // By score: b, c, a; of two, c is the best once and a twice.
        let pool = [
            answer(Some(2.0), 0.3, "a a"),
            answer(Some(-1.0), 0.9, "b"),
            answer(Some(0.5), 0.6, "c c c c c"),
            answer(None, 1.0, "too long"),
        ];
        let best = BestOf::of_pools(&[&pool], 2).unwrap();
        assert!((best.gold.unwrap().mean - 0.4).abs() < 1e-12 && (best.score.mean - 1.5).abs() < 1e-12, "{best:?}");
        // By gold: a, c, b; of two, c is the best once and b twice.
        assert!((best.gold_of_perfect_choice.unwrap().mean - 0.8).abs() < 1e-12, "{best:?}");
        assert!((best.words.mean - 3.0).abs() < 1e-12 && best.ended.mean == 1.0, "{best:?}");
        assert_eq!(BestOf::of_pools(&[&pool], 4), None);
    }
}
