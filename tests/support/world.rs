//! The data of a lab, made from a seed.

use common::rng::{Rng, Streams};
use serde_json::{Value, json};

use crate::Lab;

/// The small text world: sentences about who sees what, with questions that have answers.
pub(crate) struct World {
    rng: Rng,
}

impl World {
    pub(crate) fn new() -> Self {
        Self { rng: Streams::new(1).get("tests/world", 0) }
    }

    fn one(&mut self, words: &[&'static str]) -> &'static str {
        words[self.rng.below(words.len())]
    }

    fn animal(&mut self) -> &'static str {
        self.one(&["fox", "owl", "hare", "bear", "mouse"])
    }

    fn thing(&mut self) -> &'static str {
        self.one(&["boat", "ball", "tree", "hat", "bell", "cake"])
    }

    fn sentence(&mut self) -> String {
        let (animal, verb) = (self.animal(), self.one(&["sees", "likes", "wants", "finds"]));
        format!("the {animal} {verb} a {} {}.", self.one(&["red", "blue", "big", "old"]), self.thing())
    }

    fn document(&mut self) -> String {
        (0..2 + self.rng.below(4)).map(|_| self.sentence()).collect::<Vec<_>>().join(" ")
    }

    fn documents(&mut self, n: usize) -> String {
        (0..n).map(|_| self.document()).collect::<Vec<_>>().join("\n\n") + "\n"
    }

    fn conversation(&mut self) -> Value {
        let animal = self.animal();
        let answer = format!("the {animal} sees a {}.", self.thing());
        json!({ "messages": [
            { "role": "user", "content": format!("what does the {animal} see?") },
            { "role": "assistant", "content": answer },
        ] })
    }

    /// The better answer names the animal that was asked for.
    fn pair(&mut self) -> Value {
        let (animal, thing) = (self.animal(), self.thing());
        json!({
            "prompt": format!("what does the {animal} see?"),
            "chosen": format!("the {animal} sees a {thing}."),
            "rejected": format!("a {thing} and a {}", self.thing()),
        })
    }

    fn prompt(&mut self) -> Value {
        json!({ "prompt": format!("what does the {} see?", self.animal()) })
    }

    fn records(&mut self, n: usize, record: fn(&mut Self) -> Value) -> String {
        (0..n).map(|_| record(self).to_string() + "\n").collect()
    }

    pub(crate) fn write(mut self, lab: &Lab) {
        lab.write("data/train.txt", self.documents(300));
        lab.write("data/val.txt", self.documents(30));
        lab.write("data/sft.train.jsonl", self.records(64, Self::conversation));
        lab.write("data/sft.val.jsonl", self.records(8, Self::conversation));
        lab.write("data/pairs.train.jsonl", self.records(64, Self::pair));
        lab.write("data/pairs.val.jsonl", self.records(8, Self::pair));
        lab.write("data/prompts.train.jsonl", self.records(32, Self::prompt));
        lab.write("data/prompts.val.jsonl", self.records(6, Self::prompt));
    }
}
