//! Every error of the server, in OpenAI's body: `{"error": {"message", "type", "param", "code"}}`.

use crate::engine::{AdmissionError, RequestError};
use crate::tokenizer::EncodeError;
use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::any::Any;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// 400 about one field of the request.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, message);
        Self { param: Some(param.into()), code: Some("invalid_value"), ..error }
    }

    #[must_use]
    pub fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    pub fn context_length(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message).code("context_length_exceeded")
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message).code("internal_error")
    }

    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": error_type(self.status), "param": self.param, "code": self.code,
        }})
    }
}

/// OpenAI's word for the class of an error.
fn error_type(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
        status if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<AdmissionError> for ApiError {
    fn from(error: AdmissionError) -> Self {
        let message = error.to_string();
        match error {
            AdmissionError::EmptyPrompt => Self::field("prompt", message),
            AdmissionError::PromptTooLong { .. } | AdmissionError::PoolTooSmall { .. } => Self::context_length(message),
            AdmissionError::TokenOutOfVocabulary { .. } => Self::field("prompt", message),
            AdmissionError::TooManyNamedTokens { .. } => Self::field("logit_bias", message),
            AdmissionError::QueueFull { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, message).code("queue_full"),
            AdmissionError::Stopped { .. } => {
                // Why it stopped is the operator's business and stands in the log.
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped").code("engine_stopped")
            }
        }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::ShuttingDown => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string()).code("shutting_down")
            }
            RequestError::Device(what) => {
                tracing::error!(%what, "a request failed on the device");
                Self::internal("the device failed while running this request").code("device_error")
            }
        }
    }
}

impl From<EncodeError> for ApiError {
    fn from(error: EncodeError) -> Self {
        match error {
            EncodeError::TooLong { .. } => Self::context_length(error.to_string()),
            EncodeError::Tokenizer(_) => Self::new(StatusCode::BAD_REQUEST, error.to_string()),
        }
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, "the request body is too large").code("request_too_large")
            }
            status => Self::new(status, "the request body could not be read"),
        }
    }
}

pub async fn no_such_route(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    ApiError::new(StatusCode::NOT_FOUND, format!("no such route: {method} {path}")).code("not_found")
}

pub async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    let message = format!("{path} does not answer {method}");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).code("method_not_allowed")
}

/// A panic is one request's failure; its text stays in the log.
#[allow(clippy::needless_pass_by_value)] // tower-http's signature
pub fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    tracing::error!(panic = text.unwrap_or("(no text)"), "a request handler panicked");
    ApiError::internal("internal error").into_response()
}
