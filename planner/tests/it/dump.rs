//! tmp
#![allow(clippy::unwrap_used)]
use crate::fixtures;
use mserve_planner::memory::*;
use mserve_planner::model::*;
#[test]
fn dump() {
    for name in fixtures::names() {
        let spec = match parse_config(&fixtures::json(&name)) { Ok(s) => s, Err(e) => { println!("{name} ERR {e}"); continue } };
        let spec = match std::fs::read(format!("{}/tests/fixtures/configs/{name}.hf_quant_config.json", env!("CARGO_MANIFEST_DIR"))) { Ok(j) => match spec.with_hf_quant_config(&j) { Ok(s) => s, Err(e) => { println!("{name} HFERR {e}"); continue } }, Err(_) => spec };
        let made = spec.clone().with_task(Task::Generate);
        let p = families::program(&spec);
        let total = p.parameters();
        let active = work::active_parameters(&p, &spec);
        let w = rank_weight_bytes(&p, &spec, 1);
        let mut kinds: std::collections::BTreeMap<(CacheKind, u64), u64> = Default::default();
        for c in layer_caches(&made, 1, KvCacheDtype::Bf16.resolve(&made).into()).into_iter().flatten() { *kinds.entry((c.kind, c.bytes_per_entry)).or_default() += 1; }
        let q = match &spec.quantization { Quantization::None => "-".to_owned(), Quantization::Stored(s) => format!("{} kv8={}", s.method, s.kv_cache_fp8) };
        println!("{name}|{:?}|{}|{:.3}B|{:.3}B|w {:.2}GB|{q}|ctx {}|{:?}", spec.family, spec.layers.len(), total as f64/1e9, active as f64/1e9, w as f64/1e9, spec.max_position_embeddings, kinds);
    }
}
