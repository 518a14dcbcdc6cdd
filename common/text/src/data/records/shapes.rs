//! The shapes of records that are accepted, and what is said about any other.

use std::path::Path;

use super::json::Record;
use crate::data::DataError;

/// A document.
pub(super) const TEXT: &str = "`text`";
/// A conversation to learn from.
pub(super) const CONVERSATION: &str = "`messages`, or `prompt` with `completion` or `response`";
/// A preference.
pub(super) const PAIR: &str = "`prompt`, `chosen` and `rejected`; `chosen` and `rejected` that are conversations or \
                               transcripts with the same beginning; or `prompt` and `responses`, the best first";
/// An answer, or two, to be scored.
pub(super) const ANSWER: &str = "`prompt` and `response`, or a preference pair of `prompt`, `chosen` and `rejected`";
/// A prompt.
pub(super) const PROMPT: &str = "`prompt`";

/// Keys of forms that other programs read, and how they become ours.
const FOREIGN: [(&str, &str); 4] = [
    ("instruction", "Alpaca's form: `instruction` and `input` joined are `prompt`, `output` is `completion`"),
    (
        "conversations",
        "ShareGPT's form: rename `conversations` to `messages`, `from` to `role`, `value` to `content`, and the roles \
         `human` to `user`, `gpt` to `assistant`",
    ),
    ("label", "KTO's form: single answers with a `label` are no pairs"),
    ("summaries", "the form of summarize-from-feedback: `info` is `prompt`, `choice` says which summary is `chosen`"),
];

/// The most keys that an error repeats.
const MAX_KEYS: usize = 8;

/// The most characters of each.
const MAX_KEY_LEN: usize = 40;

/// That a record has none of the shapes `accepted`: which keys it has, and whose form that is.
pub(super) fn other(record: &Record, accepted: &str) -> String {
    if record.is_empty() {
        return format!("expected {accepted}; the record has no key");
    }
    let keys = record.keys().take(MAX_KEYS).map(|key| format!("`{}`", shortened(key)));
    let mut found = keys.collect::<Vec<_>>().join(", ");
    if record.len() > MAX_KEYS {
        found.push_str(", …");
    }
    match FOREIGN.iter().find(|(key, _)| record.contains_key(*key)) {
        Some((_, form)) => format!("expected {accepted}; found {found} ({form})"),
        None => format!("expected {accepted}; found {found}"),
    }
}

/// The beginning of `text`, for a message.
pub(super) fn shortened(text: &str) -> String {
    match text.char_indices().nth(MAX_KEY_LEN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Which of `endings` the file's name has, in either case.
pub(super) fn ending(path: &Path, endings: &'static [&'static str]) -> Result<&'static str, DataError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    if path.is_dir() {
        return Err(DataError::NotAFile(path.to_owned()));
    }
    let ending = endings.iter().find(|ending| name.ends_with(**ending));
    ending.copied().ok_or_else(|| DataError::Format { path: path.to_owned(), expected: endings })
}
