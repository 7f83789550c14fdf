//! `mserve bench`: tokens per second of the bundled CPU engine, beside what the machine's memory allows.

mod measure;
mod report;
mod shapes;

use crate::exit::Failure;
use anyhow::Context;
use clap::{Args, ValueEnum};
use measure::Workload;
use mserve_planner::model::{ModelSpec, Task, parse_config};
use mserve_runtime::cpu::{CpuBackend, CpuOptions, LoadError, WeightFormat, read_bandwidth};
use mserve_runtime::weights::{Checkpoint, RandomWeights, StoredType, TensorSource};
use report::{Machine, Report};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Model directory.
    #[arg(default_value = "examples/demo-model", value_name = "DIR")]
    model: PathBuf,
    /// Random weights of a known model's shape instead of a model directory.
    #[arg(long, conflicts_with = "model")]
    shape: Option<shapes::Shape>,
    /// Sequences decoded at once, one run for each number.
    #[arg(long, value_delimiter = ',', default_value = "1,8", value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: Vec<u32>,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt_len: u32,
    /// Tokens generated for each prompt.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    output_len: u32,
    /// Threads that compute [default: all cores].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// What weights are kept as.
    #[arg(long, value_enum, default_value_t = Weights::Auto)]
    weights: Weights,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Weights {
    /// As stored.
    Auto,
    F32,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
}

impl From<Weights> for WeightFormat {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::Auto => Self::Auto,
            Weights::F32 => Self::F32,
            Weights::Bf16 => Self::Bf16,
            Weights::Q8_0 => Self::Q8_0,
        }
    }
}

/// # Errors
/// When the model cannot be read or run, or a run does not fit its context.
pub fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let (name, spec, source) = model(args)?;
    if spec.task != Task::Generate {
        return Err(Failure::usage(format!("{name} does not generate text; bench measures generation")).into());
    }
    let workload = Workload { prompt_len: args.prompt_len as usize, output_len: args.output_len as usize };
    let batches: Vec<usize> = args.batch.iter().map(|&b| b as usize).collect();
    let options = options(args, &spec, workload, &batches)?;
    let mut backend = CpuBackend::load(&spec, source.as_ref(), &options, &mut |_, _| {}).map_err(load_failure)?;
    // Over as much memory as a step reads, so that a small model is measured against the cache that holds it.
    let bandwidth = read_bandwidth(options.threads, backend.step_weight_bytes())?;
    let machine = Machine::new(&backend, options.threads, bandwidth);
    let backend_steps = batches
        .iter()
        .map(|&batch| measure::backend_step(&mut backend, batch, workload))
        .collect::<Result<Vec<_>, _>>()?;
    let traffic = report::Traffic::of(&backend);
    let mut runs = Vec::new();
    let engine = measure::engine(backend, &options, &batches)?;
    for (&batch, backend_step) in batches.iter().zip(backend_steps) {
        let timing = measure::run(&engine, batch, workload)?;
        runs.push(report::Run::new(batch, workload, traffic, bandwidth, timing, backend_step));
    }
    let report = Report { model: name, weights: format!("{:?}", args.weights).to_lowercase(), machine, runs };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(ExitCode::SUCCESS)
}

fn model(args: &BenchArgs) -> anyhow::Result<(String, ModelSpec, Box<dyn TensorSource>)> {
    if let Some(shape) = args.shape {
        let spec = parse_config(shape.config_json().as_bytes()).context("the built-in shape")?;
        let source = RandomWeights { seed: 1, stored: StoredType::BF16 };
        return Ok((format!("{} shape, random weights", shape.name()), spec, Box::new(source)));
    }
    let spec = read_spec(&args.model)?;
    let source = Checkpoint::open(&args.model).map_err(|e| Failure::usage(e.to_string()))?;
    Ok((args.model.display().to_string(), spec, Box::new(source)))
}

fn read_spec(dir: &Path) -> anyhow::Result<ModelSpec> {
    let path = dir.join("config.json");
    let json = std::fs::read(&path).map_err(|e| {
        Failure::usage(format!("{}: {e}", path.display())).hint("give a model directory, or --shape qwen2.5-0.5b")
    })?;
    parse_config(&json).map_err(|e| Failure::usage(format!("{}: {e}", path.display())).into())
}

fn options(args: &BenchArgs, spec: &ModelSpec, work: Workload, batches: &[usize]) -> anyhow::Result<CpuOptions> {
    let tokens = work.prompt_len + work.output_len;
    if tokens as u64 > spec.max_position_embeddings {
        let most = spec.max_position_embeddings;
        return Err(Failure::usage(format!("{tokens} tokens of prompt and output; the model's context is {most}"))
            .hint("lower --prompt-len or --output-len")
            .into());
    }
    let defaults = CpuOptions::default();
    let largest = batches.iter().copied().max().unwrap_or(1);
    let heads = |l: &mserve_planner::model::LayerSpec| {
        l.attention().map_or(0, |a| a.num_kv_heads * a.head_dim.next_multiple_of(16))
    };
    let kv_bytes_per_token: u64 = spec.layers.iter().map(|l| 2 * 4 * heads(l)).sum();
    // Every sequence whole, plus a block of slack each.
    let kv_tokens = largest * (tokens + 2 * defaults.block_size);
    Ok(CpuOptions {
        threads: args.threads.map_or(defaults.threads, |t| t as usize),
        kv_cache_bytes: kv_bytes_per_token * kv_tokens as u64,
        max_model_len: Some(tokens),
        max_num_batched_tokens: defaults.max_num_batched_tokens.max(largest),
        weights: args.weights.into(),
        ..defaults
    })
}

fn load_failure(error: LoadError) -> anyhow::Error {
    match error {
        LoadError::DoesNotFit { .. } => Failure::does_not_fit(error.to_string()).into(),
        LoadError::Threads { .. } | LoadError::Quantize { .. } => error.into(),
        error => Failure::usage(error.to_string()).into(),
    }
}
