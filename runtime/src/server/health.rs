//! Is it alive, is it ready, how is it doing.

use super::error::ApiError;
use super::state::{Phase, ServerState};
use crate::engine::EngineLoad;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

/// Alive and making progress: 200 from the moment the socket is bound, 503 when work waits and no step ends.
/// Answers without the engine's thread.
pub async fn health(State(state): State<Arc<ServerState>>) -> Response {
    let stalled_ms = state.model().map_or(0, |model| model.engine.load().stalled_ms);
    let limit_ms = u64::try_from(state.config.stall_limit.as_millis()).unwrap_or(u64::MAX);
    if stalled_ms > limit_ms {
        let message = format!("work has waited {stalled_ms} ms without a step");
        return ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).code("stalled").into_response();
    }
    Json(json!({"status": phase_name(&state), "stalled_ms": stalled_ms})).into_response()
}

/// 200 when new requests are welcome.
pub async fn ready(State(state): State<Arc<ServerState>>) -> Response {
    let status = match state.phase() {
        Phase::Ready => StatusCode::OK,
        Phase::Loading | Phase::Draining => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(json!({"status": phase_name(&state)}))).into_response()
}

fn phase_name(state: &ServerState) -> &'static str {
    match state.phase() {
        Phase::Loading => "loading",
        Phase::Ready => "ready",
        Phase::Draining => "draining",
    }
}

pub async fn load(State(state): State<Arc<ServerState>>) -> Result<Json<EngineLoad>, ApiError> {
    Ok(Json(state.model()?.engine.load()))
}

pub async fn metrics(State(state): State<Arc<ServerState>>) -> Result<Response, ApiError> {
    let text = state.model()?.engine.metrics();
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
