//! Records as people write them: JSON, text and Parquet to documents, conversations, pairs and prompts.
//!
//! Keys that a record does not need are allowed and ignored. Texts are taken as they stand, white space included. Each
//! `read_…` has a `check_…` that reads the same file, finds the same faults and keeps nothing: what a program calls
//! before its first long step.

mod answers;
mod json;
mod labels;
mod options;
mod pages;
mod pairs;
mod shapes;
mod source;
mod table;
mod tally;
mod texts;

#[cfg(test)]
mod tests;

use std::path::Path;

use serde_json::{Map, Value};

use super::DataError;
use crate::conversation::{Message, Role};
pub use answers::{AnswerRecord, Answers, read_answers};
use json::Record;
pub use labels::{Appended, ENDING as LABELS_ENDING, Label, LabelFile, Verdict, read_appended, read_labels};
pub use options::{OnBadRecord, ReadOptions, RecordLimit};
pub use tally::Summary;
pub use texts::{Separator, Texts};

const NOT_UTF8: &str = "it is not valid UTF-8";

/// Some editors put it at the beginning of a file.
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// A list of turns with at least one of the assistant's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    /// The turns.
    pub messages: Vec<Message>,
}

/// Two answers to one prompt, the better one first.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Pair {
    /// The turns up to the answer.
    pub prompt: Vec<Message>,
    /// The preferred answer.
    pub chosen: String,
    /// The other one.
    pub rejected: String,
    /// By how much it is preferred, in units of score.
    pub margin: Option<f32>,
    /// The person who decided.
    pub annotator: Option<String>,
    /// How long the decision took.
    pub seconds: Option<f64>,
    /// The well-formed record that the pair comes from, counted from 0 within its file: several pairs come from one
    /// ranked list, one after the other.
    pub record: usize,
}

/// A prompt for a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The turns, the user's last.
    pub messages: Vec<Message>,
    /// The last turn's text.
    pub text: String,
}

/// Reads documents for pretraining; see [`Texts::open`].
///
/// # Errors
/// If the file cannot be read or is empty, or, unless they are skipped, at the first malformed record.
pub fn read_texts(
    path: &Path,
    separator: &Separator,
    options: impl Into<ReadOptions>,
) -> Result<Vec<String>, DataError> {
    Texts::open(path, separator, options.into())?.collect()
}

/// Checks a file that [`read_texts`] reads.
///
/// # Errors
/// As [`read_texts`].
pub fn check_texts(path: &Path, separator: &Separator, options: impl Into<ReadOptions>) -> Result<Summary, DataError> {
    let mut texts = Texts::open(path, separator, options.into())?;
    texts.by_ref().try_for_each(|text| text.map(drop))?;
    Ok(texts.summary())
}

/// Reads conversations for fine-tuning: `{"messages"}`, or `{"prompt", "completion"}` where `response` may stand for
/// `completion`. Prompt and completion are strings or lists of messages.
///
/// # Errors
/// As [`read_texts`]; a record is malformed if it has another shape or a user's or assistant's text is empty.
pub fn read_conversations(path: &Path, options: impl Into<ReadOptions>) -> Result<Vec<Conversation>, DataError> {
    json::read(path, options.into(), conversation_of)
}

/// Checks a file that [`read_conversations`] reads.
///
/// # Errors
/// As [`read_conversations`].
pub fn check_conversations(path: &Path, options: impl Into<ReadOptions>) -> Result<Summary, DataError> {
    json::check(path, options.into(), conversation_of)
}

/// Reads preference pairs: `{"prompt", "chosen", "rejected"}`; `{"chosen", "rejected"}`, both conversations, or
/// transcripts as in HH-RLHF; each with an optional `margin`. A ranked list `{"prompt", "responses"}`, the best first,
/// gives every pair of its responses, the better one as `chosen`. `{"prompt", "tied"}`, a person's word that neither of
/// two answers is better, gives none.
///
/// Beside a `prompt`, an answer is a string, the assistant's message, or a whole conversation that begins with the
/// prompt, as in `UltraFeedback`. Without a `prompt`, it is the longest beginning that both share, up to where an answer
/// starts. An answer may be empty, as in HH-RLHF: it is one that ends at once.
///
/// # Errors
/// As [`read_texts`]; a record is malformed if it has another shape, its prompt is empty or two answers are equal.
pub fn read_pairs(path: &Path, options: impl Into<ReadOptions>) -> Result<Vec<Pair>, DataError> {
    let records = json::read(path, options.into(), pairs::pairs_of)?;
    let numbered = records.into_iter().enumerate();
    Ok(numbered.flat_map(|(record, pairs)| pairs.into_iter().map(move |pair| Pair { record, ..pair })).collect())
}

/// Checks a file that [`read_pairs`] reads.
///
/// # Errors
/// As [`read_pairs`].
pub fn check_pairs(path: &Path, options: impl Into<ReadOptions>) -> Result<Summary, DataError> {
    json::check(path, options.into(), pairs::pairs_of)
}

/// Reads prompts: `{"prompt"}`, a string or a list of messages that ends with the user's.
///
/// # Errors
/// As [`read_texts`]; a record is malformed if it has no such prompt or the prompt is empty.
pub fn read_prompts(path: &Path, options: impl Into<ReadOptions>) -> Result<Vec<Prompt>, DataError> {
    json::read(path, options.into(), user_prompt_of)
}

fn conversation_of(record: &Record) -> Result<Conversation, String> {
    let other = || Err(shapes::other(record, shapes::CONVERSATION));
    let messages = if record.contains_key("messages") {
        messages_of(record, "messages")?
    } else if !record.contains_key("prompt") {
        return other();
    } else {
        let has = |key: &str| record.get(key).is_some_and(|value| !value.is_null());
        let key = match (has("completion"), has("response")) {
            (true, true) => return Err("it has both `completion` and `response`, expected one of them".to_owned()),
            (true, false) => "completion",
            (false, _) => "response",
        };
        let Some(completion) = record.get(key) else { return other() };
        let mut messages = prompt_of(record)?;
        if completion.is_array() {
            messages.extend(messages_of(record, key)?);
        } else {
            messages.push(Message::new(Role::Assistant, text_of(record, key)?));
        }
        check_turns(&messages, "the record")?;
        messages
    };
    if !messages.iter().any(|message| message.role == Role::Assistant) {
        return Err("it has no assistant message, so there is nothing to learn from".to_owned());
    }
    Ok(Conversation { messages })
}

fn user_prompt_of(record: &Record) -> Result<Prompt, String> {
    if !record.contains_key("prompt") {
        return Err(shapes::other(record, shapes::PROMPT));
    }
    let messages = prompt_of(record)?;
    match messages.last() {
        Some(Message { role: Role::User, content }) => Ok(Prompt { text: content.clone(), messages }),
        _ => Err("`prompt` does not end with the user's message".to_owned()),
    }
}

/// The string under `key`, which is not empty.
fn text_of(record: &Record, key: &str) -> Result<String, String> {
    let text = string_of(record, key)?;
    if text.trim().is_empty() { Err(format!("`{key}` is empty")) } else { Ok(text) }
}

fn string_of(record: &Record, key: &str) -> Result<String, String> {
    match record.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("`{key}` is {}, expected a string", kind(other))),
        None => Err(format!("`{key}` is missing")),
    }
}

/// The turns under `prompt`, a string or messages.
fn prompt_of(record: &Record) -> Result<Vec<Message>, String> {
    match record.get("prompt") {
        Some(Value::Array(_)) => messages_of(record, "prompt"),
        Some(Value::String(_)) => Ok(vec![Message::new(Role::User, text_of(record, "prompt")?)]),
        Some(other) => Err(format!("`prompt` is {}, expected a string or a list of messages", kind(other))),
        None => Err("`prompt` is missing".to_owned()),
    }
}

/// The list of messages under `key`; no text is empty but, possibly, the system's.
fn messages_of(record: &Record, key: &str) -> Result<Vec<Message>, String> {
    let messages = any_messages_of(record, key)?;
    check_turns(&messages, &format!("`{key}`"))?;
    Ok(messages)
}

fn any_messages_of(record: &Record, key: &str) -> Result<Vec<Message>, String> {
    let Some(Value::Array(items)) = record.get(key) else {
        return Err(format!("`{key}` is {}, expected a list of messages", record.get(key).map_or("missing", kind)));
    };
    let message = |(i, item): (usize, &Value)| {
        let at = |reason: String| format!("message {} of `{key}`: {reason}", i + 1);
        let item: &Map<_, _> =
            item.as_object().ok_or_else(|| at(format!("it is {}, expected an object", kind(item))))?;
        let role = string_of(item, "role").map_err(at)?;
        let role = match role.as_str() {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            _ => {
                let role = shapes::shortened(&role);
                return Err(at(format!("unknown role `{role}`, expected `system`, `user` or `assistant`")));
            }
        };
        Ok(Message { role, content: string_of(item, "content").map_err(at)? })
    };
    items.iter().enumerate().map(message).collect()
}

fn check_turns(messages: &[Message], what: &str) -> Result<(), String> {
    crate::conversation::validate(messages).map_err(|error| {
        let text = error.to_string();
        format!("{what}: {}", text.lines().next().unwrap_or_default())
    })?;
    match messages.iter().position(|m| m.role != Role::System && m.content.trim().is_empty()) {
        Some(i) => Err(format!("{what}: message {} (of role `{}`) is empty", i + 1, messages[i].role)),
        None => Ok(()),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
