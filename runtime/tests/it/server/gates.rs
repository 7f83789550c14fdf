use super::alphabet::Setup;
use super::client::{Answer, Client};
use axum::body::Body;
use axum::http::Request;
use mserve_runtime::server::{ServerConfig, ServerState, Telemetry};
use serde_json::json;

fn config(change: impl FnOnce(&mut ServerConfig)) -> Setup {
    let mut setup = Setup::default();
    change(&mut setup.config);
    setup
}

#[tokio::test]
async fn with_a_token_only_health_checks_are_open() {
    let client = Client::new(config(|config| config.token = Some("secret".to_owned())));
    for path in ["/health", "/ready"] {
        assert!(client.get(path).await.status.is_success(), "{path}");
    }
    for path in ["/v1/models", "/load", "/metrics", "/version", "/nothing"] {
        assert_eq!(client.get(path).await.error(), "401 invalid_token -", "{path}");
    }
    assert_eq!(client.chat("a", &json!({})).await.error(), "401 invalid_token -");
    for (token, status) in [("secret", 200), ("Secret", 401), ("secret2", 401), ("", 401)] {
        let request = Request::get("/v1/models").header("x-mserve-token", token).body(Body::empty()).unwrap();
        assert_eq!(client.send(request).await.status().as_u16(), status, "{token}");
    }
}

#[tokio::test]
async fn while_loading_only_health_answers() {
    let setup = Setup::default();
    let (model, state) = (setup.model(), ServerState::new(setup.config));
    let client = Client::of(state.clone());
    assert_eq!(client.get("/health").await.ok()["status"], "loading");
    assert_eq!(client.get("/ready").await.status.as_u16(), 503);
    let answer = client.chat("a", &json!({})).await;
    assert_eq!(answer.error(), "503 loading -");
    assert_eq!(answer.headers["retry-after"], "1");
    state.set_model(model);
    assert!(client.get("/ready").await.status.is_success());
    assert!(client.chat("a", &json!({})).await.status.is_success());
}

#[tokio::test]
async fn while_draining_running_requests_finish_and_new_ones_are_refused() {
    let client = Client::new(Setup::default());
    let running = client
        .open("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "a"}], "stream": true}))
        .await;
    client.state.start_draining();
    assert_eq!(client.chat("a", &json!({})).await.error(), "503 shutting_down -");
    assert_eq!(client.get("/ready").await.status.as_u16(), 503);
    assert_eq!(client.get("/health").await.ok()["status"], "draining");
    let idle = client.state.wait_until_idle();
    tokio::pin!(idle);
    assert!(futures::poll!(&mut idle).is_pending());
    assert!(!Answer::of(running).await.chunks().is_empty());
    idle.await;
}

#[tokio::test]
async fn telemetry_names_every_response() {
    let names = Telemetry::new("box-1", "alphabet", "demo-0").unwrap();
    let client = Client::new(config(|config| config.telemetry = Some(names)));
    for answer in [client.get("/health").await, client.get("/nothing").await, client.chat("a", &json!({})).await] {
        let header = |name: &str| answer.headers[name].to_str().unwrap().to_owned();
        assert_eq!(header("x-mserve-instance-id"), "box-1");
        assert_eq!(header("x-mserve-model-id"), "alphabet");
        assert_eq!(header("x-mserve-replica"), "demo-0");
    }
    for bad in ["", "a b", "a\nb", "é", &"a".repeat(129)] {
        assert!(Telemetry::new(bad, "m", "r").is_none(), "{bad:?}");
    }
}

#[tokio::test]
async fn request_ids_come_back() {
    let client = Client::new(Setup::default());
    let with = |id: &str| Request::get("/health").header("x-request-id", id).body(Body::empty()).unwrap();
    assert_eq!(client.send(with("abc-1")).await.headers()["x-request-id"], "abc-1");
    let made = client.send(with("a b")).await.headers()["x-request-id"].clone();
    assert_eq!(made.len(), 32);
}

#[tokio::test]
async fn load_and_metrics_are_the_engines() {
    let client = Client::new(Setup::default());
    client.chat("x", &json!({"temperature": 0})).await.ok();
    let load = client.get("/load").await.ok();
    assert_eq!((&load["requests_total"], &load["prompt_tokens_total"]), (&json!(1), &json!(2)));
    let metrics = client.get("/metrics").await;
    assert!(metrics.text.contains("vllm:prompt_tokens_total{"), "{}", metrics.text);
    assert!(metrics.headers["content-type"].to_str().unwrap().starts_with("text/plain"));
    let models = client.get("/v1/models").await.ok();
    let ids: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["alphabet", "abc/alias"]);
    assert!(client.get("/version").await.ok()["version"].is_string());
}
