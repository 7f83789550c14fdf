//! Whatever a client sends, it gets an answer or an error of its own making.

use super::alphabet::Setup;
use super::client::{Answer, Client, json_post};
use mserve_runtime::tokenizer::{IncrementalDetokenizer, ModelFiles, Tokenizer};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::{Arc, LazyLock};

const FIELDS: [&str; 24] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "logit_bias",
    "seed",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "echo",
    "messages",
    "prompt",
    "input",
    "tokens",
    "encoding_format",
    "dimensions",
    "chat_template_kwargs",
    "response_format",
];
const ROUTES: [&str; 5] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"];

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-2i64..40).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z]{0,4}".prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        Just(json!({"role": "user", "content": "a"})),
        Just(json!({"type": "text", "text": "b"})),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        let key = prop_oneof!["[a-z]{1,4}", "[0-9]{1,3}", Just("include_usage".to_owned()), Just("content".to_owned())];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

static DEMO_TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/demo-model");
    Arc::new(Tokenizer::load(&ModelFiles::read(&dir).unwrap(), 4096).unwrap())
});

#[test]
fn any_fields_get_an_answer_or_a_client_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = runtime.block_on(async { Client::new(Setup::default()) });
    let body = prop::collection::btree_map(prop::sample::select(&FIELDS[..]), any_value(), 0..5);
    let route = prop::sample::select(&ROUTES[..]);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(400));
    runner
        .run(&(route, body), |(route, body)| {
            let mut body: Map<String, Value> = body.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
            body.insert("model".to_owned(), json!("alphabet"));
            body.entry("max_tokens").or_insert(json!(3));
            let sent = Value::Object(body).to_string();
            let answer =
                runtime.block_on(async { Answer::of(client.send(json_post(route, sent.clone())).await).await });
            prop_assert!(!answer.status.is_server_error(), "{route} {sent}: {}", answer.text);
            if answer.status.is_client_error() {
                answer.error();
            }
            Ok(())
        })
        .unwrap();
}

proptest! {
    #[test]
    fn the_demo_models_text_survives_the_round_trip(text in any::<String>()) {
        let tokenizer = &DEMO_TOKENIZER;
        let ids = tokenizer.encode_rendered(&text, 1 << 20).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }

    #[test]
    fn the_demo_models_pieces_join_to_the_whole(ids in prop::collection::vec(0u32..4200, 0..40)) {
        let tokenizer = &DEMO_TOKENIZER;
        let mut detokenizer = IncrementalDetokenizer::new(Arc::clone(tokenizer));
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        text.push_str(&detokenizer.flush());
        prop_assert_eq!(text, tokenizer.decode(&ids).unwrap());
    }
}
