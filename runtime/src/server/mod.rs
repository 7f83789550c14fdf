//! The OpenAI-compatible HTTP face of one engine.
//!
//! A request goes: [`listen`] (connection limits) -> [`guard`] (token, readiness, panics) -> a route (fields checked
//! by [`fields`]) -> [`prompt`] (text to ids, off the async threads) -> [`generation`] (ids to text) -> JSON or
//! [`sse`]. Dropping a response at any point drops its token streams, which frees their KV blocks.

mod chat;
mod completions;
mod embeddings;
mod error;
mod fields;
mod generation;
mod guard;
mod health;
mod listen;
mod logprobs;
mod models;
mod openai;
mod prompt;
mod sampling;
mod sse;
mod state;
mod tokenize;
mod write_deadline;

pub use listen::{ConnectionLimits, serve};
pub use state::{Phase, ServedKind, ServedModel, ServerConfig, ServerState, Telemetry};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};
use std::sync::Arc;
use tower_http::catch_panic::CatchPanicLayer;

/// All routes of one replica.
pub fn router(state: Arc<ServerState>) -> Router {
    let model_routes = Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/metrics", get(health::metrics))
        .route("/load", get(health::load))
        .route_layer(from_fn_with_state(Arc::clone(&state), guard::require_model));
    Router::new()
        .merge(model_routes)
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/version", get(health::version))
        .fallback(error::no_such_route)
        .method_not_allowed_fallback(error::method_not_allowed)
        .layer(DefaultBodyLimit::max(state.config.max_body_bytes))
        .layer(from_fn_with_state(Arc::clone(&state), guard::require_token))
        .layer(from_fn(guard::limit_headers))
        .layer(CatchPanicLayer::custom(error::panicked))
        .layer(from_fn_with_state(Arc::clone(&state), guard::name_response))
        .with_state(state)
}
