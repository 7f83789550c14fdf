//! `docs/plan-json.md` against what is printed.
#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

fn keys(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                found.insert(key.clone());
                keys(value, found);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| keys(value, found)),
        _ => {}
    }
}

#[test]
fn every_key_of_the_output_is_documented() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = |name: &str| format!("{}/planner/tests/fixtures/configs/{name}.json", root.display());
    let llama = config("meta-llama__Meta-Llama-3.1-8B");
    let runs = [
        vec![llama.clone(), "--gpu=h100".into(), "--gpus=16".into(), "--explain".into(), "--tpot=40".into()],
        vec![config("google__gemma-3-1b-it"), "--gpu=l4".into(), "--max-model-len=16k".into()],
        vec![config("BAAI__bge-reranker-v2-m3"), "--gpu=l4".into()],
        vec![llama.clone(), "--gpu=h100".into(), "--engine=vllm".into(), "--max-model-len=16k".into()],
        vec![config("Qwen__Qwen2.5-14B-Instruct-AWQ"), "--gpu=h100".into(), "--gpus=8".into()],
        vec![config("meta-llama__Meta-Llama-3.1-70B"), "--gpu=rtx4090".into()],
        vec![llama, "--gpu=h100".into(), "--gpus=2".into(), format!("--slm={}", config("BAAI__bge-large-en-v1.5"))],
    ];
    let mut found = BTreeSet::new();
    for args in runs {
        let output = Command::new(env!("CARGO_BIN_EXE_mserve")).arg("plan").args(&args).arg("--json").output().unwrap();
        let json: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}"));
        assert_eq!(json["schema"], 2, "{args:?}");
        keys(&json, &mut found);
    }
    let text = std::fs::read_to_string(root.join("docs/plan-json.md")).unwrap();
    let documented: BTreeSet<&str> = text.split('`').skip(1).step_by(2).collect();
    let missing: Vec<_> = found.iter().filter(|key| !documented.contains(key.as_str())).collect();
    assert!(missing.is_empty(), "not in docs/plan-json.md: {missing:?}");
    assert!(found.len() > 60, "{} keys", found.len());
}
