//! Several reward models made one.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Weight of the variance in [`Ensemble::MeanLessVariance`].
const VARIANCE_WEIGHT: f64 = 0.5;

/// How the scores of several reward models become one.
///
/// The scores are taken as they are, so the members' have to be on one scale. Those that `reward-model train` normalises
/// are: of answers of the model that it starts from they have mean 0 and deviation 1.
///
/// # Source
/// Coste et al., "Reward model ensembles help mitigate overoptimization", arXiv:2310.02743: mean, worst-case and
/// uncertainty-weighted optimisation, with the weight 0.5 on the variance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Ensemble {
    /// The mean of their scores.
    #[default]
    Mean,
    /// The lowest of their scores.
    Worst,
    /// Their mean less half their variance.
    MeanLessVariance,
}

impl Ensemble {
    /// Every way.
    pub const ALL: [Self; 3] = [Self::Mean, Self::Worst, Self::MeanLessVariance];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Worst => "worst",
            Self::MeanLessVariance => "mean-less-variance",
        }
    }

    /// The one score of a response that each member gave one of `scores`; of a single member its own.
    ///
    /// # Panics
    /// If there is no member.
    pub fn combine(self, scores: &[f64]) -> f64 {
        assert!(!scores.is_empty(), "an ensemble has a member");
        match self {
            Self::Mean => mean(scores),
            Self::Worst => scores.iter().copied().fold(f64::INFINITY, f64::min),
            Self::MeanLessVariance => mean(scores) - VARIANCE_WEIGHT * variance(scores),
        }
    }
}

/// The standard deviation of the scores that members gave one response: how far they disagree.
pub fn spread(scores: &[f64]) -> f64 {
    variance(scores).sqrt()
}

fn mean(scores: &[f64]) -> f64 {
    scores.iter().sum::<f64>() / scores.len() as f64
}

/// Of all members, divided by their number.
fn variance(scores: &[f64]) -> f64 {
    let mean = mean(scores);
    scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / scores.len() as f64
}

impl fmt::Display for Ensemble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Ensemble {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|ensemble| ensemble.name() == name);
        found.ok_or_else(|| format!("expected {}", Self::ALL.map(|ensemble| format!("`{ensemble}`")).join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_combine_as_worked_by_hand() {
        // Mean 1, variance (1 + 0 + 1)/3.
        let scores = [0.0, 1.0, 2.0];
        let of = |ensemble: Ensemble| ensemble.combine(&scores);
        assert_eq!([of(Ensemble::Mean), of(Ensemble::Worst)], [1.0, 0.0]);
        assert!((of(Ensemble::MeanLessVariance) - (1.0 - 0.5 * 2.0 / 3.0)).abs() < 1e-12);
        assert!((spread(&scores) - (2.0_f64 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn one_member_is_the_ensemble_and_agreement_costs_nothing() {
        for ensemble in Ensemble::ALL {
            assert_eq!(ensemble.combine(&[-0.3]), -0.3);
            assert_eq!(ensemble.combine(&[1.25; 4]), 1.25);
        }
        assert_eq!(spread(&[1.25; 4]), 0.0);
    }

    #[test]
    fn a_name_is_that_of_configurations_and_reads_back() {
        for ensemble in Ensemble::ALL {
            assert_eq!(ensemble.name().parse(), Ok(ensemble));
            // As serde writes it.
            let quoted = format!("{ensemble:?}");
            let kebab: String = quoted
                .chars()
                .enumerate()
                .flat_map(|(i, c)| [(c.is_uppercase() && i > 0).then_some('-'), Some(c.to_ascii_lowercase())])
                .flatten()
                .collect();
            assert_eq!(kebab, ensemble.name());
        }
        assert!("median".parse::<Ensemble>().is_err_and(|error| error.contains("`mean-less-variance`")));
    }
}
