//! Sampling and scoring responses: the library under evaluation, pair collection and every algorithm that learns from
//! scores.
//!
//! In reading order: [`Prompts`] are read from files, [`Sampling`] answers them, [`FrozenModels`] make [`Rollout`]s of
//! the [`Response`]s: log-probabilities under the reference policy, a score, that of one reward model or of an
//! [`Ensemble`], their divergence ([`kl`]). Below these,
//! [`ResponseBatch`] holds prompts with given responses as one batch, [`log_probs`] and [`values`] are tensors of one
//! number a response token, with gradient where the model has one, [`sum_by_response`] adds them up; [`of_response_tokens`] reads such numbers to the
//! host; [`score_rows`] reads a reward model at the last token of each row. [`Pairs`] are preferences read from files, and
//! [`Agreement`] says how far a reward model's scores order them as people did. A [`Watch`] looks on while any of it is computed.
//!
//! # Invariants
//! - No number depends on padding: rows are padded behind, and no position that is read comes after a padding token.
//! - Log-probabilities of one response are taken at one temperature, that of its sampling, by every model.
//! - Nothing here knows rewards, advantages or objectives; these belong to the algorithms.

#![forbid(unsafe_code)]

mod ensemble;
mod error;
pub mod kl;
mod pairs;
mod prompts;
mod rollout;
mod rows;
mod sampling;
mod tokens;
mod watch;

pub use ensemble::{Ensemble, spread};
pub use error::ScoreError;
pub use pairs::{Agreement, EncodedPair, PairTooLong, Pairs, distance, longer_wins, negative_log_sigmoid, score_pairs};
pub use prompts::{EncodedPrompt, Prompts, TooLong};
pub use rollout::{FrozenModels, Gold, Rollout};
pub use rows::{by_length, score_rows, score_rows_watched};
pub use sampling::{Response, Sampling};
pub use tokens::{
    Numbered, ResponseBatch, log_probs, log_probs_and_entropy, of_response_tokens, of_response_tokens_watched,
    of_share_of_responses, sum_by_response, values,
};
pub use watch::{UNWATCHED, Watch};
