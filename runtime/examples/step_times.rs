//! What steps of given contents cost on a card: decodes, prompts, and both together, with random weights.
//!
//!     cargo run --release -p mserve-runtime --example step_times -- CONFIG_JSON [MAX_NUM_SEQS] [MAX_NUM_BATCHED_TOKENS]
#![allow(clippy::unwrap_used)]

use mserve_planner::model::parse_config;
use mserve_runtime::cuda::{CudaBackend, CudaOptions, WeightOrigin};
use mserve_runtime::engine::{Backend, RowSampling, SamplingParams, StepBatch, StepSequence};
use std::sync::Arc;
use std::time::Instant;

/// Contexts of decodes.
const CONTEXT: usize = 1100;
const MAX_MODEL_LEN: usize = 2048;
const REPEATS: usize = 7;

/// Prompt pieces as (tokens before, tokens now, asks for output).
type Pieces = Vec<(usize, usize, bool)>;

fn whole(count: usize, len: usize) -> Pieces {
    vec![(0, len, true); count]
}

fn batch(block_size: usize, decodes: usize, pieces: &Pieces, params: &Arc<SamplingParams>) -> StepBatch {
    let mut batch = StepBatch::default();
    let rows = std::iter::repeat_n((CONTEXT - 1, 1, true), decodes).chain(pieces.iter().copied());
    let mut next_block = 0_u32;
    for (before, len, wants_output) in rows {
        let end = before + len;
        let blocks = end.div_ceil(block_size) as u32;
        let table_start = batch.block_tables.len();
        batch.block_tables.extend(next_block..next_block + blocks);
        batch.sequences.push(StepSequence {
            query_start: batch.token_ids.len(),
            query_len: len,
            context_len: end,
            block_table: table_start..batch.block_tables.len(),
            wants_output,
            sampling: Some(RowSampling {
                params: params.clone(),
                seed: 1,
                step: 0,
                prompt_token_ids: Arc::from([]),
                output_token_ids: Vec::new(),
                forbidden_token_ids: Vec::new(),
            }),
        });
        for position in before..end {
            batch.token_ids.push((position * 7919 % 100_000) as u32);
            batch.positions.push(position as u32);
            batch.slot_mapping.push(next_block * block_size as u32 + position as u32);
        }
        next_block += blocks;
    }
    batch
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, otherwise: usize| args.get(at).map_or(otherwise, |text| text.parse().unwrap());
    let spec = parse_config(&std::fs::read(&args[0]).unwrap()).unwrap();
    let (max_num_seqs, most) = (number(1, 272), number(2, 8448));
    let options = CudaOptions {
        max_model_len: Some(MAX_MODEL_LEN),
        max_num_seqs,
        max_num_batched_tokens: most,
        ..CudaOptions::default()
    };
    let mut backend = CudaBackend::load(&spec, &WeightOrigin::Random { seed: 1 }, &options, &mut |_, _| {}).unwrap();
    println!("loaded: {:?}", backend.timings());
    let params = Arc::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() });
    let block_size = backend.info().block_size;
    let with_rest = |count: usize, rest: usize| {
        let mut pieces = whole(count, 1024);
        pieces.push((0, rest, false));
        pieces
    };
    // As much as a step takes: prompts alone, and beside so many decodes.
    let full = |decodes: usize| {
        let rest = most - decodes;
        let mut pieces = whole(rest / 1024, 1024);
        pieces.extend((!rest.is_multiple_of(1024)).then_some((0, rest % 1024, false)));
        pieces
    };
    let in_parts = [(512, 512, true), (0, 512, false)];
    let cases: Vec<(&str, usize, Pieces)> = vec![
        ("decodes", 64, vec![]),
        ("decodes", 128, vec![]),
        ("decodes", 192, vec![]),
        ("decodes", 256, vec![]),
        ("decodes", 512, vec![]),
        ("decodes, launched for 2 prompt tokens", 256, vec![(0, 2, false)]),
        ("prompts", 0, whole(1, 1024)),
        ("prompts", 0, whole(2, 1024)),
        ("prompts", 0, whole(4, 1024)),
        ("prompts, a full step", 0, full(0)),
        ("prompts, less than full", 0, with_rest(6, 768)),
        ("prompts in parts", 0, whole(6, 1024).into_iter().chain(in_parts).collect()),
        ("both", 256, with_rest(0, 768)),
        ("both", 256, with_rest(1, 768)),
        ("both", 256, with_rest(3, 768)),
        ("both, a full step", 64, full(64)),
        ("both, a full step", 128, full(128)),
        ("both, a full step", 256, full(256)),
    ];
    println!("| step | decodes | prompt tokens | device ms | submit ms | us a token |\n|---|--:|--:|--:|--:|--:|");
    for (name, decodes, pieces) in cases {
        let prompt_tokens: usize = pieces.iter().map(|piece| piece.1).sum();
        if decodes + pieces.len() > max_num_seqs || decodes + prompt_tokens > most {
            continue;
        }
        let step = batch(block_size, decodes, &pieces, &params);
        let (mut device, mut submit) = (Vec::new(), Vec::new());
        // One step ahead, as the engine does it.
        backend.submit(&step).unwrap();
        for _ in 0..REPEATS {
            let begin = Instant::now();
            backend.submit(&step).unwrap();
            submit.push(begin.elapsed().as_secs_f64() * 1e3);
            backend.collect().unwrap();
            device.push(backend.last_step_time().unwrap().as_secs_f64() * 1e3);
        }
        backend.collect().unwrap();
        let (device, submit) = (median(device), median(submit));
        let each = device * 1e3 / (decodes + prompt_tokens) as f64;
        println!("| {name} | {decodes} | {prompt_tokens} | {device:.3} | {submit:.3} | {each:.2} |");
    }
}
