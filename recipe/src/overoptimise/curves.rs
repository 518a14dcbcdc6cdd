//! Gold and proxy against the distance from the initial policy.

use common::score::Ensemble;
use common::stats::{Interval, win};
use serde::{Deserialize, Serialize};

use super::fit::{Fit, Form};
use crate::best_of::{expected_of_best, kl};

/// Steps of a policy over which its mean curve is averaged, on either side: a step's 128 answers scatter.
const REACH: usize = 2;

/// One measurement of a policy. Gold and proxy are gains over the initial policy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Point {
    /// n of best-of-n, the step of PPO and RLOO, β of DPO.
    pub at: f64,
    /// Divergence from the initial policy in nats.
    pub kl: f64,
    /// Gain in gold score.
    pub gold: f64,
    /// Gain in the reward model's score.
    pub proxy: f64,
}

/// The points of one seed, nearest first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct SeedCurve {
    /// The seed.
    pub seed: u64,
    /// Its points.
    pub points: Vec<Point>,
}

/// A point of the mean over seeds, with the least and the greatest of them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct MeanPoint {
    /// As of [`Point`].
    pub at: f64,
    /// Mean divergence in nats.
    pub kl: f64,
    /// Mean, least and greatest gain in gold score.
    pub gold: [f64; 3],
    /// The same of the reward model's score.
    pub proxy: [f64; 3],
}

/// One curve of the page.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Curve {
    /// Points of each seed.
    pub seeds: Vec<SeedCurve>,
    /// Their mean.
    pub mean: Vec<MeanPoint>,
    /// The form that fits it.
    pub fit: Option<Fit>,
    /// Index in `mean` of the highest gold.
    pub peak: usize,
}

impl Curve {
    /// Of seeds with as many points each; `None` without a point.
    pub(crate) fn new(form: Form, seeds: Vec<SeedCurve>, smooth: bool) -> Option<Self> {
        let reach = if smooth { REACH } else { 0 };
        let smoothed: Vec<Vec<Point>> = seeds.iter().map(|seed| averaged(&seed.points, reach)).collect();
        let n = smoothed.iter().map(Vec::len).min()?;
        let mean: Vec<MeanPoint> = (0..n)
            .map(|i| {
                let of = |value: fn(&Point) -> f64| smoothed.iter().map(|points| value(&points[i])).collect::<Vec<_>>();
                let band = |values: Vec<f64>| {
                    let mean = values.iter().sum::<f64>() / values.len() as f64;
                    let ends = values.into_iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                        (low.min(value), high.max(value))
                    });
                    [mean, ends.0, ends.1]
                };
                MeanPoint {
                    at: smoothed[0][i].at,
                    kl: band(of(|point| point.kl))[0].max(0.0),
                    gold: band(of(|point| point.gold)),
                    proxy: band(of(|point| point.proxy)),
                }
            })
            .collect();
        let peak = (0..n).max_by(|&a, &b| mean[a].gold[0].total_cmp(&mean[b].gold[0]))?;
        let distances: Vec<Vec<(f64, f64)>> = seeds
            .iter()
            .map(|seed| seed.points.iter().map(|point| (point.kl.max(0.0).sqrt(), point.gold)).collect())
            .collect();
        Some(Self { fit: Fit::of_seeds(form, &distances), seeds, mean, peak })
    }

    /// The largest divergence that was measured, in nats.
    pub(crate) fn reach(&self) -> f64 {
        self.mean.iter().map(|point| point.kl).fold(0.0, f64::max)
    }

    /// Whether every seed has gained gold where their mean is highest.
    pub(crate) fn gains(&self) -> bool {
        self.best().gold[1] > 0.0
    }

    /// Where the fitted curve turns over, if that lies within what was measured. One that gains nothing has nothing to lose.
    pub(crate) fn turn(&self) -> Option<f64> {
        self.fit.and_then(|fit| fit.turn_kl).filter(|kl| self.gains() && *kl <= self.reach())
    }

    /// The highest gain in gold score.
    pub(crate) fn best(&self) -> MeanPoint {
        self.mean[self.peak]
    }

    /// The gain farthest from the initial policy.
    pub(crate) fn last(&self) -> MeanPoint {
        self.mean[self.mean.len() - 1]
    }
}

/// Each point as the mean of those within `reach` of it.
fn averaged(points: &[Point], reach: usize) -> Vec<Point> {
    (0..points.len())
        .map(|i| {
            // As far on either side as there is on both, so that the ends stay where they are.
            let reach = reach.min(i).min(points.len() - 1 - i);
            let window = &points[i - reach..=i + reach];
            let mean = |value: fn(&Point) -> f64| window.iter().map(value).sum::<f64>() / window.len() as f64;
            Point {
                at: points[i].at,
                kl: mean(|point| point.kl),
                gold: mean(|point| point.gold),
                proxy: mean(|point| point.proxy),
            }
        })
        .collect()
}

/// Best-of-n for n = 1, 2, 4, … to the size of the pools, without bias from all answers of a pool.
///
/// `golds` and `scores` are those of the answers, `pool` to a prompt side by side.
///
/// # Panics
/// If the lengths do not agree, or there is no prompt.
pub(crate) fn best_of_n(golds: &[f64], scores: &[f64], pool: usize) -> Vec<Point> {
    assert!(golds.len() == scores.len() && !golds.is_empty() && golds.len().is_multiple_of(pool));
    let pools: Vec<[Vec<f64>; 2]> = golds
        .chunks(pool)
        .zip(scores.chunks(pool))
        .map(|(golds, scores)| {
            let mut order: Vec<usize> = (0..pool).collect();
            order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
            [golds, scores].map(|values| order.iter().map(|&i| values[i]).collect())
        })
        .collect();
    let expected = |of: usize, n: usize| -> f64 {
        pools.iter().map(|pool| expected_of_best(&pool[of], n)).sum::<f64>() / pools.len() as f64
    };
    let start = [expected(0, 1), expected(1, 1)];
    std::iter::successors(Some(1_usize), |n| Some(2 * n))
        .take_while(|&n| n <= pool)
        .map(|n| Point { at: n as f64, kl: kl(n), gold: expected(0, n) - start[0], proxy: expected(1, n) - start[1] })
        .collect()
}

/// The scores of the ensemble, from those of its members, each brought to mean 0 and deviation 1 first.
pub(crate) fn ensemble_scores(ensemble: Ensemble, members: &[Vec<f64>]) -> Vec<f64> {
    let members: Vec<Vec<f64>> = members.iter().map(|scores| standardised(scores)).collect();
    let of_answer = |i: usize| members.iter().map(|member| member[i]).collect::<Vec<f64>>();
    (0..members.first().map_or(0, Vec::len)).map(|i| ensemble.combine(&of_answer(i))).collect()
}

fn standardised(scores: &[f64]) -> Vec<f64> {
    let n = scores.len().max(1) as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let deviation = (scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / n).sqrt().max(f64::MIN_POSITIVE);
    scores.iter().map(|score| (score - mean) / deviation).collect()
}

/// How often the answer of the higher gold score scores higher, of neighbouring answers in a pool that differ by
/// `least_difference` in gold; `None` where no two do. Equal scores count half.
pub(crate) fn accuracy(golds: &[f64], scores: &[f64], pool: usize, least_difference: f64) -> Option<Interval> {
    let right: Vec<f64> = golds
        .chunks(pool)
        .zip(scores.chunks(pool))
        .flat_map(|(golds, scores)| golds.chunks_exact(2).zip(scores.chunks_exact(2)))
        .filter(|(golds, _)| (golds[0] - golds[1]).abs() >= least_difference.max(f64::MIN_POSITIVE))
        .map(|(golds, scores)| if golds[0] > golds[1] { win(scores[0], scores[1]) } else { win(scores[1], scores[0]) })
        .collect();
    Interval::of_rate(&right)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(at: f64, kl: f64, gold: f64) -> Point {
        Point { at, kl, gold, proxy: 2.0 * gold }
    }

    #[test]
    fn the_best_of_a_pool_are_taken_by_score_and_measured_by_gold() {
        // Two prompts with four answers; the score is right in the first pool and turned round in the second.
        let golds = [0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3, 0.4];
        let scores = [1.0, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0];
        let points = best_of_n(&golds, &scores, 4);
        let ns: Vec<f64> = points.iter().map(|point| point.at).collect();
        assert_eq!(ns, [1.0, 2.0, 4.0]);
        assert!(points.iter().all(|point| point.gold.abs() < 1e-12), "{points:?}");
        assert!((points[2].proxy - 1.5).abs() < 1e-12 && points[0].kl == 0.0, "{points:?}");
        let points = best_of_n(&golds[..4], &scores[..4], 4);
        assert!((points[2].gold - 0.15).abs() < 1e-12, "{points:?}");
    }

    #[test]
    fn a_curve_has_its_band_and_its_peak() {
        let seed = |seed, golds: [f64; 4]| SeedCurve {
            seed,
            points: golds.iter().enumerate().map(|(i, &gold)| point(i as f64, (i * i) as f64, gold)).collect(),
        };
        let seeds = vec![seed(1, [0.0, 0.3, 0.4, 0.2]), seed(2, [0.0, 0.1, 0.6, 0.2])];
        let curve = Curve::new(Form::BestOfN, seeds, false).unwrap();
        assert_eq!(curve.peak, 2);
        let best = curve.best();
        assert!((best.gold[0] - 0.5).abs() < 1e-12 && best.gold[1..] == [0.4, 0.6], "{best:?}");
        assert_eq!((curve.reach(), curve.last().gold[0]), (9.0, 0.2));
        assert!(curve.turn().is_some_and(|kl| kl > 1.0 && kl < 9.0), "{curve:?}");
        assert!(Curve::new(Form::Rl, vec![SeedCurve { seed: 1, points: Vec::new() }], true).is_none());

        let falling = Curve::new(Form::BestOfN, vec![seed(1, [0.0, -0.1, -0.3, -0.6])], false).unwrap();
        assert!(!falling.gains() && falling.turn().is_none(), "{falling:?}");
        let short =
            SeedCurve { seed: 1, points: vec![point(0.0, 0.0, 0.0), point(1.0, 1.0, 0.3), point(2.0, 4.0, 0.1)] };
        assert!(Curve::new(Form::Rl, vec![short], false).unwrap().fit.is_none(), "two parameters by three points");
    }

    #[test]
    fn neighbouring_steps_are_averaged_and_the_ends_stay() {
        let points: Vec<Point> = [0.0, 6.0, 0.0, 6.0, 0.0, 6.0].iter().map(|&gold| point(0.0, gold, gold)).collect();
        let golds: Vec<f64> = averaged(&points, 2).iter().map(|point| point.gold).collect();
        assert_eq!(golds, [0.0, 2.0, 2.4, 3.6, 4.0, 6.0]);
    }

    #[test]
    fn ensembles_combine_standardised_scores() {
        let members = [vec![0.0, 2.0, 4.0, 2.0], vec![10.0, 10.0, 30.0, 30.0]];
        // 2 ± √2 and 20 ± 10.
        let root = 2.0_f64.sqrt();
        let close = |found: Vec<f64>, expected: [f64; 4]| {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?} {expected:?}");
        };
        let standard = [[-root, 0.0, root, 0.0], [-1.0, -1.0, 1.0, 1.0]];
        let of = |combine: fn(f64, f64) -> f64| std::array::from_fn(|i| combine(standard[0][i], standard[1][i]));
        close(ensemble_scores(Ensemble::Mean, &members), of(f64::midpoint));
        close(ensemble_scores(Ensemble::Worst, &members), of(f64::min));
        close(
            ensemble_scores(Ensemble::MeanLessVariance, &members),
            of(|a, b| f64::midpoint(a, b) - 0.125 * (a - b) * (a - b)),
        );
    }

    #[test]
    fn accuracy_counts_pairs_that_differ() {
        let golds = [0.1, 0.9, 0.5, 0.55, 0.8, 0.2, 0.1, 0.5];
        let of = |scores: [f64; 8]| accuracy(&golds, &scores, 4, 0.1).map(|rate| (rate.mean, rate.n));
        // Right, too close, wrong or right, a tie.
        assert_eq!(of([0.0, 1.0, 9.0, 1.0, 1.0, 3.0, 2.0, 2.0]), Some((0.5, 3)));
        assert_eq!(of([0.0, 1.0, 9.0, 1.0, 3.0, 1.0, 2.0, 2.0]), Some((2.5 / 3.0, 3)));
        assert_eq!(accuracy(&[0.5, 0.5], &[1.0, 2.0], 2, 0.0), None);
    }
}
