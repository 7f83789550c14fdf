//! What must hold for every engine's budget and pool.
#![allow(clippy::unwrap_used)]

use crate::fixtures;
use mserve_planner::engine::vllm::{Groups, PoolOptions, PrintRule, Printed};
use mserve_planner::engine::{Engine, EngineBudget, EngineSettings, Version, parse_boot_log};
use mserve_planner::model::{DType, Task, families};
use mserve_planner::units::GIB;
use proptest::prelude::*;

fn configs() -> impl Strategy<Value = String> {
    proptest::sample::select(fixtures::names())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn pools_are_monotone(
        config in configs(),
        tp in proptest::sample::select(vec![1_u64, 2, 4, 8]),
        fp8 in any::<bool>(),
        pool_gib in 1_u64..200,
        more_gib in 0_u64..100,
        tokens in 1_u64..300_000,
        more_tokens in 0_u64..100_000,
    ) {
        let spec = fixtures::spec(&config).with_task(Task::Generate);
        let dtype = if fp8 { DType::F8E4M3 } else { DType::BF16 };
        let groups = Groups::new(&spec, PoolOptions::new(tp, dtype));
        let (small, large) = (pool_gib * GIB, (pool_gib + more_gib) * GIB);
        let printed = |bytes, len| Printed::new(&groups, bytes, len, PrintRule::ConcurrencyTimesLength);
        prop_assert!(printed(large, tokens).concurrency >= printed(small, tokens).concurrency);
        prop_assert!(groups.blocks_per_request(tokens + more_tokens) >= groups.blocks_per_request(tokens));
        let longest = groups.longest(small, 1 << 27);
        prop_assert!(longest == 0 || groups.needed_bytes(longest) <= small);
        prop_assert!(longest == 1 << 27 || groups.needed_bytes(longest + 1) > small);
        // Every layer with a cache is in a group, once.
        let layers: u64 = groups.groups.iter().map(|g| g.layers).sum();
        let caches = mserve_planner::memory::layer_caches(&spec, tp, dtype.into());
        prop_assert_eq!(layers, caches.iter().map(|c| c.len() as u64).sum::<u64>());
    }

    #[test]
    fn budgets_add_up(
        config in configs(),
        sglang in any::<bool>(),
        minor in 1_u32..40,
        total_gib in 8_u64..200,
        tp in proptest::sample::select(vec![1_u64, 2, 4, 8]),
    ) {
        let spec = fixtures::spec(&config);
        let engine = if sglang { Engine::Sglang } else { Engine::Vllm };
        let settings = EngineSettings {
            version: Version::new(0, minor, 0),
            ..EngineSettings::new(engine, total_gib * GIB, 4096, PoolOptions::new(tp, DType::BF16))
        };
        let program = families::whole_layers(&spec);
        let budget = EngineBudget::new(&program, &spec, &settings, None);
        prop_assert!(budget.requested_bytes <= settings.memory_total_bytes);
        prop_assert!(budget.kv_bytes == 0 || budget.without_kv_bytes() + budget.kv_bytes == budget.requested_bytes);
        prop_assert!(!budget.assumed.is_empty() || settings.fraction.is_some());
        let larger = EngineSettings { memory_total_bytes: 2 * settings.memory_total_bytes, memory_free_bytes: 2 * settings.memory_total_bytes, max_num_seqs: Some(256), max_num_batched_tokens: Some(2048), ..settings };
        let same = EngineSettings { max_num_seqs: Some(256), max_num_batched_tokens: Some(2048), ..settings };
        let kv = |settings| EngineBudget::new(&program, &spec, settings, None).kv_bytes;
        prop_assert!(kv(&larger) >= kv(&same));
    }

    #[test]
    fn logs_of_any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2000), cut in any::<prop::sample::Index>()) {
        let _ = parse_boot_log(&bytes);
        let mut log = b"Available KV cache memory: 51.04 GiB\nGPU KV cache size: 418,112 tokens\n# GPU blocks: 12, # CPU blocks: 3\n".to_vec();
        let at = cut.index(log.len());
        log.splice(at..at, bytes);
        if let Ok(found) = parse_boot_log(&log) {
            let calibration = found.calibration(Some(80 * GIB), Some(0.9));
            prop_assert!(calibration.bytes_per_token.is_none_or(f64::is_finite));
        }
    }
}

#[test]
fn defaults_follow_version_and_card() {
    let pool = PoolOptions::new(1, DType::BF16);
    let settings = |minor, gib| EngineSettings {
        version: Version::new(0, minor, 0),
        ..EngineSettings::new(Engine::Vllm, gib * GIB, 4096, pool)
    };
    assert_eq!((settings(11, 80).gpu_memory_utilization(), settings(22, 80).gpu_memory_utilization()), (0.9, 0.92));
    assert_eq!((settings(11, 80).max_num_seqs(), settings(11, 24).max_num_seqs()), (1024, 256));
    assert_eq!(EngineSettings { a100: true, ..settings(11, 80) }.max_num_seqs(), 256);
    assert_eq!((settings(11, 80).max_num_batched_tokens(), settings(11, 24).max_num_batched_tokens()), (8192, 2048));
    // Graphs are subtracted since 0.21.
    let spec = fixtures::spec("Qwen__Qwen3-8B");
    let names = |minor| {
        let budget = EngineBudget::new(&families::whole_layers(&spec), &spec, &settings(minor, 80), None);
        budget.terms.iter().map(|t| t.name).collect::<Vec<_>>()
    };
    assert!(!names(20).contains(&"CUDA graph estimate") && names(21).contains(&"CUDA graph estimate"));
}

#[test]
fn sglang_prints_its_own_lines() {
    let line = |name: &str| {
        let spec = fixtures::spec(name);
        let settings = EngineSettings::new(Engine::Sglang, 140 * GIB, 32_768, PoolOptions::new(8, DType::BF16));
        let budget = EngineBudget::new(&families::whole_layers(&spec), &spec, &settings, None);
        assert!(budget.assumed.iter().any(|fact| fact.0.starts_with("mem_fraction_static 0.")), "{:?}", budget.assumed);
        let tokens = budget.printed.tokens;
        let read = parse_boot_log(budget.lines().as_bytes()).unwrap();
        assert_eq!(
            (read.engine, read.kv_tokens, read.max_model_len),
            (Some(Engine::Sglang), Some(tokens), Some(32_768))
        );
        budget.lines()
    };
    let llama = line("meta-llama__Meta-Llama-3.1-70B");
    assert!(llama.contains(" GB, V size: ") && llama.contains("K size: "), "{llama}");
    let kimi = line("moonshotai__Kimi-K2-Instruct");
    assert!(kimi.contains(", KV size: ") && !kimi.contains("V size: 0"), "{kimi}");
}

#[test]
fn the_printed_lines_are_the_engines() {
    let spec = fixtures::spec("Qwen__Qwen3-8B");
    let groups = Groups::new(&spec, PoolOptions::new(1, DType::BF16));
    let printed = Printed::new(&groups, 10 * GIB, 32_768, PrintRule::of(Version::new(0, 11, 0)));
    // 10 GiB of 2,359,296-byte blocks are 4,551.
    assert_eq!(
        printed.to_string(),
        "Available KV cache memory: 10.00 GiB\nGPU KV cache size: 72,816 tokens\n\
         Maximum concurrency for 32,768 tokens per request: 2.22x"
    );
    // Activations of 1,024 sequences as vLLM 0.11 logged them on H100: 5.56 GiB for Qwen3-0.6B.
    let small = fixtures::spec("Qwen__Qwen3-0.6B");
    let settings = EngineSettings {
        version: Version::new(0, 11, 0),
        ..EngineSettings::new(Engine::Vllm, (79.18 * GIB as f64) as u64, 16_000, PoolOptions::new(1, DType::BF16))
    };
    let budget = EngineBudget::new(&families::whole_layers(&small), &small, &settings, None);
    let peak = budget.terms.iter().find(|t| t.name == "peak activations").unwrap().bytes as f64 / GIB as f64;
    assert!((peak - 5.56).abs() < 0.05, "{peak}");
    assert!((budget.kv_bytes as f64 / GIB as f64 - 64.45).abs() < 0.2, "{}", budget.kv_bytes);
}
