//! `POST /v1/embeddings`.

use super::error::ApiError;
use super::fields::Fields;
use super::models;
use super::prompt::Prompts;
use super::state::{ServedKind, ServerState};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures::stream::{StreamExt, TryStreamExt};
use serde_json::{Value, json};
use std::sync::Arc;

const MAX_INPUTS: usize = 2048;
/// Inputs of one request that are in the engine at a time: enough to fill its steps, not its queue.
const IN_ENGINE: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Float,
    Base64,
}

pub async fn create(State(state): State<Arc<ServerState>>, fields: Fields) -> Result<Response, ApiError> {
    let model = state.model()?;
    models::check_name(&state, &fields)?;
    let ServedKind::Embedding { width } = model.kind else {
        let message = "this model is served for text generation; /v1/embeddings needs one served as embedding model";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, message).code("wrong_model_kind"));
    };
    let encoding = encoding(&fields)?;
    let dimensions = fields.count("dimensions", 1..=i64::try_from(width).unwrap_or(i64::MAX))?;
    let inputs = Prompts::parse(&fields, "input", MAX_INPUTS)?.into_token_ids(&state, model).await?;
    let prompt_tokens: usize = inputs.iter().map(Vec::len).sum();
    let engine = &model.engine;
    let vectors: Vec<Vec<f32>> = futures::stream::iter(inputs)
        .map(|ids| async move { Ok::<_, ApiError>(engine.encode(ids)?.await?) })
        .buffered(IN_ENGINE)
        .try_collect()
        .await?;
    let entry = |(index, vector): (usize, Vec<f32>)| {
        let vector = dimensions.map_or(vector.clone(), |n| shorten(&vector, n));
        json!({"object": "embedding", "index": index, "embedding": encode(&vector, encoding)})
    };
    let data: Vec<Value> = vectors.into_iter().enumerate().map(entry).collect();
    let usage = json!({"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens});
    Ok(Json(json!({"object": "list", "data": data, "model": state.model_name(), "usage": usage})).into_response())
}

fn encoding(fields: &Fields) -> Result<Encoding, ApiError> {
    match fields.text("encoding_format")?.as_deref() {
        None | Some("float") => Ok(Encoding::Float),
        Some("base64") => Ok(Encoding::Base64),
        Some(_) => Err(ApiError::field("encoding_format", "encoding_format must be \"float\" or \"base64\"")),
    }
}

/// The leading dimensions, of length 1 again: what models trained for it (Matryoshka) mean by fewer dimensions.
fn shorten(vector: &[f32], dimensions: usize) -> Vec<f32> {
    let kept = &vector[..dimensions.min(vector.len())];
    let norm = kept.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    kept.iter().map(|x| x / norm).collect()
}

fn encode(vector: &[f32], encoding: Encoding) -> Value {
    match encoding {
        Encoding::Float => vector.iter().map(|&x| Value::from(x)).collect(),
        Encoding::Base64 => {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            Value::from(base64(&bytes))
        }
    }
}

/// RFC 4648 with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().chain([0, 0].iter()).take(3).fold(0u32, |group, &b| group << 8 | u32::from(b));
        for i in 0..4 {
            let symbol = ALPHABET[(group >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= chunk.len() { char::from(symbol) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_as_in_the_rfc() {
        let cases = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (bytes, text) in cases {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn fewer_dimensions_have_length_one() {
        assert_eq!(shorten(&[3.0, 4.0, 12.0], 2), [0.6, 0.8]);
    }
}
