//! Timed runs: whole requests through the engine, and bare steps of the backend.

use anyhow::{anyhow, bail};
use mserve_runtime::cpu::{CpuBackend, CpuOptions};
use mserve_runtime::engine::{
    Backend, Engine, EngineConfig, EngineHandle, GenerateRequest, RowSampling, SamplingParams, StepBatch, StepSequence,
    TokenEvent, TokenStream,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Sizes of every request of a run.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    pub prompt_len: usize,
    pub output_len: usize,
}

/// What a run through the engine took.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// From submission until every request had its first token.
    pub prefill: Duration,
    /// From then until the last token of all.
    pub decode: Duration,
    /// Tokens that came in `decode`.
    pub decode_tokens: usize,
}

/// Bare decode steps timed for the backend's own figure; the median counts.
const BACKEND_STEPS: usize = 9;

/// An engine that takes the largest batch at once.
///
/// # Errors
/// When the engine cannot start.
pub fn engine(backend: CpuBackend, options: &CpuOptions, batches: &[usize]) -> anyhow::Result<EngineHandle> {
    let max_model_len = backend.info().max_model_len;
    let max_num_seqs = batches.iter().copied().max().unwrap_or(1);
    let config = EngineConfig {
        model_name: "bench".to_owned(),
        max_num_seqs,
        max_num_batched_tokens: options.max_num_batched_tokens,
        max_model_len,
        // All prompts wait at once, and the engine counts a quarter of the context for each place.
        max_num_queued_reqs: 4 * max_num_seqs,
        enable_prefix_caching: false,
    };
    Ok(Engine::start(Box::new(backend), config)?)
}

/// `batch` requests at once, each with its own random prompt, decoded greedily to their full length.
///
/// # Errors
/// When a request fails.
pub fn run(engine: &EngineHandle, batch: usize, workload: Workload) -> anyhow::Result<Timing> {
    let start = Instant::now();
    let streams = (0..batch)
        .map(|i| Ok(engine.generate(request(i, engine.info().vocab_size, workload))?))
        .collect::<anyhow::Result<Vec<TokenStream>>>()?;
    let times = std::thread::scope(|scope| {
        let readers: Vec<_> = streams.into_iter().map(|stream| scope.spawn(|| token_times(stream))).collect();
        let joined = readers.into_iter().map(|r| r.join().map_err(|_| anyhow!("a reader panicked"))?);
        joined.collect::<anyhow::Result<Vec<Vec<Instant>>>>()
    })?;
    let (Some(all_started), Some(end)) =
        (times.iter().filter_map(|t| t.first()).max(), times.iter().filter_map(|t| t.last()).max())
    else {
        bail!("no tokens came");
    };
    Ok(Timing {
        prefill: *all_started - start,
        decode: *end - *all_started,
        decode_tokens: times.iter().flatten().filter(|t| *t > all_started).count(),
    })
}

fn token_times(mut stream: TokenStream) -> anyhow::Result<Vec<Instant>> {
    let mut times = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            TokenEvent::Token(_) => times.push(Instant::now()),
            TokenEvent::Finished { .. } => break,
            TokenEvent::Failed(error) => return Err(error.into()),
        }
    }
    Ok(times)
}

fn request(i: usize, vocab_size: usize, workload: Workload) -> GenerateRequest {
    let params = SamplingParams {
        temperature: 0.0,
        max_tokens: workload.output_len,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    GenerateRequest {
        request_id: format!("bench-{i}"),
        prompt_token_ids: prompt(0, i, vocab_size, workload.prompt_len),
        params: Arc::new(params),
        eos_token_ids: Arc::new([]),
        choice_index: 0,
    }
}

/// Random ids, the same for the same seed and number.
pub fn prompt(seed: u64, i: usize, vocab_size: usize, len: usize) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(seed.wrapping_mul(1_000_003).wrapping_add(i as u64));
    (0..len).map(|_| random.u32(0..vocab_size as u32)).collect()
}

/// Median time of one decode step of `batch` sequences without the engine around it, greedy choice included, after
/// their prompts have been computed.
///
/// # Errors
/// When a step fails.
pub fn backend_step(backend: &mut CpuBackend, batch: usize, workload: Workload) -> anyhow::Result<Duration> {
    let vocab_size = backend.info().vocab_size;
    for sequence in 0..batch {
        let tokens = prompt(0, sequence, vocab_size, workload.prompt_len);
        // In pieces, as the engine's token budget would cut them.
        for (piece, tokens) in tokens.chunks(512).enumerate() {
            let rows = [(sequence, piece * 512, tokens)];
            backend.step(&step(backend, workload, &rows))?;
        }
    }
    let steps = BACKEND_STEPS.min(workload.output_len);
    let mut times = Vec::new();
    for i in 0..steps {
        let rows: Vec<(usize, usize, &[u32])> =
            (0..batch).map(|s| (s, workload.prompt_len + i, &[7_u32][..])).collect();
        let step = step(backend, workload, &rows);
        let start = Instant::now();
        backend.step(&step)?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2])
}

/// Tokens of several sequences, each (sequence, first position, tokens). A sequence owns a run of blocks.
fn step(backend: &CpuBackend, workload: Workload, rows: &[(usize, usize, &[u32])]) -> StepBatch {
    let block_size = backend.info().block_size;
    let blocks_per_sequence = (workload.prompt_len + workload.output_len).div_ceil(block_size);
    let params = Arc::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() });
    let mut batch = StepBatch::default();
    for &(sequence, start, tokens) in rows {
        let end = start + tokens.len();
        let first_block = sequence * blocks_per_sequence;
        let first_table = batch.block_tables.len();
        batch.block_tables.extend((0..end.div_ceil(block_size)).map(|b| (first_block + b) as u32));
        batch.sequences.push(StepSequence {
            query_start: batch.token_ids.len(),
            query_len: tokens.len(),
            context_len: end,
            block_table: first_table..batch.block_tables.len(),
            wants_output: true,
            sampling: Some(RowSampling {
                params: params.clone(),
                seed: 0,
                step: 0,
                prompt_token_ids: Arc::new([]),
                output_token_ids: Vec::new(),
                forbidden_token_ids: Vec::new(),
            }),
        });
        batch.token_ids.extend(tokens);
        batch.positions.extend((start..end).map(|p| p as u32));
        batch.slot_mapping.extend((start..end).map(|p| (first_block * block_size + p) as u32));
    }
    batch
}
