//! Errors in OpenAI's form.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::shapes::Json;

/// A request that is not answered, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    status: StatusCode,
    /// OpenAI's `type`.
    kind: &'static str,
    message: String,
    /// The parameter that is wrong.
    param: Option<String>,
    code: Option<&'static str>,
    /// When to try again, in seconds.
    retry_after: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// A request that is malformed or asks for what cannot be honoured.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A parameter of the right type whose value cannot be used.
    pub(super) fn unprocessable(param: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_request_error", message).about(param)
    }

    /// A status for which there is nothing else to say.
    pub(super) fn of_status(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// The key is missing or wrong.
    pub(super) fn unauthorized() -> Self {
        let message = "missing or incorrect API key, expected the header `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message).coded("invalid_api_key")
    }

    /// As many requests as there is room for wait already.
    pub(super) fn busy() -> Self {
        /// A few answers' time, in seconds.
        const RETRY_AFTER: u64 = 2;
        let message = format!("the queue is full, try again in {RETRY_AFTER} seconds");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message).coded("queue_full");
        Self { retry_after: Some(RETRY_AFTER), ..error }
    }

    /// A failure that is no fault of the request.
    pub(super) fn server(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "server_error", message)
    }

    /// The same error with the parameter that it is about.
    pub(super) fn about(self, param: &str) -> Self {
        Self { param: Some(param.to_owned()), ..self }
    }

    /// The same error with OpenAI's `code`.
    pub(super) fn coded(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// The body.
    pub(super) fn to_json(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
