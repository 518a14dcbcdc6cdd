//! The `[tokenizer]` table.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{SPECIAL_TOKENS, TokenizerError};

/// How text is cut into tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TokenizerKind {
    /// Byte-level byte-pair encoding, as in GPT-2; every UTF-8 text round-trips.
    Bpe,
    /// Words and pieces of words, as in BERT; white space is not kept, rare characters become `[UNK]`.
    Wordpiece,
    /// One token for each character of the training text; any other character is an error.
    Char,
    /// One token for each byte; nothing is learnt.
    Byte,
}

/// The `[tokenizer]` table of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerConfig {
    /// How text is split into tokens.
    pub kind: TokenizerKind,
    /// Size of the vocabulary to learn: bytes, merges and special tokens together. At least 262 for `bpe` (256 bytes and 6
    /// special tokens) and 8 for `wordpiece`; a small text may give fewer. Ignored by `char` and `byte`.
    #[schemars(range(max = 1_000_000))]
    pub vocab_size: usize,
    /// Number of occurrences below which a pair is not merged; 0 merges any pair, as in the `tokenizers` library.
    pub min_frequency: u64,
    /// Bytes of text to learn from: of a larger corpus, documents are drawn at random, each with the same probability. `char`
    /// reads all, so that no character is missing.
    #[schemars(range(min = 1))]
    pub sample_bytes: u64,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self { kind: TokenizerKind::Bpe, vocab_size: 4096, min_frequency: 0, sample_bytes: 1 << 30 }
    }
}

impl TokenizerConfig {
    /// Checks that a tokenizer can have this shape.
    ///
    /// # Errors
    /// If `vocab_size` leaves no room for the special tokens and the alphabet.
    pub fn validate(&self) -> Result<(), TokenizerError> {
        if self.sample_bytes == 0 {
            return Err(TokenizerError::Config {
                field: "sample_bytes",
                reason: "expected at least 1, found 0".to_owned(),
            });
        }
        let (least, what) = match self.kind {
            TokenizerKind::Bpe => (256 + SPECIAL_TOKENS.len(), "256 bytes and 6 special tokens"),
            TokenizerKind::Wordpiece => (SPECIAL_TOKENS.len() + 2, "`[UNK]`, 6 special tokens and one character"),
            TokenizerKind::Char | TokenizerKind::Byte => return Ok(()),
        };
        if self.vocab_size < least {
            return Err(TokenizerError::Config {
                field: "vocab_size",
                reason: format!("expected at least {least} ({what}), found {}", self.vocab_size),
            });
        }
        if u32::try_from(self.vocab_size).is_err() {
            return Err(TokenizerError::Config {
                field: "vocab_size",
                reason: format!("token ids have 32 bits, found {}", self.vocab_size),
            });
        }
        Ok(())
    }
}
