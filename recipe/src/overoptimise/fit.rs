//! The two forms in which gold reward follows the distance from the initial policy, and their coefficients.
//!
//! # Source
//! Gao, Schulman, Hilton, "Scaling laws for reward model overoptimization", arXiv:2210.10760, section 3: with
//! `d = √KL(π ‖ π_init)` and rewards centred so that `R(0) = 0`, best-of-n follows `d·(α − β·d)` and reinforcement learning
//! `d·(α − β·log d)`.

use common::stats::Interval;
use serde::Serialize;

/// How gold reward depends on the distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Form {
    /// `d·(α − β·d)`.
    BestOfN,
    /// `d·(α − β·log d)`.
    Rl,
}

/// A coefficient with its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Estimate {
    /// The value.
    pub value: f64,
    /// Over seeds where there are several, else of the least squares.
    pub error: f64,
}

/// `R(d)` as one of the two forms has it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Fit {
    /// Which.
    pub form: Form,
    /// Gain at the beginning.
    pub alpha: Estimate,
    /// What bends the curve down.
    pub beta: Estimate,
    /// Where the fitted curve turns over, in nats of KL; `None` where it does not.
    pub turn_kl: Option<f64>,
    /// The same with α and β a standard error lower and higher, and the other way round: where it may turn as well.
    pub turn_range: [Option<f64>; 2],
    /// Share of the variance that the form explains; `None` where all rewards are equal.
    pub r_squared: Option<f64>,
}

impl Form {
    /// What `−β` is multiplied by.
    fn bend(self, d: f64) -> f64 {
        match self {
            Self::BestOfN => d * d,
            Self::Rl => d * d.ln(),
        }
    }

    /// `R(d)`.
    pub(crate) fn reward(self, d: f64, alpha: f64, beta: f64) -> f64 {
        if d == 0.0 { 0.0 } else { alpha * d - beta * self.bend(d) }
    }

    /// The distance of the maximum: `α / 2β`, and `exp(α/β − 1)`.
    fn turn(self, alpha: f64, beta: f64) -> Option<f64> {
        let d = match self {
            _ if beta <= 0.0 => return None,
            Self::BestOfN => alpha / (2.0 * beta),
            Self::Rl => (alpha / beta - 1.0).exp(),
        };
        (d.is_finite() && d > 0.0).then_some(d)
    }
}

/// Fewest points of a seed that are fitted: two more than the form has parameters.
const MIN_POINTS: usize = 4;

impl Fit {
    /// Least squares of the points `(d, R)` of each seed; `None` where a seed has fewer than three beyond 0, or all at one distance.
    pub(crate) fn of_seeds(form: Form, seeds: &[Vec<(f64, f64)>]) -> Option<Self> {
        if seeds.iter().any(|points| points.len() < MIN_POINTS) {
            return None;
        }
        let fits = seeds.iter().map(|points| least_squares(form, points)).collect::<Option<Vec<_>>>()?;
        let over_seeds = |value: fn(&Solution) -> (f64, f64)| -> Option<Estimate> {
            if let [one] = fits.as_slice() {
                let (value, error) = value(one);
                return Some(Estimate { value, error });
            }
            let values: Vec<f64> = fits.iter().map(|fit| value(fit).0).collect();
            let mean = Interval::of(&values)?.mean;
            let n = values.len() as f64;
            let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
            Some(Estimate { value: mean, error: (variance / n).sqrt() })
        };
        let (alpha, beta) = (over_seeds(|fit| fit.alpha)?, over_seeds(|fit| fit.beta)?);
        let all: Vec<(f64, f64)> = seeds.iter().flatten().copied().collect();
        let mean = all.iter().map(|(_, r)| r).sum::<f64>() / all.len() as f64;
        let sum = |residual: &dyn Fn(f64, f64) -> f64| all.iter().map(|&(d, r)| residual(d, r).powi(2)).sum::<f64>();
        let left = sum(&|d, r| r - form.reward(d, alpha.value, beta.value));
        let turn = |errors: f64| {
            let (alpha, beta) = (alpha.value - errors * alpha.error, beta.value + errors * beta.error);
            form.turn(alpha, beta).map(|d| d * d)
        };
        let (turn_kl, turn_range) = (turn(0.0), [turn(1.0), turn(-1.0)]);
        let variance = sum(&|_, r| r - mean);
        Some(Self {
            form,
            alpha,
            beta,
            turn_kl,
            turn_range,
            r_squared: (variance > 0.0).then(|| 1.0 - left / variance),
        })
    }
}

/// Coefficients, each with its standard error.
#[derive(Clone, Copy, Debug)]
struct Solution {
    alpha: (f64, f64),
    beta: (f64, f64),
}

/// The normal equations of two regressors without a constant; errors from the variance of the residuals.
fn least_squares(form: Form, points: &[(f64, f64)]) -> Option<Solution> {
    let rows: Vec<[f64; 3]> =
        points.iter().filter(|(d, _)| *d > 0.0).map(|&(d, reward)| [d, -form.bend(d), reward]).collect();
    if rows.len() < 3 {
        return None;
    }
    let dot = |i: usize, j: usize| rows.iter().map(|row| row[i] * row[j]).sum::<f64>();
    let (aa, ab, bb, ar, br) = (dot(0, 0), dot(0, 1), dot(1, 1), dot(0, 2), dot(1, 2));
    let determinant = aa * bb - ab * ab;
    if determinant <= 1e-12 * aa * bb {
        return None;
    }
    let (alpha, beta) = ((ar * bb - br * ab) / determinant, (br * aa - ar * ab) / determinant);
    let left: f64 = rows.iter().map(|[a, b, reward]| (reward - alpha * a - beta * b).powi(2)).sum();
    let variance = left / (rows.len() - 2) as f64;
    let error = |diagonal: f64| (variance * diagonal / determinant).sqrt();
    Some(Solution { alpha: (alpha, error(bb)), beta: (beta, error(aa)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(form: Form, alpha: f64, beta: f64) -> Vec<(f64, f64)> {
        (0..20).map(|i| f64::from(i) * 0.15).map(|d| (d, form.reward(d, alpha, beta))).collect()
    }

    #[test]
    fn coefficients_of_exact_curves_are_found() {
        for (form, turn_kl) in
            [(Form::BestOfN, (0.5_f64 / 0.4).powi(2)), (Form::Rl, (2.0 * (0.5_f64 / 0.2 - 1.0)).exp())]
        {
            let fit = Fit::of_seeds(form, &[points(form, 0.5, 0.2)]).unwrap();
            assert!((fit.alpha.value - 0.5).abs() < 1e-12 && (fit.beta.value - 0.2).abs() < 1e-12, "{fit:?}");
            assert!(fit.alpha.error < 1e-12 && (fit.r_squared.unwrap() - 1.0).abs() < 1e-12, "{fit:?}");
            assert!((fit.turn_kl.unwrap() / turn_kl - 1.0).abs() < 1e-9, "{fit:?}");
        }
    }

    /// Against numpy: `np.linalg.lstsq` and the usual covariance `s²·(XᵀX)⁻¹`, see tests/oracles/overoptimise.py.
    #[test]
    fn errors_of_one_seed_are_those_of_least_squares() {
        let points = [(0.3, 0.14), (0.6, 0.2), (0.9, 0.31), (1.2, 0.27), (1.5, 0.3), (1.8, 0.22)];
        let bon = Fit::of_seeds(Form::BestOfN, &[points.to_vec()]).unwrap();
        let rl = Fit::of_seeds(Form::Rl, &[points.to_vec()]).unwrap();
        let found = [bon.alpha.value, bon.alpha.error, bon.beta.value, bon.beta.error].into_iter().chain([
            rl.alpha.value,
            rl.alpha.error,
            rl.beta.value,
            rl.beta.error,
        ]);
        for (found, expected) in found.zip(NUMPY) {
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
    }

    const NUMPY: [f64; 8] = [
        0.495_982_142_857,
        0.037_533_865_448,
        0.205_853_174_603,
        0.025_022_576_965,
        0.271_127_974_146,
        0.018_133_841_778,
        0.225_615_179_503,
        0.039_001_061_848,
    ];

    #[test]
    fn with_several_seeds_the_error_is_theirs() {
        let seeds = [points(Form::BestOfN, 0.4, 0.1), points(Form::BestOfN, 0.6, 0.3)];
        let fit = Fit::of_seeds(Form::BestOfN, &seeds).unwrap();
        assert!((fit.alpha.value - 0.5).abs() < 1e-12 && (fit.alpha.error - 0.1).abs() < 1e-12, "{fit:?}");
    }

    #[test]
    fn what_cannot_be_fitted_is_not() {
        assert_eq!(Fit::of_seeds(Form::Rl, &[vec![(0.0, 0.0), (1.0, 0.2), (2.0, 0.3)]]), None);
        assert_eq!(Fit::of_seeds(Form::Rl, &[vec![(1.0, 0.1), (1.0, 0.2), (1.0, 0.3)]]), None);
        let rising = Fit::of_seeds(Form::BestOfN, &[points(Form::BestOfN, 0.5, -0.1)]).unwrap();
        assert_eq!(rising.turn_kl, None);
        let seeds = [points(Form::BestOfN, 0.4, 0.1), points(Form::BestOfN, 0.6, 0.3)];
        let fit = Fit::of_seeds(Form::BestOfN, &seeds).unwrap();
        // α 0.5 ± 0.1, β 0.2 ± 0.1.
        let [low, high] = fit.turn_range.map(|kl| kl.unwrap().sqrt());
        assert!((low - 0.4 / 0.6).abs() < 1e-9 && (high - 0.6 / 0.2).abs() < 1e-9, "{fit:?}");
    }
}
