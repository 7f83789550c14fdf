//! `mserve worker`: one replica in this process. Events as JSON lines on standard output, the log on standard error.

use crate::exit::Failure;
use crate::hardware::card_holders;
use clap::{Args, ValueEnum};
use mserve_planner::model::Pooling;
use mserve_runtime::cpu::WeightFormat;
use mserve_runtime::worker::{self, DeviceChoice, Identity, WorkerConfig, WorkerEvent, WorkerKind};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::getppid;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tracing_subscriber::EnvFilter;

/// The launcher's pid, set by the launcher.
const PARENT_PID: &str = "MSERVE_PARENT_PID";

#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// Directory with config.json, tokenizer.json and safetensors.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Name that requests use; may be repeated. Default: the directory's name.
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Vec<String>,
    /// What the model is served as. Default: what its architecture says.
    #[arg(long, value_enum)]
    pub kind: Option<KindArg>,
    /// How an embedding model makes one vector of a text. Default: 1_Pooling/config.json, then mean.
    #[arg(long, value_enum)]
    pub pooling: Option<PoolingArg>,
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// 0 picks a free port and tells it in the `listening` event.
    #[arg(long, default_value_t = 0)]
    pub port: u16,
    /// Longest sequence in tokens, prompt and output. Default: the model's own limit.
    #[arg(long, value_name = "TOKENS")]
    pub max_model_len: Option<usize>,
    /// auto, cpu, cuda, cuda:N or cuda:GPU-UUID; N counts the cards that CUDA_VISIBLE_DEVICES shows.
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Share of the card's total memory that this replica may use.
    #[arg(long, value_name = "RATIO", visible_alias = "vram-ratio", default_value_t = 0.9)]
    pub gpu_memory_utilization: f64,
    /// Sequences in one step. Default: 64 on the CPU, 256 on a card.
    #[arg(long)]
    pub max_num_seqs: Option<usize>,
    /// Tokens in one step. Default: 2048 on the CPU and 8448 on a card, and for embedding models at least the longest text.
    #[arg(long, value_name = "TOKENS")]
    pub max_num_batched_tokens: Option<usize>,
    /// Requests that may wait; beyond it the answer is 429.
    #[arg(long, default_value_t = 512)]
    pub max_num_queued_reqs: usize,
    #[arg(long)]
    pub no_enable_prefix_caching: bool,
    /// Tokens per KV block.
    #[arg(long, default_value_t = 16)]
    pub block_size: usize,
    /// Default: on the CPU enough for max-num-seqs sequences at full length, at most a quarter of the free memory; on
    /// a card what gpu-memory-utilization leaves.
    #[arg(long, value_name = "BYTES")]
    pub kv_cache_bytes: Option<u64>,
    /// Threads that compute. Default: one for each core.
    #[arg(long)]
    pub threads: Option<usize>,
    /// What weights are kept as.
    #[arg(long, value_enum, default_value = "auto")]
    pub weights: WeightsArg,
    /// A built-in prompt form, an entry of the model's list, or a Jinja file. Default: the model's own.
    #[arg(long, value_name = "NAME|FILE")]
    pub chat_template: Option<String>,
    /// Secret that clients must send in `x-mserve-token`. From the environment only: arguments are public.
    #[arg(skip = std::env::var(TOKEN).ok())]
    pub token: Option<String>,
    /// Name instance, model and replica in headers of every response.
    #[arg(long)]
    pub telemetry: bool,
    /// `x-mserve-instance-id` with --telemetry. Default: a random one.
    #[arg(long, value_name = "ID")]
    pub instance_id: Option<String>,
    /// `x-mserve-replica` with --telemetry.
    #[arg(long, value_name = "NAME", default_value = "0")]
    pub replica: String,
    /// Seconds for running requests to finish after SIGTERM.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub shutdown_timeout: u64,
    /// Largest request body.
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 20)]
    pub max_body_bytes: usize,
    /// End when standard input is closed or the parent process is gone.
    #[arg(long)]
    pub die_with_parent: bool,
}

/// Environment variable of the per-launch secret.
pub const TOKEN: &str = "MSERVE_WORKER_TOKEN";

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum KindArg {
    Chat,
    Embedding,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum PoolingArg {
    Cls,
    Mean,
    LastToken,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum WeightsArg {
    Auto,
    F32,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
}

pub fn run(args: WorkerArgs) -> anyhow::Result<ExitCode> {
    if args.die_with_parent {
        die_with_parent()?;
    }
    log_to_stderr();
    match worker::run(config(args), |event| tell(&event)) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            tracing::error!(%error, "the worker ends");
            Ok(ExitCode::from(error.kind().exit_code()))
        }
    }
}

fn config(args: WorkerArgs) -> WorkerConfig {
    let identity = args.telemetry.then(|| Identity {
        instance_id: args.instance_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
        replica: args.replica,
    });
    WorkerConfig {
        served_model_names: args.served_model_name,
        kind: args.kind.map(|kind| match kind {
            KindArg::Chat => WorkerKind::Chat,
            KindArg::Embedding => WorkerKind::Embedding,
        }),
        pooling: args.pooling.map(|pooling| match pooling {
            PoolingArg::Cls => Pooling::Cls,
            PoolingArg::Mean => Pooling::Mean,
            PoolingArg::LastToken => Pooling::LastToken,
        }),
        host: args.host,
        port: args.port,
        max_model_len: args.max_model_len,
        device: args.device,
        gpu_memory_utilization: args.gpu_memory_utilization,
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        max_num_queued_reqs: args.max_num_queued_reqs,
        enable_prefix_caching: !args.no_enable_prefix_caching,
        block_size: args.block_size,
        kv_cache_bytes: args.kv_cache_bytes,
        threads: args.threads,
        weights: match args.weights {
            WeightsArg::Auto => WeightFormat::Auto,
            WeightsArg::F32 => WeightFormat::F32,
            WeightsArg::Bf16 => WeightFormat::Bf16,
            WeightsArg::Q8_0 => WeightFormat::Q8_0,
        },
        chat_template: args.chat_template,
        token: args.token.filter(|token| !token.is_empty()),
        identity,
        shutdown_timeout: Duration::from_secs(args.shutdown_timeout),
        max_body_bytes: args.max_body_bytes,
        card_holders: Some(card_holders),
        ..WorkerConfig::new(args.model)
    }
}

/// One line, written at once. A reader that has gone is no reason to fail: the parent's end is noticed elsewhere.
fn tell(event: &WorkerEvent) {
    if let Ok(mut line) = serde_json::to_vec(event) {
        line.push(b'\n');
        let mut out = std::io::stdout().lock();
        drop(out.write_all(&line).and_then(|()| out.flush()));
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("MSERVE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A second subscriber in one process is a test's business.
    drop(tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).try_init());
}

/// No replica outlives its launcher, however that one ends: the kernel kills this process with the thread that started
/// it, and the end of standard input (a pipe from the launcher) ends it too.
fn die_with_parent() -> anyhow::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    // The parent may have gone before the line above.
    let expected = std::env::var(PARENT_PID).ok();
    if let Some(expected) = expected
        && expected.parse() != Ok(getppid().as_raw())
    {
        return Err(
            Failure { code: crate::exit::FAILURE, message: "the launcher is gone".to_owned(), hint: None }.into()
        );
    }
    std::thread::Builder::new().name("death-pipe".to_owned()).spawn(|| {
        let mut input = std::io::stdin().lock();
        let mut buffer = [0; 256];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => break,
                Err(e) if e.kind() != std::io::ErrorKind::Interrupted => break,
                _ => {}
            }
        }
        // The launcher is gone, so nobody waits for guards to run.
        #[allow(clippy::disallowed_methods)]
        std::process::exit(i32::from(crate::exit::FAILURE));
    })?;
    Ok(())
}
