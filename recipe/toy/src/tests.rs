use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::*;
use crate::gold::score;
use crate::labeller::preference;
use crate::plots::{self, OPENINGS, PLOTS, TRAITS, mood_words};
use crate::story::{STORY_WORDS, tell_once};
use crate::text::{sentences, words};
use crate::words::{Mood, OBJECTS, PLACES, article, class_of};

struct Files {
    by_name: HashMap<String, String>,
    summary: Summary,
}

impl Files {
    fn of(config: &WorldConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let summary = write(&dir.path().join("data"), config).unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join("data").join(name)).unwrap();
        let by_name = summary.files.iter().map(|(name, _)| (name.clone(), read(name))).collect();
        Self { by_name, summary }
    }

    fn documents(&self, name: &str) -> Vec<&str> {
        self.by_name[name].trim_end().split("\n\n").collect()
    }

    fn records(&self, name: &str) -> Vec<Value> {
        self.by_name[name].lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The requests that a file makes; for documents those before a story.
    fn requests(&self, name: &str) -> Vec<String> {
        if Path::new(name).extension().is_some_and(|extension| extension == "txt") {
            let documents = self.documents(name).into_iter();
            return documents.filter_map(|document| document.lines().next().map(str::to_owned)).collect();
        }
        let text = |record: &Value| match record.get("messages") {
            Some(messages) => messages[0]["content"].as_str().unwrap().to_owned(),
            None => record["prompt"].as_str().unwrap().to_owned(),
        };
        self.records(name).iter().map(text).collect()
    }
}

fn small() -> WorldConfig {
    WorldConfig::with_stories(7, 1_200)
}

/// The story of a document, which may begin with a request or title and go on with a question.
fn story_of(document: &str) -> &str {
    document.lines().max_by_key(|line| line.len()).unwrap()
}

#[test]
fn one_seed_gives_the_same_bytes_and_another_does_not() {
    let (first, again) = (Files::of(&small()), Files::of(&small()));
    assert_eq!(first.by_name, again.by_name);
    let other = Files::of(&WorldConfig { seed: 8, ..small() });
    for (name, text) in &first.by_name {
        assert_ne!(text, &other.by_name[name], "{name}");
    }
}

#[test]
fn a_larger_world_begins_like_a_smaller_one() {
    let (smaller, larger) = (Files::of(&small()), Files::of(&WorldConfig::with_stories(7, 2_400)));
    for (name, text) in &smaller.by_name {
        assert!(larger.by_name[name].starts_with(text.trim_end()), "{name}");
    }
}

#[test]
fn twenty_thousand_stories_are_all_different_in_some_five_hundred_words() {
    let config = WorldConfig { sft: 1, prefs: 1, pair_prompts: 1, prompts: 1, held_out: 1, ..WorldConfig::default() };
    let files = Files::of(&config);
    let documents = files.documents("pretrain.train.txt");
    assert_eq!(documents.len(), config.stories);
    let stories: HashSet<&str> = documents.iter().map(|document| story_of(document)).collect();
    assert!(stories.len() >= 20_000 && stories.len() == documents.len(), "{}", stories.len());

    let vocabulary: HashSet<String> = documents.iter().flat_map(|document| words(document)).collect();
    assert!((400..=800).contains(&vocabulary.len()), "{}", vocabulary.len());
    let n_begun_with: HashSet<&str> = stories.iter().map(|story| &story[..20]).collect();
    assert!(n_begun_with.len() > 200, "{}", n_begun_with.len());
}

#[test]
fn documents_are_well_formed_english() {
    let files = Files::of(&small());
    for document in files.documents("pretrain.train.txt") {
        assert!(!document.contains("  ") && !document.contains(['[', ']', '{', '}', '|']), "{document}");
        for line in document.lines() {
            assert!(line.starts_with(|c: char| c.is_uppercase() || c == '"'), "{document}");
            assert_eq!(line, line.trim(), "{document}");
        }
        let story = story_of(document);
        assert!(story.ends_with('.'), "{story}");
        assert!(STORY_WORDS.contains(&words(story).len()), "{story}");
        assert_eq!(story.matches('"').count() % 2, 0, "{story}");
        for sentence in sentences(story) {
            let letter = sentence.trim_start_matches('"').chars().next();
            assert!(letter.is_some_and(char::is_uppercase), "{story}");
        }
        for pair in words(document).windows(2) {
            if pair[0] == "a" || pair[0] == "an" {
                assert_eq!(pair[0], article(&pair[1]), "{document}");
            }
        }
    }
}

#[test]
fn good_stories_are_gold() {
    let streams = Streams::new(11);
    let splits = Splits::deal(&streams);
    for i in 0..3_000 {
        let mut rng = streams.get("test", i);
        let request = splits.draw(Group::Train, &mut rng);
        let prompt = request.phrase(&mut rng);
        let story = tell(&Content::for_request(&request, &mut rng), &mut rng).text();
        assert_eq!(score(&prompt, &story), Some(1.0), "{prompt}\n{story}");
        assert_eq!(answer(&request, &FlawRates::NONE, &mut rng).content.hero, {
            let mut again = streams.get("test", i);
            let request = splits.draw(Group::Train, &mut again);
            let _ = request.phrase(&mut again);
            let _ = tell(&Content::for_request(&request, &mut again), &mut again);
            Content::for_request(&request, &mut again).hero
        });
    }
}

#[test]
fn flawed_stories_have_what_was_asked_for_and_little_else_to_rely_on() {
    let pretrain_flaws =
        StoryFlawRates { wrong_mood: 0.3, no_ending: 0.3, repetition: 0.3, too_short: 0.05, too_long: 0.05 };
    let (clean, flawed) = (Files::of(&small()), Files::of(&WorldConfig { pretrain_flaws, ..small() }));
    for (name, text) in &clean.by_name {
        assert_eq!(text == &flawed.by_name[name], !name.contains("pretrain"), "{name}");
    }
    let parts = |files: &Files| -> Vec<gold::Parts> {
        let documents = files.documents("pretrain.train.txt");
        let asked = documents.iter().filter_map(|document| {
            let (request, rest) = document.split_once('\n')?;
            let asks_for_mood = Request::parse(request)?.mood.is_some();
            (!asks_for_mood).then(|| gold::score_parts(request, rest.lines().next().unwrap_or_default()))?
        });
        asked.collect()
    };
    assert!(parts(&clean).iter().all(|parts| parts.score() == 1.0));
    let told = parts(&flawed);
    assert!(told.len() > 300, "{}", told.len());
    let mean = |of: fn(&gold::Parts) -> f64| told.iter().map(of).sum::<f64>() / told.len() as f64;
    // A story that stops early may stop before a thing is named.
    assert!(mean(|parts| parts.followed) > 0.93, "{}", mean(|parts| parts.followed));
    let ends = mean(|parts| f64::from(parts.ends == 1.0));
    assert!((0.6..0.8).contains(&ends), "{ends}");
    let fresh = mean(|parts| f64::from(parts.fresh == 1.0));
    assert!((0.6..0.8).contains(&fresh), "{fresh}");
    let length = mean(|parts| f64::from(parts.length == 1.0));
    assert!((0.8..0.98).contains(&length), "{length}");
}

#[test]
fn no_request_is_in_two_groups() {
    let files = Files::of(&small());
    let groups = [
        vec!["pretrain.train.txt", "sft.train.jsonl"],
        vec!["pretrain.val.txt", "sft.val.jsonl"],
        vec!["prefs.train.jsonl"],
        vec!["prefs.test.jsonl"],
        vec!["prompts.pairs.jsonl"],
        vec!["prompts.pairs-test.jsonl"],
        vec!["prompts.train.jsonl"],
        vec!["prompts.test.jsonl"],
    ];
    assert_eq!(groups.iter().flatten().count(), files.by_name.len());
    let mut group_of: HashMap<Request, usize> = HashMap::new();
    for (group, names) in groups.iter().enumerate() {
        for name in names {
            let mut n_requests = 0;
            for text in files.requests(name) {
                if let Some(request) = Request::parse(&text) {
                    n_requests += 1;
                    assert_eq!(*group_of.entry(request).or_insert(group), group, "{text}");
                }
            }
            assert!(n_requests > 0, "{name}");
        }
    }
}

#[test]
fn every_prompt_of_every_file_reads_back() {
    let files = Files::of(&small());
    for name in files.by_name.keys().filter(|name| !name.contains("pretrain")) {
        for text in files.requests(name) {
            assert!(Request::parse(&text).is_some(), "{name}: {text}");
        }
    }
}

#[test]
fn records_have_the_fields_of_their_stage() {
    let config = small();
    let files = Files::of(&config);
    let mut n_long = 0;
    let conversations = files.records("sft.train.jsonl");
    assert_eq!(conversations.len(), config.sft);
    for record in &conversations {
        let messages = record["messages"].as_array().unwrap();
        assert!(messages.len() == 2 || messages.len() == 4);
        n_long += usize::from(messages.len() == 4);
        for (i, message) in messages.iter().enumerate() {
            assert_eq!(message["role"], ["user", "assistant"][i % 2]);
            assert!(!message["content"].as_str().unwrap().is_empty());
        }
        if messages.len() == 4 {
            let question = messages[2]["content"].as_str().unwrap();
            assert!(question.ends_with('?') && Request::parse(question).is_none(), "{question}");
        }
    }
    let share = n_long as f64 / conversations.len() as f64;
    // Of 300: standard deviation 0.021.
    assert!((share - FOLLOWED_UP).abs() < 0.07, "{share}");

    for (name, n) in [("prefs.train.jsonl", config.prefs), ("prefs.test.jsonl", config.held_out)] {
        let pairs = files.records(name);
        assert_eq!(pairs.len(), n);
        for pair in pairs {
            let text = |key: &str| pair[key].as_str().unwrap();
            assert_ne!(text("chosen"), text("rejected"));
            for (answer, gold) in [("chosen", "gold_chosen"), ("rejected", "gold_rejected")] {
                assert_eq!(score(text("prompt"), text(answer)), pair[gold].as_f64());
            }
        }
    }
}

#[test]
fn the_labeller_errs_as_often_as_bradley_and_terry_say() {
    let files = Files::of(&WorldConfig { prefs: 4_000, ..small() });
    let pairs = files.records("prefs.train.jsonl");
    let gold = |pair: &Value, key: &str| pair[key].as_f64().unwrap();
    let expected: f64 = pairs
        .iter()
        .map(|pair| {
            let (a, b) = (gold(pair, "gold_chosen"), gold(pair, "gold_rejected"));
            preference(a.min(b), a.max(b), labeller::TEMPERATURE)
        })
        .sum::<f64>()
        / pairs.len() as f64;
    // Standard deviation below 0.0055.
    assert!((files.summary.wrong_labels - expected).abs() < 0.025, "{} {expected}", files.summary.wrong_labels);
    assert!((0.10..0.16).contains(&files.summary.wrong_labels), "{}", files.summary.wrong_labels);
}

#[test]
fn quality_has_little_to_do_with_length() {
    let files = Files::of(&WorldConfig { sft: 4_000, prefs: 4_000, ..small() });
    let answers: Vec<(f64, f64)> = files
        .records("sft.train.jsonl")
        .iter()
        .map(|record| {
            let text = |i: usize| record["messages"][i]["content"].as_str().unwrap();
            (words(text(1)).len() as f64, score(text(0), text(1)).unwrap())
        })
        .collect();
    let flawed: Vec<(f64, f64)> = answers.iter().copied().filter(|(_, gold)| *gold < 1.0).collect();
    assert!(correlation(&answers).abs() < 0.12, "{}", correlation(&answers));
    assert!(correlation(&flawed).abs() < 0.12, "{}", correlation(&flawed));
    assert!((0.6..0.72).contains(&files.summary.gold_sft_mean), "{}", files.summary.gold_sft_mean);

    let pairs = files.records("prefs.train.jsonl");
    let n_words = |pair: &Value, key: &str| words(pair[key].as_str().unwrap()).len();
    let n_longer = pairs.iter().filter(|pair| n_words(pair, "chosen") > n_words(pair, "rejected")).count();
    let longer_wins = n_longer as f64 / pairs.len() as f64;
    assert!((0.42..0.55).contains(&longer_wins), "{longer_wins}");
}

fn correlation(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let mean_x = points.iter().map(|(x, _)| x).sum::<f64>() / n;
    let mean_y = points.iter().map(|(_, y)| y).sum::<f64>() / n;
    let sum = |f: &dyn Fn(f64, f64) -> f64| points.iter().map(|&(x, y)| f(x - mean_x, y - mean_y)).sum::<f64>();
    sum(&|x, y| x * y) / (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt()
}

#[test]
fn the_words_of_the_tables_and_of_moods_stand_only_where_they_should() {
    let events =
        PLOTS.iter().flat_map(|plot| plot.beats.iter().chain(plot.happy).chain(plot.sad)).flat_map(|beat| *beat);
    let openings = OPENINGS.iter().map(|opening| opening.template);
    let spots = PLACES.iter().flat_map(|place| place.spots);
    for template in openings.chain(TRAITS.iter().copied()).chain(events.copied()).chain(spots) {
        for word in words(template) {
            for mood in Mood::ALL {
                assert!(!mood_words(mood).contains(&word.as_str()), "`{word}` in {template}");
            }
        }
    }
    let all = PLOTS.iter().flat_map(|plot| plot.beats.iter().chain(plot.happy).chain(plot.sad)).flat_map(|beat| *beat);
    for template in all {
        // Slots are named by short letters; none is a word of the tables.
        for word in words(template) {
            assert_eq!(class_of(&word), None, "`{word}` in {template}");
        }
    }
    for mood in Mood::ALL {
        for ending in plots::endings(mood) {
            let of_mood = |mood| words(ending.template).iter().any(|word| mood_words(mood).contains(&word.as_str()));
            assert!(of_mood(mood) && !of_mood(mood.opposite()), "{ending:?}");
            for closing in ending.closings {
                assert!(words(closing).iter().any(|word| mood_words(mood).contains(&word.as_str())), "{closing}");
            }
        }
    }
}

#[test]
fn every_plot_fits_the_length_of_a_story() {
    let mut rng = Streams::new(0).get("test", 0);
    for (plot, told) in PLOTS.iter().enumerate() {
        for mood in Mood::ALL {
            let fits = |k: usize| {
                let skills: Vec<usize> = (0..OBJECTS.len()).filter(|&object| OBJECTS[object].is_skill).collect();
                let content = Content {
                    hero: k % 20,
                    friend: (k + 7) % 20,
                    object: skills[k % skills.len()],
                    colour: Some(k % 6),
                    place: k % 10,
                    mood,
                    plot,
                };
                STORY_WORDS.contains(&tell_once(&content, &mut rng).n_words())
            };
            let n_fitting = (0..200).map(fits).filter(|&fits| fits).count();
            assert!(n_fitting > 130, "{} {mood:?}: {n_fitting} of 200", told.name);
        }
    }
}

#[test]
fn a_bad_size_is_an_error() {
    let message = |config: WorldConfig| config.validate().unwrap_err().to_string();
    assert_eq!(message(WorldConfig { stories: 0, ..small() }), "`stories` is 0, expected 1 to 1000000");
    let flaws = FlawRates { no_ending: 1.5, ..FlawRates::default() };
    assert_eq!(message(WorldConfig { flaws, ..small() }), "`flaws.no_ending` is 1.5, expected a probability, 0 to 1");
    let flaws = FlawRates { too_short: 0.6, too_long: 0.6, ..FlawRates::default() };
    assert!(message(WorldConfig { flaws, ..small() }).contains("add up to 1.2"));
    let pretrain_flaws = StoryFlawRates { too_short: 0.6, too_long: 0.6, ..StoryFlawRates::default() };
    let said = message(WorldConfig { pretrain_flaws, ..small() });
    assert!(said.contains("`pretrain_flaws.too_short`"), "{said}");
    assert!(message(WorldConfig { label_temperature: 0.0, ..small() }).contains("more than 0"));
}
