//! `POST /score`: a conversation's score by the reward model.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use common::conversation::{Message, Role, encode_prompt, encode_response};
use common::model::ScalarGpt;
use common::runtime::on_pool;
use common::score::score_rows;
use common::tokenizer::Tokenizer;
use serde_json::json;
use tokio::sync::{Mutex, Semaphore};

use super::answer::messages;
use super::engine::one_line;
use super::error::ApiError;
use super::params::Params;
use super::shapes::Json;
use super::state::App;

/// A reward model.
#[derive(Debug)]
pub(super) struct Scorer {
    model: Arc<ScalarGpt>,
    tokenizer: Arc<Tokenizer>,
    /// A permit for each request that runs or waits.
    room: Semaphore,
    /// One request is computed at a time.
    turn: Mutex<()>,
}

impl Scorer {
    /// A reward model for which at most `queue` requests wait.
    pub(super) fn new(model: ScalarGpt, tokenizer: Tokenizer, queue: usize) -> Self {
        let room = Semaphore::new(queue + 1);
        Self { model: Arc::new(model), tokenizer: Arc::new(tokenizer), room, turn: Mutex::new(()) }
    }

    /// The score of the last message, an answer to those before it, in units of the reward model.
    ///
    /// # Errors
    /// If the queue is full, the messages are no conversation or too long, or the score is not finite.
    pub(super) async fn score(&self, messages: Vec<Message>) -> Result<f64, ApiError> {
        let _place = self.room.try_acquire().map_err(|_| ApiError::busy())?;
        let _turn = self.turn.lock().await;
        let (model, tokenizer) = (Arc::clone(&self.model), Arc::clone(&self.tokenizer));
        let computed = tokio::task::spawn_blocking(move || compute(&model, &tokenizer, &messages)).await;
        computed.unwrap_or_else(|_| Err(failed("the score could not be computed")))
    }
}

fn compute(model: &ScalarGpt, tokenizer: &Tokenizer, messages: &[Message]) -> Result<f64, ApiError> {
    let refused = |reason: String| ApiError::unprocessable("messages", reason);
    let Some((Message { role: Role::Assistant, content }, prompt)) = messages.split_last() else {
        return Err(refused("the last message is not the assistant's: there is no answer to score".to_owned()));
    };
    let mut row = encode_prompt(tokenizer, prompt).map_err(|error| refused(one_line(&error)))?;
    row.extend(encode_response(tokenizer, content).map_err(|error| refused(one_line(&error)))?);
    let (n_tokens, context) = (row.len(), model.config().max_seq_len);
    if n_tokens > context {
        let message = format!("the conversation has {n_tokens} tokens, the reward model's context {context}");
        return Err(ApiError::invalid(message).about("messages").coded("context_length_exceeded"));
    }
    let scores = on_pool(|| score_rows(model, &[&row], 1)).map_err(|error| failed(&one_line(&error)))?;
    match scores.first().map(|score| f64::from(*score)) {
        Some(score) if score.is_finite() => Ok(score),
        _ => Err(failed("the score is not finite: the weights have diverged")),
    }
}

fn failed(message: &str) -> ApiError {
    ApiError::server(StatusCode::INTERNAL_SERVER_ERROR, message)
}

/// `POST /score`.
pub(super) async fn score(State(app): State<App>, mut params: Params) -> Result<Json, ApiError> {
    let messages = messages(&mut params)?;
    params.finish()?;
    let Some(scorer) = &app.scorer else {
        let message = "there is no reward model: the server was started without `--reward-model`";
        return Err(ApiError::of_status(StatusCode::NOT_FOUND, message));
    };
    let score = scorer.score(messages).await?;
    Ok(Json(json!({ "score": score, "raw_score": score - scorer.model.score_bias() })))
}
