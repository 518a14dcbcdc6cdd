//! Errors.

use std::path::PathBuf;

use burn::tensor::TensorReadError;
use group::GroupError;
use model::generate::GenerateError;
use text::conversation::ConversationError;
use text::data::DataError;

/// Why prompts cannot be read or responses not be sampled or scored.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    /// Another process of the run has ended.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// A file of prompts cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A prompt cannot be encoded.
    #[error("failed to encode a prompt of `{path}`", path = path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: ConversationError,
    },
    /// Prompts that leave too little of the context for a response.
    #[error(
        "{n_too_long} of {n} prompts leave no room for {response_length} more tokens in the context of {max_seq_len}; \
         the longest has {longest}\nhint: allow fewer tokens for a response (`ppo.response_length`, `--max-tokens`), or \
         set `data.on_too_long` to \"skip\""
    )]
    TooLong {
        /// How many there are.
        n_too_long: usize,
        /// Prompts of all files.
        n: usize,
        /// Tokens that a response may have.
        response_length: usize,
        /// The context, in tokens.
        max_seq_len: usize,
        /// Tokens of the longest prompt.
        longest: usize,
    },
    /// A pair cannot be encoded.
    #[error("failed to encode a pair of `{path}`", path = path.display())]
    EncodePair {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: ConversationError,
    },
    /// A pair is longer than the context.
    #[error(
        "a pair of `{path}` has {n_tokens} tokens, the context {max_seq_len}\nhint: set `data.on_too_long` to \
         \"truncate-prompt\" or \"skip\"",
        path = path.display()
    )]
    PairTooLong {
        /// The file.
        path: PathBuf,
        /// Tokens of its prompt and longer answer.
        n_tokens: usize,
        /// The context, in tokens.
        max_seq_len: usize,
    },
    /// The files hold no pair that can be used.
    #[error("no pair is left to use")]
    NoPair,
    /// The files hold no prompt that can be used.
    #[error("no prompt is left to use")]
    NoPrompt,
    /// No response was sampled.
    #[error("failed to sample responses")]
    Sample(#[from] GenerateError),
    /// A number cannot be read from the device.
    #[error("failed to read the device")]
    Device(#[source] Box<TensorReadError>),
    /// The one who watched the work broke it off.
    #[error("stopped before its end")]
    Stopped,
    /// A score is NaN or infinite.
    #[error("a score is not finite: the reward model's weights have diverged")]
    NotFinite,
    /// The score of one of several reward models is NaN or infinite.
    #[error("a score is not finite: the weights of reward model {number} of {n} have diverged")]
    MemberNotFinite {
        /// Its number in the order they were given in, from 1.
        number: usize,
        /// How many there are.
        n: usize,
    },
}

impl From<TensorReadError> for ScoreError {
    fn from(error: TensorReadError) -> Self {
        Self::Device(Box::new(error))
    }
}
