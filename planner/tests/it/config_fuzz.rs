//! Whatever a config.json holds, reading and planning it returns, and soon.
#![allow(clippy::unwrap_used)]

use crate::fixtures;
use mserve_planner::memory::{EngineLimits, KvCacheDtype, SlidingLayers, WeightSource};
use mserve_planner::model::{ModelSpec, families, parse_config};
use mserve_planner::plan::{Accounting, Card, Demand, PlanRequest, plan};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// For one config, in a release build.
const LIMIT: Duration = Duration::from_millis(50);
/// What a build with debug assertions may take longer.
const SLOWER: u32 = if cfg!(debug_assertions) { 3 } else { 1 };
const TRIES: usize = 5;

/// Time that this thread was on a core, where the system tells it: other work on the machine does not count.
fn busy(since: Instant) -> Duration {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = told.and_then(|stat| stat.split(' ').next()?.parse().ok());
    nanoseconds.map_or_else(|| since.elapsed(), Duration::from_nanos)
}

/// Reads and plans; the shortest of a few tries counts: cores are shared and caches cold now and then.
fn read_and_plan_in_time(bytes: &[u8], max_model_len: u64, what: &str) {
    let mut best = Duration::MAX;
    for _ in 0..TRIES {
        let since = Instant::now();
        let before = busy(since);
        read_and_plan(bytes, max_model_len);
        best = best.min(busy(since).saturating_sub(before));
        if best <= LIMIT * SLOWER {
            return;
        }
    }
    panic!("{what}: {best:?} for {} bytes", bytes.len());
}

fn read_and_plan(bytes: &[u8], max_model_len: u64) {
    let Ok(spec) = parse_config(bytes) else { return };
    assert!(families::program(&spec).parameters() > 0);
    let limits = EngineLimits::for_model(&spec);
    let limits = limits.with_max_model_len(&spec, max_model_len.min(spec.max_position_embeddings));
    let card = Card { name: "NVIDIA H100 80GB HBM3".to_owned(), memory_total_bytes: 80 << 30 };
    let _ = plan(&request(&spec, card, 8, limits));
}

fn request(spec: &ModelSpec, card: Card, gpus: u64, limits: EngineLimits) -> PlanRequest<'_> {
    PlanRequest {
        model_name: "model",
        spec,
        weights: WeightSource::Program,
        card,
        gpus,
        tensor_parallel_size: None,
        limits,
        demand: Demand::of(1536, 512),
        accounting: Accounting::default(),
        kv_cache_dtype: KvCacheDtype::Auto,
        sliding: SlidingLayers::KeepWindow,
    }
}

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

/// One change to a config.
#[derive(Debug, Clone)]
enum Change {
    /// A field gets another value.
    Set(prop::sample::Index, Value),
    Remove(prop::sample::Index),
    /// A number becomes the largest that its range may hold, or what is next to it.
    Enlarge(prop::sample::Index, u64),
    /// A field of another model comes in: its architecture, its experts, its quantisation.
    Borrow(String, prop::sample::Index),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (any::<prop::sample::Index>(), odd_value()).prop_map(|(at, value)| Change::Set(at, value)),
        1 => any::<prop::sample::Index>().prop_map(Change::Remove),
        2 => (any::<prop::sample::Index>(), proptest::sample::select(vec![1, 2, 63, 1024, 4096, 65_536, 1 << 20, 1 << 27]))
            .prop_map(|(at, value)| Change::Enlarge(at, value)),
        3 => (proptest::sample::select(fixtures::names()), any::<prop::sample::Index>())
            .prop_map(|(name, at)| Change::Borrow(name, at)),
    ]
}

/// The file's own fields, or those of the language model or the quantisation.
fn object<'a>(map: &'a mut Map<String, Value>, inner: &str) -> &'a mut Map<String, Value> {
    match map.get(inner).is_some_and(Value::is_object) {
        true => map.get_mut(inner).and_then(Value::as_object_mut).unwrap(),
        false => map,
    }
}

fn mutate(map: &mut Map<String, Value>, place: usize, change: Change) {
    let inner = ["text_config", "quantization_config", ""][place % 3];
    let object = object(map, inner);
    let pick = |object: &Map<String, Value>, at: prop::sample::Index, fits: fn(&Value) -> bool| {
        let keys: Vec<String> = object.iter().filter(|(_, v)| fits(v)).map(|(k, _)| k.clone()).collect();
        (!keys.is_empty()).then(|| at.get(&keys).clone())
    };
    match change {
        Change::Set(at, value) => {
            pick(object, at, |_| true).map(|key| object.insert(key, value));
        }
        Change::Remove(at) => {
            pick(object, at, |_| true).map(|key| object.remove(&key));
        }
        Change::Enlarge(at, value) => {
            pick(object, at, Value::is_number).map(|key| object.insert(key, json!(value)));
        }
        Change::Borrow(name, at) => {
            let other = fields_of(&name);
            pick(&other, at, |_| true).map(|key| object.insert(key.clone(), other[&key].clone()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn mutated_configs_are_refused_or_planned_in_time(
        config in proptest::sample::select(fixtures::names()),
        changes in proptest::collection::vec(change(), 1..5),
        max_model_len in 1_u64..100_000,
    ) {
        let mut map = fields_of(&config);
        for (place, change) in changes.into_iter().enumerate() {
            mutate(&mut map, place, change);
        }
        read_and_plan_in_time(&serde_json::to_vec(&map).unwrap(), max_model_len, &config);
    }

    #[test]
    fn damaged_bytes_are_refused_or_read(
        config in proptest::sample::select(fixtures::names()),
        at in any::<prop::sample::Index>(),
        bytes in proptest::collection::vec(any::<u8>(), 1..9),
    ) {
        let mut json = fixtures::json(&config);
        let at = at.index(json.len());
        let end = (at + bytes.len()).min(json.len());
        json.splice(at..end, bytes);
        read_and_plan(&json, 4096);
        read_and_plan(&json[..at], 4096);
    }
}

/// A model of `layers` layers with what else its file says.
fn large(architecture: &str, rest: &str) -> String {
    format!(
        r#"{{"architectures":["{architecture}"],"hidden_size":4096,"num_hidden_layers":1024,"num_attention_heads":32,
        "num_key_value_heads":8,"intermediate_size":14336,"vocab_size":128256,"max_position_embeddings":131072,
        "torch_dtype":"bfloat16"{rest}}}"#
    )
}

fn listed(count: usize, item: impl Fn(usize) -> String) -> String {
    let mut list = String::new();
    for i in 0..count {
        let _ = write!(list, "{}{}", if i == 0 { "" } else { "," }, item(i));
    }
    list
}

fn left_out(modules: &str) -> String {
    format!(r#","quantization_config":{{"quant_method":"fp8","modules_to_not_convert":[{modules}]}}"#)
}

/// Files made to be slow: as long as may be, with as much to look up as may be.
#[test]
fn files_made_to_be_slow_are_not() {
    const MIB: usize = 1 << 20;
    let alike = listed(60, |i| format!(r#""*m*l*p*q{i}*""#));
    let odd = listed(4, |i| format!(r#""*{i}*m*l*p*q""#));
    let experts = r#","num_experts":4096,"num_experts_per_tok":8,"moe_intermediate_size":768"#;
    for (what, json) in [
        ("empty lists", format!("[{}]", listed(MIB, |_| "[]".to_owned()))),
        ("small lists", format!(r#"{{"a":[{}]}}"#, listed(MIB - 10, |_| "[0]".to_owned()))),
        (
            "fields in no order",
            format!("{{{}}}", listed(98_000, |i| format!(r#""{:x}":0"#, i * 2_654_435_761 % 4_294_967_291))),
        ),
        ("a long text", format!(r#"{{"a":"{}"}}"#, r"\u00e9".repeat(MIB / 2))),
        ("numbers that are none", format!(r#"{{"a":[{}]}}"#, listed(4 * MIB / 10, |_| "Infinity".to_owned()))),
        ("deep", "[".repeat(4 * MIB)),
        ("many layers", large("LlamaForCausalLM", "")),
        ("many experts", large("Qwen3MoeForCausalLM", experts)),
        (
            "names of modules",
            large("LlamaForCausalLM", &left_out(&listed(65_000, |i| format!(r#""layers.{}.a.b{i}""#, i % 1024)))),
        ),
        (
            "patterns of layers",
            large("LlamaForCausalLM", &left_out(&listed(8192, |i| format!(r#""layers.{}.m{i}*p*q""#, i % 1024)))),
        ),
        ("patterns of all", large("Qwen3MoeForCausalLM", &(experts.to_owned() + &left_out(&format!("{alike},{odd}"))))),
    ] {
        read_and_plan_in_time(json.as_bytes(), 4096, what);
    }
}

/// As published, and the longest with all 22,000 of its modules.
#[test]
fn published_files_are_planned_in_time() {
    for name in fixtures::names() {
        read_and_plan_in_time(&fixtures::json(&name), 4096, &name);
    }
    let modules = listed(22_422, |i| {
        let (layer, expert, part) = (i / 384 + 3, i % 384 / 3, ["gate_proj", "up_proj", "down_proj"][i % 3]);
        let name = format!("language_model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}");
        format!(r#""{name}":{{"quant_algo":"NVFP4","group_size":16}}"#)
    });
    let mut map = fields_of("nvidia__MiniMax-M3-NVFP4");
    let layers: Value = serde_json::from_str(&format!("{{{modules}}}")).unwrap();
    object(&mut map, "quantization_config").insert("quantized_layers".to_owned(), layers);
    let json = serde_json::to_vec_pretty(&map).unwrap();
    assert!(json.len() > 3_000_000, "{}", json.len());
    assert!(parse_config(&json).is_ok());
    read_and_plan_in_time(&json, 4096, "22,422 modules");
}

#[test]
fn the_largest_model_in_range_does_not_overflow() {
    let text = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":131072,"num_hidden_layers":1024,
        "num_attention_heads":1024,"num_key_value_heads":1024,"head_dim":1024,"intermediate_size":1048576,
        "vocab_size":16777216,"max_position_embeddings":134217728,"torch_dtype":"float32"}"#;
    let spec = parse_config(text.as_bytes()).unwrap();
    let mut limits = EngineLimits::for_model(&spec);
    limits.max_num_seqs = 65_536;
    limits.max_num_batched_tokens = 1 << 27;
    let card = Card { name: "card".to_owned(), memory_total_bytes: 1 << 40 };
    let plan = plan(&request(&spec, card, 1024, limits));
    // 4 MiB of KV a token and layer, 2^27 tokens: no card holds it, and the sum still fits 64 bits.
    assert!(plan.is_err(), "{plan:?}");
}
