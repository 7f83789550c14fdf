//! Checks before anything of a request is used: who asks, from where, and in which form.

use super::error::ApiError;
use super::{Access, Shared};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::net::IpAddr;
use std::sync::Arc;
use subtle::ConstantTimeEq;

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// hyper's own bound ([`super::listener`]) is on what it buffers while a head is incomplete.
const MAX_HEAD_BYTES: usize = 64 * 1024;
const MAX_URI_BYTES: usize = 8 * 1024;
const MAX_REQUEST_ID_BYTES: usize = 128;

/// Open to probes of load balancers, which have no key: they tell no more than up or not.
const WITHOUT_KEY: [&str; 2] = ["/health", "/ready"];

pub(super) async fn check(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    match admit(&shared.access, &request) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

fn admit(access: &Access, request: &Request) -> Result<(), ApiError> {
    if request.uri().to_string().len() > MAX_URI_BYTES {
        let message = format!("the address is longer than {MAX_URI_BYTES} bytes");
        return Err(ApiError::invalid(StatusCode::URI_TOO_LONG, "uri_too_long", message));
    }
    let headers = request.headers();
    let head_bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if head_bytes > MAX_HEAD_BYTES {
        let message = format!("the request's headers are longer than {MAX_HEAD_BYTES} bytes");
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        return Err(ApiError::invalid(status, "headers_too_large", message));
    }
    match access {
        Access::Key(key) if !WITHOUT_KEY.contains(&request.uri().path()) && !has_key(headers, key) => {
            return Err(ApiError::unauthorized());
        }
        Access::Local => check_origin(headers)?,
        Access::Key(_) | Access::Open => {}
    }
    // A browser sends JSON to another site only after asking it; text/plain and forms it sends unasked.
    if request.method() == Method::POST && !is_json(headers) {
        let message = "the request body must have `Content-Type: application/json`";
        return Err(ApiError::invalid(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    Ok(())
}

fn has_key(headers: &HeaderMap, key: &str) -> bool {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
    });
    let offered = bearer.or_else(|| headers.get("x-api-key").map(HeaderValue::as_bytes));
    // Takes the same time wherever the first difference is.
    offered.is_some_and(|offered| offered.ct_eq(key.as_bytes()).into())
}

/// A name that someone else's DNS points at 127.0.0.1 still stands in `Host`, and a foreign page in `Origin`.
fn check_origin(headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or("?"));
    let foreign = |what: &str, value: &str| {
        let value: String = value.chars().take(128).collect();
        let message = format!("{what} {value:?} is not of this machine; set an API key to serve others");
        Err(ApiError::invalid(StatusCode::FORBIDDEN, "foreign_origin", message))
    };
    if let Some(host) = text(header::HOST)
        && !is_local(host)
    {
        return foreign("Host", host);
    }
    if let Some(origin) = text(header::ORIGIN) {
        let authority = origin.split_once("://").map_or("", |(_, authority)| authority);
        if !is_local(authority) {
            return foreign("Origin", origin);
        }
    }
    Ok(())
}

/// `localhost`, `127.x.x.x` or `[::1]`, with or without a port.
fn is_local(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    let host = host.to_ascii_lowercase();
    host == "localhost" || host.ends_with(".localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    value.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

/// Give every request an id, the client's own if it is harmless, and return it with the answer.
pub(super) async fn request_id(mut request: Request, next: Next) -> Response {
    let id = request.headers().get(REQUEST_ID).filter(|id| is_harmless(id.as_bytes())).cloned();
    let id = id.unwrap_or_else(|| {
        let fresh = format!("req-{}", uuid::Uuid::new_v4().simple());
        HeaderValue::from_str(&fresh).unwrap_or(HeaderValue::from_static("req"))
    });
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Ids end up in headers, logs and screens.
fn is_harmless(id: &[u8]) -> bool {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"._:/-".contains(byte);
    !id.is_empty() && id.len() <= MAX_REQUEST_ID_BYTES && id.iter().all(allowed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use axum::body::Body;

    fn request(method: Method, path: &str, headers: &[(&str, &str)]) -> Request {
        let mut builder = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(Body::empty()).unwrap()
    }

    fn status(access: &Access, method: Method, path: &str, headers: &[(&str, &str)]) -> u16 {
        admit(access, &request(method, path, headers)).map_or_else(|error| error.status.as_u16(), |()| 200)
    }

    #[test]
    fn the_key_guards_every_path_but_the_probes() {
        let access = Access::Key("s3cret".into());
        let get = |path, headers: &[(&str, &str)]| status(&access, Method::GET, path, headers);
        for path in ["/v1/models", "/metrics", "/version", "/rerank", "/nowhere", "/health/", "//health", "/healthz"] {
            assert_eq!(get(path, &[]), 401, "{path}");
        }
        for path in ["/health", "/ready"] {
            assert_eq!(get(path, &[]), 200, "{path}");
        }
        for value in ["Bearer s3cret", "bearer s3cret", "BEARER s3cret"] {
            assert_eq!(get("/v1/models", &[("authorization", value)]), 200, "{value}");
        }
        for value in ["Bearer s3cre", "Bearer s3crets", "Bearer ", "Bearer", "s3cret", "Basic s3cret", "Bearer  s3cret"]
        {
            assert_eq!(get("/v1/models", &[("authorization", value)]), 401, "{value}");
        }
        assert_eq!(get("/v1/models", &[("x-api-key", "s3cret")]), 200);
    }

    #[test]
    fn a_local_router_talks_to_local_programs_only() {
        let get = |headers: &[(&str, &str)]| status(&Access::Local, Method::GET, "/v1/models", headers);
        for host in
            ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.8.9.1", "[::1]:8000", "[::1]", "a.localhost:1"]
        {
            assert_eq!(get(&[("host", host)]), 200, "{host}");
        }
        for host in
            ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1:8000", "", "[::2]:80"]
        {
            assert_eq!(get(&[("host", host)]), 403, "{host}");
        }
        let with_origin = |origin| get(&[("host", "localhost:8000"), ("origin", origin)]);
        assert_eq!(with_origin("http://localhost:3000"), 200);
        for origin in ["http://evil.example", "null", "https://localhost.evil.example", ""] {
            assert_eq!(with_origin(origin), 403, "{origin}");
        }
    }

    #[test]
    fn posts_are_json() {
        let post = |headers: &[(&str, &str)]| status(&Access::Open, Method::POST, "/v1/completions", headers);
        assert_eq!(post(&[("content-type", "application/json; charset=utf-8")]), 200);
        for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", ""]
        {
            assert_eq!(post(&[("content-type", kind)]), 415, "{kind}");
        }
        assert_eq!(post(&[]), 415);
    }

    #[test]
    fn long_addresses_are_refused_and_odd_ids_replaced() {
        let path = format!("/v1/models?{}", "x".repeat(MAX_URI_BYTES));
        assert_eq!(status(&Access::Open, Method::GET, &path, &[]), 414);
        assert!(is_harmless(b"req-1.a:b/c_d"));
        let long = "x".repeat(129);
        for id in ["", "a b", "a\"", "\u{e4}", long.as_str()] {
            assert!(!is_harmless(id.as_bytes()), "{id}");
        }
    }
}
