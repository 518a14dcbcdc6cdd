//! Which runs of three words the world's own sentences contain.
//!
//! Names, animals, things, colours and places stand for their class, so `saw a red` is known if any `saw a` with a
//! colour is. A run never crosses the end of a sentence. The set follows from the templates, not from samples.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::OnceLock;

use crate::plots::{OPENINGS, PLOTS, TRAITS, endings};
use crate::story::every_filling;
use crate::template::{Part, parse};
use crate::text::tokens;
use crate::words::{Mood, article, capitalised, class_of};

/// The share of known runs among all runs of three in `text`: 1 for every story of the world, 0 without words.
pub fn known_share(text: &str) -> f64 {
    let grammar = Grammar::get();
    let tokens = tokens(text);
    let (mut n_known, mut n_all) = (0usize, 0usize);
    let mut before = START;
    for (i, token) in tokens.iter().enumerate() {
        if is_skipped(before, token) {
            continue;
        }
        let next = tokens.get(i + 1).copied().unwrap_or_default();
        let symbol = grammar.symbols.get(&symbol_of(token, Some(next))).copied().unwrap_or(UNKNOWN);
        n_all += 1;
        n_known += usize::from(grammar.runs.contains(&[before[0], before[1], symbol]));
        before = following(before, token, symbol);
    }
    if n_all == 0 { 0.0 } else { n_known as f64 / n_all as f64 }
}

/// A word, a mark or a class.
type Symbol = u16;

/// No word yet: the beginning of a sentence.
const BEGIN: Symbol = 0;
const UNKNOWN: Symbol = Symbol::MAX;
const START: [Symbol; 2] = [BEGIN, BEGIN];

struct Grammar {
    symbols: HashMap<String, Symbol>,
    fillings: HashMap<String, Vec<String>>,
    runs: HashSet<[Symbol; 3]>,
}

impl Grammar {
    fn get() -> &'static Self {
        static GRAMMAR: OnceLock<Grammar> = OnceLock::new();
        GRAMMAR.get_or_init(|| {
            let mut grammar = Self { symbols: HashMap::new(), fillings: HashMap::new(), runs: HashSet::new() };
            for template in templates() {
                grammar.walk(&parse(template), BTreeSet::from([START]));
            }
            grammar
        })
    }

    /// Takes all ways through `parts` from each state in `states`; a state is the two symbols before.
    fn walk(&mut self, parts: &[Part<'_>], mut states: BTreeSet<[Symbol; 2]>) -> BTreeSet<[Symbol; 2]> {
        for part in parts {
            states = match part {
                Part::Text(text) => self.step(text, states),
                Part::Choice(ways) => ways.iter().flat_map(|way| self.walk(way, states.clone())).collect(),
                Part::Slot(slot) => self
                    .fillings
                    .entry((*slot).to_owned())
                    .or_insert_with(|| every_filling(slot))
                    .clone()
                    .iter()
                    .flat_map(|filling| self.walk(&parse(filling), states.clone()))
                    .collect(),
            };
        }
        states
    }

    fn step(&mut self, text: &str, mut states: BTreeSet<[Symbol; 2]>) -> BTreeSet<[Symbol; 2]> {
        for token in tokens(text) {
            let name = symbol_of(token, None);
            let n_symbols = self.symbols.len() as Symbol;
            let symbol = *self.symbols.entry(name).or_insert(n_symbols + 1);
            states = states
                .into_iter()
                .map(|before| {
                    if is_skipped(before, token) {
                        return before;
                    }
                    self.runs.insert([before[0], before[1], symbol]);
                    following(before, token, symbol)
                })
                .collect();
        }
        states
    }
}

fn templates() -> impl Iterator<Item = &'static str> {
    let openings = OPENINGS.iter().map(|opening| opening.template);
    let events =
        PLOTS.iter().flat_map(|plot| plot.beats.iter().chain(plot.happy).chain(plot.sad)).flat_map(|beat| *beat);
    let last = Mood::ALL.into_iter().flat_map(endings).map(|ending| ending.template);
    openings.chain(TRAITS.iter().copied()).chain(events.copied()).chain(last)
}

/// Speech begins and ends where sentences do; its marks tell nothing there.
fn is_skipped(before: [Symbol; 2], token: &str) -> bool {
    before == START && token == "\""
}

fn following(before: [Symbol; 2], token: &str, symbol: Symbol) -> [Symbol; 2] {
    if matches!(token, "." | "!" | "?") { START } else { [before[1], symbol] }
}

/// The name of what `token` stands for. With `next` given, `a` and `an` count only where they are right.
fn symbol_of(token: &str, next: Option<&str>) -> String {
    let lower = token.to_lowercase();
    if lower == "a" || lower == "an" {
        let is_right = next.is_none_or(|next| article(next) == lower);
        return if is_right { token[..1].to_owned() } else { format!("{token}?") };
    }
    match class_of(&lower) {
        Some("NAME") if token == capitalised(&lower) => "NAME".to_owned(),
        Some(class) if class != "NAME" && token == lower => class.to_owned(),
        _ => token.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_sentences_are_known_and_others_are_not() {
        for good in [
            "Mia was very happy.",
            "On a warm day, a gentle owl went to the park. Soon, the owl found an orange kite under a bench.",
            "\"That boat is mine!\" said Tom.",
        ] {
            assert_eq!(known_share(good), 1.0, "{good}");
        }
        for bad in [
            "Mia was very happy happy.",
            "a gentle owl went to the park",
            "On a warm day, an gentle owl went to the park.",
            "Soon, the owl found a orange kite under a bench.",
            "Mia found zebras.",
            "fox boat park happy",
            "Soon, mia found a kite near the swings.",
        ] {
            assert!(known_share(bad) < 0.95, "{bad}: {}", known_share(bad));
        }
        assert_eq!(known_share(""), 0.0);
    }
}
