//! Pairs that occur twice: in both halves of the data, twice in one, with equal answers, or the other way round.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use common::data::records::Pair;

use super::about;
use super::report::Check;
use super::words::words;

/// A prompt with two answers, by hash.
type Key = (u64, u64, u64);

/// By prompt, preferred and other answer.
fn key(pair: &Pair) -> Key {
    fn hash(value: impl Hash) -> u64 {
        let mut hasher = DefaultHasher::new();
        value.hash(&mut hasher);
        hasher.finish()
    }
    (hash(&pair.prompt), hash(pair.chosen.trim()), hash(pair.rejected.trim()))
}

fn reversed((prompt, chosen, rejected): Key) -> Key {
    (prompt, rejected, chosen)
}

/// Held-out pairs that are training pairs, in either order.
pub(super) fn leaks(training: &[Pair], held_out: &[Pair]) -> Check {
    let known: HashSet<Key> = training.iter().map(key).collect();
    let prompts: HashSet<u64> = known.iter().map(|key| key.0).collect();
    let is_known = |pair: &&Pair| known.contains(&key(pair)) || known.contains(&reversed(key(pair)));
    let n = held_out.len();
    let n_known = held_out.iter().filter(is_known).count();
    let n_prompts = held_out.iter().filter(|pair| prompts.contains(&key(pair).0)).count();
    let reason = format!("{n_known} of {n} held-out pairs are training pairs; {n_prompts} share a prompt with one");
    Check::share(&about::LEAKS, n_known as f64 / n.max(1) as f64, [0.0, 0.05], reason)
}

/// Training pairs that repeat an earlier one, or held-out pairs that do; training pairs whose answers are equal, and whose
/// reverse is among them.
pub(super) fn training(pairs: &[Pair], held_out: &[Pair]) -> [Check; 3] {
    let n = pairs.len();
    let share = |count: usize| count as f64 / n.max(1) as f64;
    let mut counts: HashMap<Key, usize> = HashMap::new();
    for pair in pairs {
        *counts.entry(key(pair)).or_default() += 1;
    }
    let n_repeated = n - counts.len();
    let n_held_out = held_out.len();
    let n_held_out_repeated = n_held_out - held_out.iter().map(key).collect::<HashSet<Key>>().len();
    let n_contradicted = pairs.iter().filter(|pair| counts.contains_key(&reversed(key(pair)))).count();
    let is_tie = |pair: &&Pair| pair.margin == Some(0.0) || words(&pair.chosen).eq(words(&pair.rejected));
    let n_ties = pairs.iter().filter(is_tie).count();
    [
        Check::share(
            &about::DUPLICATES,
            share(n_repeated).max(n_held_out_repeated as f64 / n_held_out.max(1) as f64),
            [0.05, 0.5],
            format!(
                "{n_repeated} of {n} training pairs repeat an earlier one, of {n_held_out} held-out pairs {n_held_out_repeated}"
            ),
        ),
        Check::share(
            &about::TIES,
            share(n_ties),
            [0.05, 0.5],
            format!("{n_ties} of {n} training pairs have equal answers or a margin of 0"),
        ),
        Check::share(
            &about::CONTRADICTIONS,
            share(n_contradicted),
            [0.02, 0.2],
            format!("{n_contradicted} of {n} training pairs are also there in the other order"),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::report::Verdict;
    use super::*;
    use common::conversation::{Message, Role};

    fn pair(prompt: &str, chosen: &str, rejected: &str) -> Pair {
        Pair {
            prompt: vec![Message::new(Role::User, prompt)],
            chosen: chosen.to_owned(),
            rejected: rejected.to_owned(),
            ..Pair::default()
        }
    }

    #[test]
    fn a_leak_is_the_same_prompt_with_the_same_answers_in_either_order() {
        let known = [pair("p", "a", "b"), pair("q", "a", "b")];
        let held_out = [pair("p", "b", "a"), pair("p", "a", "c"), pair("r", "a", "b"), pair("q", "a ", "b")];
        let check = leaks(&known, &held_out);
        assert_eq!((check.value, check.verdict), (Some(0.5), Verdict::Fail));
        assert!(check.reason.ends_with("3 share a prompt with one"), "{}", check.reason);
    }

    #[test]
    fn repeats_ties_and_contradictions_are_counted_apart() {
        let pairs = [
            pair("p", "a", "b"),
            pair("p", "a", "b"),
            pair("p", "b", "a"),
            pair("q", "The end.", "the end"),
            Pair { margin: Some(0.0), ..pair("q", "a", "b") },
        ];
        let values = training(&pairs, &pairs[2..]).map(|check| check.value.expect("a share"));
        assert_eq!(values, [0.2, 0.4, 0.6]);
        assert_eq!(training(&pairs[2..], &pairs[..2])[0].value, Some(0.5), "held-out pairs count too");
    }
}
