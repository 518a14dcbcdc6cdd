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
//! - `length`: 1 from 30 to 85 words, and in that range length does not matter; down to 0 at 10 and at 130 words.
//! - `fluency`: `max(0, 1 − 2·(1 − known))`, where `known` is the share of three-word runs which the world's own
//!   sentences contain ([`grammar::known_share`]): words, spelling, capitals, articles and most of the syntax.
//!
//! The first three are what the simulated labeller cares about and so what there is to learn. The two factors keep what
//! is not a story from scoring: a list of the right words has no fluency, two fine sentences no length.

use std::collections::HashSet;

use serde::Serialize;

use super::grammar;
use crate::world::plots::{endings, mood_words};
use crate::world::request::Request;
use crate::world::text::{sentences, words};
use crate::world::words::{CHARACTERS, COLOURS, Mood, OBJECTS, PLACES};

/// What a story needs that has an end, but none of the world's.
const PLAIN_END: f64 = 0.4;
/// Words between which length does not matter.
const FULL_LENGTH: (f64, f64) = (30.0, 85.0);
/// Words at which an answer is worth nothing.
const NO_LENGTH: (f64, f64) = (10.0, 130.0);
/// What a repeated share of the words costs.
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
    Some(Parts {
        followed: followed(&request, &words, &sentences),
        ends: sentences.last().map_or(0.0, |last| ends(last)),
        fresh: fresh(&sentences),
        length: length(words.len()),
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
        let is_right = colour.is_none_or(|colour| {
            words.windows(2).any(|pair| pair[0] == COLOURS[colour] && pair[1] == object)
        });
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
    let is_closing =
        Mood::ALL.into_iter().flat_map(endings).any(|ending| ending.closings.iter().any(|c| closes(c)));
    if is_closing && last.ends_with('.') {
        1.0
    } else if last.trim_end_matches('"').ends_with(['.', '!', '?']) {
        PLAIN_END
    } else {
        0.0
    }
}

fn fresh(sentences: &[&str]) -> f64 {
    let sentences: Vec<Vec<String>> = sentences.iter().map(|sentence| words(sentence)).collect();
    let (mut said, mut runs) = (HashSet::new(), HashSet::new());
    let (mut n_words, mut n_repeated) = (0, 0);
    for sentence in &sentences {
        let mut is_repeated = vec![!said.insert(sentence); sentence.len()];
        for (start, run) in sentence.windows(RUN).enumerate() {
            if !runs.insert(run) {
                is_repeated[start..start + RUN].fill(true);
            }
        }
        n_words += sentence.len();
        n_repeated += is_repeated.iter().filter(|&&repeated| repeated).count();
    }
    (1.0 - REPETITION_COST * n_repeated as f64 / n_words.max(1) as f64).max(0.0)
}

fn length(n_words: usize) -> f64 {
    let n = n_words as f64;
    let rising = (n - NO_LENGTH.0) / (FULL_LENGTH.0 - NO_LENGTH.0);
    let falling = (NO_LENGTH.1 - n) / (NO_LENGTH.1 - FULL_LENGTH.1);
    rising.min(falling).clamp(0.0, 1.0)
}
