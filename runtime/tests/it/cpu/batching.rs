//! A sequence's result does not depend on what runs beside it or on how its prompt is cut.
#![allow(clippy::unwrap_used)]

use super::steps::{Chunk, batch, golden, golden_dir, load, options, rows, spec, whole};
use mserve_planner::model::{ModelSpec, Pooling, Task};
use mserve_runtime::cpu::{CpuBackend, CpuOptions, LoadError, WeightFormat};
use mserve_runtime::engine::Backend;
use mserve_runtime::weights::{RandomWeights, StoredType};
use serde::Deserialize;
use std::path::Path;

const DECODERS: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

fn texts(name: &str) -> Vec<Vec<u32>> {
    Deserialize::deserialize(&golden(name)["input_ids"]).unwrap()
}

#[test]
fn batch_single_and_chunked_prefill_agree_bit_for_bit() {
    for name in DECODERS {
        let ids = texts(name);
        let mut backend = load(name, &spec(&golden_dir(name)));
        let chunks: Vec<_> = ids.iter().enumerate().map(|(i, ids)| whole(i, ids)).collect();
        let together = rows(&mut backend, &chunks);
        for (i, ids) in ids.iter().enumerate() {
            assert_eq!(rows(&mut backend, &[whole(i, ids)])[0], together[i], "{name}, text {i} alone");
        }
        let long = &ids[0];
        for size in [1, 3, 7, 20] {
            let mut last = Vec::new();
            for start in (0..long.len()).step_by(size) {
                let end = (start + size).min(long.len());
                // A decode row of another sequence runs beside each chunk.
                let other = Chunk { sequence: 1, tokens: &ids[1], start: ids[1].len() - 1, end: ids[1].len() };
                last = rows(&mut backend, &[other, Chunk { sequence: 6, tokens: long, start, end }]).pop().unwrap();
            }
            assert_eq!(last, together[0], "{name}, prefill in chunks of {size}");
        }
    }
}

#[test]
fn embeddings_do_not_depend_on_the_batch() {
    let ids = texts("bert");
    let spec = spec(&golden_dir("bert")).with_task(Task::Embed { pooling: Pooling::Mean });
    let mut backend = load("bert", &spec);
    let chunks: Vec<_> = ids.iter().enumerate().map(|(i, ids)| whole(i, ids)).collect();
    let together = rows(&mut backend, &chunks);
    for (i, ids) in ids.iter().enumerate() {
        assert_eq!(rows(&mut backend, &[whole(i, ids)])[0], together[i]);
    }
}

fn random_backend(spec: &ModelSpec, stored: StoredType, weights: WeightFormat, threads: usize) -> CpuBackend {
    let options = CpuOptions { weights, threads, max_num_batched_tokens: 512, ..options() };
    CpuBackend::load(spec, &RandomWeights { seed: 7, stored }, &options, &mut |_, _| {}).unwrap()
}

#[test]
fn the_number_of_threads_changes_nothing_and_long_prefill_shares_out_tokens() {
    let spec = spec(&golden_dir("llama"));
    // Long enough that products share out tokens with one thread and panels with four.
    let ids: Vec<u32> = (0..200).map(|i| (i * 37 % 128) as u32).collect();
    let mut results: Vec<_> = [1, 2, 4]
        .iter()
        .map(|&threads| {
            rows(&mut random_backend(&spec, StoredType::BF16, WeightFormat::Auto, threads), &[whole(0, &ids)])
        })
        .collect();
    let first = results.remove(0);
    assert!(first[0].iter().all(|v| v.is_finite()));
    for other in results {
        assert_eq!(first, other);
    }
}

/// Mean squared error over mean square.
fn nmse(ours: &[f32], exact: &[f32]) -> f32 {
    let square = |v: f32| v * v;
    ours.iter().zip(exact).map(|(a, b)| square(a - b)).sum::<f32>() / exact.iter().map(|&v| square(v)).sum::<f32>()
}

#[test]
fn weight_formats_agree_as_far_as_their_rounding_allows() {
    // The demo model's shape: wide enough for Q8_0, and padded by it.
    let spec = spec(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/demo-model"));
    let ids: Vec<u32> = (0..21).map(|i| (i * 5 % 128) as u32).collect();
    let run = |stored, weights| rows(&mut random_backend(&spec, stored, weights, 2), &[whole(0, &ids)]).remove(0);
    for stored in [StoredType::BF16, StoredType::F16] {
        // Widening is exact, so kernels of the stored type and of f32 do the same sums.
        assert_eq!(run(stored, WeightFormat::Auto), run(stored, WeightFormat::F32), "{stored:?}");
    }
    let exact = run(StoredType::F32, WeightFormat::Auto);
    // (format, bound): bf16 keeps 8 bits of mantissa, Q8_0 about 7 of the largest of 32 weights.
    for (format, bound) in [(WeightFormat::Bf16, 1e-4), (WeightFormat::Q8_0, 2e-3)] {
        let error = nmse(&run(StoredType::F32, format), &exact);
        assert!(error < bound && error > 0.0, "{format:?}: {error}");
    }
}

#[test]
fn a_step_that_cannot_be_is_an_error() {
    let ids = texts("llama");
    let mut backend = load("llama", &spec(&golden_dir("llama")));
    let good = || batch(&[whole(0, &ids[0])], 4);
    assert!(backend.step(&good()).is_ok());
    type Break = fn(&mut mserve_runtime::engine::StepBatch);
    let cases: [(&str, Break); 9] = [
        ("vocabulary", |b| b.token_ids[3] = 128),
        ("position", |b| b.positions[3] = 256),
        ("outside the pool", |b| b.slot_mapping[3] = u32::MAX),
        ("outside the pool", |b| b.block_tables[0] = u32::MAX),
        ("blocks for a context", |b| b.sequences[0].block_table = 0..1),
        ("outside the step's tables", |b| b.sequences[0].block_table = 0..1000),
        ("do not follow", |b| b.sequences[0].query_start = 1),
        ("cover", |b| b.sequences[0].query_len -= 1),
        ("no tokens", |b| *b = Default::default()),
    ];
    for (expected, wreck) in cases {
        let mut broken = good();
        wreck(&mut broken);
        let error = backend.step(&broken).unwrap_err();
        assert!(error.what.contains(expected) && !error.fatal, "{expected}: {error}");
    }
    assert!(backend.step(&good()).is_ok(), "a refused step leaves the backend usable");
}

#[test]
fn options_are_checked() {
    let spec = spec(&golden_dir("llama"));
    let load = |options: CpuOptions| {
        CpuBackend::load(&spec, &RandomWeights { seed: 7, stored: StoredType::F32 }, &options, &mut |_, _| {})
            .map(|_| ())
    };
    assert!(matches!(load(CpuOptions { threads: 0, ..options() }), Err(LoadError::Option { option: "threads", .. })));
    assert!(matches!(
        load(CpuOptions { max_model_len: Some(257), ..options() }),
        Err(LoadError::MaxModelLen { asked: 257, limit: 256 })
    ));
    let huge = load(CpuOptions { kv_cache_bytes: 1 << 50, ..options() });
    assert!(matches!(huge, Err(LoadError::DoesNotFit { .. })), "{huge:?}");
    assert!(matches!(load(CpuOptions { kv_cache_bytes: 100, ..options() }), Err(LoadError::KvCacheTooSmall { .. })));
}
