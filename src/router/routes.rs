//! Which paths there are, and the answers that need no replica.

use super::error::ApiError;
use super::forward::forward;
use super::{Shared, guard};
use crate::status::ModelKind;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tower_http::catch_panic::CatchPanicLayer;

/// A path that is passed on to a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Route {
    pub path: &'static str,
    pub serves: Serves,
}

/// What a request without a model name can only have meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Serves {
    Generation,
    Vectors,
    /// Works on any model's tokenizer.
    Tokens,
}

impl Serves {
    pub fn suits(self, kind: ModelKind) -> bool {
        match self {
            Self::Generation => kind == ModelKind::Chat,
            Self::Vectors => kind == ModelKind::Embedding,
            Self::Tokens => true,
        }
    }
}

const PASSED_ON: [(&str, Serves); 17] = [
    ("/v1/chat/completions", Serves::Generation),
    ("/v1/completions", Serves::Generation),
    ("/generate", Serves::Generation),
    ("/generate_stream", Serves::Generation),
    ("/v1/embeddings", Serves::Vectors),
    ("/embed", Serves::Vectors),
    ("/v1/rerank", Serves::Vectors),
    ("/v2/rerank", Serves::Vectors),
    ("/rerank", Serves::Vectors),
    ("/v1/score", Serves::Vectors),
    ("/score", Serves::Vectors),
    ("/v1/classify", Serves::Vectors),
    ("/classify", Serves::Vectors),
    ("/predict", Serves::Vectors),
    ("/tokenize", Serves::Tokens),
    ("/v1/tokenize", Serves::Tokens),
    ("/detokenize", Serves::Tokens),
];

pub(super) fn app(shared: Arc<Shared>) -> Router {
    let mut app = Router::new()
        .route("/health", get(|| async { StatusCode::OK }))
        .route("/ready", get(ready))
        .route("/version", get(|| async { Json(json!({"version": env!("CARGO_PKG_VERSION")})) }))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model));
    for (path, serves) in PASSED_ON {
        let route = Route { path, serves };
        app = app.route(
            path,
            post(move |State(shared): State<Arc<Shared>>, request: Request| async move {
                forward(&shared, route, request).await
            }),
        );
    }
    app.fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(Arc::clone(&shared), guard::check))
        .layer(CatchPanicLayer::custom(|_panic| internal_error()))
        .layer(from_fn(guard::request_id))
        .with_state(shared)
}

async fn not_found(request: Request) -> ApiError {
    let message = format!("there is no {} here", printable(request.uri().path()));
    ApiError::invalid(StatusCode::NOT_FOUND, "unknown_path", message)
}

async fn method_not_allowed(request: Request) -> ApiError {
    let message = format!("{} does not take {}", printable(request.uri().path()), request.method());
    ApiError::invalid(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

fn internal_error() -> axum::http::Response<axum::body::Body> {
    ApiError {
        status: StatusCode::INTERNAL_SERVER_ERROR,
        kind: "server_error",
        code: "internal_error",
        message: "the router failed to handle this request".into(),
        param: None,
        retry_after_s: None,
    }
    .into_response()
}

fn printable(path: &str) -> String {
    path.chars().take(128).collect()
}

async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    let draining = shared.draining.load(Ordering::Relaxed);
    let groups = shared.registry.groups();
    let all_ready = groups.iter().all(|group| group.replicas.iter().any(|replica| replica.is_ready()));
    let status = if all_ready && !draining { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let models: Vec<_> = groups
        .iter()
        .map(|group| {
            let ready = group.replicas.iter().filter(|replica| replica.is_ready()).count();
            json!({"model": group.name(), "ready": ready, "replicas": group.replicas.len()})
        })
        .collect();
    (status, Json(json!({"ready": status == StatusCode::OK, "draining": draining, "models": models}))).into_response()
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let text = shared.metrics.text(&shared.registry);
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, content_type)], text).into_response()
}

async fn models(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let data: Vec<Value> = cards(&shared).collect();
    Json(json!({"object": "list", "data": data}))
}

async fn model(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let card = cards(&shared).find(|card| card["id"] == name.as_str());
    card.map(Json).ok_or_else(|| shared.unknown_model(&name))
}

/// One per name, as OpenAI lists them; the fields after `owned_by` are vLLM's and ours.
fn cards(shared: &Shared) -> impl Iterator<Item = Value> {
    shared.registry.groups().iter().flat_map(|group| {
        group.names.iter().map(|name| {
            json!({
                "id": name,
                "object": "model",
                "created": shared.started_unix_s,
                "owned_by": "mserve",
                "root": group.name(),
                "max_model_len": group.max_model_len(),
                "kind": group.kind,
            })
        })
    })
}

impl Shared {
    pub(super) fn unknown_model(&self, name: &str) -> ApiError {
        let known: Vec<_> = self.registry.groups().iter().map(|group| group.name()).collect();
        let name = printable(name);
        let message = format!("the model {name:?} does not exist; served here: {}", known.join(", "));
        ApiError::invalid(StatusCode::NOT_FOUND, "model_not_found", message).param("model")
    }
}
