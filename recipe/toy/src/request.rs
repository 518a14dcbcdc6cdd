//! Requests for stories: what can be asked for, how it is said, how it is read back.

use common::rng::Rng;

use super::story::definite;
use super::template::realise;
use super::text::words;
use super::words::{CHARACTERS, COLOURS, Mood, OBJECTS, PLACES, capitalised};

/// Constraints on a story, one to three. Indices point into [`super::words`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Request {
    /// Who it is about.
    pub character: Option<usize>,
    /// A thing in it, perhaps of a colour.
    pub object: Option<(usize, Option<usize>)>,
    /// Where it happens.
    pub place: Option<usize>,
    /// How it ends.
    pub mood: Option<Mood>,
}

impl Request {
    /// Reads a request back from any of its phrasings; `None` if `text` asks for no story.
    ///
    /// A request speaks of a story (not of *the* story, which has been told) and names at least one constraint. The
    /// first character is the one asked for, and so on; a colour counts right before a thing, a place after `the`.
    pub fn parse(text: &str) -> Option<Self> {
        let words = words(text);
        let at = |i: usize| words.get(i).map_or("", String::as_str);
        let mut request = Self { character: None, object: None, place: None, mood: None };
        let mut is_request = false;
        for i in 0..words.len() {
            let word = at(i);
            let before = if i == 0 { "" } else { at(i - 1) };
            if word == "story" {
                if before == "the" {
                    return None;
                }
                is_request = true;
            }
            if let Some(character) = CHARACTERS.iter().position(|c| c.word == word) {
                request.character.get_or_insert(character);
            }
            if let Some(object) = OBJECTS.iter().position(|o| o.word == word) {
                request.object.get_or_insert((object, COLOURS.iter().position(|&c| c == before)));
            }
            if let Some(place) = PLACES.iter().position(|p| p.word == word && before == "the") {
                request.place.get_or_insert(place);
            }
            if let Some(mood) = Mood::ALL.into_iter().find(|m| word == m.adjective() || word == m.adverb()) {
                request.mood.get_or_insert(mood);
            }
        }
        (is_request && request.n_constraints() > 0).then_some(request)
    }

    /// How many constraints it names; a thing and its colour are one.
    pub fn n_constraints(&self) -> usize {
        usize::from(self.character.is_some())
            + usize::from(self.object.is_some())
            + usize::from(self.place.is_some())
            + usize::from(self.mood.is_some())
    }

    /// The request in words, in one of its phrasings.
    pub fn phrase(&self, rng: &mut Rng) -> String {
        let has_things = self.character.is_some() || self.object.is_some();
        let place_sentence = self.place.is_some() && has_things && rng.uniform() < 0.15;
        let mood_style = match self.mood {
            None => MoodStyle::None,
            Some(_) => MOOD_STYLES[rng.below(MOOD_STYLES.len())],
        };
        let (frame, mark) = FRAMES[rng.below(FRAMES.len())];
        let mut text = self.fill_frame(frame, !place_sentence, mood_style, rng);
        text.push_str(mark);
        if let (true, Some(place)) = (place_sentence, self.place) {
            let place = &PLACES[place];
            text = format!("{text} It should happen {} the {}.", place.preposition, place.word);
        }
        if let (MoodStyle::Sentence, Some(mood)) = (mood_style, self.mood) {
            let template = ["The ending should be {mood}.", "Please make the ending {mood}."];
            let sentence = template[rng.below(2)].replace("{mood}", mood.adjective());
            text.push(' ');
            text.push_str(&sentence);
        }
        text
    }

    /// The request as a title, `The fox and the red boat in the park, a sad story`.
    pub fn title(&self) -> String {
        let mut parts = Vec::new();
        if let Some(character) = self.character {
            parts.push(definite(&CHARACTERS[character]));
        }
        if let Some((object, colour)) = self.object {
            parts.push(format!("the {}", thing(object, colour)));
        }
        let mut title = parts.join(" and ");
        if let Some(place) = self.place {
            let place = &PLACES[place];
            if title.is_empty() {
                title = format!("the {}", place.word);
            } else {
                title = format!("{title} {} the {}", place.preposition, place.word);
            }
        }
        match self.mood {
            Some(mood) if title.is_empty() => format!("A {} story", mood.adjective()),
            Some(mood) => format!("{}, a {} story", capitalised(&title), mood.adjective()),
            None => capitalised(&title),
        }
    }

    fn fill_frame(&self, frame: &str, with_place: bool, mood_style: MoodStyle, rng: &mut Rng) -> String {
        let mut things = Vec::new();
        if let Some(character) = self.character {
            let character = &CHARACTERS[character];
            things.push(if character.is_person { definite(character) } else { format!("a {}", character.word) });
        }
        if let Some((object, colour)) = self.object {
            things.push(format!("a {}", thing(object, colour)));
        }
        let about = if things.is_empty() { String::new() } else { format!(" about {}", things.join(" and ")) };
        let place = self.place.filter(|_| with_place).map(|place| &PLACES[place]);
        let happens = place.is_some() && rng.uniform() < 0.4;
        let place = place.map_or_else(String::new, |place| {
            let happens = if happens { " that happens" } else { "" };
            format!("{happens} {} the {}", place.preposition, place.word)
        });
        let adjective = match (mood_style, self.mood) {
            (MoodStyle::Adjective, Some(mood)) => format!("{} ", mood.adjective()),
            _ => String::new(),
        };
        let ending = match (mood_style, self.mood) {
            (MoodStyle::With, Some(mood)) => format!(" with a {} ending", mood.adjective()),
            (MoodStyle::Adverb, Some(mood)) if happens => format!(" and ends {}", mood.adverb()),
            (MoodStyle::Adverb, Some(mood)) => format!(" that ends {}", mood.adverb()),
            _ => String::new(),
        };
        let text = frame.replace("{story}", &format!("{adjective}story{about}{place}{ending}"));
        realise(&text, &mut |slot, _| unreachable!("no slot `{slot}` in a request"), rng)
    }
}

/// `red boat`, `boat`.
fn thing(object: usize, colour: Option<usize>) -> String {
    let object = OBJECTS[object].word;
    colour.map_or_else(|| object.to_owned(), |colour| format!("{} {object}", COLOURS[colour]))
}

/// How a request says the mood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MoodStyle {
    /// It does not.
    None,
    /// `with a happy ending`
    With,
    /// `that ends happily`
    Adverb,
    /// `a happy story`
    Adjective,
    /// `The ending should be happy.`
    Sentence,
}

/// The first one is the commonest.
const MOOD_STYLES: [MoodStyle; 5] =
    [MoodStyle::With, MoodStyle::With, MoodStyle::Adverb, MoodStyle::Adjective, MoodStyle::Sentence];

/// Frames and the marks that close them.
const FRAMES: [(&str, &str); 9] = [
    ("Tell me a {story}", "."),
    ("Tell me a {story}", "."),
    ("Please tell me a [short |little |]{story}", "."),
    ("Can you tell me a [short |]{story}", "?"),
    ("I would like [to hear |]a {story}", "."),
    ("I want [to hear |]a [short |]{story}", "."),
    ("Write a [short |little |]{story}", "."),
    ("Please write a {story}", "."),
    ("Make up a {story}", ", please."),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::splits::all_requests;
    use common::rng::Streams;

    #[test]
    fn every_phrasing_and_title_reads_back() {
        let streams = Streams::new(1);
        for (i, request) in all_requests().into_iter().enumerate() {
            let mut rng = streams.get("phrase", i as u64);
            for _ in 0..4 {
                let text = request.phrase(&mut rng);
                assert_eq!(Request::parse(&text), Some(request), "{text}");
                assert!(!text.contains("  ") && !text.contains(['[', '{', '|']), "{text}");
            }
            if request.mood.is_some() {
                let title = request.title();
                assert_eq!(Request::parse(&title), Some(request), "{title}");
            }
        }
    }

    #[test]
    fn what_asks_for_no_story_is_no_request() {
        for text in ["Where did Mia go?", "", "Did the story have a happy ending?", "Tell me a story."] {
            assert_eq!(Request::parse(text), None, "{text}");
        }
    }

    #[test]
    fn titles_read_like_titles() {
        let request =
            Request { character: Some(10), object: Some((1, Some(0))), place: Some(0), mood: Some(Mood::Sad) };
        assert_eq!(request.title(), "The fox and the red boat in the park, a sad story");
    }
}
