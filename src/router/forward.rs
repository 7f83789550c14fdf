//! One request: admitted, read, sent, and sent again while that can still help.

use super::Shared;
use super::error::ApiError;
use super::guard::REQUEST_ID;
use super::registry::{Group, Lease, Tried};
use super::relay::{self, Failure, Reason};
use super::request::peek;
use super::routes::{Route, Serves};
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

/// Attempts of one request, those included that found nobody listening.
const MAX_ATTEMPTS: usize = 4;
/// A connection that breaks may have been an old one that was just being closed: the same process is asked once more,
/// but first there is time to notice that it has ended.
const SAME_PROCESS_PAUSE: Duration = Duration::from_millis(100);

/// What of a client's head a replica gets to see. All else (keys, cookies, hop-by-hop headers) stays here.
const PASSED_ON: [HeaderName; 6] = [
    header::ACCEPT,
    header::CONTENT_TYPE,
    header::USER_AGENT,
    REQUEST_ID,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
];

/// A request that has been let in; counted until its answer has ended.
#[derive(Debug)]
pub(super) struct Admitted {
    shared: Arc<Shared>,
    _permit: OwnedSemaphorePermit,
    started: Instant,
    route: &'static str,
    /// Once known to be one that is served.
    model: Option<String>,
    code: Option<u16>,
}

pub(super) struct Outgoing {
    path: &'static str,
    headers: HeaderMap,
    body: Bytes,
    tokens: u64,
}

pub(super) async fn forward(shared: &Arc<Shared>, route: Route, request: Request) -> Response {
    let mut admitted = match Admitted::new(shared, route.path) {
        Ok(admitted) => admitted,
        Err(error) => return error.into_response(),
    };
    match prepare(shared, route, request, &mut admitted).await {
        Ok((group, outgoing)) => attempt(shared, group, &outgoing, admitted).await,
        Err(error) => {
            admitted.answered(error.status);
            error.into_response()
        }
    }
}

async fn prepare<'a>(
    shared: &'a Shared,
    route: Route,
    request: Request,
    admitted: &mut Admitted,
) -> Result<(&'a Group, Outgoing), ApiError> {
    let (head, body) = request.into_parts();
    let body = read_body(shared, &head.headers, body).await?;
    let peeked = peek(&body, route.serves == Serves::Generation)?;
    let group = shared.find_group(peeked.model.as_deref(), route.serves)?;
    admitted.model = Some(group.name().to_owned());
    let headers = PASSED_ON.iter().filter_map(|name| Some((name.clone(), head.headers.get(name)?.clone()))).collect();
    Ok((group, Outgoing { path: route.path, headers, body, tokens: peeked.tokens }))
}

async fn read_body(shared: &Shared, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let limit = shared.limits.max_body_bytes;
    let too_large = || {
        let message = format!("the request body is larger than {limit} bytes");
        ApiError::invalid(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > limit as u64) {
        return Err(too_large());
    }
    let collected = tokio::time::timeout(shared.limits.body_timeout, Limited::new(body, limit).collect()).await;
    match collected {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(ApiError::invalid(StatusCode::BAD_REQUEST, "incomplete_body", "the request body broke off")),
        Err(_) => Err(ApiError::invalid(StatusCode::REQUEST_TIMEOUT, "body_timeout", "the request body took too long")),
    }
}

async fn attempt(shared: &Arc<Shared>, group: &Group, outgoing: &Outgoing, mut admitted: Admitted) -> Response {
    let ready_deadline = Instant::now() + shared.limits.ready_timeout;
    let mut tried: Vec<Tried> = Vec::new();
    let mut failed: Option<Failure> = None;
    let mut sent_again = false;
    for _ in 0..MAX_ATTEMPTS {
        let lease = match shared.acquire(group, &tried, failed.as_ref(), outgoing.tokens, ready_deadline).await {
            Ok(lease) => lease,
            Err(error) => return finish(admitted, failed, error),
        };
        if failed.is_some() {
            shared.metrics.retries.inc();
        }
        tried.push(lease.tried);
        match relay::ask(shared, lease, outgoing, admitted).await {
            Ok(response) => return response,
            Err((returned, failure)) => {
                admitted = returned;
                let last = failure.is_final() || (failure.may_have_run() && sent_again);
                sent_again |= failure.may_have_run();
                failed = Some(failure);
                if last {
                    break;
                }
            }
        }
    }
    finish(admitted, failed, ApiError::unavailable("no replica could be reached"))
}

/// The answer when no attempt has succeeded: what the last one said, else `otherwise`.
fn finish(mut admitted: Admitted, failed: Option<Failure>, otherwise: ApiError) -> Response {
    let response = failed.map_or_else(|| otherwise.into_response(), IntoResponse::into_response);
    admitted.answered(response.status());
    response
}

impl Outgoing {
    pub fn send(&self, http: &reqwest::Client, lease: &Lease) -> reqwest::RequestBuilder {
        http.post(format!("http://{}{}", lease.address, self.path))
            .headers(self.headers.clone())
            .header("x-mserve-token", &lease.replica.token)
            .body(self.body.clone())
    }
}

impl Shared {
    fn find_group(&self, model: Option<&str>, serves: Serves) -> Result<&Group, ApiError> {
        let groups = self.registry.groups();
        if let Some(name) = model {
            let found = groups.iter().find(|group| group.names.iter().any(|known| known == name));
            return found.ok_or_else(|| self.unknown_model(name));
        }
        let suits: Vec<&Group> = groups.iter().filter(|group| serves.suits(group.kind)).collect();
        let chats: Vec<&Group> = suits.iter().copied().filter(|group| Serves::Generation.suits(group.kind)).collect();
        match (suits.as_slice(), chats.as_slice()) {
            ([only], _) | (_, [only]) => Ok(only),
            _ => {
                let known: Vec<_> = groups.iter().map(Group::name).collect();
                let message = format!("`model` is missing; served here: {}", known.join(", "));
                Err(ApiError::invalid(StatusCode::BAD_REQUEST, "missing_model", message).param("model"))
            }
        }
    }

    /// A replica for the next attempt, waited for if none is ready.
    async fn acquire(
        &self,
        group: &Group,
        tried: &[Tried],
        failed: Option<&Failure>,
        tokens: u64,
        deadline: Instant,
    ) -> Result<Lease, ApiError> {
        let mut rng = fastrand::Rng::new();
        let mut changes = self.registry.changes();
        if let Some(lease) = group.pick(tried, tokens, &mut rng) {
            return Ok(lease);
        }
        // An error that the replica has answered with is an answer; waiting for another replica is for lost ones.
        if failed.is_some_and(|failure| failure.reason == Reason::Status) {
            return Err(ApiError::bad_gateway("no other replica is ready"));
        }
        let _waiting = Waiting::enter(&self.registry.waiting, self.limits.max_waiting_requests)
            .ok_or_else(|| ApiError::overloaded("too many requests wait for a replica to become ready"))?;
        let pause_ends = Instant::now() + SAME_PROCESS_PAUSE;
        while Instant::now() < deadline && !self.draining.load(Ordering::Relaxed) {
            let paused = Instant::now() >= pause_ends;
            let left_out = if paused { &[] } else { tried };
            changes.mark_unchanged();
            if let Some(lease) = group.pick(left_out, tokens, &mut rng) {
                return Ok(lease);
            }
            let until = if paused { deadline } else { pause_ends.min(deadline) };
            // Either way: look again.
            let _ = tokio::time::timeout_at(until, changes.changed()).await;
        }
        Err(ApiError::unavailable(format!("no replica of {} is ready", group.name())))
    }
}

/// A place among those who wait; there are only so many.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn enter(count: &'a AtomicUsize, limit: usize) -> Option<Self> {
        let place = Self(count);
        (count.fetch_add(1, Ordering::Relaxed) < limit).then_some(place)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admitted {
    fn new(shared: &Arc<Shared>, route: &'static str) -> Result<Self, ApiError> {
        if shared.draining.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        let permit = Arc::clone(&shared.admission).try_acquire_owned().map_err(|_| {
            let limit = shared.limits.max_concurrent_requests;
            ApiError::overloaded(format!("{limit} requests are being served, which is the limit"))
        })?;
        shared.metrics.requests_total.inc();
        shared.metrics.in_flight.inc();
        let shared = Arc::clone(shared);
        Ok(Self { shared, _permit: permit, started: Instant::now(), route, model: None, code: None })
    }

    /// The head of the answer goes out.
    pub fn answered(&mut self, status: StatusCode) {
        self.code = Some(status.as_u16());
        if status.is_server_error() {
            self.shared.metrics.errors_total.inc();
        }
        if let Some(model) = &self.model {
            let elapsed = self.started.elapsed().as_secs_f64();
            self.shared.metrics.first_byte.with_label_values(&[model]).observe(elapsed);
        }
    }

    /// The answer broke off after its head had gone out.
    pub fn broke_off(&self) {
        self.shared.metrics.errors_total.inc();
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let metrics = &self.shared.metrics;
        metrics.in_flight.dec();
        let model = self.model.as_deref().unwrap_or("unknown");
        // 499 is nginx's code for a client that went away before the answer.
        let code = self.code.unwrap_or(499).to_string();
        metrics.requests.with_label_values(&[model, self.route, &code]).inc();
        metrics.duration_of(model).observe(self.started.elapsed().as_secs_f64());
    }
}
