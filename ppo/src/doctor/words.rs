//! The baseline that knows words alone: logistic regression on the difference of two answers' word counts.

use std::collections::HashMap;

use common::data::records::Pair;
use common::stats::win;

/// Passes over the training pairs.
const EPOCHS: usize = 5;

/// Step of a weight at its first update; later ones are divided by the root of its summed squared gradients.
const STEP: f64 = 0.5;

/// Weight of the penalty `½‖w‖²` a pair.
const PENALTY: f64 = 1e-4;

/// A weight for each word of the training pairs.
#[derive(Debug)]
pub(super) struct BagOfWords {
    weights: HashMap<String, f64>,
}

impl BagOfWords {
    /// Fits the weights by `AdaGrad`: `P(chosen) = σ(Σ w·(count in chosen − count in rejected))`.
    ///
    /// # Source
    /// Duchi et al., "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR 12, 2011.
    pub(super) fn fit(pairs: &[Pair]) -> Self {
        let mut index: HashMap<String, usize> = HashMap::new();
        let rows: Vec<Vec<(usize, f64)>> = pairs
            .iter()
            .map(|pair| {
                let place = |(word, count)| {
                    let next = index.len();
                    (*index.entry(word).or_insert(next), count)
                };
                differences(pair).into_iter().map(place).collect()
            })
            .collect();
        let (mut weights, mut squares) = (vec![0.0; index.len()], vec![0.0; index.len()]);
        for _ in 0..EPOCHS {
            for row in &rows {
                let distance: f64 = row.iter().map(|&(word, count)| weights[word] * count).sum();
                let wrong = 1.0 / (1.0 + distance.exp());
                for &(word, count) in row {
                    let gradient = PENALTY * weights[word] - wrong * count;
                    squares[word] += gradient * gradient;
                    if squares[word] > 0.0 {
                        weights[word] -= STEP * gradient / squares[word].sqrt();
                    }
                }
            }
        }
        Self { weights: index.into_iter().map(|(word, i)| (word, weights[i])).collect() }
    }

    /// Whether the words prefer the chosen answer: 1, 0, or ½ for none.
    pub(super) fn wins(&self, pair: &Pair) -> f64 {
        let of_word = |(word, count): (String, f64)| self.weights.get(&word).map_or(0.0, |weight| weight * count);
        win(differences(pair).into_iter().map(of_word).sum(), 0.0)
    }
}

/// Every word with how much more often the chosen answer has it, in the order of the words.
fn differences(pair: &Pair) -> Vec<(String, f64)> {
    let mut counts: std::collections::BTreeMap<String, f64> = std::collections::BTreeMap::new();
    for (text, sign) in [(&pair.chosen, 1.0), (&pair.rejected, -1.0)] {
        for word in words(text) {
            *counts.entry(word).or_default() += sign;
        }
    }
    counts.into_iter().filter(|(_, count)| *count != 0.0).collect()
}

/// The words of a text in lower case.
pub(super) fn words(text: &str) -> impl Iterator<Item = String> {
    let parts = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    parts.map(str::to_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(chosen: &str, rejected: &str) -> Pair {
        Pair { chosen: chosen.to_owned(), rejected: rejected.to_owned(), ..Pair::default() }
    }

    #[test]
    fn words_that_decide_are_found_among_others() {
        let training: Vec<Pair> =
            (0..60).map(|i| pair(&format!("the {} is good", i % 7), &format!("the {} is bad", i % 5))).collect();
        let bag = BagOfWords::fit(&training);
        assert_eq!(bag.wins(&pair("good news", "bad news")), 1.0);
        assert_eq!(bag.wins(&pair("bad, news", "Good news")), 0.0);
        assert_eq!(bag.wins(&pair("one", "two")), 0.5);
    }
}
