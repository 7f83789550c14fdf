//! The fields of a JSON request, read one by one so that an error names the field and what it should be.

use super::error::ApiError;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::time::Duration;

const BODY_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_FIELDS: usize = 256;

/// A JSON object whose values are still text: a value costs memory only when it is asked for.
#[derive(Debug)]
pub struct Fields(HashMap<String, Box<RawValue>>);

impl<S: Send + Sync> FromRequest<S> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        // A page in a browser may send other types across origins without asking.
        if !is_json(&request) {
            let message = "the content type must be application/json";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let body = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, state))
            .await
            .map_err(|_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the request body took too long"))??;
        Self::parse(&body)
    }
}

fn is_json(request: &Request) -> bool {
    let value = request.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json")
}

impl Fields {
    /// # Errors
    /// 400 when the body is not a JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let fields: HashMap<String, Box<RawValue>> = serde_json::from_slice(body).map_err(|e| {
            let message = format!("the request body is not a JSON object: {e}");
            ApiError::new(StatusCode::BAD_REQUEST, message).code("invalid_json")
        })?;
        if fields.len() > MAX_FIELDS {
            let message = format!("the request has {} fields, and the limit is {MAX_FIELDS}", fields.len());
            return Err(ApiError::new(StatusCode::BAD_REQUEST, message));
        }
        Ok(Self(fields))
    }

    /// The JSON text of a field; `None` when absent or null.
    pub fn raw(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|raw| raw.get()).filter(|text| *text != "null")
    }

    /// A field of type `T`; `expected` says in words what that is.
    pub fn get<T: DeserializeOwned>(&self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        let Some(text) = self.raw(name) else { return Ok(None) };
        serde_json::from_str(text).map(Some).map_err(|_| wrong_type(name, expected))
    }

    pub fn text(&self, name: &str) -> Result<Option<String>, ApiError> {
        self.get(name, "a string")
    }

    pub fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.get(name, "true or false")
    }

    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        let Some(value) = self.get::<f64>(name, &expected)? else { return Ok(None) };
        if range.contains(&value) { Ok(Some(value as f32)) } else { Err(out_of_range(name, &value, &expected)) }
    }

    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let expected = if *range.end() == i64::MAX {
            format!("an integer of at least {}", range.start())
        } else {
            format!("an integer from {} to {}", range.start(), range.end())
        };
        let Some(value) = self.get::<i64>(name, &expected)? else { return Ok(None) };
        if range.contains(&value) { Ok(Some(value)) } else { Err(out_of_range(name, &value, &expected)) }
    }

    /// A count that fits memory sizes.
    pub fn count(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<usize>, ApiError> {
        Ok(self.integer(name, range)?.and_then(|n| usize::try_from(n).ok()))
    }

    /// Refuse a field that would change the answer and is not supported. Values that ask for nothing pass.
    pub fn refuse(&self, name: &str, why: &str) -> Result<(), ApiError> {
        match self.raw(name) {
            None | Some("false" | "[]" | "{}" | "\"\"") => Ok(()),
            Some(_) => {
                Err(ApiError::field(name, format!("{name} is not supported{why}")).code("unsupported_parameter"))
            }
        }
    }
}

fn wrong_type(name: &str, expected: &str) -> ApiError {
    ApiError::field(name, format!("{name} must be {expected}")).code("invalid_type")
}

fn out_of_range(name: &str, value: &dyn std::fmt::Display, expected: &str) -> ApiError {
    ApiError::field(name, format!("{name} is {value}; it must be {expected}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn fields(body: &str) -> Fields {
        Fields::parse(body.as_bytes()).unwrap()
    }

    #[test]
    fn absent_and_null_are_the_same() {
        let fields = fields(r#"{"a": null, "b": 1.5}"#);
        assert_eq!(fields.number("a", 0.0..=2.0), Ok(None));
        assert_eq!(fields.number("c", 0.0..=2.0), Ok(None));
        assert_eq!(fields.number("b", 0.0..=2.0), Ok(Some(1.5)));
    }

    #[test]
    fn errors_name_the_field_and_what_would_do() {
        let fields = fields(r#"{"t": "hot", "n": 3, "x": 1e999, "s": 1.5}"#);
        let text = |error: ApiError| format!("{:?} {:?} {}", error.param.unwrap(), error.code.unwrap(), error.message);
        assert_eq!(
            text(fields.number("t", 0.0..=2.0).unwrap_err()),
            r#""t" "invalid_type" t must be a number from 0 to 2"#
        );
        assert_eq!(
            text(fields.integer("n", 0..=2).unwrap_err()),
            r#""n" "invalid_value" n is 3; it must be an integer from 0 to 2"#
        );
        assert_eq!(fields.number("x", 0.0..=2.0).unwrap_err().code, Some("invalid_type"));
        assert_eq!(fields.integer("s", 0..=2).unwrap_err().code, Some("invalid_type"));
    }

    #[test]
    fn bodies_that_are_no_object_are_refused() {
        for body in ["", "[]", "{", "\"a\"", "{\"a\": }", "\u{0}"] {
            assert_eq!(Fields::parse(body.as_bytes()).unwrap_err().code, Some("invalid_json"), "{body:?}");
        }
    }

    #[test]
    fn deep_values_are_refused_where_they_are_read() {
        let deep = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let fields = fields(&deep);
        assert_eq!(fields.get::<serde_json::Value>("a", "a list").unwrap_err().code, Some("invalid_type"));
    }
}
