use super::alphabet::{Kind, Setup};
use super::client::Client;
use serde_json::json;

fn client() -> Client {
    Client::new(Setup { kind: Kind::Embedding, ..Setup::default() })
}

#[tokio::test]
async fn vectors_in_the_order_of_inputs() {
    let inputs: Vec<String> = (1..=60).map(|n| "a".repeat(n)).collect();
    let answer = client().post("/v1/embeddings", &json!({"input": inputs})).await.ok();
    let data = answer["data"].as_array().unwrap();
    assert_eq!(data.len(), 60);
    for (i, entry) in data.iter().enumerate() {
        // The toy's vector: number of tokens (with the begin token), first token, 0, 1.
        let expected = json!([i as f32 + 2.0, 0.0, 0.0, 1.0]);
        assert_eq!(
            (&entry["index"], &entry["object"], &entry["embedding"]),
            (&json!(i), &json!("embedding"), &expected)
        );
    }
    let tokens = (1..=60).map(|n| n + 1).sum::<usize>();
    assert_eq!(answer["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
}

#[tokio::test]
async fn base64_is_little_endian_floats() {
    let answer = client().post("/v1/embeddings", &json!({"input": [2, 3], "encoding_format": "base64"})).await.ok();
    // 2.0 2.0 0.0 1.0
    assert_eq!(answer["data"][0]["embedding"], "AAAAQAAAAEAAAAAAAACAPw==");
}

#[tokio::test]
async fn fewer_dimensions_are_normalised() {
    let answer = client().post("/v1/embeddings", &json!({"input": [3, 4, 5, 6], "dimensions": 2})).await.ok();
    assert_eq!(answer["data"][0]["embedding"], json!([0.8, 0.6]));
    let error = client().post("/v1/embeddings", &json!({"input": "a", "dimensions": 5})).await.error();
    assert_eq!(error, "400 invalid_value dimensions");
}

#[tokio::test]
async fn each_kind_of_model_has_its_routes() {
    let error = client().chat("a", &json!({})).await.error();
    assert_eq!(error, "400 wrong_model_kind -");
    let chat = Client::new(Setup::default());
    assert_eq!(chat.post("/v1/embeddings", &json!({"input": "a"})).await.error(), "400 wrong_model_kind -");
}

#[tokio::test]
async fn limits_of_input() {
    let long = "a".repeat(2000);
    let error = client().post("/v1/embeddings", &json!({"input": long})).await.error();
    assert_eq!(error, "400 context_length_exceeded -");
    let many = vec!["a"; 2049];
    assert_eq!(client().post("/v1/embeddings", &json!({"input": many})).await.error(), "400 invalid_value input");
    for input in [json!([]), json!(null), json!(1), json!([["a"]])] {
        let error = client().post("/v1/embeddings", &json!({"input": input})).await.error();
        assert!(error.starts_with("400 ") && error.ends_with(" input"), "{input}: {error}");
    }
}
