//! From a model and prompts to new tokens: ids in, ids and log-probabilities out, never text.
//!
//! [`generate`] samples (or takes the best token) for a list of prompts, [`Scheduler`] for requests that come and go; both
//! decode many rows over one key/value [`Cache`](crate::Cache). [`beam_search`] looks for the likeliest continuation of
//! one prompt. [`Sampler`] is the step from one row of logits to one token.
//!
//! Sampling happens on the host, from the stream `"sampling"` of the row's number, one uniform number a token: the tokens
//! of a prompt do not depend on the batch it is in, on the batch size or on the backend's own random numbers.

mod beam;
mod decoder;
mod engine;
mod sampling;
mod scheduler;
#[cfg(test)]
mod tests;

pub use beam::{BeamConfig, Hypothesis, MAX_BEAMS, beam_search};
pub use engine::{DEFAULT_MAX_BATCH, GenerateOptions, Generated, OnToken, generate};
pub use sampling::{Choice, NonFiniteLogit, Sampler, SamplingConfig, TEMPERATURE_EPS};
pub use scheduler::{Failed, Finish, Limits, Request, SampledToken, Scheduler};

use std::fmt::{Display, LowerExp};

use burn::tensor::{Tensor, TensorReadError};
use thiserror::Error;

use crate::Gpt;

/// Why nothing was generated.
#[derive(Debug, Error)]
pub enum GenerateError {
    /// A setting outside its range.
    #[error("invalid `{name}`: expected {expected}, found `{found}`")]
    InvalidOption {
        /// The setting's name.
        name: &'static str,
        /// The values allowed.
        expected: &'static str,
        /// The value given.
        found: String,
    },
    /// A prompt without a token.
    #[error(
        "prompt {prompt_idx} is empty\nhint: start it with `<|bos|>`, there is nothing to predict the first token from"
    )]
    EmptyPrompt {
        /// Index among the prompts.
        prompt_idx: usize,
    },
    /// A prompt that leaves no room for a single new token.
    #[error(
        "prompt {prompt_idx} is too long: {n_tokens} tokens, but the model's context window holds {max_seq_len} and \
         needs room for an answer\nhint: shorten the prompt, or use a model with a larger `max_seq_len`"
    )]
    PromptTooLong {
        /// Index among the prompts.
        prompt_idx: usize,
        /// The prompt's length in tokens.
        n_tokens: usize,
        /// The model's context window in tokens.
        max_seq_len: usize,
    },
    /// A token the model has no embedding for.
    #[error(
        "token {id} of prompt {prompt_idx} is outside the model's vocabulary of {vocab_size}\nhint: the prompt was \
         encoded with another tokenizer than the model was trained with"
    )]
    TokenOutOfRange {
        /// Index among the prompts.
        prompt_idx: usize,
        /// The token.
        id: u32,
        /// The model's vocabulary size.
        vocab_size: usize,
    },
    /// The model returned NaN or infinity.
    #[error(
        "the logits of prompt {prompt_idx} are not finite after {n_generated} new tokens: token {id} has {logit}\nhint: \
         the weights hold NaN or have diverged; use an earlier checkpoint"
    )]
    NonFinite {
        /// Index among the prompts.
        prompt_idx: usize,
        /// How many tokens had been generated before.
        n_generated: usize,
        /// The first token whose logit is not finite.
        id: u32,
        /// Its logit.
        logit: f32,
    },
    /// The device failed to compute or to return the logits.
    #[error("failed to read the logits from the device")]
    Device(#[source] Box<TensorReadError>),
}

/// Refuses a prompt the model cannot take.
fn check_prompt(model: &Gpt, prompt_idx: usize, prompt: &[u32]) -> Result<(), GenerateError> {
    let (vocab_size, max_seq_len) = (model.config().vocab_size, model.config().max_seq_len);
    if prompt.is_empty() {
        return Err(GenerateError::EmptyPrompt { prompt_idx });
    }
    if prompt.len() >= max_seq_len {
        return Err(GenerateError::PromptTooLong { prompt_idx, n_tokens: prompt.len(), max_seq_len });
    }
    match prompt.iter().find(|&&id| id as usize >= vocab_size) {
        Some(&id) => Err(GenerateError::TokenOutOfRange { prompt_idx, id, vocab_size }),
        None => Ok(()),
    }
}

/// The logits of one position of each row, on the host.
///
/// # Shapes
/// - `hidden`: `[batch, 1, d_model]`
/// - returns `batch · vocab_size` numbers, row after row
fn logits_of(model: &Gpt, hidden: Tensor<3>) -> Result<Vec<f32>, GenerateError> {
    let logits = model.logits(hidden); // [batch, 1, vocab_size]
    logits.try_into_vec_as::<f32>().map_err(|error| GenerateError::Device(Box::new(error)))
}

fn invalid(name: &'static str, expected: &'static str, found: impl Display + LowerExp) -> GenerateError {
    let digits = found.to_string();
    GenerateError::InvalidOption {
        name,
        expected,
        found: if digits.len() > 20 { format!("{found:e}") } else { digits },
    }
}
