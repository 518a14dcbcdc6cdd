//! Questions about a story that was just told, with their answers.

use common::rng::Rng;

use super::story::{Story, definite, introduced, pronoun};
use super::words::{CHARACTERS, COLOURS, OBJECTS, PLACES, capitalised};

/// A question about `story` and its answer; `None` if the story is too broken to ask about.
///
/// Only what the text says is asked for.
pub fn ask(story: &Story, rng: &mut Rng) -> Option<(String, String)> {
    let mut candidates = candidates(story);
    if candidates.is_empty() {
        return None;
    }
    Some(candidates.swap_remove(rng.below(candidates.len())))
}

fn candidates(story: &Story) -> Vec<(String, String)> {
    let content = &story.content;
    let text = story.text();
    let (hero, friend) = (&CHARACTERS[content.hero], &CHARACTERS[content.friend]);
    let (object, place) = (OBJECTS[content.object].word, &PLACES[content.place]);
    let (name, he) = (definite(hero), capitalised(pronoun("he", hero.gender)));
    let says = |word: &str| text.to_lowercase().contains(&format!(" {word}"));
    let in_place = format!("{} the {}", place.preposition, place.word);
    let mut found = Vec::new();
    let mut add = |question: String, answer: String| found.push((question, answer));

    let who = introduced(hero, "");
    add("Who was the story about?".to_owned(), format!("The story was about {}.", with_an(&who)));
    if says(place.word) {
        add(format!("Where was {name}?"), format!("{he} was {in_place}."));
        add("Where did the story happen?".to_owned(), format!("It happened {in_place}."));
    }
    if says(object) {
        if let Some(colour) = content.colour {
            let colour = COLOURS[colour];
            if says(&format!("{colour} {object}")) {
                add(format!("What colour was the {object}?"), format!("The {object} was {colour}."));
            }
        }
        let thing = content.thing();
        add("What was the story about?".to_owned(), format!("It was about {}.", with_an(&format!("a {thing}"))));
    }
    if says(friend.word) {
        let other = introduced(friend, "");
        add("Who else was in the story?".to_owned(), format!("There was {} too.", with_an(&other)));
    }
    let last = story.sentences.last().map_or("", String::as_str);
    if last.ends_with('.') && last.to_lowercase().contains(content.mood.adjective()) {
        let mood = content.mood.adjective();
        add(format!("How did {name} feel at the end?"), format!("{he} was {mood}."));
        add("How did the story end?".to_owned(), format!("It had a {mood} ending."));
    }
    found
}

/// `an owl` for `a owl`.
fn with_an(phrase: &str) -> String {
    match phrase.split_once(' ') {
        Some(("a", rest)) => format!("{} {rest}", super::words::article(rest)),
        _ => phrase.to_owned(),
    }
}
