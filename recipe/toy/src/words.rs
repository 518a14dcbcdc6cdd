//! Who and what there is in the world: characters, things, colours, places.
//!
//! The tables are small on purpose: a model of a million parameters has to meet each entry some thousand times.
//! Every entry is one lower-case word that the sentences of [`super::plots`] use for nothing else, so that finding the
//! word in a text is finding the thing.

/// The pronouns of a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gender {
    /// she, her, her
    She,
    /// he, him, his
    He,
}

/// Somebody a story can be about: a child with a name, or an animal.
#[derive(Debug)]
pub struct Character {
    /// The child's name in lower case, or the animal's kind.
    pub word: &'static str,
    /// Whether `word` is a name.
    pub is_person: bool,
    /// An animal's gender is fixed as well: one thing less to get wrong.
    pub gender: Gender,
}

/// How a thing comes to harm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Something hard, which falls and breaks.
    Breaks,
    /// Something soft, which catches on a branch and tears.
    Tears,
}

/// A thing that can be found, lost, shared or given away.
#[derive(Debug)]
pub struct Object {
    /// The thing, in one word.
    pub word: &'static str,
    /// The verb for its use, up to the article: `sail`, `try on`.
    pub verb: &'static str,
    /// The same in the past tense: `sailed`, `tried on`.
    pub verb_past: &'static str,
    /// How it comes to harm.
    pub damage: Damage,
    /// Whether using it has to be learned.
    pub is_skill: bool,
}

/// Somewhere a story can happen.
#[derive(Debug)]
pub struct Place {
    /// The place, in one word.
    pub word: &'static str,
    /// `in`, `at`, `on` or `by`.
    pub preposition: &'static str,
    /// Spots in it where a thing may lie.
    pub spots: [&'static str; 3],
}

/// The mood of an ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mood {
    /// The story ends well.
    Happy,
    /// The story ends badly.
    Sad,
}

impl Mood {
    /// Both moods.
    pub const ALL: [Self; 2] = [Self::Happy, Self::Sad];

    /// `happy` or `sad`.
    pub const fn adjective(self) -> &'static str {
        match self {
            Self::Happy => "happy",
            Self::Sad => "sad",
        }
    }

    /// `happily` or `sadly`.
    pub const fn adverb(self) -> &'static str {
        match self {
            Self::Happy => "happily",
            Self::Sad => "sadly",
        }
    }

    /// The other mood.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Happy => Self::Sad,
            Self::Sad => Self::Happy,
        }
    }
}

const fn person(word: &'static str, gender: Gender) -> Character {
    Character { word, is_person: true, gender }
}

const fn animal(word: &'static str, gender: Gender) -> Character {
    Character { word, is_person: false, gender }
}

/// Ten children and ten animals.
pub const CHARACTERS: [Character; 20] = [
    person("mia", Gender::She),
    person("anna", Gender::She),
    person("lily", Gender::She),
    person("rosa", Gender::She),
    person("ella", Gender::She),
    person("tom", Gender::He),
    person("ben", Gender::He),
    person("max", Gender::He),
    person("sam", Gender::He),
    person("leo", Gender::He),
    animal("fox", Gender::He),
    animal("cat", Gender::She),
    animal("dog", Gender::He),
    animal("rabbit", Gender::She),
    animal("bear", Gender::He),
    animal("mouse", Gender::She),
    animal("duck", Gender::She),
    animal("owl", Gender::He),
    animal("frog", Gender::He),
    animal("goat", Gender::She),
];

const fn object(
    word: &'static str,
    verb: &'static str,
    verb_past: &'static str,
    damage: Damage,
    is_skill: bool,
) -> Object {
    Object { word, verb, verb_past, damage, is_skill }
}

/// Fourteen things.
pub const OBJECTS: [Object; 14] = [
    object("ball", "throw", "threw", Damage::Breaks, false),
    object("boat", "sail", "sailed", Damage::Breaks, true),
    object("kite", "fly", "flew", Damage::Tears, true),
    object("hat", "try on", "tried on", Damage::Tears, false),
    object("box", "open", "opened", Damage::Breaks, false),
    object("book", "read", "read", Damage::Tears, true),
    object("drum", "play", "played", Damage::Breaks, true),
    object("bell", "ring", "rang", Damage::Breaks, false),
    object("cup", "fill", "filled", Damage::Breaks, false),
    object("lamp", "light", "lit", Damage::Breaks, false),
    object("scarf", "try on", "tried on", Damage::Tears, false),
    object("basket", "fill", "filled", Damage::Tears, false),
    object("umbrella", "open", "opened", Damage::Tears, false),
    object("wagon", "pull", "pulled", Damage::Breaks, false),
];

/// Six colours.
pub const COLOURS: [&str; 6] = ["red", "blue", "green", "yellow", "orange", "purple"];

const fn place(word: &'static str, preposition: &'static str, spots: [&'static str; 3]) -> Place {
    Place { word, preposition, spots }
}

/// Ten places.
pub const PLACES: [Place; 10] = [
    place("park", "in", ["under a bench", "beside the fountain", "near the swings"]),
    place("forest", "in", ["under an old oak", "behind a fallen tree", "on the soft moss"]),
    place("garden", "in", ["among the roses", "behind the gate", "under the apple tree"]),
    place("beach", "at", ["on the warm sand", "between two rocks", "near the waves"]),
    place("farm", "on", ["behind the barn", "in the hay", "beside the well"]),
    place("hill", "on", ["beside a flat stone", "in the tall grass", "under a tall pine"]),
    place("river", "by", ["under the bridge", "among the reeds", "on the muddy bank"]),
    place("market", "at", ["beside a fruit stand", "under a table", "behind a cart"]),
    place("school", "at", ["on the steps", "beside the door", "under a desk"]),
    place("lake", "by", ["on the dock", "near the water", "under a willow"]),
];

/// Class of words in the grammar: a name, an animal, a thing, a colour, a place.
///
/// `None` for every other word. The argument is in lower case.
pub fn class_of(word: &str) -> Option<&'static str> {
    if let Some(character) = CHARACTERS.iter().find(|c| c.word == word) {
        return Some(if character.is_person { "NAME" } else { "ANIMAL" });
    }
    if OBJECTS.iter().any(|o| o.word == word) {
        return Some("OBJECT");
    }
    if COLOURS.contains(&word) {
        return Some("COLOUR");
    }
    PLACES.iter().any(|p| p.word == word).then_some("PLACE")
}

/// `an` before a vowel, else `a`; true to the sound for every word of this world.
pub fn article(next: &str) -> &'static str {
    if next.starts_with(['a', 'e', 'i', 'o', 'u', 'A', 'E', 'I', 'O', 'U']) { "an" } else { "a" }
}

/// `word` with a capital first letter.
pub fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
