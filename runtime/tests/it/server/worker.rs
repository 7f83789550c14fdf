//! Loading a model directory: what is wrong with it is said in one error that names the file.

use super::alphabet;
use mserve_runtime::tokenizer::{ModelFiles, Tokenizer, TokenizerError};
use mserve_runtime::worker::{FailureKind, WorkerConfig, WorkerEvent, WorkerKind, run};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

fn demo_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/demo-model")
}

/// A copy of the demo model's files in which one is replaced.
fn broken(file: &str, content: Option<&[u8]>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(demo_model()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    match content {
        Some(content) => fs::write(dir.path().join(file), content).unwrap(),
        None => fs::remove_file(dir.path().join(file)).unwrap(),
    }
    dir
}

/// The failure that a worker tells, with its kind.
fn failure(config: WorkerConfig) -> (FailureKind, String) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&events);
    let error = run(config, move |event| told.lock().unwrap().push(event)).unwrap_err();
    let last = events.lock().unwrap().pop().unwrap();
    let WorkerEvent::Failed { kind, message } = last else { panic!("{last:?}") };
    assert_eq!((kind, &message), (error.kind(), &error.to_string()));
    (kind, message)
}

#[test]
fn bad_files_are_named() {
    for (file, content, expected) in [
        ("config.json", None, "config.json"),
        ("config.json", Some("{"), "config.json"),
        ("tokenizer.json", None, "a model needs a tokenizer.json"),
        ("tokenizer.json", Some("{}"), "tokenizer.json: not a tokenizer"),
        ("tokenizer_config.json", Some("["), "tokenizer_config.json"),
        ("generation_config.json", Some(r#"{"eos_token_id": 4096}"#), "eos_token_id"),
        ("generation_config.json", Some(r#"{"temperature": -1}"#), "temperature"),
        ("chat_template.jinja", Some("{% if %}"), "chat_template"),
        ("model.safetensors", None, "model.safetensors"),
    ] {
        let dir = broken(file, content.map(str::as_bytes));
        let (kind, message) = failure(WorkerConfig::new(dir.path().to_owned()));
        assert_eq!(kind, FailureKind::Config, "{message}");
        assert!(message.contains(expected), "{file}: {message}");
    }
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let change = |change: &dyn Fn(&mut WorkerConfig)| {
        let mut config = WorkerConfig::new(demo_model());
        change(&mut config);
        failure(config)
    };
    let (kind, message) = change(&|config| config.max_model_len = Some(1 << 20));
    assert!(kind == FailureKind::Config && message.contains("1048576") && message.contains("2048"), "{message}");
    let (kind, message) = change(&|config| {
        config.max_model_len = Some(2048);
        config.kv_cache_bytes = Some(1 << 20);
    });
    assert!(kind == FailureKind::DoesNotFit && message.contains("2048"), "{message}");
    let (kind, _) = change(&|config| config.kv_cache_bytes = Some(1 << 50));
    assert_eq!(kind, FailureKind::DoesNotFit);
    let (kind, message) = change(&|config| config.chat_template = Some("nonesuch".to_owned()));
    assert!(kind == FailureKind::Config && message.contains("vicuna"), "{message}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let (kind, message) = change(&|config| config.port = port);
    assert!(kind == FailureKind::Config && message.contains(&port.to_string()), "{message}");
}

#[test]
fn an_encoder_is_no_chat_model() {
    let config = json!({"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 4096,
        "max_position_embeddings": 64, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12});
    let dir = broken("config.json", Some(config.to_string().as_bytes()));
    let mut config = WorkerConfig::new(dir.path().to_owned());
    config.kind = Some(WorkerKind::Chat);
    let (kind, message) = failure(config);
    assert!(kind == FailureKind::Config && message.contains("BertModel") && message.contains("embedding"), "{message}");
}

#[test]
fn a_tokenizer_of_another_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    alphabet::write_files(dir.path());
    let files = ModelFiles::read(dir.path()).unwrap();
    assert!(Tokenizer::load(&files, alphabet::VOCAB).is_ok());
    let error = Tokenizer::load(&files, alphabet::VOCAB - 1).unwrap_err();
    assert!(matches!(&error, TokenizerError::VocabularyMismatch { token, .. } if token == "."), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("tokenizer.json") && text.contains("does not match the vocabulary"), "{text}");
}
