//! Whatever a config.json holds, reading and planning it returns.
#![allow(clippy::unwrap_used)]

use crate::fixtures;
use mserve_planner::memory::{EngineLimits, KvCacheDtype, SlidingLayers, WeightSource};
use mserve_planner::model::{families, parse_config};
use mserve_planner::plan::{Accounting, Card, Demand, PlanRequest, plan};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// Values that break careless readers.
fn odd_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<i64>().prop_map(|n| json!(n)),
        any::<u64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|x| json!(x)),
        (0_u64..70).prop_map(|shift| json!(1_u64.checked_shl(shift as u32).unwrap_or(u64::MAX))),
        (1_u64..200).prop_map(|n| json!(n)),
        proptest::sample::select(vec![
            json!(null),
            json!(true),
            json!(""),
            json!("silu"),
            json!([]),
            json!({}),
            json!([1, 2]),
            json!({"type": "yarn", "factor": 1e6, "original_max_position_embeddings": 134_217_728}),
            json!({"type": "linear", "factor": 1e6}),
            json!({"rope_type": "longrope", "short_factor": [], "long_factor": []}),
            json!({"quant_method": "gptq", "bits": 2, "group_size": 1}),
            json!({"quant_method": "fp8"}),
        ]),
    ]
}

fn fields_of(name: &str) -> Map<String, Value> {
    // Python's Infinity is read by the parser under test, not by serde_json.
    let text = String::from_utf8(fixtures::json(name)).unwrap().replace("Infinity", "1e9");
    serde_json::from_str(&text).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn mutated_configs_are_refused_or_planned(
        config in proptest::sample::select(fixtures::names()),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), odd_value()), 1..4),
        max_model_len in 1_u64..100_000,
    ) {
        let mut map = fields_of(&config);
        for (i, (key, value)) in changes.into_iter().enumerate() {
            // Now in the file's own fields, now in those of the language model or the quantisation.
            let inner = ["text_config", "quantization_config", ""][i % 3];
            let object = match map.get(inner).is_some_and(Value::is_object) {
                true => map.get_mut(inner).and_then(Value::as_object_mut).unwrap(),
                false => &mut map,
            };
            let keys: Vec<String> = object.keys().cloned().collect();
            if !keys.is_empty() {
                object.insert(key.get(&keys).clone(), value);
            }
        }
        let Ok(spec) = parse_config(&serde_json::to_vec(&map).unwrap()) else { return Ok(()) };
        prop_assert!(families::program(&spec).parameters() > 0);
        let limits = EngineLimits::for_model(&spec);
        let limits = limits.with_max_model_len(&spec, max_model_len.min(spec.max_position_embeddings));
        let _ = plan(&PlanRequest {
            model_name: "mutant",
            spec: &spec,
            weights: WeightSource::Program,
            card: Card { name: "card".to_owned(), memory_total_bytes: 80 << 30 },
            gpus: 8,
            tensor_parallel_size: None,
            limits,
            demand: Demand::of(1536, 512),
            accounting: Accounting::default(),
            kv_cache_dtype: KvCacheDtype::Auto,
            sliding: SlidingLayers::KeepWindow,
        });
    }

    #[test]
    fn damaged_bytes_are_refused_or_read(
        config in proptest::sample::select(fixtures::names()),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let mut bytes = fixtures::json(&config);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = parse_config(&bytes);
        let _ = parse_config(&bytes[..at]);
    }
}

#[test]
fn the_largest_model_in_range_neither_overflows_nor_takes_long() {
    let text = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":131072,"num_hidden_layers":1024,
        "num_attention_heads":1024,"num_key_value_heads":1024,"head_dim":1024,"intermediate_size":1048576,
        "vocab_size":16777216,"max_position_embeddings":134217728,"torch_dtype":"float32"}"#;
    let spec = parse_config(text.as_bytes()).unwrap();
    let mut limits = EngineLimits::for_model(&spec);
    limits.max_num_seqs = 65_536;
    limits.max_num_batched_tokens = 1 << 27;
    let request = PlanRequest {
        model_name: "largest",
        spec: &spec,
        weights: WeightSource::Program,
        card: Card { name: "card".to_owned(), memory_total_bytes: 1 << 40 },
        gpus: 1024,
        tensor_parallel_size: None,
        limits,
        demand: Demand::of(1536, 512),
        accounting: Accounting::default(),
        kv_cache_dtype: KvCacheDtype::Auto,
        sliding: SlidingLayers::KeepWindow,
    };
    let plan = plan(&request);
    // 4 MiB of KV a token and layer, 2^27 tokens: no card holds it, and the sum still fits 64 bits.
    assert!(plan.is_err(), "{plan:?}");
}
