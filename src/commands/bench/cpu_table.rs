//! Batch sizes on the CPU, beside what the machine's memory allows.

use super::measure::{self, Workload};
use super::report::{Machine, Report, Run, Traffic};
use super::{BenchArgs, Model, check_context};
use crate::exit::Failure;
use mserve_planner::model::{LayerSpec, ModelSpec};
use mserve_runtime::cpu::{CpuBackend, CpuOptions, LoadError, read_bandwidth};

const INPUT_LEN: u32 = 128;
const OUTPUT_LEN: u32 = 64;

/// # Errors
/// When the model cannot be read or run, or a run does not fit its context.
pub fn run(args: &BenchArgs) -> anyhow::Result<Report> {
    let model = Model::open(args)?;
    let (name, spec) = (model.name.clone(), model.spec.clone());
    let workload = Workload {
        prompt_len: args.input_len.unwrap_or(INPUT_LEN) as usize,
        output_len: args.output_len.unwrap_or(OUTPUT_LEN) as usize,
    };
    let batches: Vec<usize> = args.batch.iter().map(|&b| b as usize).collect();
    let largest = batches.iter().copied().max().unwrap_or(1);
    let options = options(args, &spec, workload, largest)?;
    let mut backend =
        CpuBackend::load(&spec, model.source().as_ref(), &options, &mut |_, _| {}).map_err(load_failure)?;
    // Over as much memory as a step reads, so that a small model is measured against the cache that holds it.
    let bandwidth = read_bandwidth(options.threads, backend.step_weight_bytes())?;
    let machine = Machine::new(&backend, options.threads, bandwidth);
    let backend_steps = batches
        .iter()
        .map(|&batch| measure::backend_step(&mut backend, batch, workload))
        .collect::<Result<Vec<_>, _>>()?;
    let traffic = Traffic::of(&backend);
    let mut runs = Vec::new();
    let engine = measure::engine(backend, &options, &batches)?;
    for (&batch, backend_step) in batches.iter().zip(backend_steps) {
        let timing = measure::run(&engine, batch, workload)?;
        runs.push(Run::new(batch, workload, traffic, bandwidth, timing, backend_step));
    }
    Ok(Report { model: name, weights: format!("{:?}", args.weights).to_lowercase(), machine, runs })
}

/// Room for `sequences` of this size at once.
///
/// # Errors
/// They are longer than the model's context.
pub fn options(args: &BenchArgs, spec: &ModelSpec, work: Workload, sequences: usize) -> Result<CpuOptions, Failure> {
    let tokens = work.prompt_len + work.output_len;
    check_context(spec, tokens)?;
    let defaults = CpuOptions::default();
    let heads = |l: &LayerSpec| l.attention().map_or(0, |a| a.num_kv_heads * a.head_dim.next_multiple_of(16));
    let kv_bytes_per_token: u64 = spec.layers.iter().map(|l| 2 * 4 * heads(l)).sum();
    // Every sequence whole, plus a block of slack each.
    let kv_tokens = sequences * (tokens + 2 * defaults.block_size);
    Ok(CpuOptions {
        threads: args.threads.map_or(defaults.threads, |t| t as usize),
        kv_cache_bytes: kv_bytes_per_token * kv_tokens as u64,
        max_model_len: Some(tokens),
        max_num_batched_tokens: defaults.max_num_batched_tokens.max(sequences),
        weights: args.weights.into(),
        ..defaults
    })
}

pub fn load_failure(error: LoadError) -> anyhow::Error {
    match error {
        LoadError::DoesNotFit { .. } => Failure::does_not_fit(error.to_string()).into(),
        LoadError::Threads { .. } | LoadError::Quantize { .. } => error.into(),
        error => Failure::usage(error.to_string()).into(),
    }
}
