//! `POST /tokenize` and `/detokenize`, as vLLM has them.

use super::error::ApiError;
use super::fields::Fields;
use super::prompt::text_work;
use super::state::ServerState;
use super::{chat, models};
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use std::sync::Arc;

pub async fn tokenize(State(state): State<Arc<ServerState>>, fields: Fields) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    check_name(&state, &fields)?;
    let ids = match fields.text("prompt")? {
        None => chat::prompt(&state, model, &fields).await?,
        Some(text) => {
            let add_special_tokens = fields.flag("add_special_tokens")?.unwrap_or(true);
            let tokenizer = Arc::clone(&model.tokenizer);
            // Counting is the point here, so a text beyond the context is counted as well.
            let work = move || match add_special_tokens {
                true => tokenizer.encode(&text, usize::MAX),
                false => tokenizer.encode_rendered(&text, usize::MAX),
            };
            text_work(&state, work).await??
        }
    };
    let mut answer = json!({"count": ids.len(), "max_model_len": model.max_model_len, "tokens": ids});
    if fields.flag("return_token_strs")?.unwrap_or(false) {
        answer["token_strs"] = ids.iter().map(|&id| model.tokenizer.id_to_token(id)).collect();
    }
    Ok(Json(answer))
}

pub async fn detokenize(State(state): State<Arc<ServerState>>, fields: Fields) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    check_name(&state, &fields)?;
    let expected = "a list of token ids";
    let ids: Vec<u32> = fields.get("tokens", expected)?.ok_or_else(|| {
        ApiError::field("tokens", format!("tokens is required: {expected}")).code("missing_required_parameter")
    })?;
    let tokenizer = Arc::clone(&model.tokenizer);
    let text = text_work(&state, move || tokenizer.decode(&ids)).await??;
    Ok(Json(json!({"prompt": text})))
}

/// A replica has one model, so these two routes do not need its name.
fn check_name(state: &ServerState, fields: &Fields) -> Result<(), ApiError> {
    if fields.raw("model").is_some() { models::check_name(state, fields) } else { Ok(()) }
}
