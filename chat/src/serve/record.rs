//! What is known of requests: a line in the log for each, and numbers for Prometheus.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

use super::state::App;

/// Bounds of the buckets for seconds.
const SECONDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// The status of a request whose client left before the answer, as nginx has it.
const CLIENT_LEFT: u16 = 499;

/// The numbers that `/metrics` shows.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    request_seconds: HistogramVec,
    first_token_seconds: HistogramVec,
    prompt_tokens: IntCounterVec,
    completion_tokens: IntCounterVec,
    running: IntGaugeVec,
    waiting: IntGaugeVec,
}

impl Metrics {
    /// Zeros.
    ///
    /// # Errors
    /// If two metrics have the same name.
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let counter = |name, help, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        let gauge = |name, help| IntGaugeVec::new(Opts::new(name, help), &["model"]);
        let seconds = |name, help, label: &str| {
            HistogramVec::new(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()), &[label])
        };
        let metrics = Self {
            registry: Registry::new(),
            requests: counter("kindling_requests_total", "Requests by route and status.", &["route", "status"])?,
            request_seconds: seconds(
                "kindling_request_seconds",
                "Seconds from a request to the end of its response.",
                "route",
            )?,
            first_token_seconds: seconds(
                "kindling_first_token_seconds",
                "Seconds from a request to its first token.",
                "model",
            )?,
            prompt_tokens: counter("kindling_prompt_tokens_total", "Tokens of prompts.", &["model"])?,
            completion_tokens: counter("kindling_completion_tokens_total", "Tokens of answers.", &["model"])?,
            running: gauge("kindling_answers_running", "Answers that get a token a step.")?,
            waiting: gauge("kindling_answers_waiting", "Answers that wait for a slot, or are still being sent.")?,
        };
        metrics.registry.register(Box::new(metrics.requests.clone()))?;
        metrics.registry.register(Box::new(metrics.request_seconds.clone()))?;
        metrics.registry.register(Box::new(metrics.first_token_seconds.clone()))?;
        metrics.registry.register(Box::new(metrics.prompt_tokens.clone()))?;
        metrics.registry.register(Box::new(metrics.completion_tokens.clone()))?;
        metrics.registry.register(Box::new(metrics.running.clone()))?;
        metrics.registry.register(Box::new(metrics.waiting.clone()))?;
        Ok(metrics)
    }
}

/// `GET /metrics`: the text that Prometheus reads.
pub(super) async fn metrics(State(app): State<App>) -> Response {
    let metrics = &app.metrics;
    for (name, engine) in &app.engines {
        let (running, waiting) = engine.load();
        metrics.running.with_label_values(&[name]).set(running as i64);
        metrics.waiting.with_label_values(&[name]).set(waiting as i64);
    }
    let text = TextEncoder::new().encode_to_string(&metrics.registry.gather()).unwrap_or_default();
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response()
}

/// Follows a request to the end of its response.
pub(super) async fn follow(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let method = request.method().to_string();
    let record = Arc::new(Record { app, began: Instant::now(), method, route, known: Mutex::default() });
    request.extensions_mut().insert(Arc::clone(&record));
    let response = next.run(request).await;
    record.known().status = Some(response.status().as_u16());
    response
}

/// A request. Its line is written when the last who knows it has dropped it: with its response, or when the client left.
#[derive(Debug)]
pub(super) struct Record {
    app: App,
    began: Instant,
    method: String,
    /// The path of the table of routes, which the client did not choose.
    route: String,
    known: Mutex<Known>,
}

/// What is known of a request so far.
#[derive(Debug, Default)]
struct Known {
    status: Option<u16>,
    /// Whether the client left before it had said everything.
    has_left: bool,
    model: Option<String>,
    n_prompt: usize,
    n_completion: usize,
    first_token: Option<Duration>,
    /// Whether the whole answer is there.
    is_finished: bool,
    has_failed: bool,
    /// With `--log-text`.
    prompt: String,
    answer: String,
}

impl Record {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client is gone: whatever it is answered, nobody reads it.
    pub(super) fn leave(&self) {
        self.known().has_left = true;
    }

    /// A model begins to answer.
    pub(super) fn begin(&self, model: &str, n_prompt: usize) {
        let mut known = self.known();
        known.model = Some(model.to_owned());
        known.n_prompt = n_prompt;
    }

    /// There is a token.
    pub(super) fn token(&self) {
        let elapsed = self.began.elapsed();
        let mut known = self.known();
        known.first_token.get_or_insert(elapsed);
        known.n_completion += 1;
    }

    /// There are so many tokens more, which are not told.
    pub(super) fn count(&self, n_tokens: usize) {
        self.known().n_completion += n_tokens;
    }

    /// All answers have ended.
    pub(super) fn finish(&self) {
        self.known().is_finished = true;
    }

    /// The answer ends with an error.
    pub(super) fn fail(&self) {
        self.known().has_failed = true;
    }

    /// The text of the prompt, for the log.
    pub(super) fn note_prompt(&self, text: String) {
        self.known().prompt = text;
    }

    /// More text of the answer, for the log.
    pub(super) fn note_answer(&self, text: &str) {
        if self.app.log_text {
            self.known().answer.push_str(text);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let elapsed = self.began.elapsed();
        let known = self.known.get_mut().unwrap_or_else(PoisonError::into_inner);
        let status = known.status.filter(|_| !known.has_left).unwrap_or(CLIENT_LEFT);
        let metrics = &self.app.metrics;
        metrics.requests.with_label_values(&[&*self.route, &status.to_string()]).inc();
        metrics.request_seconds.with_label_values(&[&self.route]).observe(elapsed.as_secs_f64());
        let mut line = format!("{} {} {status}", self.method, self.route);
        if let Some(model) = &known.model {
            metrics.prompt_tokens.with_label_values(&[model]).inc_by(known.n_prompt as u64);
            metrics.completion_tokens.with_label_values(&[model]).inc_by(known.n_completion as u64);
            line +=
                &format!(" model={model} prompt_tokens={} completion_tokens={}", known.n_prompt, known.n_completion);
            if let Some(first_token) = known.first_token {
                let seconds = first_token.as_secs_f64();
                metrics.first_token_seconds.with_label_values(&[model]).observe(seconds);
                line += &format!(" first_token={seconds:.3}s");
            }
        }
        line += &format!(" total={:.3}s", elapsed.as_secs_f64());
        if known.has_failed {
            line += " failed";
        } else if status == CLIENT_LEFT || (known.model.is_some() && !known.is_finished && status == 200) {
            line += " client_left";
        }
        if self.app.log_text && known.model.is_some() {
            line += &format!(" prompt={} answer={:?}", known.prompt, known.answer);
        }
        // The page looks at a run every few seconds.
        if self.route.starts_with("/training/") {
            tracing::debug!("{line}");
        } else {
            tracing::info!("{line}");
        }
    }
}
