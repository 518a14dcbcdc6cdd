//! The story-teller: a cast and a plot become sentences.

use std::collections::BTreeSet;

use common::rng::{Rng, Streams};

use super::plots::{self, LOOKS, OPENINGS, PLOTS, TRAITS, WEATHER, WHEN_BEGUN, WHEN_HABIT};
use super::request::Request;
use super::template::realise;
use super::text::{sentences, words};
use super::words::{CHARACTERS, COLOURS, Character, Damage, Gender, Mood, OBJECTS, PLACES, capitalised};

/// Words a good story has, at least and at most. Within them length does not matter.
pub const STORY_WORDS: std::ops::RangeInclusive<usize> = 35..=75;

/// Everything that is settled before a story is told. Indices point into [`super::words`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// Who the story is about.
    pub hero: usize,
    /// The other character.
    pub friend: usize,
    /// The thing.
    pub object: usize,
    /// Its colour; some things have none.
    pub colour: Option<usize>,
    /// Where it happens.
    pub place: usize,
    /// How it ends.
    pub mood: Mood,
    /// Index of the plot in [`PLOTS`].
    pub plot: usize,
}

impl Content {
    /// A story that `request` asks for; what it leaves open is drawn.
    pub fn for_request(request: &Request, rng: &mut Rng) -> Self {
        let hero = request.character.unwrap_or_else(|| rng.below(CHARACTERS.len()));
        let friend = (hero + 1 + rng.below(CHARACTERS.len() - 1)) % CHARACTERS.len();
        let (object, asked_colour) = request.object.unwrap_or_else(|| (rng.below(OBJECTS.len()), None));
        let colour = asked_colour.or_else(|| (rng.uniform() < 0.7).then(|| rng.below(COLOURS.len())));
        let plot = loop {
            let plot = rng.below(PLOTS.len());
            if OBJECTS[object].is_skill || !PLOTS[plot].needs_skill {
                break plot;
            }
        };
        Self {
            hero,
            friend,
            object,
            colour,
            place: request.place.unwrap_or_else(|| rng.below(PLACES.len())),
            mood: request.mood.unwrap_or_else(|| Mood::ALL[rng.below(2)]),
            plot,
        }
    }

    /// The thing with its colour, if it has one: `red boat`.
    pub fn thing(&self) -> String {
        let object = OBJECTS[self.object].word;
        self.colour.map_or_else(|| object.to_owned(), |colour| format!("{} {object}", COLOURS[colour]))
    }
}

/// A story, sentence by sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Story {
    /// The text.
    pub content: Content,
    /// Its sentences; the last one is the ending.
    pub sentences: Vec<String>,
}

impl Story {
    /// The whole text, on one line.
    pub fn text(&self) -> String {
        self.sentences.join(" ")
    }

    /// How many words the story has.
    pub fn n_words(&self) -> usize {
        self.sentences.iter().map(|sentence| words(sentence).len()).sum()
    }
}

/// Tells `content` without a flaw, in [`STORY_WORDS`] words.
pub fn tell(content: &Content, rng: &mut Rng) -> Story {
    loop {
        let story = tell_once(content, rng);
        if STORY_WORDS.contains(&story.n_words()) {
            return story;
        }
    }
}

/// Tells `content` in as many words as it takes.
pub fn tell_once(content: &Content, rng: &mut Rng) -> Story {
    let opening = &OPENINGS[rng.below(OPENINGS.len())];
    let mut teller = Teller { content, is_habit: opening.is_habit, last_spot: None };
    let mut told = teller.say(opening.template, rng);
    if rng.uniform() < 0.2 {
        told.extend(teller.say(TRAITS[rng.below(TRAITS.len())], rng));
    }
    told.extend(teller.events(content.plot, rng));
    let endings = plots::endings(content.mood);
    told.extend(teller.say(endings[rng.below(endings.len())].template, rng));
    Story { content: *content, sentences: told }
}

/// The events of another plot with the same cast, to make a story longer than it should be.
pub fn more_events(content: &Content, rng: &mut Rng) -> Vec<String> {
    let other = loop {
        let plot = rng.below(PLOTS.len());
        if plot != content.plot && (OBJECTS[content.object].is_skill || !PLOTS[plot].needs_skill) {
            break plot;
        }
    };
    Teller { content, is_habit: true, last_spot: None }.events(other, rng)
}

/// Everything that can stand for `slot` in some story, as templates.
pub fn every_filling(slot: &str) -> Vec<String> {
    if slot == "spot" {
        return PLACES.iter().flat_map(|place| place.spots).map(str::to_owned).collect();
    }
    let mut rng = Streams::new(0).get("world/fillings", 0);
    let mut found = BTreeSet::new();
    for i in 0..CHARACTERS.len() * OBJECTS.len() {
        for (colour, is_habit) in [(Some(i % COLOURS.len()), true), (None, false)] {
            let (hero, object, place) = (i % CHARACTERS.len(), i / CHARACTERS.len(), i % PLACES.len());
            let content = Content { hero, friend: hero, object, colour, place, mood: Mood::Happy, plot: 0 };
            found.insert(Teller { content: &content, is_habit, last_spot: None }.fill(slot, &mut rng));
        }
    }
    found.into_iter().collect()
}

/// Fills the slots of templates for one story.
struct Teller<'c> {
    content: &'c Content,
    is_habit: bool,
    /// A thing is not found where it was looked for.
    last_spot: Option<usize>,
}

impl Teller<'_> {
    fn events(&mut self, plot: usize, rng: &mut Rng) -> Vec<String> {
        let plot = &PLOTS[plot];
        let mut told = Vec::new();
        for beat in plot.beats.iter().chain(plot.turn(self.content.mood)) {
            told.extend(self.say(beat[rng.below(beat.len())], rng));
        }
        told
    }

    fn say(&mut self, template: &str, rng: &mut Rng) -> Vec<String> {
        let text = realise(template, &mut |slot, rng| self.fill(slot, rng), rng);
        sentences(&text).into_iter().map(str::to_owned).collect()
    }

    /// Replacement of `slot`: text, or a template again.
    fn fill(&mut self, slot: &str, rng: &mut Rng) -> String {
        let content = self.content;
        let (hero, friend) = (&CHARACTERS[content.hero], &CHARACTERS[content.friend]);
        let (object, place) = (&OBJECTS[content.object], &PLACES[content.place]);
        let in_place = format!("{} the {}", place.preposition, place.word);
        match slot {
            "h" => definite(hero),
            "H" => capitalised(&definite(hero)),
            "intro" => introduced(hero, &format!("{LOOKS} ")),
            "Intro" => capitalised(&introduced(hero, &format!("{LOOKS} "))),
            "f" => definite(friend),
            "F" => capitalised(&definite(friend)),
            "a_f" => introduced(friend, ""),
            "A_f" => capitalised(&introduced(friend, "")),
            "fhim" => pronoun("him", friend.gender).to_owned(),
            "he" | "him" | "his" => pronoun(slot, hero.gender).to_owned(),
            "He" => capitalised(pronoun("he", hero.gender)),
            "His" => capitalised(pronoun("his", hero.gender)),
            "co" => content.thing(),
            "o" => object.word.to_owned(),
            "use" => format!("{} the {}", object.verb, object.word),
            "used" => format!("{} the {}", object.verb_past, object.word),
            "used_his" => format!("{} {}", object.verb_past, pronoun("his", hero.gender)),
            "harm" => harm(object.damage).to_owned(),
            "p" => place.word.to_owned(),
            "in_p" => in_place,
            "spot" => {
                let spot = loop {
                    let spot = rng.below(place.spots.len());
                    if self.last_spot != Some(spot) {
                        break spot;
                    }
                };
                self.last_spot = Some(spot);
                place.spots[spot].to_owned()
            }
            "here" if self.is_habit => format!(" {in_place}"),
            "here" => String::new(),
            "When" if self.is_habit => WHEN_HABIT.to_owned(),
            "When" => WHEN_BEGUN.to_owned(),
            "weather" => WEATHER.to_owned(),
            _ => unreachable!("no slot is called `{slot}`"),
        }
    }
}

/// `Mia`, `the fox`.
pub fn definite(character: &Character) -> String {
    if character.is_person { capitalised(character.word) } else { format!("the {}", character.word) }
}

/// `a girl named Mia`, `a fox`, with `looks` (a template that ends in a space) before the noun.
pub fn introduced(character: &Character, looks: &str) -> String {
    match (character.is_person, character.gender) {
        (false, _) => format!("a {looks}{}", character.word),
        (true, Gender::She) => format!("a {looks}girl named {}", capitalised(character.word)),
        (true, Gender::He) => format!("a {looks}boy named {}", capitalised(character.word)),
    }
}

/// The form of `he`, `him` or `his` for `gender`.
pub fn pronoun(he: &str, gender: Gender) -> &str {
    match (gender, he) {
        (Gender::He, _) => he,
        (Gender::She, "he") => "she",
        (Gender::She, _) => "her",
    }
}

/// The accident of a thing.
pub const fn harm(damage: Damage) -> &'static str {
    match damage {
        Damage::Breaks => "[fell on|hit] a stone and broke",
        Damage::Tears => "caught on a [branch|nail] and tore",
    }
}
