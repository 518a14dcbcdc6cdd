//! From a request to its answer: prompts to token ids, jobs for the engine, and what comes back as JSON or as a stream.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::extract::{Extension, State};
use axum::http::StatusCode;
use axum::response::sse::{KeepAlive, Sse};
use axum::response::{IntoResponse, Response, sse};
use common::conversation::{Message, Role, encode_prompt};
use common::generate::SamplingConfig;
use common::rng::Streams;
use common::tokenizer::Tokenizer;
use futures_util::stream;
use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::engine::{Engine, Event, Job, one_line};
use super::error::ApiError;
use super::params::{Generation, Params, Shape};
use super::record::Record;
use super::shapes::{Head, Json, LogProbs, Usage, Written};
use super::state::App;

/// Most prompts of a request to `/v1/completions`.
const MAX_PROMPTS: usize = 128;

/// `POST /v1/chat/completions`.
pub(super) async fn chat(
    State(app): State<App>,
    Extension(record): Extension<Arc<Record>>,
    mut params: Params,
) -> Result<Response, ApiError> {
    let model = params.take::<String>("model", "a text")?;
    let messages = messages(&mut params)?;
    let generation = Generation::take(&mut params, Shape::Chat, app.limits.max_tokens)?;
    params.finish()?;
    answer(&app, model, Prompts::Conversation(messages), generation, record).await
}

/// `POST /v1/completions`.
pub(super) async fn text(
    State(app): State<App>,
    Extension(record): Extension<Arc<Record>>,
    mut params: Params,
) -> Result<Response, ApiError> {
    let model = params.take::<String>("model", "a text")?;
    let prompts = prompts(&mut params)?;
    let generation = Generation::take(&mut params, Shape::Text, app.limits.max_tokens)?;
    params.finish()?;
    answer(&app, model, prompts, generation, record).await
}

/// What is to be continued.
#[derive(Debug)]
enum Prompts {
    Conversation(Vec<Message>),
    Texts(Vec<String>),
    Ids(Vec<Vec<u32>>),
}

impl Prompts {
    fn count(&self) -> usize {
        match self {
            Self::Conversation(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::Ids(rows) => rows.len(),
        }
    }

    /// The parameter that has them.
    fn param(&self) -> &'static str {
        if matches!(self, Self::Conversation(_)) { "messages" } else { "prompt" }
    }

    /// As a request has them, for the log.
    fn to_json(&self) -> Value {
        match self {
            Self::Conversation(messages) => json!(messages),
            Self::Texts(texts) => json!(texts),
            Self::Ids(rows) => json!(rows),
        }
    }

    /// Their token ids. Text never yields one that structures a conversation.
    fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, ApiError> {
        let refused = |reason: String| ApiError::unprocessable(self.param(), reason);
        match self {
            Self::Conversation(messages) => {
                let ids = encode_prompt(tokenizer, messages).map_err(|error| refused(one_line(&error)))?;
                Ok(vec![ids])
            }
            Self::Texts(texts) => {
                let encode = |text: &String| {
                    let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
                    ids.extend(tokenizer.encode(text).map_err(|error| refused(one_line(&error)))?);
                    Ok(ids)
                };
                texts.iter().map(encode).collect()
            }
            Self::Ids(rows) => Ok(rows.clone()),
        }
    }
}

/// Takes the messages of a conversation.
pub(super) fn messages(params: &mut Params) -> Result<Vec<Message>, ApiError> {
    let listed = params.take::<Vec<Map<String, Value>>>("messages", "a list of objects")?;
    let listed = listed.ok_or_else(|| ApiError::invalid("`messages` is missing").about("messages"))?;
    listed.into_iter().enumerate().map(|(i, fields)| message(i, fields)).collect()
}

fn message(i: usize, mut fields: Map<String, Value>) -> Result<Message, ApiError> {
    let wrong = |field: &str, expected: &str| {
        let param = format!("messages[{i}].{field}");
        ApiError::invalid(format!("invalid `{param}`: expected {expected}")).about(&param)
    };
    let role = match fields.remove("role").as_ref().and_then(Value::as_str) {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        _ => return Err(wrong("role", "`system`, `developer`, `user` or `assistant`")),
    };
    let is_text = |part: &Value| part["type"] == "text" && part.as_object().is_some_and(|part| part.len() == 2);
    let content = match fields.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) if parts.iter().all(|part| is_text(part) && part["text"].is_string()) => {
            parts.iter().filter_map(|part| part["text"].as_str()).collect()
        }
        _ => return Err(wrong("content", "a text, or a list of parts of type `text`")),
    };
    match fields.into_iter().find(|(_, value)| !value.is_null()) {
        None => Ok(Message::new(role, content)),
        Some((name, _)) => Err(wrong(&name.chars().take(64).collect::<String>(), "nothing: it is not supported")),
    }
}

fn prompts(params: &mut Params) -> Result<Prompts, ApiError> {
    let expected = "a text, a list of texts, a list of token ids or a list of such lists";
    let prompt = params.take::<Value>("prompt", expected)?;
    let prompt = prompt.ok_or_else(|| ApiError::invalid("`prompt` is missing").about("prompt"))?;
    let wrong = |_| ApiError::invalid(format!("invalid `prompt`: expected {expected}")).about("prompt");
    let prompts = match &prompt {
        Value::String(text) => Prompts::Texts(vec![text.clone()]),
        Value::Array(list) if list.first().is_some_and(Value::is_string) => {
            Prompts::Texts(serde_json::from_value(prompt).map_err(wrong)?)
        }
        Value::Array(list) if list.first().is_some_and(Value::is_array) => {
            Prompts::Ids(serde_json::from_value(prompt).map_err(wrong)?)
        }
        _ => Prompts::Ids(vec![serde_json::from_value(prompt).map_err(wrong)?]),
    };
    if prompts.count() > MAX_PROMPTS {
        let message = format!("{} prompts, at most {MAX_PROMPTS} are taken", prompts.count());
        return Err(ApiError::unprocessable("prompt", message));
    }
    Ok(prompts)
}

/// Refuses a prompt that the model cannot take, or not with an answer of the length that is asked for.
fn check(engine: &Engine, param: &str, ids: &[u32], generation: &Generation) -> Result<(), ApiError> {
    if ids.is_empty() {
        return Err(ApiError::unprocessable(param, "the prompt has no token"));
    }
    if let Some(id) = ids.iter().find(|id| **id as usize >= engine.vocab_size) {
        let message = format!("token {id} is outside the model's vocabulary of {}", engine.vocab_size);
        return Err(ApiError::unprocessable(param, message));
    }
    if ids.len() >= engine.context {
        let (found, context) = (ids.len(), engine.context);
        let message =
            format!("the prompt has {found} tokens, but {context} is the most for prompt and answer together");
        return Err(ApiError::invalid(message).about(param).coded("context_length_exceeded"));
    }
    let (found, asked, context) = (ids.len(), generation.sampling.max_tokens, engine.context);
    if let Some(param) = generation.length_param
        && found + asked > context
    {
        let message = format!(
            "the prompt has {found} tokens and the answer may have {asked}, but {context} is the most for both together"
        );
        return Err(ApiError::invalid(message).about(param).coded("context_length_exceeded"));
    }
    Ok(())
}

/// Answers every prompt `generation.n` times.
async fn answer(
    app: &App,
    model: Option<String>,
    prompts: Prompts,
    generation: Generation,
    record: Arc<Record>,
) -> Result<Response, ApiError> {
    let began = Instant::now();
    let (name, engine) = app.engine(model)?;
    let param = prompts.param();
    let n_choices = prompts.count() * generation.n;
    let permit = engine.admit(n_choices)?;
    let tokenizer = Arc::clone(&engine.tokenizer);
    if app.log_text {
        record.note_prompt(prompts.to_json().to_string());
    }
    let encoded = tokio::task::spawn_blocking(move || prompts.encode(&tokenizer)).await;
    let failed = |_| ApiError::server(StatusCode::INTERNAL_SERVER_ERROR, "the prompt could not be encoded");
    let rows = encoded.map_err(failed)??;
    rows.iter().try_for_each(|ids| check(engine, param, ids, &generation))?;
    let n_prompt = rows.iter().map(Vec::len).sum();
    record.begin(name, n_prompt);

    let streams = Streams::new(generation.seed.unwrap_or_else(random));
    let (events, receiver) = unbounded_channel();
    for (i, prompt) in rows.iter().enumerate() {
        let max_tokens = generation.sampling.max_tokens.min(engine.context - prompt.len());
        let sampling = SamplingConfig { stop: engine.stop.clone(), max_tokens, ..generation.sampling.clone() };
        for sample in 0..generation.n {
            engine.submit(Job {
                prompt: prompt.clone(),
                sampling: sampling.clone(),
                // As `chat generate --num-samples` draws them.
                rng: streams.get("sampling", sample as u64),
                stop_texts: generation.stop_texts.clone(),
                n_likeliest: generation.log_probs.unwrap_or(0),
                choice: i * generation.n + sample,
                deadline: began + app.limits.timeout,
                events: events.clone(),
            });
        }
    }
    let prefix = if generation.shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
    let head = Head {
        shape: generation.shape,
        id: format!("{prefix}-{:016x}", random()),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        model: name.to_owned(),
        include_usage: generation.include_usage,
    };
    let replies = Replies {
        tokenizer: Arc::clone(&engine.tokenizer),
        log_probs: generation.log_probs,
        receiver,
        offsets: vec![0; n_choices],
        told: vec![0; n_choices],
        n_open: n_choices,
        usage: Usage { prompt: n_prompt, completion: 0 },
        record,
        _permit: permit,
        head,
    };
    if generation.stream { Ok(replies.stream()) } else { replies.whole(n_choices).await }
}

/// 64 bits that nobody can foresee.
fn random() -> u64 {
    RandomState::new().hash_one(Instant::now())
}

/// What the engine answers, on its way to the client.
struct Replies {
    head: Head,
    tokenizer: Arc<Tokenizer>,
    log_probs: Option<usize>,
    receiver: UnboundedReceiver<(usize, Event)>,
    /// Where each choice's next token begins in its text, in characters.
    offsets: Vec<usize>,
    /// Tokens of each choice so far.
    told: Vec<usize>,
    /// Choices that have not ended.
    n_open: usize,
    usage: Usage,
    record: Arc<Record>,
    /// Held until the answer is sent, so that what is not read yet is bounded too.
    _permit: OwnedSemaphorePermit,
}

impl Replies {
    /// The next piece of a choice, or `None` when all have ended.
    ///
    /// # Errors
    /// If a choice failed.
    async fn next(&mut self) -> Result<Option<(usize, Written)>, ApiError> {
        if self.n_open == 0 {
            self.record.finish();
            return Ok(None);
        }
        // The sender in `answer` is gone, those of the jobs live until their choices end.
        let Some((choice, event)) = self.receiver.recv().await else {
            return Err(ApiError::server(StatusCode::INTERNAL_SERVER_ERROR, "the model stopped unexpectedly"));
        };
        let offset = &mut self.offsets[choice];
        let mut log_probs = self.log_probs.map(|n| LogProbs::new(self.head.shape, n > 0, *offset));
        match event {
            Event::Token(token) => {
                self.record.token();
                self.told[choice] += 1;
                if let Some(log_probs) = &mut log_probs {
                    log_probs.push(&self.tokenizer, &token);
                    *offset = log_probs.end();
                }
                self.record.note_answer(&token.text);
                Ok(Some((choice, Written { text: token.text, log_probs, finish: None })))
            }
            Event::End { text, finish, n_tokens } => {
                self.n_open -= 1;
                self.usage.completion += n_tokens;
                // The token that ends an answer is not told.
                self.record.count(n_tokens - self.told[choice]);
                self.record.note_answer(&text);
                Ok(Some((choice, Written { text, log_probs: None, finish: Some(finish) })))
            }
            Event::Failed(error) => Err(error),
        }
    }

    /// Everything at once.
    async fn whole(mut self, n_choices: usize) -> Result<Response, ApiError> {
        let empty = || Written {
            log_probs: self.log_probs.map(|n| LogProbs::new(self.head.shape, n > 0, 0)),
            ..Written::default()
        };
        let mut choices: Vec<Written> = (0..n_choices).map(|_| empty()).collect();
        while let Some((choice, piece)) = self.next().await? {
            let written = &mut choices[choice];
            written.text += &piece.text;
            written.finish = piece.finish;
            if let (Some(all), Some(more)) = (&mut written.log_probs, piece.log_probs) {
                all.append(more);
            }
        }
        Ok(Json(self.head.whole(choices, self.usage)).into_response())
    }

    /// Piece by piece, as server-sent events.
    fn stream(self) -> Response {
        let first: VecDeque<Value> = (0..self.n_open).filter_map(|choice| self.head.first(choice)).collect();
        let events = stream::unfold(Sending { replies: self, ready: first, state: Sent::Some }, Sending::next);
        Sse::new(events).keep_alive(KeepAlive::default()).into_response()
    }
}

/// A stream on its way.
struct Sending {
    replies: Replies,
    ready: VecDeque<Value>,
    state: Sent,
}

/// How much of a stream is sent.
enum Sent {
    /// Not all choices.
    Some,
    /// All of them.
    Choices,
    /// All there is, the end included.
    All,
}

impl Sending {
    async fn next(mut self) -> Option<(Result<sse::Event, Infallible>, Self)> {
        loop {
            if let Some(json) = self.ready.pop_front() {
                return Some((Ok(sse::Event::default().data(json.to_string())), self));
            }
            match self.state {
                Sent::All => return None,
                Sent::Choices => {
                    self.state = Sent::All;
                    return Some((Ok(sse::Event::default().data("[DONE]")), self));
                }
                Sent::Some => match self.replies.next().await {
                    Ok(Some((choice, piece))) => {
                        if !piece.text.is_empty() || piece.log_probs.is_some() || piece.finish.is_some() {
                            self.ready.extend(self.replies.head.pieces(choice, piece));
                        }
                    }
                    Ok(None) => {
                        let head = &self.replies.head;
                        self.ready.extend(head.include_usage.then(|| head.usage(self.replies.usage)));
                        self.state = Sent::Choices;
                    }
                    Err(error) => {
                        self.replies.record.fail();
                        self.ready.push_back(error.to_json());
                        self.state = Sent::All;
                    }
                },
            }
        }
    }
}
