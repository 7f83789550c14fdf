use super::alphabet::{MAX_MODEL_LEN, Setup};
use super::client::Client;
use futures::StreamExt;
use mserve_runtime::tokenizer::GenerationDefaults;
use serde_json::{Value, json};
use std::time::Duration;

const GREEDY: (&str, f64) = ("temperature", 0.0);

fn greedy(more: &Value) -> Value {
    let mut body = json!({GREEDY.0: GREEDY.1});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Text, finish reason and index of every choice, with volatile fields checked and left out.
fn choices(answer: &Value) -> Vec<(String, String)> {
    let choices = answer["choices"].as_array().unwrap();
    let one = |(i, choice): (usize, &Value)| {
        assert_eq!(choice["index"], i);
        let text = choice["message"]["content"].as_str().unwrap();
        (text.to_owned(), choice["finish_reason"].as_str().unwrap().to_owned())
    };
    choices.iter().enumerate().map(one).collect()
}

/// The text of choice `index` joined from a stream.
fn joined(chunks: &[Value], index: usize) -> String {
    let of = |chunk: &&Value| chunk["choices"][0]["index"] == index;
    chunks.iter().filter(of).filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
}

#[tokio::test]
async fn a_whole_answer() {
    let client = Client::new(Setup::default());
    let mut answer = client.chat("v", &greedy(&json!({}))).await.ok();
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_600_000_000);
    answer["id"] = json!("ID");
    answer["created"] = json!(0);
    insta::assert_snapshot!(serde_json::to_string_pretty(&answer).unwrap());
}

#[tokio::test]
async fn a_stream_has_role_deltas_end_usage_and_done() {
    let client = Client::new(Setup::default());
    let more = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = client.chat("w", &greedy(&more)).await.chunks();
    let first = &chunks[0]["choices"][0];
    assert_eq!(first["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(joined(&chunks, 0), "xyz é!");
    let (usage, deltas) = chunks.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    // Two of the prompt, seven of text, the end.
    assert_eq!(usage["usage"]["total_tokens"], 10);
    let end = &deltas.last().unwrap()["choices"][0];
    assert_eq!((&end["delta"], &end["finish_reason"]), (&json!({}), &json!("stop")));
    for chunk in deltas {
        assert_eq!((&chunk["object"], &chunk["usage"]), (&json!("chat.completion.chunk"), &Value::Null));
        assert_eq!(chunk["id"], usage["id"]);
        // é is two tokens and must come in one piece.
        assert!(!chunk.to_string().contains('\u{FFFD}'), "{chunk}");
    }
}

#[tokio::test]
async fn without_include_usage_there_is_none() {
    let client = Client::new(Setup::default());
    let chunks = client.chat("y", &greedy(&json!({"stream": true}))).await.chunks();
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none() && chunk["choices"][0].is_object()));
}

#[tokio::test]
async fn stop_strings_across_tokens_are_cut_out() {
    let client = Client::new(Setup::default());
    for stream in [false, true] {
        let more = greedy(&json!({"stop": ["efg", "nope"], "stream": stream}));
        let answer = client.chat("a", &more).await;
        let (text, end) = if stream {
            let chunks = answer.chunks();
            (joined(&chunks, 0), chunks.last().unwrap()["choices"][0].clone())
        } else {
            let answer = answer.ok();
            assert_eq!(answer["usage"]["completion_tokens"], 6);
            (choices(&answer)[0].0.clone(), answer["choices"][0].clone())
        };
        assert_eq!((text.as_str(), &end["finish_reason"], &end["stop_reason"]), ("bcd", &json!("stop"), &json!("efg")));
    }
}

#[tokio::test]
async fn a_possible_stop_string_that_comes_to_nothing_is_given_out() {
    let client = Client::new(Setup::default());
    let answer = client.chat("w", &greedy(&json!({"stop": "é!?"}))).await.ok();
    assert_eq!(choices(&answer), [("xyz é!".to_owned(), "stop".to_owned())]);
}

#[tokio::test]
async fn min_tokens_hold_off_stop_strings_and_the_end() {
    let client = Client::new(Setup::default());
    let early = client.chat("a", &greedy(&json!({"stop": "c", "min_tokens": 4, "max_tokens": 6}))).await.ok();
    assert_eq!(choices(&early), [("bcdefg".to_owned(), "length".to_owned())]);
    let end = client.chat("z", &greedy(&json!({"min_tokens": 6, "max_tokens": 6}))).await.ok();
    assert_eq!(choices(&end)[0].1, "length");
}

#[tokio::test]
async fn n_choices_interleave_by_index() {
    let client = Client::new(Setup::default());
    let whole = client.chat("u", &greedy(&json!({"n": 3, "max_tokens": 4}))).await.ok();
    assert_eq!(choices(&whole), vec![("vwxy".to_owned(), "length".to_owned()); 3]);
    assert_eq!(
        whole["usage"],
        json!({"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14,
                                     "prompt_tokens_details": whole["usage"]["prompt_tokens_details"]})
    );
    let more = json!({"n": 3, "max_tokens": 4, "stream": true, "stream_options": {"include_usage": true}});
    let chunks = client.chat("u", &greedy(&more)).await.chunks();
    let (usage, deltas) = chunks.split_last().unwrap();
    for index in 0..3 {
        assert_eq!(joined(deltas, index), "vwxy");
    }
    let ends = deltas.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "length").count();
    let roles = deltas.iter().filter(|chunk| chunk["choices"][0]["delta"]["role"] == "assistant").count();
    assert_eq!((ends, roles, &usage["usage"]["total_tokens"]), (3, 3, &json!(14)));
}

#[tokio::test]
async fn logprobs_of_every_token() {
    let client = Client::new(Setup::default());
    let more = json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 4});
    let answer = client.chat("z", &greedy(&more)).await.ok();
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let text: Vec<&str> = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(text, [" ", "\u{FFFD}", "\u{FFFD}", "!"]);
    assert_eq!((&tokens[1]["bytes"], &tokens[2]["bytes"]), (&json!([0xC3]), &json!([0xA9])));
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[0]["token"], &top[1]["token"]), (2, &token["token"], &json!("?")));
        let (first, second) = (top[0]["logprob"].as_f64().unwrap(), top[1]["logprob"].as_f64().unwrap());
        assert!((first - second - 10.0).abs() < 1e-3 && first == token["logprob"].as_f64().unwrap());
    }
    let chunks = client.chat("z", &greedy(&json!({"logprobs": true, "stream": true}))).await.chunks();
    let of = |chunk: &Value| chunk["choices"][0]["logprobs"]["content"].as_array().map_or(0, Vec::len);
    assert_eq!(chunks.iter().map(of).sum::<usize>(), 4);
}

#[tokio::test]
async fn sampling_fields_reach_the_sampler() {
    let client = Client::new(Setup::default());
    let client = &client;
    let answer = |more: Value| async move { choices(&client.chat("a", &greedy(&more)).await.ok())[0].clone() };
    assert_eq!(answer(json!({"max_tokens": 1, "logit_bias": {"3": -100}})).await.0, "?");
    assert_eq!(answer(json!({"stop_token_ids": [5]})).await, ("bc".to_owned(), "stop".to_owned()));
    assert_eq!(answer(json!({"max_completion_tokens": 2})).await, ("bc".to_owned(), "length".to_owned()));
    assert!(answer(json!({"ignore_eos": true, "max_tokens": 40})).await.0.starts_with("bcdefghijklmnopqrstuvwxyz é!"));
}

#[tokio::test]
async fn the_models_own_sampling_values_are_defaults() {
    let defaults = GenerationDefaults { temperature: Some(0.0), ..GenerationDefaults::default() };
    let client = Client::new(Setup { defaults, ..Setup::default() });
    let answers = client.chat("x", &json!({"n": 8})).await.ok();
    assert!(choices(&answers).iter().all(|(text, _)| text == "yz é!"));
}

#[tokio::test]
async fn max_tokens_left_out_is_the_rest_of_the_context() {
    let client = Client::new(Setup::default());
    let answer = client.chat("aaa", &greedy(&json!({"ignore_eos": true}))).await.ok();
    assert_eq!(answer["usage"]["total_tokens"], MAX_MODEL_LEN);
    assert_eq!(choices(&answer)[0].1, "length");
}

#[tokio::test]
async fn content_may_be_text_parts_and_roles_are_checked() {
    let client = Client::new(Setup::default());
    let messages = json!([{"role": "developer", "content": "ab"}, {"role": "assistant", "content": null},
                          {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}]);
    let answer = client.post("/tokenize", &json!({"messages": messages})).await.ok();
    // The parts are joined by a new line, which this alphabet has no token for.
    assert_eq!(answer["tokens"], json!([0, 2, 3, 25, 26]));
    for (message, param) in [
        (json!({"role": "king", "content": "a"}), "messages[0].role"),
        (json!({"role": "user", "content": 1}), "messages[0].content"),
        (json!({"role": "user"}), "messages[0].content"),
        (
            json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}),
            "messages[0].content",
        ),
        (json!({"role": "user", "content": "a", "name": 1}), "messages[0].name"),
        (json!("a"), "messages[0]"),
    ] {
        let error = client.post("/v1/chat/completions", &json!({"messages": [message]})).await.error();
        assert_eq!(error, format!("400 invalid_type {param}"));
    }
    let error = client.post("/v1/chat/completions", &json!({"messages": [{"role": "tool", "content": "a"}]})).await;
    assert_eq!(error.error(), "400 invalid_value messages");
    assert!(error.text.contains("no tools here"), "{}", error.text);
}

#[tokio::test]
async fn an_error_after_the_first_delta_is_an_event_without_done() {
    let client = Client::new(Setup::default());
    let events = client.chat("#", &greedy(&json!({"stream": true}))).await.events();
    assert!(events.iter().any(|event| event.contains("\"content\":\"$\"")), "{events:?}");
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "device_error");
    assert!(!events.concat().contains("0x1234"), "internals stay in the log");
}

#[tokio::test]
async fn an_error_before_the_first_delta_has_its_status() {
    let client = Client::new(Setup::default());
    for stream in [true, false] {
        let answer = client.chat("%", &greedy(&json!({"stream": stream}))).await;
        assert_eq!(answer.error(), "500 device_error -");
    }
    assert!(client.chat("y", &greedy(&json!({}))).await.status.is_success(), "others go on");
}

#[tokio::test]
async fn dropping_the_response_frees_the_request() {
    let client = Client::new(Setup::default());
    let body = json!({"messages": [{"role": "user", "content": "&"}], "stream": true, "n": 2, "temperature": 0});
    let response = client.open("/v1/chat/completions", &body).await;
    let mut stream = response.into_body().into_data_stream();
    assert!(stream.next().await.unwrap().is_ok());
    drop(stream);
    let engine = client.state.model().unwrap().engine.clone();
    let idle = async {
        while engine.load().running > 0 || engine.load().waiting > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), idle).await.unwrap();
    let load = engine.load();
    assert!((1..MAX_MODEL_LEN as u64).contains(&load.generation_tokens_total), "{load:?}");
    assert_eq!(load.kv_cache_usage, 0.0);
}
