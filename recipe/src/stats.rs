//! Means with 95 % intervals, as the report prints them.

use serde::{Deserialize, Serialize};

/// Two-sided 95 % point of the standard normal distribution.
const Z_95: f64 = 1.959_963_984_540_054;

/// How [`Interval::of`] finds its bounds, in words for the reports.
pub const METHOD: &str = "normal approximation: mean ± 1.96·s/√n over prompts, s² with n − 1";

/// A mean over held-out prompts and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The mean.
    pub mean: f64,
    /// Lower end of the 95 % interval.
    pub low: f64,
    /// Upper end of the 95 % interval.
    pub high: f64,
    /// How many values were averaged.
    pub n: usize,
}

impl Interval {
    /// Mean and 95 % interval of independent values.
    ///
    /// `mean ± 1.96·s/√n` with `s² = Σ(x − mean)²/(n − 1)`, the normal approximation: with the hundreds of prompts used
    /// here Student's t would widen it by less than one per cent. One value has the interval of width 0, none gives `None`.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let half_width = if n < 2 {
            0.0
        } else {
            let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
            Z_95 * (variance / n as f64).sqrt()
        };
        Some(Self { mean, low: mean - half_width, high: mean + half_width, n })
    }

    /// Whether the two intervals share no point.
    pub fn is_apart_from(&self, other: &Self) -> bool {
        self.low > other.high || self.high < other.low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interval_of_a_hand_worked_sample() {
        // mean 2, deviations −1, 0, 1: s² = 2/2 = 1, so the half width is 1.96/√3 = 1.1316.
        let interval = Interval::of(&[1.0, 2.0, 3.0]).expect("three values");
        assert_eq!((interval.mean, interval.n), (2.0, 3));
        assert!((interval.high - 2.0 - 1.131_586).abs() < 1e-6, "{interval:?}");
        assert!((interval.low - 2.0 + 1.131_586).abs() < 1e-6, "{interval:?}");
    }

    #[test]
    fn no_values_have_no_interval_and_one_value_has_width_zero() {
        assert_eq!(Interval::of(&[]), None);
        assert_eq!(Interval::of(&[0.5]), Some(Interval { mean: 0.5, low: 0.5, high: 0.5, n: 1 }));
    }

    #[test]
    fn touching_intervals_are_not_apart() {
        let at = |low, high| Interval { mean: f64::midpoint(low, high), low, high, n: 10 };
        assert!(!at(0.0, 1.0).is_apart_from(&at(1.0, 2.0)));
        assert!(at(0.0, 1.0).is_apart_from(&at(1.1, 2.0)) && at(1.1, 2.0).is_apart_from(&at(0.0, 1.0)));
    }
}
