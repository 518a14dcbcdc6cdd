//! The gold score of the generated world: does a story do what its request asks, and is it a story?
//!
//! ```text
//! gold = fluency · length · (½·followed + ¼·ends + ¼·fresh)            all in [0, 1]
//! ```
//!
//! - `followed`: the mean over the one to three constraints of the request. A character, a thing or a place counts 1 if
//!   its word stands anywhere in the answer. A thing with a colour counts 1 with the colour right before it, ½ without.
//!   A mood counts 1 if the last sentence has words of that mood and none of the other; ½ if the last sentence has words
//!   of neither and the one before would count 1.
//! - `ends`: 1 if the last sentence ends in one of the world's closing phrases (`a big smile`, `all the way home`) and a
//!   full stop; 0.4 if it ends in any of `. ! ?`; 0 if it stops in the middle.
//! - `fresh`: `max(0, 1 − 4·share)`, where `share` are the words that belong to a sentence said before or to a run
//!   of six words in a sentence said before, of all words.
//! - `length`: 1 from 30 to 85 words, and in that range length does not matter; down to 0 at 10 and at 130 words. At the
//!   short end words that were said before do not count.
//! - `fluency`: `max(0, 1 − 2·(1 − known))`, where `known` is the share of three-word runs which the world's own
//!   sentences contain ([`grammar::known_share`]): words, spelling, capitals, articles and most of the syntax.
//!
//! The first three are what the simulated labeller cares about and so what there is to learn. The two factors keep what
//! is not a story from scoring: a list of the right words has no fluency, two fine sentences no length.

use std::collections::HashSet;

use serde::Serialize;

use crate::grammar;
use crate::plots::{endings, mood_words};
use crate::request::Request;
use crate::text::{sentences, words};
use crate::words::{CHARACTERS, COLOURS, Mood, OBJECTS, PLACES};

/// Credit for an ending that is none of the world's.
const PLAIN_END: f64 = 0.4;
/// Words between which length does not matter.
const FULL_LENGTH: (f64, f64) = (30.0, 85.0);
/// Words at which an answer is worth nothing.
const NO_LENGTH: (f64, f64) = (10.0, 130.0);
/// Penalty for a repeated share of the words.
const REPETITION_COST: f64 = 4.0;
/// Words of a run within a sentence that may not come twice.
const RUN: usize = 6;

/// The parts of a gold score, each in `[0, 1]`; see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Parts {
    /// The named things are there, and the mood.
    pub followed: f64,
    /// The story comes to an end.
    pub ends: f64,
    /// Nothing is said twice.
    pub fresh: f64,
    /// Neither too short nor too long.
    pub length: f64,
    /// The sentences are sentences.
    pub fluency: f64,
}

impl Parts {
    /// The gold score they make.
    pub fn score(&self) -> f64 {
        self.fluency * self.length * (0.5 * self.followed + 0.25 * self.ends + 0.25 * self.fresh)
    }
}

/// The gold score of `response`, in `[0, 1]`; `None` if `prompt` asks for no story.
pub fn score(prompt: &str, response: &str) -> Option<f64> {
    score_parts(prompt, response).map(|parts| parts.score())
}

/// The parts of the gold score of `response`; `None` if `prompt` asks for no story.
pub fn score_parts(prompt: &str, response: &str) -> Option<Parts> {
    let request = Request::parse(prompt)?;
    let sentences = sentences(response);
    let words = words(response);
    let n_repeated = n_repeated(&sentences);
    Some(Parts {
        followed: followed(&request, &words, &sentences),
        ends: sentences.last().map_or(0.0, |last| ends(last)),
        fresh: fresh(n_repeated, words.len()),
        length: length(words.len() - n_repeated, words.len()),
        fluency: (1.0 - 2.0 * (1.0 - grammar::known_share(response))).max(0.0),
    })
}

fn followed(request: &Request, words: &[String], sentences: &[&str]) -> f64 {
    let has = |word: &str| words.iter().any(|w| w == word);
    let mut sum = 0.0;
    if let Some(character) = request.character {
        sum += f64::from(has(CHARACTERS[character].word));
    }
    if let Some((object, colour)) = request.object {
        let object = OBJECTS[object].word;
        let is_right =
            colour.is_none_or(|colour| words.windows(2).any(|pair| pair[0] == COLOURS[colour] && pair[1] == object));
        sum += if is_right { f64::from(has(object)) } else { 0.5 * f64::from(has(object)) };
    }
    if let Some(place) = request.place {
        sum += f64::from(has(PLACES[place].word));
    }
    if let Some(mood) = request.mood {
        sum += mood_of_ending(mood, sentences);
    }
    sum / request.n_constraints() as f64
}

fn mood_of_ending(mood: Mood, sentences: &[&str]) -> f64 {
    // The first of the last two sentences that has a mood at all decides.
    for (sentence, credit) in sentences.iter().rev().zip([1.0, 0.5]) {
        let words = words(sentence);
        let has = |mood| words.iter().any(|word| mood_words(mood).contains(&word.as_str()));
        match (has(mood), has(mood.opposite())) {
            (true, false) => return credit,
            (false, false) => {}
            (_, true) => return 0.0,
        }
    }
    0.0
}

fn ends(last: &str) -> f64 {
    let said = words(last).join(" ");
    let closes = |closing: &&str| said.ends_with(*closing);
    let is_closing = Mood::ALL.into_iter().flat_map(endings).any(|ending| ending.closings.iter().any(&closes));
    if is_closing && last.ends_with('.') {
        1.0
    } else if last.trim_end_matches('"').ends_with(['.', '!', '?']) {
        PLAIN_END
    } else {
        0.0
    }
}

/// How many of the words of `sentences` were said before: in the same sentence, or in the same run of words.
fn n_repeated(sentences: &[&str]) -> usize {
    let sentences: Vec<Vec<String>> = sentences.iter().map(|sentence| words(sentence)).collect();
    let (mut said, mut runs) = (HashSet::new(), HashSet::new());
    let mut n_repeated = 0;
    for sentence in &sentences {
        let mut is_repeated = vec![!said.insert(sentence); sentence.len()];
        for (start, run) in sentence.windows(RUN).enumerate() {
            if !runs.insert(run) {
                is_repeated[start..start + RUN].fill(true);
            }
        }
        n_repeated += is_repeated.iter().filter(|&&repeated| repeated).count();
    }
    n_repeated
}

fn fresh(n_repeated: usize, n_words: usize) -> f64 {
    (1.0 - REPETITION_COST * n_repeated as f64 / n_words.max(1) as f64).max(0.0)
}

fn length(n_new: usize, n_words: usize) -> f64 {
    let rising = (n_new as f64 - NO_LENGTH.0) / (FULL_LENGTH.0 - NO_LENGTH.0);
    let falling = (NO_LENGTH.1 - n_words as f64) / (NO_LENGTH.1 - FULL_LENGTH.1);
    rising.min(falling).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROMPT: &str = "Tell me a story about a fox and a red boat with a happy ending.";
    const STORY: &str = "Once upon a time, a little fox lived near the lake. One day, the fox was playing with his red \
                         boat by the lake. Suddenly, the boat was gone. \"Where is my boat?\" asked the fox. A girl \
                         named Mia came to help. Together, they found the boat under a willow. The fox was very happy.";

    fn gold(response: &str) -> f64 {
        score(PROMPT, response).unwrap()
    }

    #[test]
    fn what_is_asked_for_counts_half() {
        assert_eq!(gold(STORY), 1.0);
        // One of three constraints: a sixth of the score, half that for a colour.
        for (from, to, lost) in [
            ("fox", "cat", 1.0 / 6.0),
            ("boat", "kite", 1.0 / 6.0),
            ("red", "blue", 1.0 / 12.0),
            ("red boat", "boat", 1.0 / 12.0),
            ("very happy", "very sad", 1.0 / 6.0),
        ] {
            let story = STORY.replace(from, to);
            assert!((1.0 - lost - gold(&story)).abs() < 1e-9, "{story}: {}", gold(&story));
        }
        let at_the_park = "Please tell me a story about Mia in the park.";
        let parts = score_parts(at_the_park, STORY).unwrap();
        assert_eq!(parts, Parts { followed: 0.5, ends: 1.0, fresh: 1.0, length: 1.0, fluency: 1.0 });
        assert_eq!(parts.score(), 0.75);
    }

    #[test]
    fn a_mood_before_the_last_sentence_counts_half() {
        let story = STORY.to_owned() + " A girl named Mia came closer.";
        let parts = score_parts(PROMPT, &story).unwrap();
        assert!((parts.followed - 2.5 / 3.0).abs() < 1e-9);
        assert_eq!(parts.ends, PLAIN_END);
        let both = STORY.replace("very happy", "happy and sad");
        assert!((score_parts(PROMPT, &both).unwrap().followed - 2.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn an_ending_counts_a_quarter() {
        let without = STORY.replace(" The fox was very happy.", "");
        let parts = score_parts(PROMPT, &without).unwrap();
        assert_eq!(parts.ends, PLAIN_END);
        let cut = STORY.replace(" a willow. The fox was very happy.", "");
        assert_eq!(score_parts(PROMPT, &cut).unwrap().ends, 0.0);
        // The mood of the ending is gone as well.
        assert!((gold(&cut) - (0.5 * 2.0 / 3.0 + 0.25)).abs() < 1e-9, "{}", gold(&cut));
        assert_eq!(score_parts(PROMPT, STORY.trim_end_matches('.')).unwrap().ends, 0.0);
    }

    #[test]
    fn saying_things_twice_costs_up_to_a_quarter() {
        let again = "A girl named Mia came to help.";
        let story = STORY.replace(again, &format!("{again} {again}"));
        let parts = score_parts(PROMPT, &story).unwrap();
        // 7 of 63 words.
        assert!((parts.fresh - (1.0 - 4.0 * 7.0 / 63.0)).abs() < 1e-9, "{parts:?}");
        let more = STORY.replace(again, &[again; 4].join(" "));
        assert_eq!(score_parts(PROMPT, &more).unwrap().fresh, 0.0);
        // Not the same sentence, but six words of it.
        let run = STORY.replace(again, "Suddenly, the fox was playing with his red ball.");
        assert!(score_parts(PROMPT, &run).unwrap().fresh < 1.0);
    }

    #[test]
    fn length_matters_only_outside_its_range() {
        let of = |n| length(n, n);
        assert_eq!([10, 20, 30, 55, 85, 130].map(of), [0.0, 0.5, 1.0, 1.0, 1.0, 0.0]);
        assert_eq!([0, 5, 131, 9_999].map(of), [0.0; 4]);
        assert!((of(100) - 2.0 / 3.0).abs() < 1e-9);
        assert_eq!(length(20, 60), 0.5);
        let short = "A little fox lived near the lake. He had a red boat. The fox was very happy.";
        assert!(gold(short) < 0.4, "{}", gold(short));
    }

    #[test]
    fn what_is_no_story_scores_little() {
        let shuffled = {
            let mut words: Vec<&str> = STORY.split(' ').collect();
            words.sort_unstable();
            words.join(" ")
        };
        for degenerate in [
            "",
            "fox red boat very happy.",
            &"The fox was very happy. ".repeat(12),
            &"happy ".repeat(50),
            &format!("{}.", ["red boat fox happy"; 12].join(" ")),
            &shuffled,
            PROMPT,
        ] {
            assert!(gold(degenerate) < 0.3, "{degenerate}: {}", gold(degenerate));
        }
        for hopeless in ["", "fox red boat very happy.", &"happy ".repeat(50), &shuffled] {
            assert!(gold(hopeless) < 0.15, "{hopeless}: {}", gold(hopeless));
        }
    }

    #[test]
    fn other_prompts_have_no_gold() {
        for prompt in ["Where was the fox?", "Hello!", "", "Tell me a story."] {
            assert_eq!(score(prompt, STORY), None);
        }
    }

    #[test]
    fn any_text_scores_between_zero_and_one() {
        for text in ["\u{0}", "\"\"\"...!?", "é ü 漢字 🦊", "A A A an an", "\n\n", "The fox\u{a0}was."] {
            assert!((0.0..=1.0).contains(&gold(text)), "{text:?}");
        }
    }
}
