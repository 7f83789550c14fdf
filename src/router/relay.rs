//! One attempt at one replica, and passing its answer on.
//!
//! Nothing goes to the client before the first event of a stream, or the whole of another answer, is here: until then
//! the request can be sent again elsewhere.

use super::Shared;
use super::error::ApiError;
use super::forward::{Admitted, Outgoing};
use super::registry::Lease;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream, StreamExt};
use std::time::Duration;

/// An event of a stream is held until it is complete, up to this size.
const MAX_HELD_EVENT_BYTES: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// Nobody listens: the request has not reached the replica.
    Connect,
    /// The connection broke before an answer had begun.
    Reset,
    /// It answered with an error of its own (5xx).
    Status,
    Timeout,
}

/// An attempt that gave the client nothing.
#[derive(Debug)]
pub(super) struct Failure {
    pub reason: Reason,
    answer: Answer,
}

#[derive(Debug)]
enum Answer {
    /// The replica's own words.
    Replica(Box<(StatusCode, HeaderMap, Bytes)>),
    Router(Box<ApiError>),
}

impl Failure {
    fn new(reason: Reason, error: ApiError) -> Self {
        Self { reason, answer: Answer::Router(Box::new(error)) }
    }

    /// The replica may have worked on it: worth one more attempt, not several.
    pub fn may_have_run(&self) -> bool {
        self.reason != Reason::Connect
    }

    /// Another replica would take as long.
    pub fn is_final(&self) -> bool {
        self.reason == Reason::Timeout
    }

    fn label(&self) -> &'static str {
        match self.reason {
            Reason::Connect => "connect",
            Reason::Reset => "reset",
            Reason::Status => "status",
            Reason::Timeout => "timeout",
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        match self.answer {
            Answer::Replica(answer) => answer.into_response(),
            Answer::Router(error) => error.into_response(),
        }
    }
}

/// Send the request to the leased replica. `admitted` comes back with a failure, for the next attempt.
pub(super) async fn ask(
    shared: &Shared,
    mut lease: Lease,
    outgoing: &Outgoing,
    mut admitted: Admitted,
) -> Result<Response, (Admitted, Failure)> {
    let timeout = shared.limits.answer_timeout;
    let begun = tokio::time::timeout(timeout, begin(shared, &lease, outgoing)).await;
    let begun = begun.unwrap_or_else(|_| {
        let message = format!("the replica did not answer within {} s", timeout.as_secs());
        Err(Failure::new(Reason::Timeout, ApiError::gateway_timeout(message)))
    });
    match begun {
        Ok(begun) => {
            lease.succeeded();
            admitted.answered(begun.status);
            Ok(respond(shared, begun, Held { lease, admitted }))
        }
        Err(failure) => {
            lease.failed();
            let labels = [lease.replica.id.as_str(), failure.label()];
            shared.metrics.replica_failures.with_label_values(&labels).inc();
            Err((admitted, failure))
        }
    }
}

/// An answer that has begun well enough to be passed on.
struct Begun {
    status: StatusCode,
    headers: HeaderMap,
    body: BegunBody,
}

enum BegunBody {
    Whole(Bytes),
    /// Too long to be held: what is here, and what is to come.
    Long(Bytes, Upstream),
    Events(Bytes, EventRelay),
}

type Upstream = BoxStream<'static, reqwest::Result<Bytes>>;

async fn begin(shared: &Shared, lease: &Lease, outgoing: &Outgoing) -> Result<Begun, Failure> {
    let response = outgoing.send(&shared.http, lease).send().await.map_err(|error| lost(&error))?;
    let status = response.status();
    let is_stream = media_type(response.headers()) == "text/event-stream";
    let headers = passed_back(response.headers());
    let mut upstream: Upstream = response.bytes_stream().boxed();
    if is_stream && status.is_success() {
        let mut relay = EventRelay { upstream, held: BytesMut::new(), idle_timeout: shared.limits.idle_timeout };
        return match relay.next().await {
            Chunk::Data(first) => Ok(Begun { status, headers, body: BegunBody::Events(first, relay) }),
            Chunk::End => Err(broken("the replica ended its stream before the first event")),
            Chunk::Lost(why) => Err(broken(why)),
        };
    }
    let mut whole = BytesMut::new();
    while let Some(chunk) = upstream.next().await {
        whole.extend_from_slice(&chunk.map_err(|error| lost(&error))?);
        if whole.len() > shared.limits.max_held_bytes {
            return Ok(Begun { status, headers, body: BegunBody::Long(whole.freeze(), upstream) });
        }
    }
    let whole = whole.freeze();
    if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED {
        return Err(Failure { reason: Reason::Status, answer: error_answer(status, headers, whole) });
    }
    Ok(Begun { status, headers, body: BegunBody::Whole(whole) })
}

/// A replica's error as it is when it is JSON, else in words of our own.
fn error_answer(status: StatusCode, headers: HeaderMap, body: Bytes) -> Answer {
    let is_object = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&body).is_ok();
    if is_object {
        return Answer::Replica(Box::new((status, headers, body)));
    }
    Answer::Router(Box::new(ApiError { status, ..ApiError::bad_gateway(format!("the replica answered {status}")) }))
}

fn lost(error: &reqwest::Error) -> Failure {
    if error.is_connect() {
        return Failure::new(Reason::Connect, ApiError::bad_gateway("the replica does not accept connections"));
    }
    broken("the replica broke off before its answer was complete")
}

fn broken(why: &str) -> Failure {
    Failure::new(Reason::Reset, ApiError::bad_gateway(why))
}

/// What an answer holds on to until its last byte is out or its client is gone.
struct Held {
    lease: Lease,
    admitted: Admitted,
}

fn respond(shared: &Shared, begun: Begun, held: Held) -> Response {
    let body = match begun.body {
        BegunBody::Whole(bytes) => Body::from(bytes),
        BegunBody::Long(first, rest) => long_body(first, rest, held, shared.limits.idle_timeout),
        BegunBody::Events(first, relay) => event_body(first, relay, held),
    };
    (begun.status, begun.headers, body).into_response()
}

/// A loss breaks the client's connection off too, so that it cannot take the part for the whole.
fn long_body(first: Bytes, rest: Upstream, held: Held, idle_timeout: Duration) -> Body {
    let rest = stream::unfold((rest, held), move |(mut rest, mut held)| async move {
        let chunk = match tokio::time::timeout(idle_timeout, rest.next()).await {
            Ok(None) => return None,
            Ok(Some(chunk)) => chunk.map_err(std::io::Error::other),
            Err(_) => Err(std::io::Error::other("the replica fell silent")),
        };
        if chunk.is_err() {
            held.lease.failed();
            held.admitted.broke_off();
        }
        Some((chunk, (rest, held)))
    });
    Body::from_stream(stream::iter([Ok(first)]).chain(rest))
}

/// A loss becomes an error event; the `[DONE]` of a complete stream does not follow.
fn event_body(first: Bytes, relay: EventRelay, held: Held) -> Body {
    let rest = stream::unfold(Some((relay, held)), |state| async move {
        let (mut relay, mut held) = state?;
        match relay.next().await {
            Chunk::Data(bytes) => Some((bytes, Some((relay, held)))),
            Chunk::End => None,
            Chunk::Lost(why) => {
                held.lease.failed();
                held.admitted.broke_off();
                Some((Bytes::from(ApiError::bad_gateway(why).sse_event()), None))
            }
        }
    });
    Body::from_stream(stream::iter([first]).chain(rest).map(Ok::<_, std::convert::Infallible>))
}

/// Passes whole events on, byte for byte: one that was cut by a loss is dropped, so that the error event stands alone.
struct EventRelay {
    upstream: Upstream,
    /// The beginning of an event that is not complete.
    held: BytesMut,
    idle_timeout: Duration,
}

#[derive(Debug, PartialEq, Eq)]
enum Chunk {
    Data(Bytes),
    End,
    Lost(&'static str),
}

impl EventRelay {
    async fn next(&mut self) -> Chunk {
        loop {
            let chunk = match tokio::time::timeout(self.idle_timeout, self.upstream.next()).await {
                Ok(Some(Ok(chunk))) => chunk,
                Ok(Some(Err(_))) => return Chunk::Lost("the replica broke off in the middle of the stream"),
                Ok(None) if self.held.is_empty() => return Chunk::End,
                Ok(None) => return Chunk::Data(self.held.split().freeze()),
                Err(_) => return Chunk::Lost("the replica fell silent in the middle of the stream"),
            };
            if let Some(complete) = self.complete(chunk) {
                return Chunk::Data(complete);
            }
        }
    }

    /// The complete events among what is held and `chunk`.
    fn complete(&mut self, mut chunk: Bytes) -> Option<Bytes> {
        if self.held.is_empty() {
            // The usual case: whole events, nothing copied.
            let end = end_of_last_event(&chunk);
            let complete = chunk.split_to(end);
            self.held.extend_from_slice(&chunk);
            return (!complete.is_empty()).then_some(complete);
        }
        self.held.extend_from_slice(&chunk);
        let end = match end_of_last_event(&self.held) {
            0 if self.held.len() > MAX_HELD_EVENT_BYTES => self.held.len(),
            end => end,
        };
        (end > 0).then(|| self.held.split_to(end).freeze())
    }
}

/// Index after the last blank line, 0 when there is none. Lines may end in LF, CRLF or CR.
fn end_of_last_event(bytes: &[u8]) -> usize {
    (1..bytes.len())
        .rev()
        .find(|&last| {
            let before = &bytes[..=last];
            before.ends_with(b"\n\n") || before.ends_with(b"\r\n\r\n") || before.ends_with(b"\r\r")
        })
        .map_or(0, |last| last + 1)
}

fn media_type(headers: &HeaderMap) -> &str {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    value.split(';').next().unwrap_or("").trim()
}

/// A replica's headers without those that speak of its connection to us.
fn passed_back(headers: &HeaderMap) -> HeaderMap {
    const OF_THE_CONNECTION: [HeaderName; 8] = [
        header::CONNECTION,
        HeaderName::from_static("keep-alive"),
        header::PROXY_AUTHENTICATE,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        header::CONTENT_LENGTH,
    ];
    let named: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').map(|name| name.trim().to_ascii_lowercase()))
        .collect();
    let passes =
        |name: &HeaderName| !OF_THE_CONNECTION.contains(name) && !named.iter().any(|other| other == name.as_str());
    headers.iter().filter(|(name, _)| passes(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn relay(chunks: Vec<Bytes>) -> EventRelay {
        let upstream = stream::iter(chunks.into_iter().map(Ok)).boxed();
        EventRelay { upstream, held: BytesMut::new(), idle_timeout: Duration::from_secs(60) }
    }

    fn drain(mut relay: EventRelay) -> Vec<Bytes> {
        let mut all = Vec::new();
        futures::executor::block_on(async {
            while let Chunk::Data(bytes) = relay.next().await {
                all.push(bytes);
            }
        });
        all
    }

    #[test]
    fn finds_the_end_of_the_last_event() {
        for (text, end) in [
            ("", 0),
            ("\n", 0),
            ("data: 1", 0),
            ("data: 1\n\n", 9),
            ("data: 1\r\n\r\n", 11),
            ("data: 1\r\rdata: 2", 9),
            ("data: 1\n\ndata: 2\n\ndata", 18),
            ("data: 1\n", 0),
        ] {
            assert_eq!(end_of_last_event(text.as_bytes()), end, "{text:?}");
        }
    }

    #[test]
    fn headers_of_the_connection_stay_here() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("connection", "close, X-Private"), ("x-private", "1"), ("transfer-encoding", "chunked"), ("x-kept", "1")]
        {
            headers.insert(name, value.parse().unwrap());
        }
        assert_eq!(passed_back(&headers).keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-kept"]);
    }

    proptest! {
        #[test]
        fn events_pass_byte_for_byte_and_whole_however_they_are_cut(
            events in prop::collection::vec("[a-zä \n]{0,12}", 1..12),
            cuts in prop::collection::vec(1usize..9, 0..60),
        ) {
            let text: String = events.iter().map(|event| format!("data: {}\n\n", event.trim_matches('\n'))).collect();
            let mut rest = Bytes::from(text.clone());
            let mut chunks = Vec::new();
            for cut in cuts {
                let cut = cut.min(rest.len());
                chunks.push(rest.split_to(cut));
            }
            chunks.push(rest);
            chunks.retain(|chunk| !chunk.is_empty());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let _inside = runtime.enter();
            let got = drain(relay(chunks));
            prop_assert!(got.iter().all(|chunk| chunk.ends_with(b"\n\n")));
            prop_assert_eq!(got.concat(), text.as_bytes());
        }
    }
}
