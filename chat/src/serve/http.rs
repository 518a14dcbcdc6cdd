//! The table of routes, and who may use them.

use std::net::IpAddr;

use axum::Router;
use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use common::hash::sha256_of;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::error::ApiError;
use super::shapes::Json;
use super::state::{App, Shared};
use super::{answer, compare, page, questions, record, score, training};

/// Whether a path needs no key: it tells nothing but that the server runs, and the page asks for the key.
fn is_open(path: &str) -> bool {
    path == "/health" || page::FILES.iter().any(|(file, ..)| *file == path)
}

/// All routes; pages of `origins` may use them from a browser.
pub(super) fn router(app: App, origins: Vec<HeaderValue>) -> Router {
    let mut router = Router::new()
        .route("/v1/chat/completions", post(answer::chat))
        .route("/v1/completions", post(answer::text))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .route("/score", post(score::score))
        .route("/compare/judge", post(compare::judge))
        .route("/compare/undo", post(compare::undo))
        .route("/compare/question", post(questions::question))
        .route("/training/runs", get(training::runs))
        .route("/training/rows", post(training::rows))
        .route("/training/samples", post(training::samples))
        .route("/health", get(health))
        .route("/metrics", get(record::metrics))
        .merge(page::routes())
        .fallback(async || ApiError::of_status(StatusCode::NOT_FOUND, "there is no such path"))
        .method_not_allowed_fallback(async || {
            ApiError::of_status(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
        })
        .layer(DefaultBodyLimit::max(app.limits.max_body))
        .layer(from_fn_with_state(App::clone(&app), admit));
    if !origins.is_empty() {
        let cors = CorsLayer::new()
            .allow_origin(AllowOrigin::list(origins))
            .allow_methods([Method::GET, Method::POST])
            .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE]);
        router = router.layer(cors);
    }
    router.layer(from_fn_with_state(App::clone(&app), record::follow)).with_state(app)
}

/// Lets a request pass that has the key, and, where there is none, that names this machine.
///
/// A page of another site can make its own name point here (DNS rebinding) and would then count as this server's own: its
/// requests come with that name.
async fn admit(State(app): State<App>, request: Request, next: Next) -> Response {
    const NO_SNIFF: (HeaderName, HeaderValue) = (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let mut response = if request.headers().get_all(header::HOST).iter().nth(1).is_some() {
        // What stands before this server may have looked at the other one.
        ApiError::invalid("the header `Host` comes more than once").into_response()
    } else if app.checks_host && !names_this_machine(request.headers()) {
        let message = "the header `Host` names another machine than this one, and the server is for this one alone; set \
                       `--host` and `--api-key-file` to let others use it";
        ApiError::of_status(StatusCode::MISDIRECTED_REQUEST, message).into_response()
    } else if !is_open(request.uri().path()) && !app.has_key(request.headers()) {
        ApiError::unauthorized().into_response()
    } else {
        next.run(request).await
    };
    response.headers_mut().extend([NO_SNIFF]);
    response
}

/// Whether `Host` is a name of the loopback interface; clients that send none are no browsers.
fn names_this_machine(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

impl Shared {
    /// Whether the request brings the key, if one is needed. The time that it takes tells nothing of the key.
    fn has_key(&self, headers: &HeaderMap) -> bool {
        let Some(key) = &self.key else { return true };
        let given = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
        let Some((scheme, given)) = given.split_at_checked("Bearer ".len()) else { return false };
        scheme.eq_ignore_ascii_case(b"Bearer ") && sha256_of(given).as_bytes().ct_eq(key.as_bytes()).into()
    }
}

/// `GET /v1/models`.
async fn models(State(app): State<App>) -> Json {
    let models: Vec<Value> = app.engines.iter().map(|(name, _)| described(&app, name)).collect();
    Json(json!({ "object": "list", "data": models }))
}

/// `GET /v1/models/{model}`.
async fn model(State(app): State<App>, model: Result<Path<String>, PathRejection>) -> Result<Json, ApiError> {
    let Ok(Path(model)) = model else { return Err(ApiError::invalid("the path is not UTF-8").about("model")) };
    let (name, _) = app.engine(Some(model))?;
    Ok(Json(described(&app, name)))
}

fn described(app: &App, name: &str) -> Value {
    json!({ "id": name, "object": "model", "created": app.started, "owned_by": "kindling" })
}

/// `GET /health`.
async fn health(State(app): State<App>) -> Result<Json, ApiError> {
    match app.engines.iter().find(|(_, engine)| !engine.is_alive()) {
        None => Ok(Json(json!({ "status": "ok" }))),
        Some((name, _)) => {
            let message = format!("the model `{name}` has stopped");
            Err(ApiError::server(StatusCode::SERVICE_UNAVAILABLE, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_the_loopback_interface_name_this_machine() {
        let names = |host: &str| {
            names_this_machine(&HeaderMap::from_iter([(header::HOST, HeaderValue::from_str(host).unwrap())]))
        };
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:80", "127.9.9.9", "[::1]:8080", "[::1]"] {
            assert!(names(host), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:8080", "127.0.0.1.evil.example", "10.0.0.1:8080", ""] {
            assert!(!names(host), "{host}");
        }
        assert!(names_this_machine(&HeaderMap::new()));
    }
}
