//! OpenAI's JSON for answers, whole and in pieces.

use std::borrow::Cow;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use common::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

use super::engine::Token;
use super::params::Shape;
use crate::model::FinishReason;

/// A body of JSON.
#[derive(Debug)]
pub(super) struct Json(pub Value);

impl IntoResponse for Json {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, "application/json")], self.0.to_string()).into_response()
    }
}

/// What all JSON of one answered request has in common.
#[derive(Debug)]
pub(super) struct Head {
    /// Which interface is used.
    pub shape: Shape,
    /// The answer's number, unlike any other's.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// Whether each piece of a stream has the field `usage`.
    pub include_usage: bool,
}

/// Numbers of tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Of the prompts.
    pub prompt: usize,
    /// Of the answers.
    pub completion: usize,
}

impl Usage {
    fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        })
    }
}

/// An answer as far as it is known.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// The text.
    pub text: String,
    /// The tokens' log-probabilities, as JSON; `None` if they were not asked for.
    pub log_probs: Option<LogProbs>,
    /// Why it ended.
    pub finish: Option<FinishReason>,
}

impl Head {
    /// The whole answer.
    pub(super) fn whole(&self, choices: Vec<Written>, usage: Usage) -> Value {
        let choice = |(index, written): (usize, Written)| {
            let finish_reason = written.finish.map(finish_reason);
            let log_probs = written.log_probs.as_ref().map(LogProbs::to_json);
            match self.shape {
                Shape::Chat => json!({
                    "index": index,
                    "message": { "role": "assistant", "content": written.text, "refusal": null },
                    "logprobs": log_probs,
                    "finish_reason": finish_reason,
                }),
                Shape::Text => json!({
                    "index": index,
                    "text": written.text,
                    "logprobs": log_probs,
                    "finish_reason": finish_reason,
                }),
            }
        };
        let choices: Vec<Value> = choices.into_iter().enumerate().map(choice).collect();
        let object = match self.shape {
            Shape::Chat => "chat.completion",
            Shape::Text => "text_completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage.to_json(),
        })
    }

    /// The beginning of a stream's answer, if there is something to say before its first token.
    pub(super) fn first(&self, index: usize) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        let choice = json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null });
        (self.shape == Shape::Chat).then(|| self.chunk(&[choice], Value::Null))
    }

    /// A piece of a stream's answer; its end comes by itself, as in OpenAI's interface.
    pub(super) fn pieces(&self, index: usize, mut piece: Written) -> Vec<Value> {
        let finish = piece.finish.take();
        let has_more = !piece.text.is_empty() || piece.log_probs.is_some();
        let end = finish.map(|finish| Written { finish: Some(finish), ..Written::default() });
        has_more.then_some(piece).into_iter().chain(end).map(|piece| self.piece(index, &piece)).collect()
    }

    fn piece(&self, index: usize, piece: &Written) -> Value {
        let finish_reason = piece.finish.map(finish_reason);
        let log_probs = piece.log_probs.as_ref().map(LogProbs::to_json);
        let choice = match self.shape {
            Shape::Chat => {
                let delta = if finish_reason.is_some() { json!({}) } else { json!({ "content": piece.text }) };
                json!({ "index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish_reason })
            }
            Shape::Text => {
                json!({ "index": index, "text": piece.text, "logprobs": log_probs, "finish_reason": finish_reason })
            }
        };
        self.chunk(&[choice], Value::Null)
    }

    /// The numbers of tokens at the end of a stream.
    pub(super) fn usage(&self, usage: Usage) -> Value {
        self.chunk(&[], usage.to_json())
    }

    fn chunk(&self, choices: &[Value], usage: Value) -> Value {
        let object = match self.shape {
            Shape::Chat => "chat.completion.chunk",
            Shape::Text => "text_completion",
        };
        let mut chunk = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if self.include_usage {
            chunk["usage"] = usage;
        }
        chunk
    }
}

/// Log-probabilities of an answer's tokens.
#[derive(Debug)]
pub(super) struct LogProbs {
    shape: Shape,
    /// Whether alternatives were asked for.
    has_likeliest: bool,
    /// Where the first of the tokens begins in the text, in characters.
    offset: usize,
    tokens: Vec<Told>,
}

/// A token with its log-probability and the alternatives to it.
#[derive(Debug)]
struct Told {
    bytes: Vec<u8>,
    log_prob: f32,
    likeliest: Vec<Told>,
}

impl Told {
    fn new(tokenizer: &Tokenizer, id: u32, log_prob: f32) -> Self {
        Self { bytes: tokenizer.token_bytes(id), log_prob, likeliest: vec![] }
    }

    fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.bytes)
    }

    fn to_json(&self) -> Map<String, Value> {
        let Self { bytes, log_prob, .. } = self;
        [("token", json!(self.text())), ("logprob", json!(log_prob)), ("bytes", json!(bytes))]
            .map(|(key, value)| (key.to_owned(), value))
            .into_iter()
            .collect()
    }
}

impl LogProbs {
    /// None yet; the first token begins at character `offset` of the text.
    pub(super) fn new(shape: Shape, has_likeliest: bool, offset: usize) -> Self {
        Self { shape, has_likeliest, offset, tokens: vec![] }
    }

    /// Where the token behind these begins.
    pub(super) fn end(&self) -> usize {
        self.offset + self.tokens.iter().map(|token| token.text().chars().count()).sum::<usize>()
    }

    /// Adds a token.
    pub(super) fn push(&mut self, tokenizer: &Tokenizer, token: &Token) {
        let likeliest = token.likeliest.iter().map(|&(id, log_prob)| Told::new(tokenizer, id, log_prob)).collect();
        self.tokens.push(Told { likeliest, ..Told::new(tokenizer, token.id, token.log_prob) });
    }

    /// Adds the tokens of `more`.
    pub(super) fn append(&mut self, more: Self) {
        self.tokens.extend(more.tokens);
    }

    fn to_json(&self) -> Value {
        match self.shape {
            Shape::Chat => {
                let entry = |token: &Told| {
                    let mut entry = token.to_json();
                    entry.insert("top_logprobs".to_owned(), token.likeliest.iter().map(Told::to_json).collect());
                    entry
                };
                json!({ "content": self.tokens.iter().map(entry).collect::<Vec<_>>(), "refusal": null })
            }
            Shape::Text => {
                let likeliest = |token: &Told| {
                    let all = token.likeliest.iter().chain([token]);
                    all.map(|token| (token.text().into_owned(), json!(token.log_prob))).collect::<Map<_, _>>()
                };
                let offsets = self.tokens.iter().scan(self.offset, |offset, token| {
                    let begins = *offset;
                    *offset += token.text().chars().count();
                    Some(begins)
                });
                json!({
                    "tokens": self.tokens.iter().map(Told::text).collect::<Vec<_>>(),
                    "token_logprobs": self.tokens.iter().map(|token| token.log_prob).collect::<Vec<_>>(),
                    "top_logprobs": self.has_likeliest.then(|| self.tokens.iter().map(likeliest).collect::<Vec<_>>()),
                    "text_offset": offsets.collect::<Vec<_>>(),
                })
            }
        }
    }
}

fn finish_reason(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Length => "length",
        FinishReason::Stop | FinishReason::Interrupted => "stop",
    }
}
