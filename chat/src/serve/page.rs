//! The page: files that are part of the program, and what a browser may do with them.

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::IntoResponse;
use axum::routing::get;
use serde_json::json;

use super::questions::Questions;
use super::shapes::Json;
use super::state::App;

/// Nothing but what this server sends is run, shown or asked; no other page may show this one.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

/// Path, type and text of each file.
pub(super) static FILES: [(&str, &str, &str); 9] = [
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/style.css", "text/css; charset=utf-8", include_str!("page/style.css")),
    ("/app.js", SCRIPT, include_str!("page/app.js")),
    ("/api.js", SCRIPT, include_str!("page/api.js")),
    ("/chat.js", SCRIPT, include_str!("page/chat.js")),
    ("/compare.js", SCRIPT, include_str!("page/compare.js")),
    ("/curves.js", SCRIPT, include_str!("page/curves.js")),
    ("/training.js", SCRIPT, include_str!("page/training.js")),
    ("/dom.js", SCRIPT, include_str!("page/dom.js")),
];

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// The routes of the page.
pub(super) fn routes() -> Router<App> {
    FILES.iter().fold(Router::new().route("/about", get(about)), |router, (path, kind, text)| {
        let headers: [(HeaderName, HeaderValue); 4] = [
            (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
            (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
            (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
            // The next version of the program may have other files.
            (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        ];
        router.route(path, get(move || async move { (headers, *text).into_response() }))
    })
}

/// `GET /about`: what this server was started with, as far as the page differs by it.
async fn about(State(app): State<App>) -> Json {
    let n_questions = app.questions.as_ref().map_or(0, Questions::n);
    let base: Vec<&str> =
        app.engines.iter().filter(|(_, engine)| engine.is_base).map(|(name, _)| name.as_str()).collect();
    let (labels, training) = (app.labels.is_some(), app.runs.is_some());
    Json(json!({ "base": base, "labels": labels, "training": training, "questions": n_questions }))
}
