use super::alphabet::Setup;
use super::client::{Answer, Client, json_post};
use axum::body::{Body, Bytes};
use axum::http::Request;
use futures::stream;
use mserve_runtime::worker::FailureKind;
use serde_json::json;
use std::convert::Infallible;

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn bad_bodies() {
    let client = Client::new(Setup::default());
    for (body, expected) in [
        ("", "400 invalid_json -"),
        ("{", "400 invalid_json -"),
        ("[1]", "400 invalid_json -"),
        ("{}", "400 missing_required_parameter model"),
        (r#"{"model": 1}"#, "400 invalid_type model"),
        (r#"{"model": "gpt-4"}"#, "404 model_not_found model"),
        (r#"{"model": "alphabet"}"#, "400 missing_required_parameter messages"),
        (r#"{"model": "alphabet", "messages": []}"#, "400 invalid_value messages"),
        (r#"{"model": "alphabet", "messages": "hi"}"#, "400 invalid_type messages"),
    ] {
        let answer = Answer::of(client.send(json_post(CHAT, body)).await).await;
        assert_eq!(answer.error(), expected, "{body}");
    }
}

#[tokio::test]
async fn bad_fields_name_themselves() {
    let client = Client::new(Setup::default());
    for (more, expected) in [
        (json!({"temperature": "hot"}), "400 invalid_type temperature"),
        (json!({"temperature": -1}), "400 invalid_value temperature"),
        (json!({"n": 0}), "400 invalid_value n"),
        (json!({"max_tokens": 0}), "400 invalid_value max_tokens"),
        (json!({"max_tokens": 1.5}), "400 invalid_type max_tokens"),
        (json!({"max_tokens": 1023}), "400 context_length_exceeded -"),
        (json!({"max_tokens": i64::MAX}), "400 context_length_exceeded -"),
        (json!({"max_tokens": 2, "min_tokens": 3}), "400 invalid_value min_tokens"),
        (json!({"stream": "yes"}), "400 invalid_type stream"),
        (json!({"stream_options": {"include_usage": true}}), "400 invalid_value stream_options"),
        (
            json!({"stream": true, "stream_options": {"include_usage": 1}}),
            "400 invalid_type stream_options.include_usage",
        ),
        (json!({"top_logprobs": 3}), "400 invalid_value top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "400 invalid_value top_logprobs"),
        (json!({"logprobs": 3}), "400 invalid_type logprobs"),
        (json!({"chat_template": "{{ 1 }}"}), "400 unsupported_parameter chat_template"),
        (json!({"chat_template_kwargs": {"messages": true}}), "400 invalid_value chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"enable_thinking": "x"}}), "400 invalid_type chat_template_kwargs"),
        (json!({"tools": [{}]}), "400 unsupported_parameter tools"),
    ] {
        assert_eq!(client.chat("a", &more).await.error(), expected, "{more}");
    }
    for (prompt, more, expected) in [
        (json!([99]), json!({}), "400 invalid_value prompt"),
        (json!([]), json!({}), "400 invalid_value prompt"),
        (json!({}), json!({}), "400 invalid_type prompt"),
        (json!("a"), json!({"logprobs": 1, "echo": true}), "400 unsupported_parameter logprobs"),
        (json!("a"), json!({"logprobs": true}), "400 invalid_type logprobs"),
        (json!("a"), json!({"suffix": "b"}), "400 unsupported_parameter suffix"),
    ] {
        assert_eq!(client.complete(&prompt, &more).await.error(), expected, "{prompt} {more}");
    }
}

#[tokio::test]
async fn prompts_beyond_the_context() {
    let client = Client::new(Setup::default());
    for length in [1023, 1024, 2000, 100_000] {
        let answer = client.chat(&"a".repeat(length), &json!({"max_tokens": 1})).await;
        assert_eq!(answer.error(), "400 context_length_exceeded -", "{length}");
    }
    assert!(client.chat(&"a".repeat(1022), &json!({"max_tokens": 1})).await.status.is_success());
}

#[tokio::test]
async fn oversized_bodies_are_413_also_in_chunks() {
    let client = Client::new(Setup::default());
    let body = json!({"model": "alphabet", "prompt": "a".repeat(2 << 20)}).to_string();
    let answer = Answer::of(client.send(json_post(CHAT, body)).await).await;
    assert_eq!(answer.error(), "413 request_too_large -");
    let chunks = stream::iter((0..2000).map(|_| Ok::<_, Infallible>(Bytes::from(vec![b' '; 1024]))));
    let answer = Answer::of(client.send(json_post(CHAT, Body::from_stream(chunks))).await).await;
    assert_eq!(answer.error(), "413 request_too_large -");
}

#[tokio::test]
async fn a_body_in_single_bytes_is_read() {
    let client = Client::new(Setup::default());
    let text = json!({"model": "abc/alias", "prompt": "a", "max_tokens": 1, "temperature": 0}).to_string();
    let chunks = stream::iter(text.into_bytes().into_iter().map(|byte| Ok::<_, Infallible>(Bytes::from(vec![byte]))));
    let answer = Answer::of(client.send(json_post("/v1/completions", Body::from_stream(chunks))).await).await;
    assert_eq!(answer.ok()["choices"][0]["text"], "b");
}

#[tokio::test]
async fn other_content_types_are_refused() {
    let client = Client::new(Setup::default());
    let request = Request::post(CHAT).header("content-type", "text/plain").body(Body::from("{}")).unwrap();
    assert_eq!(Answer::of(client.send(request).await).await.error(), "415 - -");
}

#[tokio::test]
async fn unknown_routes_and_methods() {
    let client = Client::new(Setup::default());
    assert_eq!(client.get("/v1/nothing").await.error(), "404 not_found -");
    assert_eq!(client.get(CHAT).await.error(), "405 method_not_allowed -");
    assert_eq!(client.post("/health", &json!({})).await.error(), "405 method_not_allowed -");
    assert_eq!(client.get("/v1/models/gpt-4").await.error(), "404 model_not_found model");
    assert_eq!(client.get("/v1/models/abc/alias").await.ok()["id"], "abc/alias");
    let long = format!("/{}", "a".repeat(9000));
    assert_eq!(client.get(&long).await.error(), "414 - -");
}

#[tokio::test]
async fn no_template_is_said() {
    let client = Client::new(Setup { chat_template: Some(""), ..Setup::default() });
    let answer = client.chat("a", &json!({})).await;
    assert_eq!(answer.error(), "400 no_chat_template -");
    assert!(answer.text.contains("--chat-template"), "{}", answer.text);
    assert!(client.complete(&json!("a"), &json!({})).await.status.is_success());
}

#[tokio::test]
async fn a_full_queue_is_429_and_nothing_of_the_request_stays() {
    let client = Client::new(Setup { max_num_queued_reqs: 0, max_num_seqs: 2, ..Setup::default() });
    let answer = client.chat("&", &json!({"n": 8, "temperature": 0})).await;
    assert_eq!(answer.error(), "429 queue_full -");
    assert_eq!(answer.headers["retry-after"], "1");
    let engine = client.state.model().unwrap().engine.clone();
    while engine.load().running + engine.load().waiting > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert!(client.chat("a", &json!({"max_tokens": 1})).await.status.is_success());
}

#[tokio::test]
async fn a_lost_device_stops_the_engine() {
    let client = Client::new(Setup::default());
    let engine = client.state.model().unwrap().engine.clone();
    let answer = client.chat("(", &json!({})).await;
    assert_eq!(answer.status.as_u16() / 100, 5, "{}", answer.text);
    assert!(!answer.text.contains("0x1234"));
    let (kind, why) = engine.stopped().await;
    assert!(kind == FailureKind::ContextLost && why.contains("0x1234"), "the log has the cause");
    assert_eq!(client.chat("a", &json!({})).await.error(), "503 engine_stopped -");
}
