//! The little that the router has to know of a request's body. The replica judges the rest.

use super::error::ApiError;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::Value;

/// Asked of a request that sets no `max_tokens`; only compares replicas with one another.
const ASSUMED_OUTPUT_TOKENS: u64 = 256;
const BYTES_PER_TOKEN: u64 = 4;
/// A bound on what one request can weigh, whatever it claims.
const MAX_WEIGHT_TOKENS: u64 = 1 << 24;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peeked {
    pub model: Option<String>,
    /// Rough work in tokens: prompt and, where text is generated, output.
    pub tokens: u64,
}

/// Fields of other types are the replica's to refuse, so everything is taken as any value.
#[derive(Deserialize)]
struct Fields {
    model: Option<Value>,
    max_tokens: Option<Value>,
    max_completion_tokens: Option<Value>,
    n: Option<Value>,
}

/// # Errors
/// 400 when the body is not a JSON object or `model` is not a string.
pub fn peek(body: &[u8], generates: bool) -> Result<Peeked, ApiError> {
    let invalid = |message: String| ApiError::invalid(StatusCode::BAD_REQUEST, "invalid_body", message);
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(invalid("the request body must be a JSON object".into()));
    }
    let fields: Fields = serde_json::from_slice(body)
        .map_err(|error| invalid(format!("the request body is not valid JSON: {error}")))?;
    let model = match &fields.model {
        None | Some(Value::Null) => None,
        Some(Value::String(name)) => Some(name.clone()),
        Some(_) => return Err(invalid("`model` must be a string".into()).param("model")),
    };
    let prompt = body.len() as u64 / BYTES_PER_TOKEN;
    let output = if generates { output_tokens(&fields) } else { 0 };
    Ok(Peeked { model, tokens: prompt.saturating_add(output).clamp(1, MAX_WEIGHT_TOKENS) })
}

fn output_tokens(fields: &Fields) -> u64 {
    let number = |value: &Option<Value>| value.as_ref().and_then(Value::as_u64);
    let each = number(&fields.max_completion_tokens).or_else(|| number(&fields.max_tokens));
    each.unwrap_or(ASSUMED_OUTPUT_TOKENS).saturating_mul(number(&fields.n).unwrap_or(1).max(1))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn reads_model_and_weight() {
        let body = br#"{"model":"demo","max_tokens":100,"n":2,"messages":[]}"#;
        let prompt = body.len() as u64 / 4;
        assert_eq!(peek(body, true).unwrap(), Peeked { model: Some("demo".into()), tokens: prompt + 200 });
        assert_eq!(peek(body, false).unwrap().tokens, prompt);
        assert_eq!(peek(b" {}", true).unwrap(), Peeked { model: None, tokens: ASSUMED_OUTPUT_TOKENS });
        assert_eq!(peek(b"{}", false).unwrap().tokens, 1);
    }

    #[test]
    fn leaves_wrong_types_to_the_replica_and_bounds_the_weight() {
        assert_eq!(peek(br#"{"max_tokens":"many"}"#, true).unwrap().tokens, 21 / 4 + ASSUMED_OUTPUT_TOKENS);
        assert_eq!(peek(br#"{"max_tokens":-1,"n":null}"#, true).unwrap().tokens, 26 / 4 + ASSUMED_OUTPUT_TOKENS);
        let huge = br#"{"max_tokens":18446744073709551615,"n":18446744073709551615}"#;
        assert_eq!(peek(huge, true).unwrap().tokens, MAX_WEIGHT_TOKENS);
    }

    #[test]
    fn refuses_what_is_no_request() {
        let deep = format!("{{\"a\":{}", "[".repeat(100_000));
        for body in ["", "[]", "null", "{", r#"{"model":1}"#, r#"{"model":"a","model":"b"}"#, "{} x", &deep] {
            let error = peek(body.as_bytes(), true).unwrap_err();
            assert_eq!(error.status, StatusCode::BAD_REQUEST, "{body:.40}");
        }
        assert!(peek(b"{\"a\xff\":1}", true).is_err());
    }
}
