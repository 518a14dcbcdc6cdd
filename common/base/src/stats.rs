//! Means and rates with 95 % intervals, and comparisons of two numbers.

use serde::{Deserialize, Serialize};

/// Two-sided 95 % point of the standard normal distribution.
const Z_95: f64 = 1.959_963_984_540_054;

/// How [`Interval::of`] finds its bounds, in words for the reports.
pub const METHOD: &str = "normal approximation: mean ± 1.96·s/√n over prompts, s² with n − 1; of shares, Wilson’s";

/// A number measured on a sample, such as held-out prompts, and its 95 % interval.
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

    /// A rate with Wilson's interval, which stays within `[0, 1]` and has a width even for 0 and 1; `None` of no values.
    ///
    /// Values lie in `[0, 1]`; a tie of a win rate is ½, for which the interval is a little too wide.
    ///
    /// # Source
    /// Wilson 1927, "Probable inference, the law of succession, and statistical inference", without continuity
    /// correction.
    pub fn of_rate(values: &[f64]) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        let n = values.len() as f64;
        let rate = values.iter().sum::<f64>() / n;
        let z2_n = Z_95 * Z_95 / n;
        let centre = (rate + z2_n / 2.0) / (1.0 + z2_n);
        let half_width = (z2_n * (rate * (1.0 - rate) + z2_n / 4.0)).sqrt() / (1.0 + z2_n);
        let (low, high) = ((centre - half_width).max(0.0), (centre + half_width).min(1.0));
        Some(Self { mean: rate, low, high, n: values.len() })
    }

    /// Standard error of a mean of [`of`](Self::of).
    pub fn standard_error(&self) -> f64 {
        (self.high - self.low) / (2.0 * Z_95)
    }

    /// Whether there are values enough to say how far the mean may be off.
    pub const fn has_width(&self) -> bool {
        self.n > 1
    }

    /// Whether the two intervals share no point; a single value is apart from nothing.
    pub fn is_apart_from(&self, other: &Self) -> bool {
        self.has_width() && other.has_width() && (self.low > other.high || self.high < other.low)
    }
}

/// `value` to so many decimals; what rounds to zero has no sign.
pub fn fixed(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    match text.strip_prefix('-') {
        Some(rest) if !rest.contains(|digit: char| digit != '0' && digit != '.') => rest.to_owned(),
        _ => text,
    }
}

/// 1 where `ours` is larger, ½ where both are equal, else 0.
pub fn win(ours: f64, theirs: f64) -> f64 {
    if ours > theirs {
        1.0
    } else if ours == theirs {
        0.5
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_has_no_sign() {
        assert_eq!([-0.04, -0.05, 0.04, -12.3, -0.0].map(|x| fixed(x, 1)), ["0.0", "-0.1", "0.0", "-12.3", "0.0"]);
        assert_eq!([fixed(-0.4, 0), fixed(f64::NEG_INFINITY, 2)], ["0", "-inf"]);
    }

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
        let one = |x: f64| Interval { mean: x, low: x, high: x, n: 1 };
        assert!(!one(0.0).is_apart_from(&one(1.0)));
        assert!(at(0.0, 1.0).is_apart_from(&at(1.1, 2.0)) && at(1.1, 2.0).is_apart_from(&at(0.0, 1.0)));
    }

    #[test]
    fn a_rate_has_wilsons_interval() {
        // 8 of 10: the textbook's [0.4902, 0.9433].
        let values: Vec<f64> = (0..10).map(|i| f64::from(u8::from(i < 8))).collect();
        let rate = Interval::of_rate(&values).expect("ten values");
        assert!((rate.low - 0.490_16).abs() < 1e-4 && (rate.high - 0.943_32).abs() < 1e-4, "{rate:?}");
        let all = Interval::of_rate(&[1.0; 20]).expect("twenty values");
        assert!(all.low > 0.8 && all.high == 1.0, "{all:?}");
        assert_eq!(Interval::of_rate(&[]), None);
    }

    #[test]
    fn ties_count_half() {
        assert_eq!([win(1.0, 0.5), win(0.5, 0.5), win(0.0, 0.5)], [1.0, 0.5, 0.0]);
    }
}
