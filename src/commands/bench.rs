//! `mserve bench`: how fast the bundled engine is on this machine, or any OpenAI-compatible server over HTTP.
//!
//! Three measurements: on the CPU a table of batch sizes beside what the machine's memory allows; with `--num-prompts`
//! or on a card so many requests at once through the engine; with `--url` load on a server.

mod cpu_table;
mod engine_share;
mod figures;
mod load;
mod measure;
mod offline;
mod report;
mod shapes;

use crate::exit::Failure;
use anyhow::Context;
use clap::{Args, ValueEnum};
use load::{LoadOptions, Pace};
use mserve_planner::model::{ModelSpec, Task, parse_config};
use mserve_runtime::cpu::WeightFormat;
use mserve_runtime::weights::{Checkpoint, RandomWeights, StoredType, TensorSource};
use mserve_runtime::worker::DeviceChoice;
use serde::Serialize;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const DEMO_MODEL: &str = "examples/demo-model";
/// Prompts of a load test without `--num-prompts`, for each user.
const PROMPTS_PER_USER: usize = 4;
/// Of a load test: more than these do not make it faster.
const MOST_CLIENT_THREADS: usize = 4;

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Model directory [default: examples/demo-model].
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Model directory; with --url the name of the served model.
    #[arg(long, value_name = "DIR|NAME", conflicts_with = "dir")]
    model: Option<String>,
    /// Random weights of a known model's shape instead of a model directory.
    #[arg(long, conflicts_with_all = ["dir", "model", "url"])]
    shape: Option<shapes::Shape>,
    /// cpu, cuda, cuda:N or cuda:GPU-UUID.
    #[arg(long, default_value = "cpu", conflicts_with = "url")]
    device: DeviceChoice,
    /// Requests in all, sent at once through the engine, or over HTTP with --url.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    num_prompts: Option<u32>,
    /// Tokens of each prompt [default: 1024; 128 for the table].
    #[arg(long, visible_alias = "prompt-len", value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    input_len: Option<u32>,
    /// Tokens generated for each prompt [default: 128; 64 for the table].
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    output_len: Option<u32>,
    /// End a request at end-of-sequence too. Without it every request gets all its tokens.
    #[arg(long, conflicts_with = "url")]
    stop_at_eos: bool,
    /// Sequences in one step.
    #[arg(long, value_name = "N", conflicts_with = "url", value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_num_seqs: Option<u32>,
    /// Tokens in one step.
    #[arg(long, value_name = "TOKENS", conflicts_with = "url", value_parser = clap::value_parser!(u32).range(1..=131_072))]
    max_num_batched_tokens: Option<u32>,
    /// Table: sequences decoded at once, one run for each number.
    #[arg(long, value_delimiter = ',', default_value = "1,8", conflicts_with_all = ["url", "num_prompts"], value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: Vec<u32>,
    /// Threads: of the CPU that compute [default: all cores]; with --url of the client [default: up to 4].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// What weights are kept as, on the CPU.
    #[arg(long, value_enum, default_value_t = Weights::Auto)]
    weights: Weights,
    /// A server such as http://127.0.0.1:8000; its key from MSERVE_API_KEY.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Users at once, each with one request under way [default: 1].
    #[arg(long, value_name = "N", requires = "url", conflicts_with = "request_rate", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    users: Option<u32>,
    /// Requests a second on average, at random times, however many are under way.
    #[arg(long, value_name = "RATE", requires = "url")]
    request_rate: Option<f64>,
    /// Prompts are random token ids below this.
    #[arg(long, value_name = "N", requires = "url", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    vocab_size: u32,
    /// Of prompts and arrival times.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Longest that one request may take.
    #[arg(long, value_name = "SECONDS", requires = "url", default_value_t = 600)]
    timeout: u64,
    /// One JSON object instead of text.
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
/// When the model cannot be read or run, a run does not fit its context, or a server answers nothing.
pub fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    if let Some(url) = &args.url {
        let report = load::run(&load_options(args, url)?)?;
        print(args, &report)?;
        report.check()?;
    } else if args.num_prompts.is_some() || args.device != DeviceChoice::Cpu {
        print(args, &offline::run(args)?)?;
    } else {
        print(args, &cpu_table::run(args)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print(args: &BenchArgs, report: &(impl Serialize + Display)) -> anyhow::Result<()> {
    if args.json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

fn load_options(args: &BenchArgs, url: &str) -> anyhow::Result<LoadOptions> {
    let pace = match (args.users, args.request_rate) {
        (_, Some(rate)) if rate > 0.0 && rate.is_finite() => Pace::PerSecond(rate),
        (_, Some(rate)) => return Err(Failure::usage(format!("--request-rate {rate}; it must be above 0")).into()),
        (users, None) => Pace::Users(users.unwrap_or(1) as usize),
    };
    let users = if let Pace::Users(users) = pace { users } else { 1 };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(LoadOptions {
        url: url.to_owned(),
        model: args.model.clone(),
        pace,
        num_prompts: args.num_prompts.map_or(PROMPTS_PER_USER * users, |n| n as usize),
        input_len: args.input_len.unwrap_or(1024) as usize,
        output_len: args.output_len.unwrap_or(128) as usize,
        vocab_size: args.vocab_size,
        seed: args.seed,
        timeout: Duration::from_secs(args.timeout),
        threads: args.threads.map_or(cores.min(MOST_CLIENT_THREADS), |n| n as usize),
    })
}

/// A model to measure.
struct Model {
    name: String,
    spec: ModelSpec,
    /// `None`: random weights.
    checkpoint: Option<Checkpoint>,
}

impl Model {
    fn open(args: &BenchArgs) -> anyhow::Result<Self> {
        let model = Self::any(args)?;
        if model.spec.task != Task::Generate {
            let message = format!("{} does not generate text; bench measures generation", model.name);
            return Err(Failure::usage(message).into());
        }
        Ok(model)
    }

    fn any(args: &BenchArgs) -> anyhow::Result<Self> {
        if let Some(shape) = args.shape {
            let spec = parse_config(shape.config_json().as_bytes()).context("the built-in shape")?;
            return Ok(Self { name: format!("{} shape, random weights", shape.name()), spec, checkpoint: None });
        }
        let named = args.model.as_ref().map(PathBuf::from);
        let dir = args.dir.clone().or(named).unwrap_or_else(|| PathBuf::from(DEMO_MODEL));
        let spec = read_spec(&dir)?;
        let checkpoint = Checkpoint::open(&dir).map_err(|e| Failure::usage(e.to_string()))?;
        Ok(Self { name: dir.display().to_string(), spec, checkpoint: Some(checkpoint) })
    }

    fn source(self) -> Box<dyn TensorSource> {
        match self.checkpoint {
            Some(checkpoint) => Box::new(checkpoint),
            None => Box::new(RandomWeights { seed: 1, stored: StoredType::BF16 }),
        }
    }
}

fn read_spec(dir: &Path) -> anyhow::Result<ModelSpec> {
    let path = dir.join("config.json");
    let json = std::fs::read(&path).map_err(|e| {
        Failure::usage(format!("{}: {e}", path.display())).hint("give a model directory, or --shape qwen2.5-0.5b")
    })?;
    parse_config(&json).map_err(|e| Failure::usage(format!("{}: {e}", path.display())).into())
}

/// # Errors
/// Prompt and output are longer than the model's context.
fn check_context(spec: &ModelSpec, tokens: usize) -> Result<(), Failure> {
    if tokens as u64 <= spec.max_position_embeddings {
        return Ok(());
    }
    let most = spec.max_position_embeddings;
    Err(Failure::usage(format!("{tokens} tokens of prompt and output; the model's context is {most}"))
        .hint("lower --input-len or --output-len"))
}
