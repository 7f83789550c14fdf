//! `mserve launch`: settings, plan, replicas, one endpoint before them, until told to stop.

mod control_server;
mod deployment;
mod gpus;
mod group;
mod progress;
mod shutdown;
mod start;
mod worker_args;

use super::top::ScreenArgs;
use crate::settings::values::{
    Devices, PoolingChoice, Share, parse_bytes, parse_count, parse_devices, parse_kind, parse_pooling, parse_share,
};
use crate::settings::{self, Flags, ModelOverrides};
use crate::status::ModelKind;
use anyhow::Context;
use clap::Args;
use mserve_planner::units::parse_tokens;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub struct LaunchArgs {
    /// Deployment to launch [default: ./mserve.toml if there is one, else the embedded demo model]
    #[arg(value_name = "FILE", env = "MSERVE_CONFIG")]
    config: Option<PathBuf>,
    /// One model instead of a file: its directory
    #[arg(long, value_name = "DIR", aliases = ["model-path", "model-id"], conflicts_with = "config")]
    model: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    models: ModelArgs,
    /// Show what would be started, and end
    #[arg(long)]
    dry_run: bool,
    /// Name instance, model and replica in headers of every answer
    #[arg(long, env = "MSERVE_TELEMETRY")]
    telemetry: bool,
    /// Show the dashboard while it runs
    #[arg(long)]
    tui: bool,
    #[command(flatten, next_help_heading = "Dashboard (with --tui)")]
    screen: ScreenArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Endpoint")]
struct ServerArgs {
    /// Address to serve on [default: 127.0.0.1]; the API key is read from MSERVE_API_KEY or named in the file
    #[arg(long, value_name = "ADDRESS", env = "MSERVE_HOST")]
    host: Option<String>,
    /// Port to serve on; 0 takes a free one [default: 8000]
    #[arg(short, long, value_name = "PORT", env = "MSERVE_PORT")]
    port: Option<u16>,
    /// Requests served at once; beyond them the answer is 429 [default: 1024]
    #[arg(long, value_name = "N", env = "MSERVE_MAX_CONCURRENT_REQUESTS", value_parser = parse_count)]
    max_concurrent_requests: Option<u32>,
    /// Time that running requests get when the deployment is stopped [default: 30]
    #[arg(long, value_name = "SECONDS", env = "MSERVE_SHUTDOWN_TIMEOUT", alias = "shutdown-grace-period-secs")]
    shutdown_timeout: Option<u32>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Models (of --model, or of every [[model]] in the file)")]
struct ModelArgs {
    /// Processes that serve the model, each with its own copy [alias: -dp]
    #[arg(long, value_name = "N", visible_alias = "data-parallel-size", aliases = ["dp", "dp-size", "replica"],
          env = "MSERVE_REPLICAS", value_parser = parse_count)]
    replicas: Option<u32>,
    /// Name that requests use, and with more of them its other names [default: last part of the path]
    #[arg(long, value_name = "NAME", alias = "model-names")]
    served_model_name: Vec<String>,
    /// chat or embedding [default: what the architecture says]
    #[arg(long, value_name = "KIND", value_parser = parse_kind)]
    kind: Option<ModelKind>,
    /// auto, cpu or gpu
    #[arg(long, value_name = "DEVICES", env = "MSERVE_DEVICES", value_parser = parse_devices)]
    devices: Option<Devices>,
    /// Longest sequence, prompt and output, such as 4096 or 32k [default: the model's, or what memory allows]
    #[arg(long, value_name = "TOKENS", aliases = ["context-length", "max-total-tokens", "session-len"],
          env = "MSERVE_MAX_MODEL_LEN", value_parser = parse_tokens)]
    max_model_len: Option<u64>,
    /// Sequences that run at once in one replica
    #[arg(long, value_name = "N", aliases = ["max-running-requests", "max-batch-size"],
          env = "MSERVE_MAX_NUM_SEQS", value_parser = parse_count)]
    max_num_seqs: Option<u32>,
    /// Tokens of one step
    #[arg(long, value_name = "TOKENS", alias = "chunked-prefill-size",
          env = "MSERVE_MAX_NUM_BATCHED_TOKENS", value_parser = parse_tokens)]
    max_num_batched_tokens: Option<u64>,
    /// Threads of one replica [default: the cores shared out evenly]
    #[arg(long, value_name = "N", env = "MSERVE_THREADS", value_parser = parse_count)]
    threads: Option<u32>,
    /// KV cache of one replica, such as 512MiB
    #[arg(long, value_name = "BYTES", env = "MSERVE_KV_CACHE_MEMORY", value_parser = parse_bytes)]
    kv_cache_memory: Option<u64>,
    /// Share of a card's memory that one replica may use [default: 0.9]
    #[arg(long, value_name = "RATIO", visible_alias = "vram-ratio", alias = "mem-fraction-static",
          env = "MSERVE_GPU_MEMORY_UTILIZATION", value_parser = parse_share)]
    gpu_memory_utilization: Option<Share>,
    /// A built-in chat template, or a Jinja file
    #[arg(long, value_name = "NAME|FILE")]
    chat_template: Option<PathBuf>,
    /// How an embedding model makes one vector of a text: cls, mean, last-token
    #[arg(long, value_name = "POOLING", value_parser = parse_pooling)]
    pooling: Option<PoolingChoice>,
}

pub fn run(args: LaunchArgs) -> anyhow::Result<ExitCode> {
    let screen = args.tui.then(|| args.screen.options());
    let (dry_run, telemetry) = (args.dry_run, args.telemetry);
    let directory = std::env::current_dir().context("cannot read the current directory")?;
    let settings = settings::resolve(flags(args), &directory)?;
    let hardware = group::ThisMachine::probe()?;
    let groups = group::plan_all(&settings.models, &hardware)?;
    progress::say(&hardware.line());
    for group in &groups {
        progress::say(&group.line());
    }
    if dry_run {
        return Ok(ExitCode::SUCCESS);
    }
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // The replicas need the cores.
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let code = runtime.block_on(start::launch(settings.server, groups, start::Options { telemetry, screen }))?;
    // Tasks that still hang on a client have had their time.
    runtime.shutdown_background();
    Ok(code)
}

fn flags(args: LaunchArgs) -> Flags {
    let models = args.models;
    Flags {
        config: args.config,
        host: args.server.host,
        port: args.server.port,
        api_key: std::env::var("MSERVE_API_KEY").ok(),
        max_concurrent_requests: args.server.max_concurrent_requests,
        shutdown_timeout_s: args.server.shutdown_timeout,
        model: args.model,
        overrides: ModelOverrides {
            served_model_names: models.served_model_name,
            kind: models.kind,
            replicas: models.replicas,
            devices: models.devices,
            max_model_len: models.max_model_len,
            max_num_seqs: models.max_num_seqs,
            max_num_batched_tokens: models.max_num_batched_tokens,
            threads: models.threads,
            kv_cache_memory_bytes: models.kv_cache_memory,
            gpu_memory_utilization: models.gpu_memory_utilization,
            chat_template: models.chat_template,
            pooling: models.pooling,
        },
    }
}

/// A connection takes two descriptors: one to the client, one to the replica.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    const ENOUGH: u64 = 4096;
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard));
    if let Ok(limit) = raised
        && limit < ENOUGH
    {
        tracing::warn!(limit, "few open files are allowed: many connections will fail (ulimit -n)");
    }
}
