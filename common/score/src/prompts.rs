//! Prompts from files to token ids.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use text::conversation;
use text::data::records::{self, ReadOptions};
use text::tokenizer::Tokenizer;

use crate::ScoreError;

/// A prompt as the policy reads it, and as people do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedPrompt {
    /// Token ids, up to where the answer begins.
    pub ids: Vec<u32>,
    /// The user's last message.
    pub text: String,
}

impl AsRef<[u32]> for EncodedPrompt {
    fn as_ref(&self) -> &[u32] {
        &self.ids
    }
}

/// Tokenised prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompts {
    /// In the order of the files; at least one.
    pub encoded: Vec<EncodedPrompt>,
}

/// Treatment of a prompt that, with the tokens of a response, exceeds the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TooLong {
    /// Stop with an error.
    #[default]
    Fail,
    /// Leave it out.
    Skip,
}

impl Prompts {
    /// Reads and tokenises `files`; each prompt has to leave room for `response_length` tokens in a context of
    /// `max_seq_len`.
    ///
    /// # Errors
    /// If a file or record cannot be used, a prompt is too long and not to be skipped, or none is left.
    pub fn read(
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        max_seq_len: usize,
        response_length: usize,
        options: ReadOptions,
        on_too_long: TooLong,
    ) -> Result<Self, ScoreError> {
        let mut all = Self { encoded: Vec::new() };
        let (mut n_too_long, mut longest) = (0, 0);
        for file in files {
            for prompt in records::read_prompts(file, options)? {
                let ids = conversation::encode_prompt(tokenizer, &prompt.messages)
                    .map_err(|source| ScoreError::Encode { path: file.clone(), source })?;
                if ids.len().saturating_add(response_length) > max_seq_len {
                    n_too_long += 1;
                    longest = longest.max(ids.len());
                } else {
                    all.encoded.push(EncodedPrompt { ids, text: prompt.text });
                }
            }
        }
        let n = n_too_long + all.encoded.len();
        if n_too_long > 0 && on_too_long == TooLong::Fail {
            return Err(ScoreError::TooLong { n_too_long, n, response_length, max_seq_len, longest });
        }
        if n_too_long > 0 {
            tracing::warn!(
                "{n_too_long} of {n} prompts are skipped: they leave no room for {response_length} more tokens in the \
                 context of {max_seq_len}; the longest has {longest}"
            );
        }
        if all.encoded.is_empty() { Err(ScoreError::NoPrompt) } else { Ok(all) }
    }
}
