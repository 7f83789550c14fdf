//! Every config of the corpus: its caches, worked out from the file by the formulas alone, and its parameters against
//! what was published. The table is `fixtures/golden.csv`.
#![allow(clippy::unwrap_used)]

use crate::fixtures::{self, spec};
use mserve_planner::memory::{CacheKind, KvCacheDtype, KvLayout, SlidingLayers, layer_caches, rank_weight_bytes};
use mserve_planner::model::{DType, ModelSpec, Positions, Task, families, work};
use mserve_planner::tensor_parallel;
use std::collections::BTreeMap;

const CSV: &str = include_str!("../fixtures/golden.csv");

struct Row {
    config: String,
    /// `12 full x 2048; 36 state x 1097728`: layers, kind, bytes of a layer's entry at TP 1 in two bytes.
    caches: String,
    /// As printed: `671B`, `7615616512`; empty where nobody says.
    total: String,
    active: String,
    /// What the active figure leaves out (`lookup`: the embedding, `bare`: the head too), or GLM-4.5's own convention.
    counted: String,
    /// Parameters of the total that config.json's language model does not have: an image tower.
    outside: u64,
    source: String,
}

fn rows() -> Vec<Row> {
    CSV.lines().skip(1).map(row).collect()
}

fn row(line: &str) -> Row {
    let [config, caches, total, active, counted, outside, source] = fixtures::csv_fields(line).try_into().unwrap();
    Row { config, caches, total, active, counted, outside: outside.parse().unwrap(), source }
}

/// A causal checkpoint that is served as an embedding model still holds its head, and could generate.
fn generating(config: &str) -> ModelSpec {
    spec(config).with_task(Task::Generate)
}

/// In two bytes, whatever the checkpoint asks for.
fn layout(spec: &ModelSpec, tp: u64) -> KvLayout {
    KvLayout::new(spec, tp, DType::BF16, 16, SlidingLayers::KeepWindow)
}

pub fn caches(spec: &ModelSpec) -> String {
    let mut counts: BTreeMap<(String, u64), u64> = BTreeMap::new();
    for cache in layer_caches(spec, 1, DType::BF16.into()).into_iter().flatten() {
        let kind = match cache.kind {
            CacheKind::Full => "full".to_owned(),
            CacheKind::Sliding { window_tokens } => format!("sliding({window_tokens})"),
            CacheKind::Chunked { chunk_tokens } => format!("chunked({chunk_tokens})"),
            CacheKind::Compressed { tokens_per_entry } => format!("compressed({tokens_per_entry})"),
            CacheKind::Indexer => "indexer".to_owned(),
            CacheKind::State => "state".to_owned(),
        };
        *counts.entry((kind, cache.bytes_per_entry)).or_default() += 1;
    }
    let parts: Vec<_> = counts.iter().map(|((kind, bytes), layers)| format!("{layers} {kind} x {bytes}")).collect();
    parts.join("; ")
}

#[test]
fn caches_are_the_golden_ones() {
    for row in rows() {
        assert_eq!(caches(&generating(&row.config)), row.caches, "{}", row.config);
        let served = spec(&row.config);
        let one_shot = served.task != Task::Generate;
        assert_eq!(layout(&served, 1).is_empty(), one_shot, "{}", row.config);
    }
}

/// Value and half of what its last digit stands for.
fn published(text: &str) -> (f64, f64) {
    // "About": the last digit may be one off.
    if let Some(about) = text.strip_prefix('~') {
        let (value, half) = published(about);
        return (value, 2.0 * half);
    }
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'T') => (&text[..text.len() - 1], 1e12),
        Some(b'B') => (&text[..text.len() - 1], 1e9),
        _ => (text, 1.0),
    };
    let decimals = digits.split_once('.').map_or(0, |(_, d)| d.len());
    (digits.parse::<f64>().unwrap() * unit, 0.5 * unit * 10_f64.powi(-(decimals as i32)))
}

/// Within 0.5 %, or within the digits that were published.
pub fn close(ours: f64, text: &str) -> bool {
    let (value, half_digit) = published(text);
    (ours - value).abs() <= (0.005 * value).max(half_digit)
}

#[test]
fn parameters_are_within_half_a_percent_of_the_published_figures() {
    let (mut totals, mut actives, mut off) = (0, 0, Vec::new());
    for row in rows() {
        // A reward or embedding model is published without the head that it does not have.
        let spec = spec(&row.config);
        let spec = if spec.architecture.ends_with("ForCausalLM") { spec.with_task(Task::Generate) } else { spec };
        let program = families::program(&spec);
        let table = spec.vocab_size * spec.hidden_size;
        if !row.total.is_empty() {
            let ours = match row.counted.as_str() {
                "glm" => program.parameters() + families::mtp_parameters(&spec) - 2 * table,
                _ => program.parameters() + row.outside,
            };
            if !close(ours as f64, &row.total) {
                off.push(format!("{}: {ours} against {} ({})", row.config, row.total, row.source));
            }
            let deviation = 100.0 * (ours as f64 / published(&row.total).0 - 1.0);
            println!("{:<55} {ours:>16} {:>14} {deviation:+.2} %", row.config, row.total);
            totals += 1;
        }
        if !row.active.is_empty() {
            let left_out = match row.counted.as_str() {
                "lookup" => table,
                "bare" | "glm" => 2 * table,
                _ => 0,
            };
            let ours = work::active_parameters(&program, &spec) - left_out;
            if !close(ours as f64, &row.active) {
                off.push(format!("{}: {ours} active against {} ({})", row.config, row.active, row.source));
            }
            let deviation = 100.0 * (ours as f64 / published(&row.active).0 - 1.0);
            println!("{:<55} {ours:>16} {:>14} {deviation:+.2} % active", row.config, row.active);
            actives += 1;
        }
    }
    assert!(off.is_empty(), "{}", off.join("\n"));
    println!("{totals} totals and {actives} active figures");
    assert!(totals >= 112 && actives >= 40, "{totals} {actives}");
}

#[test]
fn every_fixture_has_a_golden_row() {
    let mut configs: Vec<_> = rows().into_iter().map(|row| row.config).collect();
    configs.sort();
    assert_eq!(fixtures::names(), configs);
}

#[test]
fn vicuna_takes_0_78125_mib_a_token() {
    let bytes = layout(&spec("lmsys__vicuna-13b-v1.5-16k"), 1).bytes_per_token();
    assert_eq!(bytes as f64 / f64::from(1 << 20), 0.78125);
}

/// Config, TP size, bytes of a token on one rank. Heads are divided, then replicated; latents and indexers are whole.
const RANKS: &[(&str, u64, u64)] = &[
    ("meta-llama__Meta-Llama-3-70B-Instruct", 8, 40_960),
    ("meta-llama__Meta-Llama-3-70B-Instruct", 16, 40_960),
    ("meta-llama__Llama-4-Scout-17B-16E-Instruct", 8, 24_576),
    ("Qwen__Qwen3-235B-A22B", 4, 48_128),
    ("Qwen__Qwen3-235B-A22B", 8, 48_128),
    ("Qwen__Qwen2.5-72B", 16, 40_960),
    ("deepseek-ai__DeepSeek-R1", 1, 70_272),
    ("deepseek-ai__DeepSeek-R1", 8, 70_272),
    ("moonshotai__Kimi-K2-Instruct", 16, 70_272),
    ("zai-org__GLM-5", 8, 100_152),
    ("google__gemma-2-2b", 8, 26_624),
];

#[test]
fn ranks_share_heads_and_repeat_latents() {
    for &(config, tp, bytes) in RANKS {
        assert_eq!(layout(&spec(config), tp).bytes_per_token(), bytes, "{config} at TP {tp}");
    }
    // fp8: whole elements for dense latents, packed ones with rope in bf16 for sparse attention.
    let fp8 =
        |config: &str| KvLayout::new(&spec(config), 8, DType::F8E4M3, 64, SlidingLayers::KeepWindow).bytes_per_token();
    assert_eq!(fp8("deepseek-ai__DeepSeek-R1"), 61 * 576);
    assert_eq!(fp8("zai-org__GLM-5"), 61_464);
    // States are divided: 32 heads of 128 x 128 and the convolution's channels, in two bytes.
    let next = spec("Qwen__Qwen3-Next-80B-A3B-Instruct-FP8");
    assert_eq!(layout(&next, 1).bytes_per_sequence(), 36 * 1_097_728);
    assert_eq!(layout(&next, 4).bytes_per_sequence(), 36 * 1_097_728 / 4);
}

#[test]
fn ranks_together_hold_at_least_the_model() {
    for row in rows() {
        let spec = spec(&row.config);
        let program = families::program(&spec);
        let whole = rank_weight_bytes(&program, &spec, 1);
        for tp in tensor_parallel::legal_sizes(&spec, 16) {
            let sum = tp * rank_weight_bytes(&program, &spec, tp);
            assert!(sum >= whole, "{} at TP {tp}: {sum} < {whole}", row.config);
        }
    }
}

/// Config, bytes of the checkpoint's files (without MTP layers and towers), where from, tolerance.
const STORED: &[(&str, f64, &str, f64)] = &[
    ("Qwen__Qwen2.5-14B-Instruct-AWQ", 9.98e9, "three files of 3.96, 3.99 and 2.04 GB", 0.01),
    ("openai__gpt-oss-120b", 65.25e9, "fifteen files, 65.2 GB: MXFP4 experts, the rest in bf16", 0.005),
    ("moonshotai__Kimi-K2.6", 594e9, "about 594 GB: int4 experts in groups of 32", 0.005),
    ("deepseek-ai__DeepSeek-V3", 673e9, "688.6 GB with the MTP layer, its embedding and head", 0.005),
    ("Qwen__Qwen3-235B-A22B-FP8", 236.4e9, "a byte a parameter, embedding and head in two", 0.005),
];

#[test]
fn quantised_checkpoints_take_their_packed_size() {
    for &(config, stored, source, tolerance) in STORED {
        let spec = spec(config);
        let bytes = rank_weight_bytes(&families::program(&spec), &spec, 1);
        assert!((bytes as f64 / stored - 1.0).abs() < tolerance, "{config}: {bytes} against {stored} ({source})");
    }
    // FP8: a byte for every projection, two for embedding and head.
    let fp8 = spec("Qwen__Qwen3-32B-FP8-Static-PerTensor");
    let bytes = rank_weight_bytes(&families::program(&fp8), &fp8, 1);
    let (embedding, all) = (2 * 151_936 * 5120, 32_762_123_264_u64);
    let expected = 2 * embedding + (all - embedding);
    assert!((bytes as f64 / expected as f64 - 1.0).abs() < 0.01, "{bytes} against {expected}");
    assert_eq!(KvCacheDtype::Auto.resolve(&fp8), DType::F8E4M3);
}

#[test]
fn float32_checkpoints_are_planned_in_two_bytes() {
    let spec = spec("google__gemma-2-2b");
    assert_eq!(spec.dtype, DType::F32);
    assert_eq!(rank_weight_bytes(&families::program(&spec), &spec, 1), 2 * 2_614_341_888);
    assert_eq!(KvCacheDtype::Auto.resolve(&spec), DType::BF16);
}

#[test]
fn programs_and_their_work_agree() {
    for row in rows() {
        let spec = spec(&row.config);
        let program = families::program(&spec);
        for tp in [1, 8].into_iter().filter(|&tp| tensor_parallel::check(&spec, tp).is_ok()) {
            let work = work::work(&program, &spec, tp, DType::BF16.into());
            let bytes: u64 = work.iter().map(|op| op.weight_bytes).sum();
            let held = rank_weight_bytes(&program, &spec, tp);
            // A tied head is read again; vectors of norms and tables of positions are no work.
            let table = spec.vocab_size * spec.hidden_size * 2 / tp;
            let tied =
                if spec.tied_embeddings && spec.task == Task::Generate { table + 64 * spec.hidden_size * 2 } else { 0 };
            let spare = held / 200
                + 20_000_000
                + match spec.positions {
                    Positions::Learned { rows, .. } => rows * spec.hidden_size * 2,
                    Positions::Rope => 0,
                };
            assert!(bytes.abs_diff(held) <= tied + spare, "{} at TP {tp}: {bytes} against {held}", row.config);
        }
        // Two operations for each active parameter that is multiplied.
        let flops: u64 = work::work(&program, &spec, 1, DType::BF16.into()).iter().map(|op| op.flops_per_row).sum();
        let active = work::active_parameters(&program, &spec);
        let looked_up =
            if spec.tied_embeddings && spec.task == Task::Generate { 0 } else { spec.vocab_size * spec.hidden_size };
        let multiplied = 2 * (active - looked_up);
        assert!(
            flops >= multiplied * 9 / 10 && flops <= multiplied * 12 / 10,
            "{}: {flops} against {multiplied}",
            row.config
        );
    }
}
