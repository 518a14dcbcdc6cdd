//! Answers of mixed quality: how an imperfect story-teller goes wrong, and how often.

use common::rng::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::request::Request;
use super::story::{Content, Story, more_events, tell};
use super::words::{CHARACTERS, COLOURS, OBJECTS, PLACES};

/// How often an answer has each flaw: probabilities, independent of each other.
///
/// With the defaults the mean gold score is near 0.67.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FlawRates {
    /// Probability, for each character, thing and place asked for, that the story is about another one.
    #[schemars(range(min = 0, max = 1))]
    pub wrong_thing: f64,
    /// Probability, for each colour asked for, that the thing has another colour or none.
    #[schemars(range(min = 0, max = 1))]
    pub wrong_colour: f64,
    /// Probability that a story for which a mood was asked ends in the other mood.
    #[schemars(range(min = 0, max = 1))]
    pub wrong_mood: f64,
    /// Probability that a story stops before its ending, after a sentence or in the middle of one.
    #[schemars(range(min = 0, max = 1))]
    pub no_ending: f64,
    /// Probability that a sentence or two are repeated.
    #[schemars(range(min = 0, max = 1))]
    pub repetition: f64,
    /// Probability that a story is hardly more than its first sentence and ending.
    #[schemars(range(min = 0, max = 1))]
    pub too_short: f64,
    /// Probability that a story goes on for too long before it ends; with `too_short` at most 1.
    #[schemars(range(min = 0, max = 1))]
    pub too_long: f64,
}

impl Default for FlawRates {
    fn default() -> Self {
        Self {
            wrong_thing: 0.12,
            wrong_colour: 0.12,
            wrong_mood: 0.4,
            no_ending: 0.35,
            repetition: 0.35,
            too_short: 0.09,
            too_long: 0.08,
        }
    }
}

impl FlawRates {
    /// A story-teller who makes no mistakes.
    pub const NONE: Self = Self {
        wrong_thing: 0.0,
        wrong_colour: 0.0,
        wrong_mood: 0.0,
        no_ending: 0.0,
        repetition: 0.0,
        too_short: 0.0,
        too_long: 0.0,
    };

    /// The rates by name.
    pub const fn named(&self) -> [(&'static str, f64); 7] {
        [
            ("wrong_thing", self.wrong_thing),
            ("wrong_colour", self.wrong_colour),
            ("wrong_mood", self.wrong_mood),
            ("no_ending", self.no_ending),
            ("repetition", self.repetition),
            ("too_short", self.too_short),
            ("too_long", self.too_long),
        ]
    }
}

/// How often a story to pretrain on has each flaw: probabilities, independent of each other; 0 by default.
///
/// Such a story always has the characters, things, colours and places of its title or request: only so can a model learn
/// to use what it is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StoryFlawRates {
    /// Probability that a story for which a mood was asked ends in the other mood.
    #[schemars(range(min = 0, max = 1))]
    pub wrong_mood: f64,
    /// Probability that a story stops before its ending, after a sentence or in the middle of one.
    #[schemars(range(min = 0, max = 1))]
    pub no_ending: f64,
    /// Probability that a sentence or two are repeated.
    #[schemars(range(min = 0, max = 1))]
    pub repetition: f64,
    /// Probability that a story is hardly more than its first sentence and ending.
    #[schemars(range(min = 0, max = 1))]
    pub too_short: f64,
    /// Probability that a story goes on for too long before it ends; with `too_short` at most 1.
    #[schemars(range(min = 0, max = 1))]
    pub too_long: f64,
}

impl From<StoryFlawRates> for FlawRates {
    fn from(rates: StoryFlawRates) -> Self {
        let StoryFlawRates { wrong_mood, no_ending, repetition, too_short, too_long } = rates;
        Self { wrong_mood, no_ending, repetition, too_short, too_long, ..Self::NONE }
    }
}

/// An answer to `request`, flawed at `rates`.
pub fn answer(request: &Request, rates: &FlawRates, rng: &mut Rng) -> Story {
    let content = misheard(&Content::for_request(request, rng), request, rates, rng);
    let mut story = tell(&content, rng);
    // At most one of the two, so that their rates stay what they say.
    let length = rng.uniform();
    if length < rates.too_short {
        shorten(&mut story, rng);
    } else if length < rates.too_short + rates.too_long {
        lengthen(&mut story, rng);
    }
    if rng.uniform() < rates.repetition {
        repeat(&mut story, rng);
    }
    if rng.uniform() < rates.no_ending {
        cut(&mut story, rng);
    }
    story
}

/// `content` with some of what `request` names taken wrongly.
fn misheard(content: &Content, request: &Request, rates: &FlawRates, rng: &mut Rng) -> Content {
    let mut told = *content;
    let other = |n: usize, not: usize, rng: &mut Rng| (not + 1 + rng.below(n - 1)) % n;
    if let Some(hero) = request.character
        && rng.uniform() < rates.wrong_thing
    {
        told.hero = other(CHARACTERS.len(), hero, rng);
        while told.friend == told.hero || told.friend == hero {
            told.friend = rng.below(CHARACTERS.len());
        }
    }
    if let Some((object, colour)) = request.object {
        if rng.uniform() < rates.wrong_thing {
            // Any other thing fits the plot but one that needs no practice.
            loop {
                told.object = other(OBJECTS.len(), object, rng);
                if OBJECTS[told.object].is_skill || !super::plots::PLOTS[told.plot].needs_skill {
                    break;
                }
            }
        }
        if let Some(colour) = colour
            && rng.uniform() < rates.wrong_colour
        {
            told.colour = (rng.uniform() < 0.5).then(|| other(COLOURS.len(), colour, rng));
        }
    }
    if let Some(place) = request.place
        && rng.uniform() < rates.wrong_thing
    {
        told.place = other(PLACES.len(), place, rng);
    }
    if let Some(mood) = request.mood
        && rng.uniform() < rates.wrong_mood
    {
        told.mood = mood.opposite();
    }
    told
}

/// Keeps the first sentence or two, and the ending.
fn shorten(story: &mut Story, rng: &mut Rng) {
    let n_kept = 1 + rng.below(2);
    let ending = story.sentences.len() - 1;
    story.sentences.drain(n_kept..ending);
}

/// Puts the events of another plot before the ending.
fn lengthen(story: &mut Story, rng: &mut Rng) {
    let ending = story.sentences.pop();
    while story.n_words() < TOO_LONG_WORDS {
        let more = more_events(&story.content, rng);
        for sentence in more {
            // A story that goes on is one flaw, one that says things twice another.
            if !story.sentences.contains(&sentence) {
                story.sentences.push(sentence);
            }
        }
    }
    story.sentences.extend(ending);
}

/// Says one or two sentences again: at once, or later on.
fn repeat(story: &mut Story, rng: &mut Rng) {
    for _ in 0..=rng.below(2) {
        let n = story.sentences.len();
        // The ending is said once, and the shortest stories have nothing but a beginning to repeat.
        let from = rng.below(n - 1);
        let to = if rng.uniform() < 0.6 { from + 1 } else { from + 1 + rng.below(n - 1 - from) };
        let again = story.sentences[from].clone();
        story.sentences.insert(to, again);
    }
}

/// Takes away the ending, and sometimes the end of the sentence before it.
fn cut(story: &mut Story, rng: &mut Rng) {
    story.sentences.pop();
    if rng.uniform() < 0.5 {
        return;
    }
    if let Some(last) = story.sentences.last_mut() {
        let words: Vec<&str> = last.split(' ').collect();
        let n_kept = 1 + rng.below(words.len().saturating_sub(2).max(1));
        let kept = words[..n_kept].join(" ");
        kept.trim_end_matches(['.', '!', '?', ',', '"']).clone_into(last);
    }
}

/// A story is too long from here on.
const TOO_LONG_WORDS: usize = 90;
