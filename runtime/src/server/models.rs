//! `GET /v1/models`, and whether a request means this model.

use super::error::ApiError;
use super::fields::Fields;
use super::state::{ServedKind, ServedModel, ServerState};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;

pub async fn list(State(state): State<Arc<ServerState>>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let data: Vec<Value> = state.config.served_model_names.iter().map(|name| card(&state, model, name)).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

pub async fn one(State(state): State<Arc<ServerState>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let name = state.config.served_model_names.iter().find(|name| **name == id).ok_or_else(|| not_found(&id))?;
    Ok(Json(card(&state, model, name)))
}

fn card(state: &ServerState, model: &ServedModel, name: &str) -> Value {
    json!({
        "id": name, "object": "model", "created": state.started_unix_s, "owned_by": "mserve",
        "root": state.model_name(), "max_model_len": model.max_model_len,
    })
}

/// # Errors
/// 404 for another model's name, 400 for none.
pub fn check_name(state: &ServerState, fields: &Fields) -> Result<(), ApiError> {
    let name = fields.text("model")?.ok_or_else(|| {
        ApiError::field("model", "model is required: the name of a served model").code("missing_required_parameter")
    })?;
    if state.config.served_model_names.contains(&name) { Ok(()) } else { Err(not_found(&name)) }
}

fn not_found(name: &str) -> ApiError {
    let name: String = name.chars().take(128).collect();
    let error = ApiError::new(StatusCode::NOT_FOUND, format!("the model `{name}` does not exist"));
    ApiError { param: Some("model".to_owned()), code: Some("model_not_found"), ..error }
}

/// # Errors
/// 400 when the model is served for embeddings.
pub fn require_generation(model: &ServedModel, route: &str) -> Result<(), ApiError> {
    match model.kind {
        ServedKind::Chat => Ok(()),
        ServedKind::Embedding { .. } => {
            let message = format!("this model is served as an embedding model; {route} needs one that generates text");
            Err(ApiError::new(StatusCode::BAD_REQUEST, message).code("wrong_model_kind"))
        }
    }
}
