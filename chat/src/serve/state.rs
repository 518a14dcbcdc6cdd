//! What every request can see.

use std::error::Error;
use std::iter;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;

use super::compare::Labels;
use super::engine::{Engine, one_line};
use super::error::ApiError;
use super::questions::Questions;
use super::record::Metrics;
use super::score::Scorer;

/// The state of the server.
pub(super) type App = Arc<Shared>;

/// See [`App`].
#[derive(Debug)]
pub(super) struct Shared {
    /// The models by name, in the order of the command line.
    pub engines: Vec<(String, Engine)>,
    /// The reward model, where there is one.
    pub scorer: Option<Scorer>,
    /// Where judgements are kept, if they are.
    pub labels: Option<Arc<Labels>>,
    /// The pairs that people judge, if there are any.
    pub questions: Option<Questions>,
    /// The folder of training runs that the page shows, if it does.
    pub runs: Option<PathBuf>,
    /// What a request may ask for.
    pub limits: RequestLimits,
    /// SHA-256 of the key, where one is needed.
    pub key: Option<String>,
    /// Whether only requests to a loopback name are answered.
    pub checks_host: bool,
    /// Whether texts are logged.
    pub log_text: bool,
    /// Counts what happens.
    pub metrics: Metrics,
    /// When the server started, in seconds since 1970.
    pub started: u64,
}

/// What a request may ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestLimits {
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Most bytes of a body.
    pub max_body: usize,
    /// Longest time to an answer's end.
    pub timeout: Duration,
}

impl Shared {
    /// The model of that name; without one the only model.
    ///
    /// # Errors
    /// If there is no such model, or several and none is named.
    pub(super) fn engine(&self, model: Option<String>) -> Result<(&str, &Engine), ApiError> {
        match (model, &*self.engines) {
            (None, [(name, engine)]) => Ok((name, engine)),
            (None, _) => {
                let names: Vec<String> = self.engines.iter().map(|(name, _)| format!("`{name}`")).collect();
                Err(ApiError::invalid(format!("`model` is missing: there are {}", names.join(", "))).about("model"))
            }
            (Some(model), engines) => {
                let known = engines.iter().find(|(name, _)| *name == model);
                known.map(|(name, engine)| (name.as_str(), engine)).ok_or_else(|| {
                    let model: String = model.chars().take(64).collect();
                    let message = format!("there is no model `{model}`; `GET /v1/models` lists them");
                    let error = ApiError::of_status(StatusCode::NOT_FOUND, message);
                    error.about("model").coded("model_not_found")
                })
            }
        }
    }
}

impl RequestLimits {
    /// Longest time from the end of a request's head to that of its body. However long an answer may take, one that is sent
    /// byte by byte must not keep its connection for as long.
    pub(super) fn body_time(self) -> Duration {
        const MOST: Duration = Duration::from_mins(1);
        self.timeout.min(MOST)
    }
}

/// Waits for the disk on a thread of its own.
///
/// # Errors
/// If `work` fails, or the thread does.
pub(super) async fn on_disk<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, ApiError>
where
    T: Send + 'static,
    E: Error + Send + 'static,
{
    let failed = |reason: String| ApiError::server(StatusCode::INTERNAL_SERVER_ERROR, reason);
    let done = tokio::task::spawn_blocking(work).await.map_err(|error| failed(one_line(&error)))?;
    done.map_err(|error| failed(causes(&error)))
}

/// An error and what it comes from, such as a full disk. Some say that themselves.
pub(super) fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = one_line(&error);
    for cause in iter::successors(error.source(), |&cause| cause.source()) {
        let cause = one_line(&cause);
        if !text.ends_with(&cause) {
            text += &format!(": {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_has_a_minute_however_long_an_answer_may_take() {
        let body_time = |timeout| {
            let timeout = Duration::from_secs(timeout);
            RequestLimits { max_tokens: 1, max_body: 1, timeout }.body_time().as_secs()
        };
        assert_eq!([1, 59, 300, 86_400].map(body_time), [1, 59, 60, 60]);
    }
}
