//! Answers as server-sent events: `data: {...}` for every delta, then `data: [DONE]`.

use super::error::ApiError;
use super::generation::{Delta, Deltas, UsageSum};
use crate::engine::Usage;
use axum::body::{Body, Bytes};
use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::Response;
use futures::FutureExt;
use futures::stream::{self, StreamExt};
use serde::Serialize;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;

/// How one route writes its events.
pub trait Chunks: Send + 'static {
    /// The events for one delta, appended to `out`.
    fn delta(&mut self, delta: Delta, out: &mut Events);
    /// The last event, when usage was asked for.
    fn usage(&mut self, usage: Usage, out: &mut Events);
}

/// Events as they go over the wire.
#[derive(Debug, Default)]
pub struct Events(Vec<u8>);

impl Events {
    pub fn push<T: Serialize>(&mut self, event: &T) {
        self.0.extend_from_slice(b"data: ");
        // Our own types have string keys only, and writing to memory does not fail.
        if let Err(error) = serde_json::to_writer(&mut self.0, event) {
            tracing::error!(%error, "an event could not be written");
        }
        self.0.extend_from_slice(b"\n\n");
    }

    fn done(&mut self) {
        self.0.extend_from_slice(b"data: [DONE]\n\n");
    }
}

/// Deltas to events. The status line waits for the first delta, so that a request that fails before it has an
/// ordinary error status, and a router may still try elsewhere.
///
/// # Errors
/// The request failed before its first delta.
pub async fn respond(mut deltas: Deltas, chunks: impl Chunks, n: usize) -> Result<Response, ApiError> {
    let first = match deltas.next().await {
        Some(Ok(delta)) => delta,
        Some(Err(error)) => return Err(error),
        None => return Err(ApiError::internal("the request has no choices")),
    };
    let state = Stream { deltas, chunks, usage: UsageSum::new(n), next: Some(first), ended: false };
    let events = stream::unfold(state, |mut state| async move {
        // A panic here would cut the connection without a word.
        let events = match AssertUnwindSafe(state.events()).catch_unwind().await {
            Ok(events) => events?,
            Err(_) => state.fail(&ApiError::internal("internal error")),
        };
        Some((Ok::<_, Infallible>(Bytes::from(events.0)), state))
    });
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(response)
}

struct Stream<C> {
    deltas: Deltas,
    chunks: C,
    usage: UsageSum,
    next: Option<Delta>,
    ended: bool,
}

impl<C: Chunks> Stream<C> {
    /// The next piece of the body; `None` at its end.
    async fn events(&mut self) -> Option<Events> {
        if self.ended {
            return None;
        }
        let next = match self.next.take() {
            Some(delta) => Some(Ok(delta)),
            None => self.deltas.next().await,
        };
        let mut events = Events::default();
        match next {
            Some(Ok(delta)) => {
                self.usage.add(&delta);
                self.chunks.delta(delta, &mut events);
            }
            Some(Err(error)) => return Some(self.fail(&error)),
            None => {
                self.chunks.usage(self.usage.total(), &mut events);
                events.done();
                self.ended = true;
            }
        }
        Some(events)
    }

    /// The error as an event, and no `[DONE]` after it.
    fn fail(&mut self, error: &ApiError) -> Events {
        self.ended = true;
        self.deltas.clear();
        let mut events = Events::default();
        events.push(&error.body());
        events
    }
}
