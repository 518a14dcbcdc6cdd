//! Answers to be scored, with all that their records say.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Pair, ReadOptions, check_turns, json, pairs, prompt_of, shapes, string_of};
use crate::conversation::Message;
use crate::data::DataError;

/// The answers of a record, to be scored.
#[derive(Debug, Clone, PartialEq)]
pub enum Answers {
    /// One answer.
    One {
        /// The turns up to the answer.
        prompt: Vec<Message>,
        /// The answer.
        response: String,
    },
    /// Two answers to one prompt.
    Two(Pair),
}

/// A record with an answer, or two, to score.
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerRecord {
    /// Everything the record says, as it stands.
    pub fields: Map<String, Value>,
    /// Its answers, to be scored.
    pub answers: Answers,
}

/// Reads answers: `{"prompt", "response"}`, or preference pairs as [`read_pairs`](super::read_pairs) does.
///
/// # Errors
/// If the file cannot be read or is empty, or, unless they are skipped, at the first malformed record.
pub fn read_answers(path: &Path, options: impl Into<ReadOptions>) -> Result<Vec<AnswerRecord>, DataError> {
    json::read(path, options.into(), |record| {
        let answers = if record.contains_key("response") {
            let prompt = prompt_of(record)?;
            check_turns(&prompt, "`prompt`")?;
            Answers::One { prompt, response: string_of(record, "response")? }
        } else if record.contains_key("chosen") || record.contains_key("rejected") {
            Answers::Two(pairs::pair_of(record)?)
        } else {
            return Err(shapes::other(record, shapes::ANSWER));
        };
        Ok(AnswerRecord { fields: record.clone(), answers })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Role;
    use crate::data::records::OnBadRecord;

    #[test]
    fn answers_stand_alone_or_in_pairs_and_keep_their_fields() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("answers.jsonl");
        let lines = [
            r#"{"id": 7, "prompt": "q", "response": ""}"#,
            r#"{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5}"#,
        ];
        std::fs::write(&path, lines.join("\n")).expect("written");
        let read = read_answers(&path, OnBadRecord::Fail).expect("both are answers");
        assert_eq!(read[0].fields["id"], 7);
        assert_eq!(
            read[0].answers,
            Answers::One { prompt: vec![Message::new(Role::User, "q")], response: String::new() }
        );
        let Answers::Two(pair) = &read[1].answers else { panic!("a pair") };
        assert_eq!((pair.chosen.as_str(), pair.margin), ("a", Some(0.5)));

        std::fs::write(&path, r#"{"prompt": "q"}"#).expect("written");
        let error = read_answers(&path, OnBadRecord::Fail).expect_err("nothing to score").to_string();
        assert!(error.contains("expected `prompt` and `response`, or a preference pair"), "{error}");
    }
}
