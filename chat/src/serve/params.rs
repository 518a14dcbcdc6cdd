//! The parameters of a request, each taken once: one that is left over cannot be honoured and is an error.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use common::generate::SamplingConfig;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::record::Record;
use super::state::App;

/// Most answers to one prompt.
const MAX_N: usize = 128;

/// Most texts that end an answer, as in OpenAI's interface.
const MAX_STOPS: usize = 4;

/// Tokens of an answer to `/v1/completions` where the request does not say, as in OpenAI's interface.
const DEFAULT_MAX_TOKENS: usize = 16;

/// The JSON object that a request brings.
#[derive(Debug)]
pub(super) struct Params {
    fields: Map<String, Value>,
}

impl FromRequest<App> for Params {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        // Pages of other sites can send no JSON without asking first.
        let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if !content_type.is_some_and(is_json) {
            let message = "expected the header `Content-Type: application/json`";
            return Err(ApiError::of_status(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let record = request.extensions().get::<Arc<Record>>().cloned();
        let bytes = match tokio::time::timeout(app.limits.body_time(), Bytes::from_request(request, app)).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(rejection)) => {
                if let Some(record) = record.filter(|_| is_hang_up(&rejection)) {
                    record.leave();
                }
                return Err(match rejection.into_response().status() {
                    status @ StatusCode::PAYLOAD_TOO_LARGE => {
                        let most = app.limits.max_body;
                        ApiError::of_status(status, format!("the body exceeds the {most} bytes that the server takes"))
                    }
                    _ => ApiError::invalid("the body ended early, or is not framed as its head says"),
                });
            }
            Err(_) => {
                let most = app.limits.body_time().as_secs();
                let message = format!("the body took more than {most} s to arrive");
                return Err(ApiError::of_status(StatusCode::REQUEST_TIMEOUT, message));
            }
        };
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(fields)) => Ok(Self { fields }),
            Ok(_) => Err(ApiError::invalid("the body is no JSON object")),
            Err(error) => Err(ApiError::invalid(unread(&error))),
        }
    }
}

/// Whether a header `Content-Type` says JSON, whatever parameters follow. The case of its letters does not count.
fn is_json(content_type: &str) -> bool {
    let media_type = content_type.split(';').next().unwrap_or_default();
    media_type.trim().eq_ignore_ascii_case("application/json")
}

/// Whether a body could not be read because its client is gone.
fn is_hang_up(rejection: &BytesRejection) -> bool {
    use std::io::{Error, ErrorKind};

    let causes = std::iter::successors(Some(rejection as &dyn std::error::Error), |error| error.source());
    causes.filter_map(|error| error.downcast_ref::<Error>()).any(|error| {
        matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted)
    })
}

/// Why a body is not read.
fn unread(error: &serde_json::Error) -> String {
    // The one error of the parser that is about well-formed JSON. It has no kind of its own.
    let error = error.to_string();
    match error.strip_prefix("number out of range") {
        Some(place) => format!("a number in the body is too large{place}"),
        None => format!("the body is no JSON: {error}"),
    }
}

impl Params {
    /// The value of a parameter; `null` stands for none.
    ///
    /// # Errors
    /// If it is of another type than `expected` says.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        match self.fields.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let wrong = |_| ApiError::invalid(format!("invalid `{name}`: expected {expected}")).about(name);
                serde_json::from_value(value).map(Some).map_err(wrong)
            }
        }
    }

    /// A number within a range.
    fn number(&mut self, name: &str, low: f64, high: f64) -> Result<Option<f64>, ApiError> {
        match self.take::<f64>(name, "a number")? {
            Some(x) if !(low..=high).contains(&x) => {
                let message = format!("invalid `{name}`: expected a number from {low} to {high}, found `{x}`");
                Err(ApiError::unprocessable(name, message))
            }
            found => Ok(found),
        }
    }

    /// A count within a range.
    fn count(&mut self, name: &str, low: usize, high: usize) -> Result<Option<usize>, ApiError> {
        match self.take::<usize>(name, "a whole number")? {
            Some(n) if !(low..=high).contains(&n) => {
                let message = format!("invalid `{name}`: expected a whole number from {low} to {high}, found `{n}`");
                Err(ApiError::unprocessable(name, message))
            }
            found => Ok(found),
        }
    }

    /// Takes the client's notes on a request, which change nothing.
    ///
    /// # Errors
    /// If one is not of OpenAI's type.
    fn notes(&mut self) -> Result<(), ApiError> {
        self.take::<String>("user", "a text")?;
        self.take::<String>("safety_identifier", "a text")?;
        self.take::<HashMap<String, String>>("metadata", "an object whose values are texts")?;
        Ok(())
    }

    /// Refuses what is left.
    ///
    /// # Errors
    /// Names the first parameter that is neither `null` nor asks for what happens anyway.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        let defaults = [
            ("best_of", json!(1)),
            ("echo", json!(false)),
            ("logit_bias", json!({})),
            ("response_format", json!({ "type": "text" })),
            ("store", json!(false)),
            ("suffix", json!("")),
            ("tools", json!([])),
        ];
        let is_honoured = |name: &str, value: &Value| {
            value.is_null() || defaults.iter().any(|(key, same)| *key == name && same == value)
        };
        match self.fields.iter().find(|(name, value)| !is_honoured(name, value)) {
            None => Ok(()),
            Some((name, _)) => {
                let only = defaults.iter().find(|(key, _)| key == name);
                let only = only.map_or(String::new(), |(_, value)| format!("; only its default `{value}` is accepted"));
                let name: String = name.chars().take(64).collect();
                let message = format!("the parameter `{name}` is not supported{only}");
                Err(ApiError::invalid(message).about(&name).coded("unsupported_parameter"))
            }
        }
    }
}

/// Which of the two interfaces a request uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
}

/// How answers are generated and told.
#[derive(Debug)]
pub(super) struct Generation {
    /// Which interface is used.
    pub shape: Shape,
    /// How tokens are chosen; without stop tokens.
    pub sampling: SamplingConfig,
    /// The parameter by which the request says how many tokens an answer may have, which the context then has to hold.
    pub length_param: Option<&'static str>,
    /// Answers to each prompt.
    pub n: usize,
    /// Texts at which an answer ends.
    pub stop_texts: Vec<String>,
    /// Seeds the answers.
    pub seed: Option<u64>,
    /// Whether to tell tokens as they come.
    pub stream: bool,
    /// Whether a stream ends with the number of tokens.
    pub include_usage: bool,
    /// How many alternatives to tell with each token's log-probability; `None` tells neither.
    pub log_probs: Option<usize>,
}

impl Generation {
    /// Takes what both interfaces know, notes included, and what `shape` knows of log-probabilities and lengths.
    ///
    /// # Errors
    /// If a parameter is of the wrong type or outside its range.
    pub(super) fn take(params: &mut Params, shape: Shape, most_tokens: usize) -> Result<Self, ApiError> {
        let mut length = |name| Ok::<_, ApiError>(params.count(name, 1, most_tokens)?.map(|length| (name, length)));
        let max_tokens = length("max_tokens")?;
        let (asked, default, log_probs) = match shape {
            Shape::Chat => {
                let asked = length("max_completion_tokens")?;
                if let (Some((name, new)), Some((_, old))) = (asked, max_tokens)
                    && new != old
                {
                    let message =
                        format!("`max_tokens` is {old}, but `{name}`, its new name, is {new}: send only one of them");
                    return Err(ApiError::invalid(message).about(name));
                }
                let asked = asked.or(max_tokens);
                (asked, most_tokens, chat_log_probs(params)?)
            }
            Shape::Text => (max_tokens, DEFAULT_MAX_TOKENS.min(most_tokens), params.count("logprobs", 0, 5)?),
        };
        let sampling = SamplingConfig {
            temperature: params.number("temperature", 0.0, 2.0)?.unwrap_or(1.0),
            // A probability of 0 keeps the likeliest token.
            top_p: params.number("top_p", 0.0, 1.0)?.unwrap_or(1.0).max(f64::MIN_POSITIVE),
            frequency_penalty: params.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
            presence_penalty: params.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
            max_tokens: asked.map_or(default, |(_, length)| length),
            ..SamplingConfig::default()
        };
        let stream = params.take("stream", "`true` or `false`")?.unwrap_or(false);
        params.notes()?;
        Ok(Self {
            shape,
            sampling,
            length_param: asked.map(|(name, _)| name),
            n: params.count("n", 1, MAX_N)?.unwrap_or(1),
            stop_texts: stops(params)?,
            seed: seed(params)?,
            stream,
            include_usage: include_usage(params, stream)?,
            log_probs,
        })
    }
}

/// `logprobs` and `top_logprobs` of a conversation.
fn chat_log_probs(params: &mut Params) -> Result<Option<usize>, ApiError> {
    let asked = params.take("logprobs", "`true` or `false`")?.unwrap_or(false);
    match params.count("top_logprobs", 0, 20)? {
        Some(n) if asked => Ok(Some(n)),
        Some(n) if n > 0 => Err(ApiError::unprocessable("top_logprobs", "`top_logprobs` needs `logprobs` to be true")),
        _ => Ok(asked.then_some(0)),
    }
}

fn stops(params: &mut Params) -> Result<Vec<String>, ApiError> {
    let expected = "a text, or a list of up to 4 texts";
    let texts = match params.take::<Value>("stop", expected)? {
        None => vec![],
        Some(Value::String(text)) => vec![text],
        Some(list) => serde_json::from_value::<Vec<String>>(list)
            .map_err(|_| ApiError::invalid(format!("invalid `stop`: expected {expected}")).about("stop"))?,
    };
    if texts.len() > MAX_STOPS || texts.iter().any(String::is_empty) {
        let message = format!("invalid `stop`: expected {expected}, none of them empty");
        return Err(ApiError::unprocessable("stop", message));
    }
    Ok(texts)
}

/// The seed; a negative one stands for the number with the same bits.
fn seed(params: &mut Params) -> Result<Option<u64>, ApiError> {
    let expected = "a whole number of 64 bits";
    let wrong = || ApiError::invalid(format!("invalid `seed`: expected {expected}")).about("seed");
    match params.take::<Value>("seed", expected)? {
        None => Ok(None),
        Some(seed) => seed.as_u64().or_else(|| seed.as_i64().map(|seed| seed as u64)).map(Some).ok_or_else(wrong),
    }
}

fn include_usage(params: &mut Params, stream: bool) -> Result<bool, ApiError> {
    let Some(fields) = params.take::<Map<String, Value>>("stream_options", "an object")? else { return Ok(false) };
    if !stream {
        return Err(ApiError::unprocessable("stream_options", "`stream_options` needs `stream` to be true"));
    }
    let mut options = Params { fields };
    let include_usage = options.take("include_usage", "`true` or `false`")?.unwrap_or(false);
    options.finish().map_err(|error| error.about("stream_options"))?;
    Ok(include_usage)
}
