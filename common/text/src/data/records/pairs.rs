//! Preferences: pairs in their several forms, and ranked lists.

use serde_json::Value;

use super::json::Record;
use super::labels::{is_repeat, tied_of};
use super::{Pair, any_messages_of, check_turns, kind, prompt_of, shapes, string_of};
use crate::conversation::{Message, Role};

/// The turns' marks in HH-RLHF's transcripts.
const TURNS: [(&str, Role); 2] = [("\n\nHuman:", Role::User), ("\n\nAssistant:", Role::Assistant)];

/// The most responses of a ranked list: 64 already make 2,016 pairs.
const MAX_RESPONSES: usize = 64;

/// The largest margin, in units of score: a batch's sum of losses has to stay within f32.
const MAX_MARGIN: f64 = 1e30;

/// The pairs of a record to learn from: one, every pair of a ranked list, or none where two answers are said to be equally good,
/// or somebody only says again what they said.
pub(super) fn pairs_of(record: &Record) -> Result<Vec<Pair>, String> {
    let pairs = said_in(record)?;
    Ok(if is_repeat(record) { Vec::new() } else { pairs })
}

/// What a record prefers, whether or not it has been said before.
pub(super) fn said_in(record: &Record) -> Result<Vec<Pair>, String> {
    let has = |key| record.contains_key(key);
    if tied_of(record)?.is_some() {
        Ok(Vec::new())
    } else if has("responses") && !has("chosen") && !has("rejected") {
        ranked(record)
    } else if has("chosen") || has("rejected") {
        Ok(vec![pair_of(record)?])
    } else {
        Err(shapes::other(record, shapes::PAIR))
    }
}

/// The pair of a record with `chosen` and `rejected`.
pub(super) fn pair_of(record: &Record) -> Result<Pair, String> {
    let is_list = |key| matches!(record.get(key), Some(Value::Array(_)));
    let (prompt, chosen, rejected) = if record.get("prompt").is_some_and(|prompt| !prompt.is_null()) {
        let prompt = prompt_of(record)?;
        let (before_chosen, chosen) = answer_after(&prompt, record, "chosen")?;
        let (before_rejected, rejected) = answer_after(&prompt, record, "rejected")?;
        if before_chosen != before_rejected {
            return Err("`chosen` and `rejected` differ before their last messages".to_owned());
        }
        (before_chosen, chosen, rejected)
    } else if is_list("chosen") && is_list("rejected") {
        of_messages(any_messages_of(record, "chosen")?, any_messages_of(record, "rejected")?)?
    } else {
        of_transcripts(&string_of(record, "chosen")?, &string_of(record, "rejected")?)?
    };
    check_prompt(&prompt)?;
    if chosen == rejected {
        return Err("`chosen` and `rejected` are equal".to_owned());
    }
    Ok(Pair { prompt, chosen, rejected, margin: margin_of(record)?, ..origin_of(record) })
}

/// Every pair of the list `responses`, whose order is the preference.
///
/// # Source
/// Ouyang et al., arXiv:2203.02155, section 3.5: all `K·(K − 1)/2` comparisons of a prompt stay in one batch, since
/// spread over an epoch each response is seen `K − 1` times and the model overfits.
fn ranked(record: &Record) -> Result<Vec<Pair>, String> {
    let prompt = prompt_of(record)?;
    check_prompt(&prompt)?;
    if record.get("margin").is_some_and(|margin| !margin.is_null()) {
        return Err("`margin` belongs to a pair, not to a list of `responses`".to_owned());
    }
    let responses = match record.get("responses") {
        Some(Value::Array(responses)) => responses,
        other => return Err(format!("`responses` is {}, expected a list of strings", other.map_or("missing", kind))),
    };
    if !(2..=MAX_RESPONSES).contains(&responses.len()) {
        return Err(format!("`responses` has length {}, expected 2 to {MAX_RESPONSES}", responses.len()));
    }
    let text = |(i, response): (usize, &Value)| match response {
        Value::String(text) => Ok(text.clone()),
        other => Err(format!("response {} of `responses` is {}, expected a string", i + 1, kind(other))),
    };
    let responses = responses.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?;
    let mut pairs = Vec::with_capacity(responses.len() * (responses.len() - 1) / 2);
    for (i, chosen) in responses.iter().enumerate() {
        for (j, rejected) in responses.iter().enumerate().skip(i + 1) {
            if chosen == rejected {
                return Err(format!("responses {} and {} of `responses` are equal", i + 1, j + 1));
            }
            let (prompt, chosen, rejected) = (prompt.clone(), chosen.clone(), rejected.clone());
            pairs.push(Pair { prompt, chosen, rejected, ..origin_of(record) });
        }
    }
    Ok(pairs)
}

pub(super) fn check_prompt(prompt: &[Message]) -> Result<(), String> {
    check_turns(prompt, "the prompt")?;
    if prompt.last().is_some_and(|last| last.role == Role::Assistant) {
        return Err("the prompt ends with the assistant's message: there is nothing to answer".to_owned());
    }
    Ok(())
}

/// The margin, if the record has one that the loss can be computed with.
fn margin_of(record: &Record) -> Result<Option<f32>, String> {
    match record.get("margin") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) => match number.as_f64() {
            Some(margin) if margin.abs() <= MAX_MARGIN => Ok(Some(margin as f32)),
            _ => Err(format!("`margin` is {number}, expected a number from -{MAX_MARGIN:e} to {MAX_MARGIN:e}")),
        },
        Some(other) => Err(format!("`margin` is {}, expected a number", kind(other))),
    }
}

/// Who decided and how long it took, where the record says so.
pub(super) fn origin_of(record: &Record) -> Pair {
    let annotator = match record.get("annotator") {
        Some(Value::String(name)) => Some(name.clone()),
        Some(Value::Number(number)) => Some(number.to_string()),
        _ => None,
    };
    Pair { annotator, seconds: record.get("seconds").and_then(Value::as_f64), ..Pair::default() }
}

/// The turns before the answer under `key`, and the answer.
///
/// The value is the answer's text, the assistant's one message, or a whole conversation that begins with `prompt`; a
/// system message may stand before it.
fn answer_after(prompt: &[Message], record: &Record, key: &str) -> Result<(Vec<Message>, String), String> {
    if !matches!(record.get(key), Some(Value::Array(_))) {
        return Ok((prompt.to_vec(), string_of(record, key)?));
    }
    let mut messages = any_messages_of(record, key)?;
    if messages.len() == 1 {
        return Ok((prompt.to_vec(), the_answer(messages, key)?));
    }
    let is_system = |message: &Message| message.role == Role::System;
    let start = usize::from(messages.first().is_some_and(is_system) && !prompt.first().is_some_and(is_system));
    let is_same = |(a, b): (&Message, &Message)| a.role == b.role && a.content.trim() == b.content.trim();
    let after_system = messages.get(start..).unwrap_or_default();
    if after_system.len() <= prompt.len() || !after_system.iter().zip(prompt).all(is_same) {
        return Err(format!("`{key}` is a conversation that does not begin with `prompt`"));
    }
    let answer = messages.split_off(messages.len() - 1);
    Ok((messages, the_answer(answer, key)?))
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
    if chosen == rejected {
        return Err("`chosen` and `rejected` are equal".to_owned());
    }
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
        // Line break by line break: to look for each mark by itself would read a long rest once for every turn.
        let is_mark = |at: &usize| TURNS.iter().any(|(mark, _)| rest[*at..].starts_with(mark));
        let end = rest.match_indices('\n').map(|(at, _)| at).find(is_mark).unwrap_or(rest.len());
        let text = rest[..end].trim();
        if !text.is_empty() {
            turns.push(Message::new(role, text));
        }
        rest = &rest[end..];
    }
    Ok(turns)
}
