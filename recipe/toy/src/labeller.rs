//! The simulated labeller, of the world's own pairs and of those that a recipe collects for any gold score.

use common::rng::Rng;

/// The labeller's temperature, in units of the gold score.
///
/// Two answers 0.1 apart are put in the wrong order three times in ten, 0.3 apart once in thirteen; over the
/// pairs of this world about one label in eight is wrong, as with people.
pub const TEMPERATURE: f64 = 0.12;

/// Whether the labeller prefers the first of two answers, given their gold scores.
///
/// `P(a preferred) = σ((gold_a − gold_b) / temperature)`
///
/// # Panics
/// If `temperature` is not positive.
///
/// # Source
/// Bradley and Terry 1952, with the gold score over `temperature` as log-strength.
pub fn label_pair(gold_a: f64, gold_b: f64, temperature: f64, rng: &mut Rng) -> bool {
    rng.uniform() < preference(gold_a, gold_b, temperature)
}

/// The probability with which the labeller prefers the first answer, see [`label_pair`].
///
/// # Panics
/// If `temperature` is not positive.
pub fn preference(gold_a: f64, gold_b: f64, temperature: f64) -> f64 {
    assert!(temperature > 0.0, "the labeller's temperature is {temperature}");
    1.0 / (1.0 + (-(gold_a - gold_b) / temperature).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::rng::Streams;

    #[test]
    fn preferences_are_bradley_terry() {
        assert_eq!(preference(0.7, 0.7, TEMPERATURE), 0.5);
        // ln 3 temperatures apart: odds of 3 to 1.
        let apart = 3.0f64.ln() * TEMPERATURE;
        assert!((preference(0.5 + apart, 0.5, TEMPERATURE) - 0.75).abs() < 1e-12);
        let mut rng = Streams::new(0).get("labels", 0);
        let n = (0..40_000).filter(|_| label_pair(0.5 + apart, 0.5, TEMPERATURE, &mut rng)).count();
        // Standard deviation 87: five of them.
        assert!(n.abs_diff(30_000) < 435, "{n}");
    }
}
