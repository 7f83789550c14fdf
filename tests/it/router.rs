//! The router before replicas that misbehave in every way: see [`super::mock_upstream`].
//!
//! Whatever a replica does, a client sees exactly one of: a complete answer, a clean error body, a stream that ends in
//! an error event.
#![allow(clippy::unwrap_used)]

use super::mock_upstream::{Behaviour, MockUpstream};
use mserve::router::{Access, Group, Registry, Replica, Router, RouterLimits, serve};
use mserve::status::ModelKind;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(60);

struct Front {
    url: String,
    http: reqwest::Client,
    router: Router,
    registry: Arc<Registry>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Front {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn limits() -> RouterLimits {
    RouterLimits { ready_timeout: Duration::from_millis(500), ..RouterLimits::default() }
}

fn group(name: &str, kind: ModelKind, count: usize) -> Group {
    let replicas = (0..count).map(|n| Replica::new(format!("{name}-{n}"), "worker-token")).collect();
    Group { names: vec![name.into(), format!("{name}-alias")], kind, replicas }
}

async fn front(groups: Vec<Group>, limits: RouterLimits, access: Access) -> Front {
    let registry = Arc::new(Registry::new(groups));
    let router = Router::new(Arc::clone(&registry), limits, access).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(serve(listener, router.app(), std::future::pending(), Duration::ZERO));
    let http = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
    Front { url, http, router, registry, task }
}

/// A router before replicas of one chat model at these addresses.
async fn before(addresses: &[SocketAddr], limits: RouterLimits) -> Front {
    let front = front(vec![group("m", ModelKind::Chat, addresses.len())], limits, Access::Local).await;
    for (n, address) in addresses.iter().enumerate() {
        front.registry.set_ready(&format!("m-{n}"), *address, Some(64));
    }
    front
}

impl Front {
    async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> reqwest::Response {
        let request = self.http.post(format!("{}{path}", self.url)).header("content-type", "application/json");
        request.body(body).send().await.unwrap()
    }

    async fn complete(&self) -> (u16, String) {
        let response = self.post("/v1/completions", r#"{"model":"m","prompt":"x"}"#).await;
        (response.status().as_u16(), response.text().await.unwrap())
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let response = self.http.get(format!("{}{path}", self.url)).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// Nothing is counted as running any more.
    async fn settles(&self) {
        let settled = async {
            while self.router.status().in_flight > 0 || self.registry.replicas().any(|r| r.outstanding_tokens() > 0) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(DEADLINE, settled).await.expect("counts must go back to zero");
    }
}

fn error_code(body: &str) -> String {
    let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"));
    let error = &body["error"];
    assert!(error["message"].is_string() && error["type"].is_string(), "{body}");
    error["code"].as_str().unwrap().to_owned()
}

/// Every fault before the first byte is made good by another replica, whichever is asked first.
#[tokio::test]
async fn a_failing_replica_is_made_good_by_another() {
    let faults = [
        Behaviour::Status(500),
        Behaviour::Status(503),
        Behaviour::PlainError,
        Behaviour::Hangup,
        Behaviour::CutBody,
        Behaviour::Garbage,
        Behaviour::NoEvents,
    ];
    for fault in faults {
        let (bad, good) = (MockUpstream::start(fault).await, MockUpstream::start(Behaviour::Json).await);
        let front = before(&[bad.address, good.address], limits()).await;
        for _ in 0..12 {
            assert_eq!(front.complete().await, (200, r#"{"answer":"complete"}"#.into()), "{fault:?}");
        }
        assert!(bad.requests() > 0, "{fault:?} was never tried");
        assert_eq!(front.router.status().retries_total as usize, bad.requests(), "{fault:?}");
        front.settles().await;
    }
}

#[tokio::test]
async fn nobody_listening_is_made_good_by_another() {
    let good = MockUpstream::start(Behaviour::Events).await;
    let front = before(&[MockUpstream::nobody().await, good.address, MockUpstream::nobody().await], limits()).await;
    for _ in 0..12 {
        let (status, body) = front.complete().await;
        assert_eq!((status, body.ends_with("data: [DONE]\n\n")), (200, true));
    }
    front.settles().await;
}

#[tokio::test]
async fn alone_a_failing_replica_makes_a_clean_error() {
    for (fault, status, code) in [
        (Behaviour::Hangup, 502, "replica_failed"),
        (Behaviour::CutBody, 502, "replica_failed"),
        (Behaviour::Garbage, 502, "replica_failed"),
        (Behaviour::NoEvents, 502, "replica_failed"),
        (Behaviour::PlainError, 500, "replica_failed"),
        (Behaviour::Silent, 504, "replica_timeout"),
    ] {
        let bad = MockUpstream::start(fault).await;
        let limits = RouterLimits { answer_timeout: Duration::from_millis(300), ..limits() };
        let front = before(&[bad.address], limits).await;
        let (got, body) = front.complete().await;
        assert_eq!((got, error_code(&body).as_str()), (status, code), "{fault:?}");
        assert!(!body.contains("stack trace") && !body.contains("127.0.0.1"), "{body}");
        assert!(bad.requests() <= 2, "{fault:?}: one retry at most, not {}", bad.requests());
        front.settles().await;
    }
}

#[tokio::test]
async fn a_replicas_own_errors_pass_and_4xx_is_never_retried() {
    for code in [400, 404, 413, 422, 429, 500, 501] {
        let upstreams =
            [MockUpstream::start(Behaviour::Status(code)).await, MockUpstream::start(Behaviour::Status(code)).await];
        let front = before(&[upstreams[0].address, upstreams[1].address], limits()).await;
        assert_eq!(front.complete().await, (code, r#"{"error":{"message":"from the replica"}}"#.into()));
        let asked = upstreams[0].requests() + upstreams[1].requests();
        assert_eq!(asked, if code == 500 { 2 } else { 1 }, "{code}");
    }
}

#[tokio::test]
async fn streams_pass_byte_for_byte() {
    let expected = "data: {\"n\":0}\n\ndata: {\"n\":1}\n\ndata: {\"n\":2}\n\ndata: [DONE]\n\n";
    for behaviour in [Behaviour::Events, Behaviour::SlowEvents] {
        let upstream = MockUpstream::start(behaviour).await;
        let front = before(&[upstream.address], limits()).await;
        assert_eq!(front.complete().await, (200, expected.into()), "{behaviour:?}");
        front.settles().await;
    }
}

#[tokio::test]
async fn a_stream_that_breaks_ends_in_an_error_event() {
    let (bad, good) = (MockUpstream::start(Behaviour::CutEvents).await, MockUpstream::start(Behaviour::Events).await);
    let front = before(&[bad.address, good.address], limits()).await;
    front.registry.set_down("m-1");
    let (status, body) = front.complete().await;
    let events: Vec<&str> = body.split_terminator("\n\n").collect();
    assert_eq!((status, &events[..2], events.len()), (200, &["data: {\"n\":0}", "data: {\"n\":1}"][..], 3), "{body}");
    assert_eq!(error_code(events[2].strip_prefix("data: ").unwrap()), "replica_failed");
    assert_eq!((good.requests(), front.router.status().errors_total), (0, 1), "what has begun is not sent again");
    front.settles().await;
}

#[tokio::test]
async fn a_stream_that_falls_silent_ends_in_an_error_event() {
    let upstream = MockUpstream::start(Behaviour::Endless).await;
    let front = before(&[upstream.address], RouterLimits { idle_timeout: Duration::from_millis(1), ..limits() }).await;
    let (_, body) = front.complete().await;
    let last = body.split_terminator("\n\n").last().unwrap();
    assert_eq!(error_code(last.strip_prefix("data: ").unwrap()), "replica_failed");
}

#[tokio::test]
async fn a_client_that_goes_away_is_felt_by_the_replica() {
    for behaviour in [Behaviour::Endless, Behaviour::Silent] {
        let upstream = MockUpstream::start(behaviour).await;
        let front = before(&[upstream.address], limits()).await;
        let client = tokio::spawn({
            let request = front.http.post(format!("{}/v1/completions", front.url));
            let request = request.header("content-type", "application/json").body(r#"{"model":"m"}"#);
            async move { request.send().await.unwrap().text().await }
        });
        let until = |open: usize| {
            let upstream = &upstream;
            async move {
                while upstream.open() != open || upstream.requests() == 0 {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
        };
        tokio::time::timeout(DEADLINE, until(1)).await.unwrap();
        client.abort();
        tokio::time::timeout(DEADLINE, until(0)).await.expect("the replica's connection must close");
        front.settles().await;
    }
}

#[tokio::test]
async fn a_kept_connection_that_was_closed_is_no_failure() {
    let upstream = MockUpstream::start(Behaviour::OneRequestPerConnection).await;
    let front = before(&[upstream.address], limits()).await;
    for _ in 0..6 {
        assert_eq!(front.complete().await.0, 200);
    }
}

#[tokio::test]
async fn requests_wait_for_a_replica_to_become_ready() {
    let upstream = MockUpstream::start(Behaviour::Json).await;
    let limits = RouterLimits { ready_timeout: DEADLINE, ..limits() };
    let front = before(&[upstream.address], limits).await;
    front.registry.set_down("m-0");
    let (answer, ()) = tokio::join!(front.complete(), async {
        while front.registry.waiting() == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        front.registry.set_ready("m-0", upstream.address, None);
    });
    assert_eq!(answer.0, 200);
    assert_eq!(front.registry.waiting(), 0);
}

#[tokio::test]
async fn a_replica_replaced_under_load_loses_nothing() {
    let first = MockUpstream::start(Behaviour::Silent).await;
    let second = MockUpstream::start(Behaviour::Json).await;
    let front = before(&[first.address], RouterLimits { ready_timeout: DEADLINE, ..limits() }).await;
    let requests = futures::future::join_all((0..20).map(|_| front.complete()));
    let (answers, ()) = tokio::join!(requests, async {
        while first.requests() < 20 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // What a kill -9 looks like from here, and the supervisor's news of it.
        drop(first);
        front.registry.set_down("m-0");
        while front.registry.waiting() < 20 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        front.registry.set_ready("m-0", second.address, None);
    });
    assert!(answers.iter().all(|(status, body)| (*status, body.as_str()) == (200, r#"{"answer":"complete"}"#)));
    front.settles().await;
}

#[tokio::test]
async fn without_any_replica_503_with_retry_after() {
    let front = before(&[MockUpstream::nobody().await], limits()).await;
    front.registry.set_down("m-0");
    let response = front.post("/v1/completions", r#"{"model":"m"}"#).await;
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (503, "5"));
    assert_eq!(error_code(&response.text().await.unwrap()), "no_replica_ready");
    assert_eq!(front.get("/ready").await.0, 503);
    assert_eq!(front.get("/health").await.0, 200);
}

#[tokio::test]
async fn too_many_are_told_so() {
    let upstream = MockUpstream::start(Behaviour::Silent).await;
    let front = before(&[upstream.address], RouterLimits { max_concurrent_requests: 2, ..limits() }).await;
    let held = tokio::spawn({
        let requests = (0..2).map(|_| {
            let request = front.http.post(format!("{}/v1/completions", front.url));
            request.header("content-type", "application/json").body(r#"{"model":"m"}"#).send()
        });
        futures::future::join_all(requests.collect::<Vec<_>>())
    });
    let both_there = async {
        while upstream.requests() < 2 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, both_there).await.unwrap();
    let response = front.post("/v1/completions", r#"{"model":"m"}"#).await;
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (429, "1"));
    assert_eq!(error_code(&response.text().await.unwrap()), "overloaded");
    assert_eq!(front.get("/health").await.0, 200, "probes are not counted");
    held.abort();
}

#[tokio::test]
async fn requests_go_to_their_model() {
    let (chat, embed) = (MockUpstream::start(Behaviour::Json).await, MockUpstream::start(Behaviour::Json).await);
    let groups = vec![group("c", ModelKind::Chat, 1), group("e", ModelKind::Embedding, 1)];
    let front = front(groups, limits(), Access::Local).await;
    front.registry.set_ready("c-0", chat.address, Some(512));
    front.registry.set_ready("e-0", embed.address, None);
    for (path, body, expected) in [
        ("/v1/chat/completions", r#"{"model":"c"}"#, Some((1, 0))),
        ("/v1/chat/completions", r#"{"model":"c-alias"}"#, Some((2, 0))),
        ("/v1/chat/completions", "{}", Some((3, 0))),
        ("/v1/embeddings", r#"{"model":"e"}"#, Some((3, 1))),
        ("/v1/embeddings", r#"{"model":null}"#, Some((3, 2))),
        ("/embed", r#"{"inputs":"x"}"#, Some((3, 3))),
        ("/tokenize", "{}", Some((4, 3))),
        ("/tokenize", r#"{"model":"e"}"#, Some((4, 4))),
        ("/v1/completions", r#"{"model":"nobody"}"#, None),
    ] {
        let response = front.post(path, body).await;
        match expected {
            Some(counts) => assert_eq!((chat.requests(), embed.requests()), counts, "{path} {body}"),
            None => {
                assert_eq!(response.status().as_u16(), 404);
                let text = response.text().await.unwrap();
                assert!(error_code(&text) == "model_not_found" && text.contains("c, e"), "{text}");
            }
        }
    }
    let (_, models) = front.get("/v1/models").await;
    let models: Value = serde_json::from_str(&models).unwrap();
    let ids: Vec<_> = models["data"].as_array().unwrap().iter().map(|card| &card["id"]).collect();
    assert_eq!(ids, ["c", "c-alias", "e", "e-alias"]);
    assert_eq!(models["data"][0]["max_model_len"], 512);
    assert_eq!(front.get("/v1/models/e-alias").await.0, 200);
    assert_eq!(front.get("/v1/models/x").await.0, 404);
}

#[tokio::test]
async fn replicas_see_the_token_and_no_secret_of_the_client() {
    let upstream = MockUpstream::start(Behaviour::Echo).await;
    let front = front(vec![group("m", ModelKind::Chat, 1)], limits(), Access::Key("k".into())).await;
    front.registry.set_ready("m-0", upstream.address, None);
    let body = "{ \"model\" : \"m\", \"prompt\":\"\u{e4}\" }";
    let response = front.http.post(format!("{}/v1/completions", front.url)).body(body);
    let response = response
        .headers(reqwest::header::HeaderMap::from_iter(
            [
                ("content-type", "application/json"),
                ("authorization", "Bearer k"),
                ("cookie", "c=1"),
                ("x-mserve-token", "forged"),
                ("x-forwarded-for", "1.2.3.4"),
                ("x-request-id", "mine-1"),
            ]
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())),
        ))
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine-1");
    let echo: Value = response.json().await.unwrap();
    assert_eq!(echo["body"], body, "the body passes byte for byte");
    let head = echo["head"].as_str().unwrap().to_ascii_lowercase();
    assert!(head.contains("x-mserve-token: worker-token") && head.contains("x-request-id: mine-1"), "{head}");
    for secret in ["bearer", "cookie", "forged", "x-forwarded", "1.2.3.4"] {
        assert!(!head.contains(secret), "{secret} in {head}");
    }
}

#[tokio::test]
async fn bad_requests_get_openai_bodies() {
    let upstream = MockUpstream::start(Behaviour::Json).await;
    let front = before(&[upstream.address], RouterLimits { max_body_bytes: 1000, ..limits() }).await;
    let large = json!({"model": "m", "prompt": "x".repeat(1000)}).to_string();
    let chunked = |text: String| reqwest::Body::wrap_stream(futures::stream::iter([Ok::<_, std::io::Error>(text)]));
    for (body, status, code) in [
        (reqwest::Body::from("{"), 400, "invalid_body"),
        ("[]".into(), 400, "invalid_body"),
        (r#"{"model":7}"#.into(), 400, "invalid_body"),
        (large.clone().into(), 413, "body_too_large"),
        (chunked(large), 413, "body_too_large"),
    ] {
        let response = front.post("/v1/completions", body).await;
        assert_eq!(response.status().as_u16(), status);
        assert!(response.headers().contains_key("x-request-id"));
        assert_eq!(error_code(&response.text().await.unwrap()), code);
    }
    let (status, body) = front.get("/nowhere").await;
    assert_eq!((status, error_code(&body).as_str()), (404, "unknown_path"));
    let (status, body) = front.get("/v1/completions").await;
    assert_eq!((status, error_code(&body).as_str()), (405, "method_not_allowed"));
    assert_eq!(upstream.requests(), 0);
    front.settles().await;
}

#[tokio::test]
async fn a_head_too_large_is_refused() {
    let front = before(&[MockUpstream::nobody().await], limits()).await;
    for headers in
        [vec![("x-big".to_owned(), "x".repeat(100_000))], (0..200).map(|n| (format!("x-{n}"), "1".into())).collect()]
    {
        let mut request = front.http.get(format!("{}/health", front.url));
        for (name, value) in headers {
            request = request.header(name, value);
        }
        // Refused with 431, or by closing while we still write.
        let status = request.send().await.map_or(431, |response| response.status().as_u16());
        assert_eq!(status, 431);
    }
}

#[tokio::test]
async fn draining_refuses_new_requests_and_finishes_running_ones() {
    let upstream = MockUpstream::start(Behaviour::SlowEvents).await;
    let front = before(&[upstream.address], limits()).await;
    let running = front.post("/v1/completions", r#"{"model":"m"}"#).await;
    front.router.drain();
    assert_eq!(front.complete().await.0, 503);
    assert_eq!(front.get("/ready").await.0, 503);
    assert!(running.text().await.unwrap().ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn metrics_tell_of_requests_and_replicas() {
    let (bad, good) = (MockUpstream::start(Behaviour::Hangup).await, MockUpstream::start(Behaviour::Json).await);
    let front = before(&[bad.address, good.address], limits()).await;
    for _ in 0..10 {
        front.complete().await;
    }
    front.post("/v1/completions", r#"{"model":"forged\"} 1"}"#).await;
    let (_, text) = front.get("/metrics").await;
    let failures =
        format!("mserve_router_replica_failures_total{{reason=\"reset\",replica=\"m-0\"}} {}", bad.requests());
    for line in [
        "mserve_router_requests_total{code=\"200\",model=\"m\",route=\"/v1/completions\"} 10",
        "mserve_router_requests_total{code=\"404\",model=\"unknown\",route=\"/v1/completions\"} 1",
        "mserve_router_replica_ready{replica=\"m-0\"} 1",
        "mserve_router_request_duration_seconds_count{model=\"m\"} 10",
        failures.as_str(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(!text.contains("forged"));
}
