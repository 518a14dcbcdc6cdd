//! Records as people write them: JSON lines, text and Parquet to documents, conversations, pairs and prompts.
//!
//! Keys that a record does not need are allowed and ignored. Texts are taken as they stand, white space included.

mod answers;
mod lines;
mod pairs;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::RowAccessor;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::DataError;
use crate::conversation::{Message, Role};
pub use answers::{AnswerRecord, Answers, read_answers};
use lines::{BadRecords, Record};

const NO_CONVERSATION: &str = "expected `messages`, or `prompt` and `completion`";

/// A list of turns with at least one of the assistant's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    /// The turns.
    pub messages: Vec<Message>,
}

/// Two answers to one prompt, the better one first.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// The turns up to the answer.
    pub prompt: Vec<Message>,
    /// The preferred answer.
    pub chosen: String,
    /// The other one.
    pub rejected: String,
    /// By how much it is preferred, in units of score.
    pub margin: Option<f32>,
}

/// What a policy is asked to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The turns, the user's last.
    pub messages: Vec<Message>,
    /// The last turn's text.
    pub text: String,
}

/// What to do about a record that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRecord {
    /// Stop, naming file, line and reason.
    #[default]
    Fail,
    /// Leave it out, and say in the log how many there were.
    Skip,
}

/// Where a `.txt` file is cut into documents.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Separator {
    /// `"blank-line"`: at lines of nothing but white space.
    #[default]
    BlankLine,
    /// `"line"`: each line is a document.
    Line,
    /// `"none"`: the whole file is one document, to the byte.
    None,
    /// Any other string, `"<|endoftext|>"` say: wherever it stands. Line breaks around it belong to no document.
    Text(String),
}

impl From<String> for Separator {
    fn from(name: String) -> Self {
        match name.as_str() {
            "blank-line" | "" => Self::BlankLine,
            "line" => Self::Line,
            "none" => Self::None,
            _ => Self::Text(name),
        }
    }
}

impl From<Separator> for String {
    fn from(separator: Separator) -> Self {
        match separator {
            Separator::BlankLine => "blank-line".to_owned(),
            Separator::Line => "line".to_owned(),
            Separator::None => "none".to_owned(),
            Separator::Text(text) => text,
        }
    }
}

/// Reads documents for pretraining: `.txt` cut at `separator`, `{"text"}` lines, or Parquet's column `text`; the
/// first two also gzipped.
///
/// # Errors
/// If the file cannot be read or is empty, or, unless they are skipped, at the first bad record.
pub fn read_texts(path: &Path, separator: &Separator, on_bad: OnBadRecord) -> Result<Vec<String>, DataError> {
    const ENDINGS: &[&str] = &[".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"];
    match lines::ending(path, ENDINGS)? {
        ".txt" | ".txt.gz" => read_plain(path, separator),
        ".parquet" => read_parquet(path, on_bad),
        _ => lines::read(path, on_bad, |record| text_of(record, "text")),
    }
}

/// Reads conversations for fine-tuning: `{"messages"}`, or `{"prompt", "completion"}` where `response` may stand for
/// `completion`. Prompt and completion are strings or lists of messages.
///
/// # Errors
/// As [`read_texts`]; a record is bad if it is no such object or a user's or assistant's text is empty.
pub fn read_conversations(path: &Path, on_bad: OnBadRecord) -> Result<Vec<Conversation>, DataError> {
    lines::read(path, on_bad, |record| {
        let messages = if record.contains_key("messages") {
            messages_of(record, "messages")?
        } else if !record.contains_key("prompt") {
            return Err(NO_CONVERSATION.to_owned());
        } else {
            let mut messages = prompt_of(record)?;
            let key = if record.contains_key("completion") { "completion" } else { "response" };
            match record.get(key) {
                None => return Err(NO_CONVERSATION.to_owned()),
                Some(Value::Array(_)) => messages.extend(messages_of(record, key)?),
                Some(_) => messages.push(Message::new(Role::Assistant, text_of(record, key)?)),
            }
            check_turns(&messages, "the record")?;
            messages
        };
        if !messages.iter().any(|message| message.role == Role::Assistant) {
            return Err("no message is the assistant's, so there is nothing to learn".to_owned());
        }
        Ok(Conversation { messages })
    })
}

/// Reads preference pairs: `{"prompt", "chosen", "rejected"}`, transcripts `{"chosen", "rejected"}` as in HH-RLHF, or
/// `{"chosen": [messages], "rejected": [messages]}`; each with an optional `margin`.
///
/// Without a `prompt`, it is the longest beginning that both share, up to where an answer starts. An answer may be
/// empty, as in HH-RLHF: it is one that ends at once.
///
/// # Errors
/// As [`read_texts`]; a record is bad if it is no such object, its prompt is empty or its answers are equal.
pub fn read_pairs(path: &Path, on_bad: OnBadRecord) -> Result<Vec<Pair>, DataError> {
    lines::read(path, on_bad, pairs::pair)
}

/// Reads prompts: `{"prompt"}`, a string or a list of messages that ends with the user's.
///
/// # Errors
/// As [`read_texts`]; a record is bad if it has no such prompt or the prompt is empty.
pub fn read_prompts(path: &Path, on_bad: OnBadRecord) -> Result<Vec<Prompt>, DataError> {
    lines::read(path, on_bad, |record| {
        let messages = prompt_of(record)?;
        match messages.last() {
            Some(Message { role: Role::User, content }) => Ok(Prompt { text: content.clone(), messages }),
            _ => Err("`prompt` does not end with the user's message".to_owned()),
        }
    })
}

fn read_plain(path: &Path, separator: &Separator) -> Result<Vec<String>, DataError> {
    let bytes = lines::read_bytes(path)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at].split(|&byte| byte == b'\n').count();
        DataError::NotUtf8 { path: path.to_owned(), line }
    })?;
    let text = text.strip_prefix(lines::BYTE_ORDER_MARK).unwrap_or(&text);
    let documents = documents(text, separator);
    if documents.is_empty() { Err(DataError::Empty(path.to_owned())) } else { Ok(documents) }
}

/// The documents of `text`: those that are not only white space.
fn documents(text: &str, separator: &Separator) -> Vec<String> {
    let parts: Vec<String> = match separator {
        Separator::None => vec![text.to_owned()],
        Separator::Line => text.lines().map(str::to_owned).collect(),
        Separator::Text(mark) => {
            text.split(mark.as_str()).map(|part| part.trim_matches(['\r', '\n']).to_owned()).collect()
        }
        Separator::BlankLine => {
            let lines: Vec<&str> = text.lines().collect();
            lines.split(|line| line.trim().is_empty()).map(|lines| lines.join("\n")).collect()
        }
    };
    parts.into_iter().filter(|part| !part.trim().is_empty()).collect()
}

fn read_parquet(path: &Path, on_bad: OnBadRecord) -> Result<Vec<String>, DataError> {
    let parquet = |reason: String| DataError::Parquet { path: path.to_owned(), reason };
    let file = File::open(path).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
    if file.metadata().is_ok_and(|data| data.len() == 0) {
        return Err(DataError::Empty(path.to_owned()));
    }
    let reader = SerializedFileReader::new(file).map_err(|error| parquet(error.to_string()))?;
    let schema = reader.metadata().file_metadata().schema();
    let column = schema.get_fields().iter().find(|field| field.name() == "text").cloned();
    let column = column.ok_or_else(|| parquet("it has no column `text`".to_owned()))?;
    // Only the column that is needed is read and unpacked.
    let projection = parquet::schema::types::Type::group_type_builder(schema.name()).with_fields(vec![column]).build();
    let projection = projection.map_err(|error| parquet(error.to_string()))?;
    let rows = reader.get_row_iter(Some(projection)).map_err(|error| parquet(error.to_string()))?;
    let mut texts = Vec::new();
    let mut bad = BadRecords::new(path, "row", on_bad);
    for (i, row) in rows.enumerate() {
        let row = row.map_err(|error| parquet(error.to_string()))?;
        match row.get_string(0) {
            Ok(text) if text.trim().is_empty() => bad.add(i + 1, "`text` is empty".to_owned())?,
            Ok(text) => texts.push(text.clone()),
            Err(_) => bad.add(i + 1, "`text` is not a string".to_owned())?,
        }
    }
    bad.report(texts)
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
