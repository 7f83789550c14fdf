#![allow(clippy::unwrap_used)]

use super::*;
use crate::model::{Mask, Positions, RopeScaling, Task, families};

const VICUNA: &str = include_str!("../../../tests/fixtures/configs/lmsys__vicuna-13b-v1.5-16k.json");
const RERANKER: &str = include_str!("../../../tests/fixtures/configs/BAAI__bge-reranker-v2-m3.json");

fn parse(text: &str) -> Result<ModelSpec, ConfigError> {
    parse_config(text.as_bytes())
}

/// Vicuna's file with one field replaced (or removed, for `null`).
fn vicuna_with(field: &str, value: &str) -> Result<ModelSpec, ConfigError> {
    let mut map: serde_json::Map<String, serde_json::Value> = serde_json::from_str(VICUNA).unwrap();
    map.insert(field.to_owned(), serde_json::from_str(value).unwrap());
    parse(&serde_json::to_string(&map).unwrap())
}

#[test]
fn vicuna_is_read_whole() {
    let spec = parse(VICUNA).unwrap();
    assert_eq!(spec.architecture, "LlamaForCausalLM");
    assert_eq!(spec.layers.len(), 40);
    let attention = &spec.layers[0].attention;
    assert_eq!((attention.num_heads, attention.num_kv_heads, attention.head_dim), (40, 40, 128));
    assert_eq!(attention.mask, Mask::Causal);
    assert_eq!(attention.rope.as_ref().unwrap().scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(spec.max_position_embeddings, 16_384);
    assert_eq!((spec.dtype, spec.tied_embeddings, spec.task), (DType::F16, false, Task::Generate));
    assert_eq!(families::program(&spec).parameters(), 13_015_864_320);
}

#[test]
fn roberta_positions_start_after_padding() {
    let spec = parse(RERANKER).unwrap();
    assert_eq!(spec.positions, Positions::Learned { rows: 8194, offset: 2, token_types: 1 });
    assert_eq!(spec.max_position_embeddings, 8192);
    assert_eq!(spec.task, Task::Classify { labels: 1 });
}

#[test]
fn rope_parameters_of_transformers_5_are_read() {
    let old = vicuna_with("rope_theta", "500000.0").unwrap();
    let mut map: serde_json::Map<String, serde_json::Value> = serde_json::from_str(VICUNA).unwrap();
    map.remove("rope_scaling");
    map.remove("torch_dtype");
    map.insert("dtype".into(), "float16".into());
    map.insert("rope_parameters".into(), serde_json::json!({"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}));
    let new = parse(&serde_json::to_string(&map).unwrap()).unwrap();
    assert_eq!(old, new);
}
