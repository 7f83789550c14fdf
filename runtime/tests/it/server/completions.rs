use super::alphabet::Setup;
use super::client::Client;
use serde_json::{Value, json};

fn texts(answer: &Value) -> Vec<&str> {
    answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn all_forms_of_prompts() {
    let client = Client::new(Setup::default());
    for (prompt, expected, prompt_tokens) in [
        (json!("a"), vec!["bcd"], 2),
        (json!(["a", "f"]), vec!["bcd", "ghi"], 4),
        (json!([2, 3]), vec!["cde"], 2),
        (json!([[2], [7]]), vec!["bcd", "ghi"], 2),
    ] {
        let answer = client.complete(&prompt, &json!({"max_tokens": 3, "temperature": 0})).await.ok();
        assert_eq!(texts(&answer), expected, "{prompt}");
        assert_eq!(answer["usage"]["prompt_tokens"], prompt_tokens);
        assert_eq!(answer["object"], "text_completion");
    }
}

#[tokio::test]
async fn max_tokens_default_to_16() {
    let client = Client::new(Setup::default());
    let answer = client.complete(&json!("a"), &json!({"temperature": 0})).await.ok();
    assert_eq!(texts(&answer), ["bcdefghijklmnopq"]);
}

#[tokio::test]
async fn echo_puts_the_prompt_first() {
    let client = Client::new(Setup::default());
    for stream in [false, true] {
        let more = json!({"max_tokens": 2, "temperature": 0, "echo": true, "n": 2, "stream": stream});
        let answer = client.complete(&json!([[2, 3], [5]]), &more).await;
        let expected = ["abcd", "abcd", "def", "def"];
        if stream {
            let chunks = answer.chunks();
            for (index, expected) in expected.iter().enumerate() {
                let of = |chunk: &&Value| chunk["choices"][0]["index"] == index;
                let text: String =
                    chunks.iter().filter(of).map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
                assert_eq!(&text, expected);
            }
        } else {
            assert_eq!(texts(&answer.ok()), expected);
        }
    }
}

#[tokio::test]
async fn logprobs_in_parallel_lists() {
    let client = Client::new(Setup::default());
    let more = json!({"max_tokens": 3, "temperature": 0, "logprobs": 1});
    let answer = client.complete(&json!("a"), &more).await.ok();
    let lists = &answer["choices"][0]["logprobs"];
    assert_eq!((&lists["tokens"], &lists["text_offset"]), (&json!(["b", "c", "d"]), &json!([0, 1, 2])));
    let first = &lists["token_logprobs"][0];
    assert_eq!(lists["top_logprobs"][0], json!({"b": first}));
    assert!((-0.01..=0.0).contains(&first.as_f64().unwrap()));
    let none = client.complete(&json!("a"), &json!({"max_tokens": 1})).await.ok();
    assert_eq!(none["choices"][0]["logprobs"], Value::Null);
}

#[tokio::test]
async fn tokenize_and_back() {
    let client = Client::new(Setup::default());
    let answer = client.post("/tokenize", &json!({"prompt": "ab é"})).await.ok();
    assert_eq!(answer, json!({"count": 6, "max_model_len": 1024, "tokens": [0, 2, 3, 28, 29, 30]}));
    let plain = json!({"prompt": "ab", "add_special_tokens": false, "return_token_strs": true});
    let answer = client.post("/tokenize", &plain).await.ok();
    assert_eq!((&answer["tokens"], &answer["token_strs"]), (&json!([2, 3]), &json!(["a", "b"])));
    let text = client.post("/detokenize", &json!({"tokens": [0, 2, 3, 28, 29, 30]})).await.ok();
    assert_eq!(text, json!({"prompt": "ab é"}));
}
