//! So many requests at once through the engine, without HTTP or text.

use super::cpu_table::{self, load_failure};
use super::engine_share::EngineShare;
use super::figures::{Answered, Figures};
use super::measure::{Workload, prompt};
use super::{BenchArgs, Model, check_context};
use crate::exit::{self, Failure};
use anyhow::{Context, bail};
use mserve_runtime::cpu::CpuBackend;
use mserve_runtime::cuda::{CudaBackend, CudaError, CudaOptions, WeightOrigin, device};
use mserve_runtime::engine::{
    Backend, Engine, EngineConfig, EngineHandle, GenerateRequest, SamplingParams, TokenEvent, TokenStream,
};
use mserve_runtime::worker::{CudaDevice, DeviceChoice};
use serde::Serialize;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Requests without `--num-prompts`.
const NUM_PROMPTS: usize = 512;
const INPUT_LEN: u32 = 1024;
const OUTPUT_LEN: u32 = 128;
const CPU_MAX_NUM_SEQS: usize = 64;
/// Of the run before the one that counts: all kernels loaded, all threads started.
const WARMUP_TOKENS: usize = 4;

#[derive(Debug, Serialize)]
pub struct OfflineReport {
    pub model: String,
    pub device: String,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    /// From the begin of loading to an engine that runs.
    pub load_s: f64,
    pub figures: Figures,
    pub engine: EngineShare,
}

/// # Errors
/// When the model cannot be read or run, or a request fails.
pub fn run(args: &BenchArgs) -> anyhow::Result<OfflineReport> {
    let model = Model::open(args)?;
    let name = model.name.clone();
    let work = Workload {
        prompt_len: args.input_len.unwrap_or(INPUT_LEN) as usize,
        output_len: args.output_len.unwrap_or(OUTPUT_LEN) as usize,
    };
    let num_prompts = args.num_prompts.map_or(NUM_PROMPTS, |n| n as usize);
    check_context(&model.spec, work.prompt_len + work.output_len)?;
    let begin = Instant::now();
    let loaded = load(args, model, work)?;
    let load_s = begin.elapsed().as_secs_f64();
    let (max_num_seqs, max_num_batched_tokens) = (loaded.max_num_seqs, loaded.max_num_batched_tokens);
    let device = loaded.backend.info().device.clone();
    let engine = start(loaded, num_prompts)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (figures, share) = runtime.block_on(async {
        let warm_up = Workload { output_len: WARMUP_TOKENS, ..work };
        requests(&engine, args, warm_up, num_prompts.min(max_num_seqs).min(8)).await?;
        let before = engine.load();
        let begin = Instant::now();
        let figures = requests(&engine, args, work, num_prompts).await?;
        let wall = begin.elapsed();
        anyhow::Ok((figures, EngineShare::new(&before, &engine.load(), wall)))
    })?;
    Ok(OfflineReport { model: name, device, max_num_seqs, max_num_batched_tokens, load_s, figures, engine: share })
}

struct Loaded {
    backend: Box<dyn Backend>,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
}

fn load(args: &BenchArgs, model: Model, work: Workload) -> anyhow::Result<Loaded> {
    let seqs = args.max_num_seqs.map(|n| n as usize);
    let budget = args.max_num_batched_tokens.map(|n| n as usize);
    let tokens = work.prompt_len + work.output_len;
    let ordinal = match &args.device {
        DeviceChoice::Cpu => {
            let max_num_seqs = seqs.unwrap_or(CPU_MAX_NUM_SEQS);
            let mut options = cpu_table::options(args, &model.spec, work, max_num_seqs)?;
            options.max_num_batched_tokens = budget.unwrap_or(options.max_num_batched_tokens);
            let spec = model.spec.clone();
            let backend = CpuBackend::load(&spec, model.source().as_ref(), &options, &mut |_, _| {});
            let backend = Box::new(backend.map_err(load_failure)?);
            return Ok(Loaded { backend, max_num_seqs, max_num_batched_tokens: options.max_num_batched_tokens });
        }
        DeviceChoice::Auto => return Err(Failure::usage("--device auto: name the device to measure").into()),
        DeviceChoice::Cuda(CudaDevice::Ordinal(ordinal)) => *ordinal,
        DeviceChoice::Cuda(CudaDevice::Uuid(uuid)) => device::ordinal_of(uuid).map_err(cuda_failure)?,
    };
    let standard = CudaOptions::default();
    let options = CudaOptions {
        ordinal,
        max_model_len: Some(tokens),
        max_num_seqs: seqs.unwrap_or(standard.max_num_seqs),
        max_num_batched_tokens: budget.unwrap_or(standard.max_num_batched_tokens),
        ..standard
    };
    let origin = match &model.checkpoint {
        Some(checkpoint) => WeightOrigin::Source(checkpoint),
        None => WeightOrigin::Random { seed: 1 },
    };
    let backend = CudaBackend::load(&model.spec, &origin, &options, &mut |_, _| {}).map_err(cuda_failure)?;
    let CudaOptions { max_num_seqs, max_num_batched_tokens, .. } = options;
    Ok(Loaded { backend: Box::new(backend), max_num_seqs, max_num_batched_tokens })
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn cuda_failure(error: CudaError) -> anyhow::Error {
    let code = exit::code_of(error.kind());
    Failure { code, message: error.to_string(), hint: None }.into()
}

fn start(loaded: Loaded, num_prompts: usize) -> anyhow::Result<EngineHandle> {
    let config = EngineConfig {
        model_name: "bench".to_owned(),
        max_num_seqs: loaded.max_num_seqs,
        max_num_batched_tokens: loaded.max_num_batched_tokens,
        max_model_len: loaded.backend.info().max_model_len,
        // All prompts wait at once, and the engine counts a quarter of the context for each place.
        max_num_queued_reqs: 4 * num_prompts,
        enable_prefix_caching: false,
    };
    Engine::start(loaded.backend, config).map_err(|error| Failure::usage(error.to_string()).into())
}

async fn requests(engine: &EngineHandle, args: &BenchArgs, work: Workload, count: usize) -> anyhow::Result<Figures> {
    let params = Arc::new(SamplingParams {
        temperature: 0.0,
        max_tokens: work.output_len,
        ignore_eos: !args.stop_at_eos,
        ..SamplingParams::default()
    });
    let asked: Vec<GenerateRequest> = (0..count)
        .map(|at| GenerateRequest {
            request_id: format!("bench-{at}"),
            prompt_token_ids: prompt(args.seed, at, engine.info().vocab_size, work.prompt_len),
            params: Arc::clone(&params),
            eos_token_ids: Arc::new([]),
            choice_index: 0,
        })
        .collect();
    let begin = Instant::now();
    let mut readers = Vec::with_capacity(count);
    for request in asked {
        let sent_at = begin.elapsed();
        let stream = engine.generate(request)?;
        readers.push(tokio::spawn(read(stream, begin, sent_at, work.prompt_len)));
    }
    let mut answered = Vec::with_capacity(count);
    for reader in readers {
        answered.push(reader.await.context("a reader ended by itself")??);
    }
    Ok(Figures::new(&answered, 0))
}

async fn read(
    mut stream: TokenStream,
    begin: Instant,
    sent_at: Duration,
    prompt_tokens: usize,
) -> anyhow::Result<Answered> {
    let mut arrivals = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            TokenEvent::Token(_) => arrivals.push(begin.elapsed() - sent_at),
            TokenEvent::Finished { usage, .. } => {
                return Ok(Answered { sent_at, prompt_tokens, output_tokens: usage.completion_tokens, arrivals });
            }
            TokenEvent::Failed(error) => return Err(error.into()),
        }
    }
    bail!("a request ended without a word")
}

impl fmt::Display for OfflineReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, device, max_num_seqs, max_num_batched_tokens, load_s, .. } = self;
        writeln!(
            f,
            "{model} on {device}: max_num_seqs {max_num_seqs}, max_num_batched_tokens {max_num_batched_tokens}, loaded in {load_s:.1} s"
        )?;
        write!(f, "{}{}", self.figures, self.engine)
    }
}
