//! The files of a world.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::Context as _;
use common::rng::{Rng, Streams};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::flaws::{FlawRates, StoryFlawRates, answer};
use super::questions;
use super::request::Request;
use super::splits::{Group, Splits};
use super::story::{Content, tell};
use crate::gold;
use crate::labeller::{self, label_pair};

/// How large a world is, and how flawed its answers are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WorldConfig {
    /// Random seed; a recipe sets it to its own.
    pub seed: u64,
    /// Number of stories to pretrain on, all different.
    #[schemars(range(min = 1, max = MOST_STORIES))]
    pub stories: usize,
    /// Number of conversations to fine-tune on.
    #[schemars(range(min = 1, max = MOST_STORIES))]
    pub sft: usize,
    /// Number of generated preference pairs.
    #[schemars(range(min = 1, max = MOST_STORIES))]
    pub prefs: usize,
    /// Number of prompts for preference pairs of a model's own answers.
    #[schemars(range(min = 1, max = MOST_PROMPTS))]
    pub pair_prompts: usize,
    /// Number of prompts for PPO.
    #[schemars(range(min = 1, max = MOST_PROMPTS))]
    pub prompts: usize,
    /// Number of records in each validation and test file.
    #[schemars(range(min = 1, max = MOST_HELD_OUT))]
    pub held_out: usize,
    /// Probabilities of the flaws in the stories to pretrain on, independent of each other.
    pub pretrain_flaws: StoryFlawRates,
    /// Probabilities of the flaws in the answers to fine-tune on, independent of each other.
    pub flaws: FlawRates,
    /// Temperature of the simulated labeller, in units of the gold score; the higher, the more labels are wrong.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub label_temperature: f64,
}

impl Default for WorldConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            stories: 24_000,
            sft: 6_000,
            prefs: 4_000,
            pair_prompts: 6_000,
            prompts: 3_000,
            held_out: 300,
            pretrain_flaws: StoryFlawRates::default(),
            flaws: FlawRates::default(),
            label_temperature: labeller::TEMPERATURE,
        }
    }
}

impl WorldConfig {
    /// The world of `seed` with `stories` stories, everything else in proportion to the default.
    pub fn with_stories(seed: u64, stories: usize) -> Self {
        let default = Self::default();
        let scaled = |n: usize| (n * stories).div_ceil(default.stories);
        Self {
            seed,
            stories,
            sft: scaled(default.sft),
            prefs: scaled(default.prefs),
            pair_prompts: scaled(default.pair_prompts),
            prompts: scaled(default.prompts),
            held_out: scaled(default.held_out),
            ..default
        }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// If a count is 0 or more than the world has, a rate is no probability, or the temperature is not positive.
    pub fn validate(&self) -> anyhow::Result<()> {
        let counts = [
            ("stories", self.stories, MOST_STORIES),
            ("sft", self.sft, MOST_STORIES),
            ("prefs", self.prefs, MOST_STORIES),
            ("pair_prompts", self.pair_prompts, MOST_PROMPTS),
            ("prompts", self.prompts, MOST_PROMPTS),
            ("held_out", self.held_out, MOST_HELD_OUT),
        ];
        for (name, count, most) in counts {
            anyhow::ensure!((1..=most).contains(&count), "`{name}` is {count}, expected 1 to {most}");
        }
        for (table, rates) in [("pretrain_flaws", self.pretrain_flaws.into()), ("flaws", self.flaws)] {
            for (name, rate) in rates.named() {
                anyhow::ensure!(
                    (0.0..=1.0).contains(&rate),
                    "`{table}.{name}` is {rate}, expected a probability, 0 to 1"
                );
            }
            let both = rates.too_short + rates.too_long;
            anyhow::ensure!(
                both <= 1.0,
                "`{table}.too_short` and `{table}.too_long` add up to {both}, expected at most 1"
            );
        }
        anyhow::ensure!(
            self.label_temperature > 0.0,
            "`label_temperature` is {}, expected more than 0",
            self.label_temperature
        );
        Ok(())
    }
}

/// The largest number of stories; more would make the search for different ones long.
pub const MOST_STORIES: usize = 1_000_000;
const MOST_PROMPTS: usize = 100_000;
const MOST_HELD_OUT: usize = 10_000;

/// The files written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// File names and their numbers of records.
    pub files: Vec<(String, usize)>,
    /// Mean gold score of the answers in `sft.train.jsonl`.
    pub gold_sft_mean: f64,
    /// Share of the pairs in `prefs.train.jsonl` whose chosen answer has the lower gold score.
    pub wrong_labels: f64,
}

/// The files of a world.
pub const FILES: [&str; 10] = [
    "pretrain.train.txt",
    "pretrain.val.txt",
    "sft.train.jsonl",
    "sft.val.jsonl",
    "prefs.train.jsonl",
    "prefs.test.jsonl",
    "prompts.pairs.jsonl",
    "prompts.pairs-test.jsonl",
    "prompts.train.jsonl",
    "prompts.test.jsonl",
];

/// Writes the world of `config` into the folder `out`, which is made if need be.
///
/// The same configuration gives the same bytes.
///
/// # Errors
/// If `config` is not valid, or a file cannot be written.
pub fn write(out: &Path, config: &WorldConfig) -> anyhow::Result<Summary> {
    config.validate()?;
    std::fs::create_dir_all(out).with_context(|| format!("failed to make the folder `{}`", out.display()))?;
    let streams = Streams::new(config.seed);
    let world = World { config, splits: Splits::deal(&streams), streams };
    let mut files = Vec::new();
    let mut save = |name: &str, records: Vec<String>, separator: &str| {
        files.push((name.to_owned(), records.len()));
        save(&out.join(name), &records, separator)
    };

    let mut told = HashSet::new();
    save("pretrain.train.txt", world.documents(Group::Train, config.stories, &mut told), "\n\n")?;
    save("pretrain.val.txt", world.documents(Group::Val, config.held_out, &mut told), "\n\n")?;

    let conversations = world.conversations(Group::Train, config.sft);
    let gold_sft_mean = conversations.iter().map(|(_, gold)| gold).sum::<f64>() / config.sft as f64;
    save("sft.train.jsonl", lines(conversations.into_iter().map(|(record, _)| record)), "\n")?;
    let held_out = world.conversations(Group::Val, config.held_out);
    save("sft.val.jsonl", lines(held_out.into_iter().map(|(record, _)| record)), "\n")?;

    let pairs = world.pairs(Group::Prefs, config.prefs);
    let n_wrong = pairs.iter().filter(|pair| pair["gold_chosen"].as_f64() < pair["gold_rejected"].as_f64()).count();
    save("prefs.train.jsonl", lines(pairs), "\n")?;
    save("prefs.test.jsonl", lines(world.pairs(Group::PrefsTest, config.held_out)), "\n")?;

    for (name, group, n) in [
        ("prompts.pairs.jsonl", Group::Pairs, config.pair_prompts),
        ("prompts.pairs-test.jsonl", Group::PairsTest, config.held_out),
        ("prompts.train.jsonl", Group::Ppo, config.prompts),
        ("prompts.test.jsonl", Group::Test, config.held_out),
    ] {
        let prompts = world.prompts(group, n);
        save(name, lines(prompts.into_iter().map(|(_, text)| json!({ "prompt": text }))), "\n")?;
    }
    Ok(Summary { files, gold_sft_mean, wrong_labels: n_wrong as f64 / config.prefs as f64 })
}

fn lines(records: impl IntoIterator<Item = Value>) -> Vec<String> {
    records.into_iter().map(|record| record.to_string()).collect()
}

fn save(path: &Path, records: &[String], separator: &str) -> anyhow::Result<()> {
    let failed = || format!("failed to write `{}`", path.display());
    let mut file = BufWriter::new(File::create(path).with_context(failed)?);
    for (i, record) in records.iter().enumerate() {
        let separator = if i + 1 == records.len() { "\n" } else { separator };
        file.write_all(record.as_bytes()).and_then(|()| file.write_all(separator.as_bytes())).with_context(failed)?;
    }
    file.flush().with_context(failed)
}

struct World<'c> {
    config: &'c WorldConfig,
    splits: Splits,
    streams: Streams,
}

impl World<'_> {
    /// A random stream for each record, so that none depends on how many there are.
    fn rng(&self, what: &str, group: Group, index: usize) -> Rng {
        self.streams.get(&format!("world/{what}/{group:?}"), index as u64)
    }

    /// Documents to pretrain on. No story is told twice, nor if it is in `told` already.
    fn documents(&self, group: Group, n: usize, told: &mut HashSet<String>) -> Vec<String> {
        let mut documents = Vec::with_capacity(n);
        let mut index = 0;
        while documents.len() < n {
            let mut rng = self.rng("documents", group, index);
            index += 1;
            let request = self.splits.draw(group, &mut rng);
            let story = match FlawRates::from(self.config.pretrain_flaws) {
                // Draws no numbers for flaws that there are none of: the stories of a clean world.
                FlawRates::NONE => tell(&Content::for_request(&request, &mut rng), &mut rng),
                rates => answer(&request, &rates, &mut rng),
            };
            let text = story.text();
            if !told.insert(text.clone()) {
                continue;
            }
            let roll = rng.uniform();
            let mut document = if roll < BARE {
                text
            } else if roll < BARE + TITLED {
                format!("{}\n{text}", request.title())
            } else {
                format!("{}\n{text}", request.phrase(&mut rng))
            };
            if rng.uniform() < QUESTIONED
                && let Some((question, answer)) = questions::ask(&story, &mut rng)
            {
                document = format!("{document}\n{question}\n{answer}");
            }
            documents.push(document);
        }
        documents
    }

    /// Conversations and the gold scores of their stories.
    fn conversations(&self, group: Group, n: usize) -> Vec<(Value, f64)> {
        let conversation = |index| {
            let mut rng = self.rng("conversations", group, index);
            let request = self.splits.draw(group, &mut rng);
            let prompt = request.phrase(&mut rng);
            let story = answer(&request, &self.config.flaws, &mut rng);
            let text = story.text();
            let gold = judged(&prompt, &text);
            let message = |role: &str, content: &str| json!({ "role": role, "content": content });
            let mut messages = vec![message("user", &prompt), message("assistant", &text)];
            if rng.uniform() < FOLLOWED_UP
                && let Some((question, answer)) = questions::ask(&story, &mut rng)
            {
                messages.extend([message("user", &question), message("assistant", &answer)]);
            }
            (json!({ "messages": messages }), gold)
        };
        (0..n).map(conversation).collect()
    }

    /// Labelled pairs of flawed answers. The labeller is not shown two answers of the same worth.
    fn pairs(&self, group: Group, n: usize) -> Vec<Value> {
        let pair = |(index, (request, prompt)): (usize, (Request, String))| {
            let mut rng = self.rng("pairs", group, index);
            let mut draw = || {
                let text = answer(&request, &self.config.flaws, &mut rng).text();
                let gold = judged(&prompt, &text);
                (text, gold)
            };
            let mut a = draw();
            let mut b = draw();
            while (a.1 - b.1).abs() < LEAST_DIFFERENCE {
                (a, b) = (b, draw());
            }
            let (chosen, rejected) =
                if label_pair(a.1, b.1, self.config.label_temperature, &mut rng) { (a, b) } else { (b, a) };
            json!({
                "prompt": prompt,
                "chosen": chosen.0,
                "rejected": rejected.0,
                "gold_chosen": chosen.1,
                "gold_rejected": rejected.1,
            })
        };
        self.prompts(group, n).into_iter().enumerate().map(pair).collect()
    }

    /// Requests, with different words as far as there are different ways to ask.
    fn prompts(&self, group: Group, n: usize) -> Vec<(Request, String)> {
        let mut seen = HashSet::new();
        let prompt = |index| {
            let mut rng = self.rng("prompts", group, index);
            let request = self.splits.draw(group, &mut rng);
            let mut text = request.phrase(&mut rng);
            for _ in 0..PHRASINGS_TRIED {
                if !seen.contains(&text) {
                    break;
                }
                text = request.phrase(&mut rng);
            }
            seen.insert(text.clone());
            (request, text)
        };
        (0..n).map(prompt).collect()
    }
}

fn judged(prompt: &str, response: &str) -> f64 {
    gold::score(prompt, response).expect("every request of this world can be read back")
}

/// Gold scores nearer than this count as the same.
const LEAST_DIFFERENCE: f64 = 0.02;
/// How often a request is put in other words before it is asked twice in the same.
const PHRASINGS_TRIED: usize = 20;
/// The share of documents that are a story and nothing else.
const BARE: f64 = 0.1;
/// The share of documents that begin with a title; the others begin with a request.
const TITLED: f64 = 0.2;
/// The share of documents with a question at the end.
const QUESTIONED: f64 = 0.12;
/// The share of conversations that go on with a question.
const FOLLOWED_UP: f64 = 0.15;

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
