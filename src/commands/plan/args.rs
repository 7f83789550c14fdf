//! The flags of `mserve plan`, and the request they make.

use super::cards::ChosenCards;
use super::model::Model;
use crate::exit::Failure;
use clap::Args;
use mserve_planner::engine::from_log::MAX_LOG_BYTES;
use mserve_planner::engine::vllm::PoolOptions;
use mserve_planner::engine::{self, BootLog, EngineSettings, NotAVersion, Version, parse_boot_log};
use mserve_planner::memory::{EngineLimits, KvCacheDtype, SlidingLayers};
use mserve_planner::model::{DType, Task};
use mserve_planner::perf::Engine;
use mserve_planner::perf::serving::RequestShape;
use mserve_planner::plan::{self, Accounting, Demand, PlanRequest, Rank, Targets};
use mserve_planner::split::{DEFAULT_SLM_TOKENS, Workload};
use mserve_planner::units::parse_tokens;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Prompt and output of a typical request, when neither is given: 2,048 tokens together.
const TYPICAL_INPUT_TOKENS: u64 = 1536;
const TYPICAL_OUTPUT_TOKENS: u64 = 512;

#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Model directory, or its config.json
    #[arg(value_name = "MODEL", required_unless_present = "model", conflicts_with = "model")]
    pub(super) model_path: Option<PathBuf>,
    /// The same as a flag
    #[arg(long, value_name = "MODEL", aliases = ["model-path", "model-id"])]
    pub(super) model: Option<PathBuf>,
    /// GPUs to plan for [default: all of this machine's, or 1]
    #[arg(long, value_name = "N", alias = "total-gpus", value_parser = clap::value_parser!(u64).range(1..=plan::MAX_GPUS))]
    pub(super) gpus: Option<u64>,
    /// Kind of GPU: h100, h200, a100-40g, l40s, rtx4090, ... [default: what this machine has]
    #[arg(long, value_name = "NAME", alias = "system")]
    pub(super) gpu: Option<String>,
    /// Only this tensor-parallel size [default: every legal one]
    #[arg(long, value_name = "N", visible_alias = "tp", aliases = ["tp-size", "num-shard"],
          value_parser = clap::value_parser!(u64).range(1..=plan::MAX_GPUS))]
    tensor_parallel_size: Option<u64>,
    /// Share of each GPU's total memory that the engine may take (of the free, for sglang) [default: 0.9, or the engine's]
    #[arg(long, value_name = "RATIO", visible_alias = "vram-ratio", alias = "mem-fraction-static")]
    pub(super) gpu_memory_utilization: Option<f64>,
    /// Longest sequence, prompt and output, such as 4096 or 32k [default: the model's context]
    #[arg(long, value_name = "TOKENS", aliases = ["context-length", "max-total-tokens", "session-len"], value_parser = parse_tokens)]
    max_model_len: Option<u64>,
    /// Sequences that run at once in one replica [default: 256, or the engine's]
    #[arg(long, value_name = "N", aliases = ["max-running-requests", "max-batch-size"])]
    max_num_seqs: Option<u64>,
    /// Tokens of one step [default: 8448, or the engine's; whole texts for models that do not generate]
    #[arg(long, value_name = "TOKENS", alias = "chunked-prefill-size", value_parser = parse_tokens)]
    max_num_batched_tokens: Option<u64>,
    /// Element type of the KV cache: auto, fp16, bf16, fp8
    #[arg(long, value_name = "TYPE", alias = "kv-dtype", default_value = "auto", value_parser = parse_kv_dtype)]
    kv_cache_dtype: KvCacheDtype,
    /// Prompt tokens of a typical request [default: 1536]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens)]
    isl: Option<u64>,
    /// Output tokens of a typical request [default: 512]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens)]
    osl: Option<u64>,
    /// Engine whose memory and speed are planned: mserve, vllm, sglang [default: mserve, or the log's]
    #[arg(long, value_name = "ENGINE", value_parser = parse_engine)]
    engine: Option<Engine>,
    /// Its release, such as 0.11.0: defaults and accounting change between them [default: the log's, or the newest known]
    #[arg(long, value_name = "VERSION", value_parser = parse_version)]
    engine_version: Option<Version>,
    /// Take weights and overhead from a boot log of vLLM or SGLang: same model, card and --tp
    #[arg(long, value_name = "FILE")]
    from_log: Option<PathBuf>,
    #[command(flatten)]
    targets: TargetArgs,
    #[command(flatten)]
    pub(super) split: SplitArgs,
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

/// Options that miss one are left out, and the others ranked by rate. Without --gpus: how many it takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Targets (options that miss one are left out; without --gpus: how many cards they need)")]
pub(super) struct TargetArgs {
    /// Time to first token, at most
    #[arg(long, value_name = "MS")]
    ttft: Option<f64>,
    /// Time per output token, at most
    #[arg(long, value_name = "MS")]
    tpot: Option<f64>,
    /// Requests per second of all replicas, at least
    #[arg(long, value_name = "N")]
    target_request_rate: Option<f64>,
    /// Requests at once in all replicas, at least
    #[arg(long, value_name = "N")]
    target_concurrency: Option<u64>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Small models beside it (embedding, reranker, classifier)")]
pub(super) struct SplitArgs {
    /// A small model that shares the cards; its kind is found from its config. May be repeated
    #[arg(long, value_name = "DIR")]
    pub(super) slm: Vec<PathBuf>,
    /// What users do: doc-qa (5 to 10 small requests for each large one), kb-qa (10 to 30), balanced (3 to 5)
    #[arg(long, value_name = "NAME", requires = "slm", value_parser = parse_workload, conflicts_with = "slm_ratio")]
    workload: Option<Workload>,
    /// Requests to small models for each request to the LLM
    #[arg(long, value_name = "N", requires = "slm")]
    slm_ratio: Option<f64>,
    /// Tokens of one request to a small model
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT_SLM_TOKENS, value_parser = parse_tokens)]
    pub(super) slm_tokens: u64,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub(super) struct OutputArgs {
    /// Print the plan as JSON (docs/plan-json.md)
    #[arg(long)]
    pub(super) json: bool,
    /// Print the formula behind each figure, with its numbers and what was assumed
    #[arg(long)]
    pub(super) explain: bool,
    /// Write the best option that `mserve launch` runs as an mserve.toml
    #[arg(long, value_name = "FILE")]
    pub(super) write: Option<PathBuf>,
    /// Change TP, cache type, lengths and cards with keys, and see the figures move
    #[arg(short, long, alias = "what-if", conflicts_with_all = ["json", "explain", "write"])]
    pub(super) interactive: bool,
}

fn parse_engine(text: &str) -> Result<Engine, String> {
    [Engine::Mserve, Engine::Vllm, Engine::Sglang]
        .into_iter()
        .find(|engine| engine.to_string() == text.to_ascii_lowercase())
        .ok_or_else(|| "expected mserve, vllm or sglang".to_owned())
}

fn parse_version(text: &str) -> Result<Version, String> {
    text.parse().map_err(|error: NotAVersion| error.to_string())
}

fn parse_workload(text: &str) -> Result<Workload, String> {
    Workload::NAMED
        .into_iter()
        .find(|workload| workload.name() == text.to_ascii_lowercase())
        .ok_or_else(|| "expected doc-qa, kb-qa or balanced".to_owned())
}

fn parse_kv_dtype(text: &str) -> Result<KvCacheDtype, String> {
    match text.to_ascii_lowercase().as_str() {
        "auto" => Ok(KvCacheDtype::Auto),
        "fp16" | "float16" | "half" => Ok(KvCacheDtype::Fp16),
        "bf16" | "bfloat16" => Ok(KvCacheDtype::Bf16),
        "fp8" | "fp8_e4m3" => Ok(KvCacheDtype::Fp8),
        _ => Err("expected auto, fp16, bf16 or fp8".to_owned()),
    }
}

impl PlanArgs {
    /// Plan for `model` on `chosen`.
    pub(super) fn request<'a>(&self, model: &'a Model, chosen: &ChosenCards) -> anyhow::Result<PlanRequest<'a>> {
        let log = self.from_log.as_deref().map(boot_log).transpose()?;
        let engine = self.engine.unwrap_or(match log.and_then(|log| log.engine) {
            Some(engine::Engine::Sglang) => Engine::Sglang,
            Some(engine::Engine::Vllm) => Engine::Vllm,
            None => Engine::Mserve,
        });
        if engine == Engine::Mserve && (self.engine_version.is_some() || log.is_some()) {
            let failure = Failure::usage("--engine-version and --from-log are of another engine");
            return Err(failure.hint("add --engine vllm or --engine sglang").into());
        }
        let version = self.engine_version.or(log.and_then(|log| log.version));
        let fraction = self.gpu_memory_utilization.or(log.and_then(|log| log.gpu_memory_utilization));
        let total = chosen.card.memory_total_bytes;
        // A log is of one TP size: the one that it says, or that is planned.
        let tp = log.and_then(|log| log.tensor_parallel_size).or(self.tensor_parallel_size).unwrap_or(1);
        Ok(PlanRequest {
            model_name: &model.name,
            spec: &model.spec,
            weights: model.weights,
            card: chosen.card.clone(),
            gpus: chosen.gpus,
            tensor_parallel_size: self.tensor_parallel_size,
            limits: self.limits(model, chosen, engine, version, fraction, log.as_ref()),
            demand: self.demand(model, engine),
            accounting: Accounting {
                version,
                default_fraction: fraction.is_none(),
                default_max_num_seqs: self.max_num_seqs.is_none(),
                // Of models that do not generate a step is as long as a text.
                default_max_num_batched_tokens: self.max_num_batched_tokens.is_none()
                    && model.spec.task == Task::Generate,
                calibration: log.map(|log| (tp, log.calibration(Some(total), fraction))),
            },
            kv_cache_dtype: self.kv_cache_dtype,
            sliding: SlidingLayers::KeepWindow,
        })
    }

    /// What was asked for; else what the log says, or the engine's own default.
    fn limits(
        &self,
        model: &Model,
        chosen: &ChosenCards,
        engine: Engine,
        version: Option<Version>,
        fraction: Option<f64>,
        log: Option<&BootLog>,
    ) -> EngineLimits {
        let mut limits = EngineLimits::for_model(&model.spec);
        let of_log = log.and_then(|log| log.max_model_len);
        if let Some(max_model_len) = self.max_model_len.or(of_log) {
            limits = limits.with_max_model_len(&model.spec, max_model_len);
        }
        let theirs = match engine {
            Engine::Mserve => None,
            Engine::Vllm => Some(engine::Engine::Vllm),
            Engine::Sglang => Some(engine::Engine::Sglang),
        };
        if let Some(theirs) = theirs {
            let pool = PoolOptions::new(1, DType::BF16);
            let total = chosen.card.memory_total_bytes;
            let settings = EngineSettings::new(theirs, total, limits.max_model_len, pool);
            let settings = EngineSettings {
                version: version.unwrap_or(settings.version),
                a100: chosen.card.name.contains("A100"),
                ..settings
            };
            limits.gpu_memory_utilization = settings.gpu_memory_utilization();
            limits.max_num_seqs = settings.max_num_seqs();
            if model.spec.task == Task::Generate {
                limits.max_num_batched_tokens = settings.max_num_batched_tokens();
            }
        }
        limits.gpu_memory_utilization = fraction.unwrap_or(limits.gpu_memory_utilization);
        limits.max_num_seqs = self.max_num_seqs.unwrap_or(limits.max_num_seqs);
        limits.max_num_batched_tokens = self.max_num_batched_tokens.unwrap_or(limits.max_num_batched_tokens);
        limits
    }

    fn demand(&self, model: &Model, engine: Engine) -> Demand {
        let generates = model.spec.task == Task::Generate;
        let (input_tokens, output_tokens) = match (self.isl, self.osl, generates) {
            (isl, _, false) => (isl.unwrap_or(TYPICAL_INPUT_TOKENS + TYPICAL_OUTPUT_TOKENS), 0),
            (None, None, true) => (TYPICAL_INPUT_TOKENS, TYPICAL_OUTPUT_TOKENS),
            (Some(isl), None, true) => (isl, (isl / 4).max(1)),
            (None, Some(osl), true) => (osl.saturating_mul(3), osl),
            (Some(isl), Some(osl), true) => (isl, osl),
        };
        let targets = self.targets();
        let by_rate = targets.any() || self.isl.is_some() || self.osl.is_some() || !self.split.slm.is_empty();
        Demand {
            engine,
            shape: RequestShape { input_tokens, output_tokens },
            targets,
            rank: if by_rate { Rank::RequestRate } else { Rank::Concurrency },
        }
    }

    pub(super) fn targets(&self) -> Targets {
        Targets {
            ttft_ms: self.targets.ttft,
            tpot_ms: self.targets.tpot,
            request_rate: self.targets.target_request_rate,
            concurrency: self.targets.target_concurrency,
        }
    }
}

fn boot_log(path: &Path) -> anyhow::Result<BootLog> {
    let refuse = |why: String| Failure::usage(format!("--from-log {}: {why}", path.display()));
    let file = std::fs::File::open(path).map_err(|error| refuse(error.to_string()))?;
    let mut log = Vec::new();
    file.take(MAX_LOG_BYTES as u64 + 1).read_to_end(&mut log).map_err(|error| refuse(error.to_string()))?;
    Ok(parse_boot_log(&log).map_err(|error| refuse(error.to_string()))?)
}

impl SplitArgs {
    pub(super) fn workload(&self) -> Result<Workload, Failure> {
        match (self.workload, self.slm_ratio) {
            (Some(workload), _) => Ok(workload),
            (None, Some(ratio)) if ratio > 0.0 && ratio <= 10_000.0 => Ok(Workload::Ratio(ratio)),
            (None, Some(ratio)) => {
                Err(Failure::usage(format!("--slm-ratio is {ratio}, expected a number above 0, at most 10000")))
            }
            (None, None) => Ok(Workload::Balanced),
        }
    }
}
