//! What every request passes before a route sees it, and every response on its way out.

use super::error::ApiError;
use super::state::{Phase, ServerState};
use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use futures::StreamExt as _;
use std::sync::Arc;
use subtle::ConstantTimeEq;

pub const TOKEN_HEADER: &str = "x-mserve-token";
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID_CHARS: usize = 128;
const MAX_HEADER_BYTES: usize = 64 << 10;
const MAX_URI_BYTES: usize = 8 << 10;

/// Routes that a health check reaches without the token.
const OPEN_PATHS: [&str; 2] = ["/health", "/ready"];

/// 401 without the launcher's token: another user of the machine must not go round the router.
pub async fn require_token(
    State(state): State<Arc<ServerState>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if let Some(token) = &state.config.token
        && !OPEN_PATHS.contains(&request.uri().path())
    {
        let given = request.headers().get(TOKEN_HEADER).map_or(&[][..], HeaderValue::as_bytes);
        if !bool::from(given.ct_eq(token.as_bytes())) {
            let message = "this replica is reached through its router";
            return Err(ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_token"));
        }
    }
    Ok(next.run(request).await)
}

/// 503 while loading, and for new work while draining. Counts the request until its last byte is out.
pub async fn require_model(
    State(state): State<Arc<ServerState>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    state.model()?;
    if request.method() != Method::POST {
        return Ok(next.run(request).await);
    }
    if state.phase() == Phase::Draining {
        let message = "this replica is shutting down";
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).code("shutting_down"));
    }
    let in_flight = state.enter();
    let mut response = next.run(request).await;
    if let Some(length) = response.body().size_hint().exact() {
        // A stream has no size of its own.
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(response.map(|body| {
        let stream = body.into_data_stream().map(move |chunk| {
            let _held = &in_flight;
            chunk
        });
        Body::from_stream(stream)
    }))
}

/// 431 and 414 for what the connection's own limits let through.
pub async fn limit_headers(request: Request, next: Next) -> Result<Response, ApiError> {
    let bytes: usize = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes > MAX_HEADER_BYTES {
        let message = format!("the headers have {bytes} bytes, and the limit is {MAX_HEADER_BYTES}");
        return Err(ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, message));
    }
    let uri_bytes = request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    if uri_bytes > MAX_URI_BYTES {
        let message = format!("the address has {uri_bytes} bytes, and the limit is {MAX_URI_BYTES}");
        return Err(ApiError::new(StatusCode::URI_TOO_LONG, message));
    }
    Ok(next.run(request).await)
}

/// Every response carries the request's id and, with telemetry, the replica's names.
pub async fn name_response(State(state): State<Arc<ServerState>>, request: Request, next: Next) -> Response {
    let id = request.headers().get(REQUEST_ID).filter(|id| is_plain(id)).cloned().or_else(new_id);
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    if let Some(id) = id {
        headers.insert(REQUEST_ID, id);
    }
    if let Some(telemetry) = &state.config.telemetry {
        headers.insert("x-mserve-instance-id", telemetry.instance_id.clone());
        headers.insert("x-mserve-model-id", telemetry.model_id.clone());
        headers.insert("x-mserve-replica", telemetry.replica.clone());
    }
    response
}

fn is_plain(id: &HeaderValue) -> bool {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"._:/-".contains(b);
    (1..=MAX_REQUEST_ID_CHARS).contains(&id.len()) && id.as_bytes().iter().all(plain)
}

fn new_id() -> Option<HeaderValue> {
    HeaderValue::from_str(&uuid::Uuid::new_v4().simple().to_string()).ok()
}
