//! The three ways to write a preference.

use serde_json::Value;

use super::lines::Record;
use super::{Pair, any_messages_of, check_turns, kind, prompt_of, string_of};
use crate::conversation::{Message, Role};

/// The turns' marks in HH-RLHF's transcripts.
const TURNS: [(&str, Role); 2] = [("\n\nHuman:", Role::User), ("\n\nAssistant:", Role::Assistant)];

pub(super) fn pair(record: &Record) -> Result<Pair, String> {
    let margin = match record.get("margin") {
        None | Some(Value::Null) => None,
        Some(Value::Number(margin)) => margin.as_f64().map(|margin| margin as f32),
        Some(other) => return Err(format!("`margin` is {}, expected a number", kind(other))),
    };
    let is_list = |key| matches!(record.get(key), Some(Value::Array(_)));
    let (prompt, chosen, rejected) = if record.contains_key("prompt") {
        (prompt_of(record)?, answer_of(record, "chosen")?, answer_of(record, "rejected")?)
    } else if is_list("chosen") && is_list("rejected") {
        of_messages(any_messages_of(record, "chosen")?, any_messages_of(record, "rejected")?)?
    } else {
        of_transcripts(&string_of(record, "chosen")?, &string_of(record, "rejected")?)?
    };
    check_turns(&prompt, "the prompt")?;
    if prompt.last().is_some_and(|last| last.role == Role::Assistant) {
        return Err("the prompt ends with the assistant's message: there is nothing to answer".to_owned());
    }
    if chosen == rejected {
        return Err("`chosen` and `rejected` are equal".to_owned());
    }
    Ok(Pair { prompt, chosen, rejected, margin })
}

/// An answer beside a prompt: a string, or a list of the assistant's one message.
fn answer_of(record: &Record, key: &str) -> Result<String, String> {
    if !matches!(record.get(key), Some(Value::Array(_))) {
        return string_of(record, key);
    }
    the_answer(any_messages_of(record, key)?, key)
}

fn the_answer(messages: Vec<Message>, key: &str) -> Result<String, String> {
    match <[Message; 1]>::try_from(messages) {
        Ok([Message { role: Role::Assistant, content }]) => Ok(content),
        Ok([Message { role, .. }]) => {
            Err(format!("`{key}` ends with a message of role `{role}`, expected `assistant`"))
        }
        Err(messages) => Err(format!("`{key}` has {} messages after the prompt, expected one", messages.len())),
    }
}

/// Two conversations that differ in their last message.
fn of_messages(mut chosen: Vec<Message>, mut rejected: Vec<Message>) -> Result<(Vec<Message>, String, String), String> {
    let n_shared = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
    let chosen_answer = the_answer(chosen.split_off(n_shared), "chosen")?;
    let rejected_answer = the_answer(rejected.split_off(n_shared), "rejected")?;
    Ok((chosen, chosen_answer, rejected_answer))
}

/// Two transcripts that differ from some answer on.
///
/// The prompt is the longest beginning that both share, up to its last `Assistant:`; the answers are what follows,
/// without the space that every turn of a transcript begins with. In five of harmless-base's 2,312 test pairs more
/// turns follow: they stay in the answer as they are.
fn of_transcripts(chosen: &str, rejected: &str) -> Result<(Vec<Message>, String, String), String> {
    let differs = chosen.bytes().zip(rejected.bytes()).take_while(|(a, b)| a == b).count();
    let [_, (mark, _)] = TURNS;
    // A mark is ASCII and stands whole before the difference, so it ends between two characters of both.
    let shared = chosen.as_bytes()[..differs].windows(mark.len()).rposition(|window| window == mark.as_bytes());
    let Some(start) = shared else {
        return Err(
            "expected `prompt`, or transcripts that share a beginning with `\\n\\nHuman:` and `\\n\\nAssistant:`"
                .to_owned(),
        );
    };
    let answer = |transcript: &str| {
        let answer = &transcript[start + mark.len()..];
        answer.strip_prefix(' ').unwrap_or(answer).trim_end().to_owned()
    };
    Ok((turns(&chosen[..start])?, answer(chosen), answer(rejected)))
}

/// The turns of a transcript. Turns of white space only, which HH-RLHF has a few of, are left out.
fn turns(transcript: &str) -> Result<Vec<Message>, String> {
    let mut rest = transcript;
    let mut turns = Vec::new();
    while !rest.is_empty() {
        let Some((mark, role)) = TURNS.into_iter().find(|(mark, _)| rest.starts_with(mark)) else {
            return Err("a transcript begins with `\\n\\nHuman:`".to_owned());
        };
        rest = &rest[mark.len()..];
        let end = TURNS.iter().filter_map(|(mark, _)| rest.find(mark)).min().unwrap_or(rest.len());
        let text = rest[..end].trim();
        if !text.is_empty() {
            turns.push(Message::new(role, text));
        }
        rest = &rest[end..];
    }
    Ok(turns)
}
