//! Errors of a tokenizer.

use std::path::PathBuf;

use base::files::FileError;

/// Why a tokenizer cannot be trained, loaded, saved or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// There is no such directory.
    #[error("no tokenizer directory at `{path}`\nhint: pass the directory that `pretrain tokenizer --out` wrote, or a checkpoint", path = .0.display())]
    NoDirectory(PathBuf),
    /// The directory has none of the files a tokenizer can be read from.
    #[error(
        "no tokenizer in `{path}`: expected `tokenizer.json`, `vocab.json` with `merges.txt`, or `encoder.json` with `vocab.bpe`\n\
         hint: `pretrain tokenizer --config C --out DIR` writes one",
        path = .0.display()
    )]
    NoFiles(PathBuf),
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is not what its name says.
    #[error("`{path}` is not a tokenizer: {reason}\nhint: the file is damaged or another kind of file; write or download it again", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The fault.
        reason: String,
    },
    /// A value of the `[tokenizer]` table makes no tokenizer.
    #[error("invalid `tokenizer.{field}`: {reason}")]
    Config {
        /// The key.
        field: &'static str,
        /// The value found and the one expected.
        reason: String,
    },
    /// There is nothing to train on.
    #[error("cannot train a tokenizer: the text is empty")]
    NoText,
    /// A character tokenizer met a character that its training text did not have.
    #[error(
        "character {character:?} (number {index}, counted from 0) is not in this tokenizer's vocabulary\n\
         hint: a `char` tokenizer knows the characters of its training text only; `bpe` and `byte` know every text"
    )]
    UnknownCharacter {
        /// The character.
        character: char,
        /// Its place in the text, in characters.
        index: usize,
    },
    /// The tokenizer lacks tokens that conversations need.
    #[error(
        "the tokenizer has no {} token, which conversations need\n\
         hint: `sft train --init` appends the missing tokens and trains their embeddings",
        .0.iter().map(|token| format!("`{token}`")).collect::<Vec<_>>().join(", ")
    )]
    MissingSpecials(Vec<&'static str>),
    /// A text can only be written with a token that structures conversations.
    #[error(
        "the text spells `{0}`, for which this tokenizer has no tokens but the special one\nhint: leave it out of the text"
    )]
    Reserved(String),
    /// The chat template does not render.
    #[error(
        "the tokenizer's chat template failed: {0}\n\
         hint: it may not take such conversations; see chat_template.jinja, or `chat_template` in tokenizer_config.json"
    )]
    Template(String),
    /// The chat template does not tell what the assistant wrote.
    #[error(
        "the tokenizer's chat template does not show where the answer in message {0} (counted from 1) begins and ends: \
         it writes that message in another way once others follow it\n\
         hint: put `{{% generation %}}` and `{{% endgeneration %}}` around the answer and its end in the template"
    )]
    NoAnswer(
        /// The place of the assistant's message, from 1.
        usize,
    ),
    /// The `tokenizers` library failed.
    #[error("failed to {doing}: {reason}")]
    Library {
        /// The library's task.
        doing: &'static str,
        /// The library's message.
        reason: String,
    },
}

impl TokenizerError {
    /// An error of the `tokenizers` library while `doing` something.
    pub(super) fn library(doing: &'static str, error: &(dyn std::error::Error + Send + Sync)) -> Self {
        Self::Library { doing, reason: error.to_string() }
    }
}
