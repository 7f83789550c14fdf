//! Steps made by hand: what the engine's scheduler would make of a few texts.
#![allow(clippy::unwrap_used)]

use mserve_planner::model::{ModelSpec, parse_config};
use mserve_runtime::cpu::{CpuBackend, CpuOptions};
use mserve_runtime::engine::{Backend, StepBatch, StepSequence};
use mserve_runtime::weights::Checkpoint;
use std::path::{Path, PathBuf};

pub fn golden_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens").join(name)
}

pub fn golden(name: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(golden_dir(name).join("golden.json")).unwrap()).unwrap()
}

pub fn options() -> CpuOptions {
    CpuOptions { threads: 2, block_size: 4, kv_cache_bytes: 8 << 20, max_num_batched_tokens: 64, ..Default::default() }
}

pub fn spec(dir: &Path) -> ModelSpec {
    parse_config(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
}

pub fn load(name: &str, spec: &ModelSpec) -> CpuBackend {
    let checkpoint = Checkpoint::open(&golden_dir(name)).unwrap();
    CpuBackend::load(spec, &checkpoint, &options(), &mut |_, _| {}).unwrap()
}

/// A piece of one text: `tokens[start..end]`, with everything before `start` already in the cache.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// Which part of the pool the text has: its blocks lie scattered, and no two sequences share one.
    pub sequence: usize,
    pub tokens: &'a [u32],
    pub start: usize,
    pub end: usize,
}

/// How many sequences the scattered block tables below make room for.
const SEQUENCES: usize = 8;

/// One step over `chunks`; all of them want output.
pub fn batch(chunks: &[Chunk<'_>], block_size: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    for chunk in chunks {
        let block = |i: usize| ((i * SEQUENCES) + (chunk.sequence + 3 * i) % SEQUENCES) as u32;
        let first_table = batch.block_tables.len();
        batch.block_tables.extend((0..chunk.end.div_ceil(block_size)).map(block));
        batch.sequences.push(StepSequence {
            query_start: batch.token_ids.len(),
            query_len: chunk.end - chunk.start,
            context_len: chunk.end,
            block_table: first_table..batch.block_tables.len(),
            wants_output: true,
            sampling: None,
        });
        for position in chunk.start..chunk.end {
            batch.token_ids.push(chunk.tokens[position]);
            batch.positions.push(position as u32);
            batch.slot_mapping.push(block(position / block_size) * block_size as u32 + (position % block_size) as u32);
        }
    }
    batch
}

/// Output rows of one step.
pub fn rows(backend: &mut CpuBackend, chunks: &[Chunk<'_>]) -> Vec<Vec<f32>> {
    let (block_size, width) = (backend.info().block_size, backend.info().output_width);
    let rows = backend.forward_rows(&batch(chunks, block_size)).unwrap();
    rows.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

pub fn whole(sequence: usize, tokens: &[u32]) -> Chunk<'_> {
    Chunk { sequence, tokens, start: 0, end: tokens.len() }
}

pub fn max_abs_error(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    // NaN must fail a comparison, so it counts as infinitely wrong.
    ours.iter()
        .zip(theirs)
        .map(|(a, b)| (a - b).abs())
        .map(|e| if e.is_nan() { f32::INFINITY } else { e })
        .fold(0.0, f32::max)
}
