//! Events of the stories: openings, twelve plots with two ways to end, and the endings.
//!
//! A plot is a list of beats, a beat a list of templates of which a story takes one; an empty template leaves the beat
//! out. Slots: `{h}` the hero (`Mia`, `the fox`), `{he} {him} {his}`; `{f}` the other character, `{a_f}` where they
//! first appear; `{co}` the thing with its colour, `{o}` without; `{p}` the place, `{in_p}` with its preposition,
//! `{spot}` a spot in it, `{here}` the place where it still has to be named; `{use} {used}` what one does with the
//! thing, `{used_his}` the same up to the thing, `{harm}` what befalls it; `{When}` leads over from the opening. A capital first letter starts a sentence.
//!
//! Words of [`super::words`] appear nowhere in the templates, and words of mood only in the endings and where the mood
//! of the ending is decided already.

use super::words::Mood;

/// Alternatives for one step of a story.
pub type Beat = &'static [&'static str];

/// A first step: who, and where.
#[derive(Debug)]
pub struct Opening {
    /// The sentences.
    pub template: &'static str,
    /// Whether the opening tells what was usual, so that the plot has to begin on some day.
    pub is_habit: bool,
}

/// Something that happens between two characters and a thing.
#[derive(Debug)]
pub struct Plot {
    /// Its subject, for people.
    pub name: &'static str,
    /// The part before the two ways to end.
    pub beats: &'static [Beat],
    /// How it turns out well.
    pub happy: &'static [Beat],
    /// How it turns out badly.
    pub sad: &'static [Beat],
    /// Whether it needs a thing whose use has to be learned.
    pub needs_skill: bool,
}

impl Plot {
    /// How it turns out.
    pub const fn turn(&self, mood: Mood) -> &'static [Beat] {
        match mood {
            Mood::Happy => self.happy,
            Mood::Sad => self.sad,
        }
    }
}

/// A last sentence. It ends in its closing words, which say its mood, and a full stop.
#[derive(Debug)]
pub struct Ending {
    /// The sentence.
    pub template: &'static str,
    /// The words it ends in, one of each bracket.
    pub closings: &'static [&'static str],
}

/// How stories begin.
pub const OPENINGS: &[Opening] = &[
    Opening {
        template: "[Once upon a time|Long ago], {intro} lived [near|close to|not far from] the {p}.",
        is_habit: true,
    },
    Opening { template: "There [once |]was {intro} who [loved|liked] the {p}.", is_habit: true },
    Opening {
        template: "{Intro} lived [near|close to] the {p}. {He} [went|walked] there [every day|in all weather|to play].",
        is_habit: true,
    },
    Opening {
        template: "On a {weather} [morning|day|afternoon], {intro} [went|walked|ran|came] to the {p}.",
        is_habit: false,
    },
    Opening {
        template: "It was a {weather} [morning|day|afternoon]. {Intro} was [playing|walking|resting] {in_p}.",
        is_habit: false,
    },
    Opening {
        template: "{Intro} was [playing|walking|sitting] {in_p}. The [sun was warm|sky was clear|wind was soft|air \
                   was fresh].",
        is_habit: false,
    },
];

/// A sentence about the hero that may follow the opening.
pub const TRAITS: Beat = &[
    "{He} was [always|often] [curious|full of ideas|ready to help|a little shy].",
    "{He} [loved to|liked to] [sing|dance|run|climb|tell jokes].",
    "{He} was not afraid of [anything|the dark|rain or snow].",
    "[Everyone|Everybody] [there |]knew {him}.",
];

/// The plots.
pub const PLOTS: &[Plot] = &[
    Plot {
        name: "found",
        beats: &[
            &["{When}, {h} [found|saw] a [little |shiny |]{co} {spot}{here}."],
            &[
                "{A_f} came [running|along]. \"[I lost that {o}|That {o} is mine]!\" said {f}.",
                "\"[Whose {o} is this|Who lost this {o}]?\" {he} [asked|wondered]. It belonged to {a_f}.",
            ],
        ],
        happy: &[
            &["{H} gave the {o} back [at once|right away].", "{H} gave it back, and {f} thanked {him}."],
            &["Then they {used} [together|in the sun].", "\"You are [so kind|a true friend]!\" said {f}."],
        ],
        sad: &[
            &[
                "But {h} [said nothing|did not listen] and ran away with the {o}.",
                "{H} wanted to give it back, but the {o} {harm}.",
            ],
            &["{F} [turned away|left] without a word.", "Later, {h} felt [sorry|bad], but {f} was gone."],
        ],
        needs_skill: false,
    },
    Plot {
        name: "lost",
        beats: &[
            &["{When}, {h} was playing with {his} [new |little |]{co}{here}.", "{When}, {h} {used_his} {co}{here}."],
            &["[A moment later|After lunch|Suddenly], the {o} was gone."],
            &[
                "\"Where is my {o}?\" [called|asked] {h}.",
                "{He} looked {spot}, but [there was nothing|found nothing].",
                "",
            ],
        ],
        happy: &[
            &[
                "{A_f} came to help. [Together|After a while], they found the {o} {spot}.",
                "{A_f} had found the {o}. \"[Here it is|Look what I have]!\" said {f}.",
            ],
            &["{H} [hugged {f}|thanked {f} again and again].", "", "They [played|stayed] {in_p} until dinner."],
        ],
        sad: &[
            &[
                "{A_f} helped {him} look [until dark|all day], but it was no use.",
                "{A_f} had seen the {o} [float|roll|drift] away.",
            ],
            &["{H} never [saw|found] the {o} again.", "The {o} was lost for good."],
        ],
        needs_skill: false,
    },
    Plot {
        name: "broken",
        beats: &[
            &["{When}, {h} {used_his} [fine|pretty|lovely|new] {co}{here}."],
            &["[\"Oh no!\" said {h}.|But {he} was not careful.|But {he} was in a hurry.] The {o} {harm}."],
        ],
        happy: &[
            &["{A_f} [saw it|heard the noise] and came to help.", "\"[Let me help you|We can mend it],\" said {a_f}."],
            &["They worked [side by side|with care|all afternoon] and mended the {o}."],
            &["[Soon|In the end], it looked [like new|better than before].", ""],
        ],
        sad: &[
            &["{A_f} [tried|worked hard] to mend the {o}, but it [fell apart|was no use]."],
            &["{H} [put|threw] the {o} away.", "There was no other {o} like it.", "\"I am sorry,\" said {f}."],
        ],
        needs_skill: false,
    },
    Plot {
        name: "share",
        beats: &[
            &["{When}, {h} [had|was playing with] a [new |shiny |]{co}{here}."],
            &["{A_f} [came by|sat {spot}] and watched.", "{A_f} came [closer|along]."],
            &["\"[May I play too|May I try the {o}|Can I have a turn]?\" asked {f}."],
        ],
        happy: &[
            &[
                "\"[Yes, of course|Yes, let us share|Yes, come here]!\" said {h}.",
                "{H} [nodded|thought for a moment] and gave {fhim} the {o}.",
            ],
            &["They took turns with the {o} [all day|until lunch|all afternoon].", "First {f} {used}, then {h}."],
        ],
        sad: &[
            &["\"No, [it is mine|this is my {o}|go away]!\" said {h}.", "{H} shook {his} head and held the {o} tight."],
            &["{F} walked away.", ""],
            &["Now {h} had the {o}, but no one to play with.", "Then the {o} was no fun [at all|any more]."],
        ],
        needs_skill: false,
    },
    Plot {
        name: "rain",
        beats: &[
            &["{When}, {h} [put|laid] {his} {co} {spot}{here}.", "{When}, {h} {used_his} {co}{here}."],
            &["[Suddenly|Then], [it began to rain|a storm came up]. {H} ran [home|for cover] and forgot the {o}."],
        ],
        happy: &[
            &["But {a_f} [saw|found] the {o} and [kept it dry|took it inside]."],
            &["The next [day|morning], {f} brought it back.", "\"[Here is your {o}|I saved your {o}]!\" said {f}."],
        ],
        sad: &[
            &["{A_f} tried to save the {o}, but [the wind was too strong|it was too late]."],
            &[
                "The next [day|morning], the {o} was [gone|ruined].",
                "In the morning, only a piece of the {o} was left.",
            ],
        ],
        needs_skill: false,
    },
    Plot {
        name: "gift",
        beats: &[
            &["{When}, {h} [made|bought] a {co} for {a_f}.", "{When}, {h} wanted to give a {co} to {a_f}."],
            &["It was a birthday gift.", "{He} had [worked on|thought about] it all week.", ""],
            &["{H} [hid the {o}|waited with the {o}] {spot}{here}."],
        ],
        happy: &[
            &["[At last|Soon], {f} came. \"[Surprise|This is for you]!\" [called|said] {h}."],
            &[
                "\"[What a lovely {o}|I always wanted a {o}|I love this {o}]!\" said {f}.",
                "{F} [clapped|jumped up and down] and {used}.",
            ],
        ],
        sad: &[
            &[
                "But {f} [did not come|forgot to come|never came].",
                "[At last|Soon], {f} came. \"I do not want a {o},\" said {f}.",
            ],
            &[
                "{H} waited [until dark|and waited|all day].",
                "{H} [took|carried] the {o} home again.",
                "Nobody wanted the {o} now.",
            ],
        ],
        needs_skill: false,
    },
    Plot {
        name: "race",
        beats: &[
            &["{When}, there was a [big |great |]race{here}. The prize was a [new |shiny |]{co}."],
            &["{H} ran against {a_f}."],
            &[
                "\"[Ready, steady, go|One, two, three, go]!\" someone called.",
                "{H} wanted that {o} more than anything.",
                "",
            ],
        ],
        happy: &[
            &[
                "{H} [ran like the wind|did not stop once] and won the {o}.",
                "They came in side by side, so both won the {o}.",
            ],
            &[
                "\"[Well done|Good race]!\" said {f}.",
                "\"Let us share the {o},\" said {h}.",
                "{F} [clapped|cheered] and shook {his} hand.",
            ],
        ],
        sad: &[
            &["But {h} [fell|slipped] {spot} and hurt {his} foot."],
            &["{F} won the {o} and [did not look back|did not wait|ran off with it]."],
            &["", "Nobody [stayed|came] to help."],
        ],
        needs_skill: false,
    },
    Plot {
        name: "friend",
        beats: &[
            &["{When}, {h} [saw|met] {a_f} with a [new |little |]{co}{here}."],
            &["{H} was shy, but {he} said hello.", "The {o} looked like so much fun.", ""],
            &["\"[May I play with you|Will you be my friend|Can we play together]?\" asked {h}."],
        ],
        happy: &[
            &["\"[Yes, come and play|Yes, please|Of course]!\" said {f}."],
            &[
                "They {used} and [talked|told jokes|ran around] {in_p}.",
                "{F} [gave {him} the {o}|let {him} hold the {o}], and they played all day.",
            ],
        ],
        sad: &[
            &["\"[No, go away|No, not today|I do not like you]!\" said {f}."],
            &["{F} [took|picked up] the {o} and [ran off|left].", "{F} only looked at the {o} and not at {h}."],
            &["", "{H} sat {spot} and said nothing."],
        ],
        needs_skill: false,
    },
    Plot {
        name: "map",
        beats: &[
            &[
                "{When}, {h} found an old map{here}. It showed [the way to|where to find] a {co}.",
                "{When}, {h} heard of a {co} hidden {in_p}.",
            ],
            &[
                "{H} and {a_f} [walked for hours|looked high and low].",
                "{A_f} wanted to see the {o} too. They dug {spot}.",
            ],
        ],
        happy: &[
            &[
                "[There|At last, there] was the {o}! \"We [found|did] it!\" they [shouted|called].",
                "[Deep down|Under some leaves], they found the {o}.",
            ],
            &["They took it home and {used} [every day|all evening].", ""],
        ],
        sad: &[
            &[
                "But the {o} was [not there|gone]. [Someone|A thief] had been faster.",
                "They found the {o}, but it {harm}.",
            ],
            &["\"It was your fault!\" said {f}.", "{F} was angry and went home.", ""],
        ],
        needs_skill: false,
    },
    Plot {
        name: "nap",
        beats: &[
            &["{When}, {h} put {his} {co} {spot}{here} and took a nap."],
            &["{A_f} [came by|came along] and took the {o}.", "{A_f} saw the {o} and took it."],
            &[
                "\"[Where is my {o}|Who took my {o}]?\" [shouted|called] {h}.",
                "When {h} woke up, the {o} was gone.",
                "",
            ],
        ],
        happy: &[
            &[
                "[Soon|Later], {f} came back. \"[I am sorry|I only wanted to play],\" said {f}.",
                "But {f} [felt bad|was sorry] and brought the {o} back.",
            ],
            &["\"[That is all right|Do not worry],\" said {h}.", "{H} forgave {fhim}, and they {used} {in_p}."],
        ],
        sad: &[
            &["{H} ran after {f}, but {f} was too fast.", "{H} asked everyone, but nobody [knew a thing|had seen it]."],
            &["{He} never [saw|found] the {o} again.", "The {o} was gone for good."],
        ],
        needs_skill: false,
    },
    Plot {
        name: "lesson",
        beats: &[
            &["{When}, {h} [got|found] a [new |little |]{co}{here}. But {he} could not {use}."],
            &["{A_f} [watched|saw it]. \"Shall I show you?\" asked {f}."],
        ],
        happy: &[
            &["{F} [showed {him} how|was a good teacher].", "\"Yes, please!\" said {h}."],
            &[
                "[Soon|At last|In the end], {h} {used} [with ease|like a master].",
                "Then they took turns with the {o} {in_p}.",
            ],
        ],
        sad: &[
            &["\"No, leave me [in peace|be]!\" said {h}. {F} [left|went home].", "But {f} only made fun of {him}."],
            &["{H} [pulled|pushed] too hard, and the {o} {harm}.", "{H} gave up and threw the {o} away."],
        ],
        needs_skill: true,
    },
    Plot {
        name: "goodbye",
        beats: &[
            &["{When}, {h} met {a_f}{here}. They became [good|best] friends."],
            &["But {f} had to move [far away|to another town].", "Then winter came, and {f} had to go away."],
            &["{F} gave {him} a {co} to keep.", "\"Keep this {co} for me,\" said {f}."],
        ],
        happy: &[
            &["{H} took [good |]care of the {o} [all year|every day]."],
            &[
                "In [spring|summer], {f} came back [and saw the {o}|to the {p}].",
                "One day, {f} came back, and they {used} together.",
            ],
        ],
        sad: &[
            &["{H} looked at the {o} every [day|night] and missed {f}.", "{H} waited and waited with the {o}."],
            &["But {f} never came back.", "Then the {o} {harm}."],
        ],
        needs_skill: false,
    },
];

/// How stories end, by mood.
pub const fn endings(mood: Mood) -> &'static [Ending] {
    match mood {
        Mood::Happy => HAPPY_ENDINGS,
        Mood::Sad => SAD_ENDINGS,
    }
}

const HAPPY_ENDINGS: &[Ending] = &[
    Ending { template: "{H} was very happy.", closings: &["very happy"] },
    Ending {
        template: "{H} [went|walked|ran] home with a [big|happy] smile.",
        closings: &["big smile", "happy smile"],
    },
    Ending { template: "{H} smiled all the way home.", closings: &["smiled all the way home"] },
    Ending {
        template: "It was the happiest day of {his} life.",
        closings: &["happiest day of his life", "happiest day of her life"],
    },
    Ending { template: "That night, {h} fell asleep with a happy heart.", closings: &["happy heart"] },
    Ending { template: "{H} and {f} laughed until the sun went down.", closings: &["laughed until the sun went down"] },
    Ending { template: "From that day on, {h} and {f} were happy friends.", closings: &["happy friends"] },
    Ending { template: "{H} was happy for the rest of the day.", closings: &["happy for the rest of the day"] },
    Ending { template: "{H} left the {p} with a happy song.", closings: &["happy song"] },
];

const SAD_ENDINGS: &[Ending] = &[
    Ending { template: "{H} was very sad.", closings: &["very sad"] },
    Ending {
        template: "{H} [went|walked|ran] home with tears in {his} eyes.",
        closings: &["tears in his eyes", "tears in her eyes"],
    },
    Ending { template: "{H} cried all the way home.", closings: &["cried all the way home"] },
    Ending {
        template: "It was the saddest day of {his} life.",
        closings: &["saddest day of his life", "saddest day of her life"],
    },
    Ending { template: "That night, {h} fell asleep with a sad heart.", closings: &["sad heart"] },
    Ending {
        template: "{H} sat alone and cried until the sun went down.",
        closings: &["cried until the sun went down"],
    },
    Ending { template: "From that day on, {h} was sad and lonely.", closings: &["sad and lonely"] },
    Ending { template: "{H} was sad for the rest of the day.", closings: &["sad for the rest of the day"] },
    Ending { template: "{H} left the {p} with a sad song.", closings: &["sad song"] },
];

/// Words that set a mood, and stand in endings only. An ending is judged by them.
pub const fn mood_words(mood: Mood) -> &'static [&'static str] {
    match mood {
        Mood::Happy => &["happy", "happily", "happiest", "smile", "smiled", "laughed", "joy"],
        Mood::Sad => &["sad", "sadly", "saddest", "cried", "tears", "lonely", "alone"],
    }
}

/// Texts for `{weather}`.
pub const WEATHER: &str = "[warm|sunny|windy|quiet|bright|cold]";

/// Texts for `{When}` after an opening in the habitual past.
pub const WHEN_HABIT: &str = "One [day|morning|afternoon|bright day|windy day|summer day]";

/// Texts for `{When}` after an opening that has begun already.
pub const WHEN_BEGUN: &str = "[Soon|After a while|Before long|A little later]";

/// How a character is described.
pub const LOOKS: &str = "[little|kind|brave|clever|young|quiet|funny|gentle]";
