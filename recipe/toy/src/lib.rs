//! A small world of simple English, generated from a seed: the data of `configs/tiny`.
//!
//! Ten children and ten animals, fourteen things, six colours, ten places and twelve plots, each of which can end
//! happily or sadly, give short stories of 35 to 75 words out of some 500 words. All of it is written for this
//! project; nothing is read from outside.
//!
//! A **request** names one to three of: a character, a thing (perhaps with its colour), a place, the mood of the ending.
//! "Tell me a story about a fox and a red boat with a happy ending." [`splits`] deals out all 29,406 requests, so that
//! no two of these groups share one: training, its validation, generated pairs and their test, requests for pairs of a
//! model's own answers and their test, PPO, and the held-out test.
//!
//! # Files
//! | file | what |
//! | --- | --- |
//! | `pretrain.train.txt`, `pretrain.val.txt` | stories without flaws unless `pretrain_flaws` asks for some, most after the request or a title they answer, so that a model learns to use what it is asked for; some with a question and its answer |
//! | `sft.train.jsonl`, `sft.val.jsonl` | requests and answers of mixed quality ([`flaws`]), some with a question about the story |
//! | `prefs.train.jsonl`, `prefs.test.jsonl` | two flawed answers to a request, in the order of the simulated [`labeller`]; `gold_chosen`, `gold_rejected` tell the true scores |
//! | `prompts.pairs.jsonl`, `prompts.pairs-test.jsonl` | requests for pairs of the SFT model's own answers |
//! | `prompts.train.jsonl` | requests for PPO |
//! | `prompts.test.jsonl` | requests for the gold evaluation |
//!
//! The worth of an answer is known exactly: [`crate::gold`]. The labeller who chooses between two answers is
//! **simulated**: it prefers the first with probability `σ((gold_a − gold_b) / temperature)`, so like people it
//! errs most often where two answers are nearly as good.
//!
//! # Reading order
//! [`words`], [`plots`], [`story`], [`request`], [`flaws`], then [`files`].

#![forbid(unsafe_code)]

pub mod files;
pub mod flaws;
pub mod gold;
pub mod grammar;
pub mod labeller;
pub mod plots;
pub mod questions;
pub mod request;
pub mod splits;
pub mod story;
pub mod template;
pub mod text;
pub mod words;

pub use files::{FILES, MOST_STORIES, Summary, WorldConfig, write};
pub use labeller::label_pair;
