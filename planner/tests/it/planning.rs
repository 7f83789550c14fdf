//! What a plan says, and what must hold for every plan.
#![allow(clippy::unwrap_used)]

use crate::fixtures;
use mserve_planner::gpus;
use mserve_planner::memory::{EngineLimits, KvCacheDtype, SlidingLayers, TermKind, WeightSource};
use mserve_planner::model::ModelSpec;
use mserve_planner::plan::{
    Accounting, Card, Change, Demand, Plan, PlanError, PlanRequest, RejectedReason, across_cards, plan,
};
use mserve_planner::units::{GIB, MIB};
use proptest::prelude::*;

const VICUNA: &str = "lmsys__vicuna-13b-v1.5-16k";
const LLAMA_8B: &str = "meta-llama__Meta-Llama-3.1-8B";
const LLAMA_70B: &str = "meta-llama__Meta-Llama-3.1-70B";

fn request<'a>(spec: &'a ModelSpec, memory_total_bytes: u64, gpus: u64) -> PlanRequest<'a> {
    PlanRequest {
        model_name: "model",
        spec,
        weights: WeightSource::Program,
        card: Card { name: "card".to_owned(), memory_total_bytes },
        gpus,
        tensor_parallel_size: None,
        limits: EngineLimits::for_model(spec),
        demand: Demand::of(1536, 512),
        accounting: Accounting::default(),
        kv_cache_dtype: KvCacheDtype::Auto,
        sliding: SlidingLayers::KeepWindow,
    }
}

fn on<'a>(spec: &'a ModelSpec, gpu: &str, gpus: u64) -> PlanRequest<'a> {
    PlanRequest { card: Card::from(gpus::find(gpu).unwrap()), ..request(spec, 1, gpus) }
}

#[test]
fn vicuna_on_eight_h100() {
    let spec = fixtures::spec(VICUNA);
    let plan = plan(&on(&spec, "h100", 8)).unwrap();
    assert_eq!(plan.model.kv_bytes_per_token, 819_200);
    let sizes: Vec<_> = plan.options.iter().map(|o| (o.tensor_parallel_size, o.replicas)).collect();
    assert_eq!(sizes, [(4, 2), (2, 4), (8, 1), (1, 8)]);
    let one = &plan.options[3];
    // 0.9 x 81,559 MiB - 24.24 GiB of weights - 1.6 GiB of overhead, in blocks of 12.5 MiB.
    assert_eq!(one.per_gpu.requested_bytes, (81_559 * MIB * 9).div_ceil(10));
    assert_eq!(one.num_blocks, one.per_gpu.kv_pool_bytes / (16 * 819_200));
    assert_eq!(one.full.requests_total, 8 * (one.num_blocks / 1024));
    assert_eq!(one.kv_cache_tokens, one.num_blocks * 16);
}

#[test]
fn a_plan_survives_its_own_json() {
    let spec = fixtures::spec("google__gemma-3-1b-it");
    let plan = plan(&on(&spec, "l4", 5)).unwrap();
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
    assert!(json.starts_with(r#"{"schema":2,"#));
}

/// Pools that vLLM logged, against ours. Columns: config, memory the driver reports (MiB), ratio, TP,
/// max_num_seqs, max_num_batched_tokens, logged pool of one GPU in GiB. Sources: memory breakdowns of vLLM 0.11 on H100
/// (Qwen3-0.6B and 32B; 1,024 sequences, the default from 70 GiB on), vLLM 0.26 on H200 (256 sequences).
const LOGGED: &[(&str, u64, f64, u64, u64, u64, f64)] = &[
    ("Qwen__Qwen3-0.6B", 81_559, 0.9, 1, 1024, 8192, 64.45),
    ("Qwen__Qwen3-32B", 81_559, 0.9, 2, 1024, 8192, 34.49),
    (LLAMA_8B, 143_771, 0.9, 1, 256, 8192, 108.81),
];

#[test]
fn pools_are_close_to_what_vllm_logged() {
    for &(config, memory_mib, ratio, tp, seqs, batched, logged_gib) in LOGGED {
        let spec = fixtures::spec(config);
        let mut request = request(&spec, memory_mib * MIB, tp);
        request.tensor_parallel_size = Some(tp);
        request.limits.gpu_memory_utilization = ratio;
        request.limits.max_num_seqs = seqs;
        request.limits.max_num_batched_tokens = batched;
        request.limits.max_model_len = 16_000;
        let pool = plan(&request).unwrap().options[0].per_gpu.kv_pool_bytes as f64 / GIB as f64;
        assert!((pool / logged_gib - 1.0).abs() < 0.03, "{config}: {pool:.2} GiB, logged {logged_gib}");
    }
}

#[test]
fn sliding_layers_cost_their_window() {
    // gemma-3-27b's groups in vLLM's planning: 10 full and 52 sliding layers share blocks of 10 layers, so that a
    // request takes ceil(L / 16) + 6 * (ceil((window - 1 + step) / 16) + 1) blocks.
    let text = r#"{"architectures":["Gemma3ForCausalLM"],"torch_dtype":"bfloat16","hidden_size":5376,
        "intermediate_size":21504,"num_hidden_layers":62,"num_attention_heads":32,"num_key_value_heads":16,
        "head_dim":128,"vocab_size":262208,"max_position_embeddings":131072,"sliding_window":1024}"#;
    let spec = mserve_planner::model::parse_config(text.as_bytes()).unwrap();
    let mut request = on(&spec, "b200", 1);
    let kept = plan(&request).unwrap();
    let option = &kept.options[0];
    assert_eq!(option.kv.block_bytes(), 16 * 10 * (2 * 16 * 128 * 2));
    assert_eq!(option.kv.blocks_per_request(131_072, 8192), 8192 + 6 * (9215_u64.div_ceil(16) + 1));
    request.sliding = SlidingLayers::KeepAll;
    let whole = plan(&request).unwrap();
    assert_eq!(whole.options[0].kv.blocks_per_request(131_072, 8192), 8192);
    assert_eq!(whole.options[0].kv.block_bytes(), 16 * 62 * (2 * 16 * 128 * 2));
    let per_replica = |plan: &Plan| plan.options[0].full.kv_per_replica.unwrap();
    assert!(per_replica(&kept) > 4.0 * per_replica(&whole));
    assert!(kept.notes.iter().any(|n| n.contains("52 of 62 layers keep their window")), "{:?}", kept.notes);
}

#[test]
fn encoders_take_no_cache() {
    let spec = fixtures::spec("BAAI__bge-reranker-v2-m3");
    let plan = plan(&on(&spec, "l4", 2)).unwrap();
    let best = &plan.options[0];
    assert_eq!((best.tensor_parallel_size, best.num_blocks, best.kv_cache_tokens), (1, 0, 0));
    assert_eq!(best.typical.kv_per_replica, None);
    // A step of 8,192 tokens holds four texts of 2,048.
    assert_eq!(best.typical.requests_total, 2 * 4);
    assert_eq!(best.per_gpu.term(TermKind::Sampler), 0);
}

#[test]
fn what_does_not_fit_says_what_would() {
    let spec = fixtures::spec(LLAMA_70B);
    let error = plan(&on(&spec, "rtx4090", 8)).unwrap_err();
    let PlanError::DoesNotFit(error) = error else { panic!("{error}") };
    assert_eq!(error.tensor_parallel_size, 8);
    assert!(error.needed_bytes > error.requested_bytes);
    assert_eq!(error.kv_bytes, 131_072 * 40_960);
    assert_eq!(error.changes[0], Change::KvCacheFp8);
    assert!(error.changes.contains(&Change::Gpus(16)), "{:?}", error.changes);
    assert!(error.changes.contains(&Change::Gpu("rtx5090")), "{:?}", error.changes);
    let shorter = error.changes.iter().find_map(|c| if let Change::MaxModelLen(n) = c { Some(*n) } else { None });
    // The length it names fits; one block more does not.
    let mut request = on(&spec, "rtx4090", 8);
    request.limits.max_model_len = shorter.unwrap();
    assert!(plan(&request).is_ok());
    request.limits.max_model_len += 16;
    assert!(plan(&request).is_err());
}

#[test]
fn arguments_out_of_range_are_named() {
    let spec = fixtures::spec(LLAMA_8B);
    let good = on(&spec, "h100", 8);
    let refused = |change: &dyn Fn(&mut PlanRequest<'_>)| {
        let mut request = good.clone();
        change(&mut request);
        plan(&request).unwrap_err().to_string()
    };
    assert!(refused(&|r| r.gpus = 0).contains("gpus is 0"));
    assert!(refused(&|r| r.gpus = u64::MAX).contains("expected 1 to 1024"));
    assert!(refused(&|r| r.limits.max_model_len = 131_073).contains("expected 1 to 131072"));
    for ratio in [0.0, -1.0, 1.01, f64::NAN, f64::INFINITY] {
        assert!(refused(&|r| r.limits.gpu_memory_utilization = ratio).contains("gpu_memory_utilization"));
    }
    assert!(refused(&|r| r.limits.max_num_seqs = 0).contains("max_num_seqs is 0"));
    assert!(refused(&|r| r.tensor_parallel_size = Some(16)).contains("expected 1 to 8"));
    let illegal = refused(&|r| r.tensor_parallel_size = Some(3));
    assert!(illegal.contains("num_attention_heads 32 does not divide into 3 ranks; possible: 1, 2, 4, 8"), "{illegal}");
}

#[test]
fn quantised_rows_are_cut_between_groups() {
    // 13,824 / 8 = 1,728 columns a rank: not whole groups of 128; 13,824 / 4 = 3,456 = 27 groups.
    let spec = fixtures::spec("Qwen__Qwen2.5-14B-Instruct-AWQ");
    let plan = plan(&on(&spec, "h100", 8)).unwrap();
    let mut sizes: Vec<_> = plan.options.iter().map(|o| o.tensor_parallel_size).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [1, 2, 4]);
    assert!(matches!(&plan.rejected[..], [r] if r.tensor_parallel_size == 8
        && matches!(&r.reason, RejectedReason::Indivisible(i) if i.dimension.contains("groups"))));
}

#[test]
fn the_checkpoints_own_size_replaces_the_programs() {
    let spec = fixtures::spec(LLAMA_8B);
    let mut request = on(&spec, "h100", 2);
    request.weights = WeightSource::Checkpoint { bytes: 20 * GIB };
    let plan = plan(&request).unwrap();
    let of = |tp| plan.options.iter().find(|o| o.tensor_parallel_size == tp).unwrap().per_gpu.term(TermKind::Weights);
    assert_eq!(of(1), 20 * GIB);
    assert!((of(2) as f64 / (10 * GIB) as f64 - 1.0).abs() < 0.01);
    assert!(plan.notes.iter().any(|n| n.contains("20.00 GiB")), "{:?}", plan.notes);
}

fn configs() -> impl Strategy<Value = String> {
    proptest::sample::select(fixtures::names())
}

/// Total requests of typical length of the best option; 0 when nothing fits.
fn best(request: &PlanRequest<'_>) -> u64 {
    match plan(request) {
        Ok(plan) => plan.options[0].typical.requests_total,
        Err(PlanError::DoesNotFit(_)) => 0,
        Err(error) => panic!("{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn more_memory_or_gpus_never_hold_less(
        config in configs(),
        memory_gib in 4_u64..200,
        more_gib in 0_u64..100,
        gpus in 1_u64..9,
        more_gpus in 0_u64..8,
        max_model_len in 256_u64..32_768,
    ) {
        let spec = fixtures::spec(&config);
        let mut small = request(&spec, memory_gib * GIB, gpus);
        small.limits = small.limits.with_max_model_len(&spec, max_model_len.min(spec.max_position_embeddings));
        let mut large = small.clone();
        large.card.memory_total_bytes += more_gib * GIB;
        large.gpus += more_gpus;
        prop_assert!(best(&large) >= best(&small));
    }

    #[test]
    fn every_option_fits_and_adds_up(config in configs(), memory_gib in 4_u64..200, gpus in 1_u64..17) {
        let spec = fixtures::spec(&config);
        let request = request(&spec, memory_gib * GIB, gpus);
        let Ok(plan) = plan(&request) else { return Ok(()) };
        let whole = plan.model.weights_bytes;
        for o in &plan.options {
            let budget = &o.per_gpu;
            prop_assert!(budget.without_kv_bytes() + budget.kv_pool_bytes <= budget.requested_bytes);
            prop_assert!(budget.requested_bytes <= budget.total_bytes);
            prop_assert!(o.num_blocks * o.kv.block_bytes() <= budget.kv_pool_bytes);
            prop_assert!(o.kv.is_empty() || o.full.requests_per_replica >= 1);
            prop_assert_eq!(o.gpus_used, o.replicas * o.tensor_parallel_size);
            prop_assert_eq!(o.gpus_used + o.gpus_idle, gpus);
            prop_assert!(budget.term(TermKind::Weights) * o.tensor_parallel_size >= whole);
        }
        let totals: Vec<_> = plan.options.iter().map(|o| o.typical.requests_total).collect();
        prop_assert!(totals.is_sorted_by(|a, b| a >= b));
    }
}

#[test]
fn every_common_card_has_a_row() {
    let spec = fixtures::spec(LLAMA_70B);
    let common = || gpus::GPUS.iter().filter(|gpu| gpu.common);
    let rows = across_cards(&on(&spec, "h100", 2), common()).unwrap();
    assert_eq!(rows.len(), common().count());
    let fits = |name: &str| rows.iter().find(|r| r.card.name.contains(name)).unwrap().best.is_some();
    assert!(fits("H200") && !fits("T4"));
    // Where it does not fit, the longest sequence that does is told.
    for row in rows.iter().filter(|row| row.best.is_none() && row.max_model_len_that_fits > 0) {
        let mut request = PlanRequest { card: row.card.clone(), ..on(&spec, "h100", 2) };
        request.limits.max_model_len = row.max_model_len_that_fits;
        assert!(plan(&request).is_ok(), "{}", row.card.name);
    }
    assert!(rows.iter().any(|row| row.best.is_none() && row.max_model_len_that_fits > 0));
}
