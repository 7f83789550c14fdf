//! `mserve plan`: what fits, on the cards of this machine or on ones that are named.

mod cards;
pub(super) mod model;
mod render;

use crate::exit::{self, Failure};
use anyhow::Context;
use cards::{CardSource, ChosenCards};
use clap::Args;
use mserve_planner::memory::{EngineLimits, KvCacheDtype, SlidingLayers};
use mserve_planner::plan::{self, CardRow, DoesNotFit, Plan, PlanError, PlanRequest};
use mserve_planner::units::parse_tokens;
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Prompt and output of a typical request, when neither is given.
const TYPICAL_LEN_TOKENS: u64 = 2048;

#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Model directory, or its config.json
    #[arg(value_name = "MODEL", required_unless_present = "model", conflicts_with = "model")]
    model_path: Option<PathBuf>,
    /// The same as a flag
    #[arg(long, value_name = "MODEL", aliases = ["model-path", "model-id"])]
    model: Option<PathBuf>,
    /// GPUs to plan for [default: all of this machine's, or 1]
    #[arg(long, value_name = "N", alias = "total-gpus", value_parser = clap::value_parser!(u64).range(1..=plan::MAX_GPUS))]
    gpus: Option<u64>,
    /// Kind of GPU: h100, h200, a100-40g, l40s, rtx4090, ... [default: what this machine has]
    #[arg(long, value_name = "NAME", alias = "system")]
    gpu: Option<String>,
    /// Only this tensor-parallel size [default: every legal one]
    #[arg(long, value_name = "N", visible_alias = "tp", aliases = ["tp-size", "num-shard"],
          value_parser = clap::value_parser!(u64).range(1..=plan::MAX_GPUS))]
    tensor_parallel_size: Option<u64>,
    /// Share of each GPU's total memory that the engine may take
    #[arg(
        long,
        value_name = "RATIO",
        visible_alias = "vram-ratio",
        alias = "mem-fraction-static",
        default_value_t = 0.9
    )]
    gpu_memory_utilization: f64,
    /// Longest sequence, prompt and output, such as 4096 or 32k [default: the model's context]
    #[arg(long, value_name = "TOKENS", aliases = ["context-length", "max-total-tokens", "session-len"], value_parser = parse_tokens)]
    max_model_len: Option<u64>,
    /// Sequences that run at once in one replica
    #[arg(long, value_name = "N", aliases = ["max-running-requests", "max-batch-size"], default_value_t = 256)]
    max_num_seqs: u64,
    /// Tokens of one step [default: 8192; whole texts for models that do not generate]
    #[arg(long, value_name = "TOKENS", alias = "chunked-prefill-size", value_parser = parse_tokens)]
    max_num_batched_tokens: Option<u64>,
    /// Element type of the KV cache: auto, fp16, bf16, fp8
    #[arg(long, value_name = "TYPE", alias = "kv-dtype", default_value = "auto", value_parser = parse_kv_dtype)]
    kv_cache_dtype: KvCacheDtype,
    /// Prompt tokens of a typical request [default: 2048 together with --osl]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens)]
    isl: Option<u64>,
    /// Output tokens of a typical request
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens)]
    osl: Option<u64>,
    /// Print the plan as JSON
    #[arg(long)]
    json: bool,
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

/// The plan as `--json` prints it.
#[derive(Debug, Serialize)]
struct PlanJson<'a> {
    #[serde(flatten)]
    plan: &'a Plan,
    card_source: CardSource,
    /// One row for each common card, when the plan had to be made for the default one.
    other_cards: &'a [CardRow],
}

#[derive(Debug, Serialize)]
struct DoesNotFitJson<'a> {
    schema: u32,
    does_not_fit: &'a DoesNotFit,
    card_source: CardSource,
    other_cards: &'a [CardRow],
}

pub fn run(mut args: PlanArgs) -> anyhow::Result<ExitCode> {
    let path = args.model_path.take().or_else(|| args.model.take()).context("no model was given")?;
    let args = &args;
    let model = model::load(&path)?;
    let chosen = cards::choose(args.gpu.as_deref(), args.gpus, args.gpu_memory_utilization)?;
    let request = request(args, &model, &chosen);
    let other_cards = match chosen.source {
        CardSource::Default => plan::across_cards(&request, cards::common()).map_err(|error| usage(&error))?,
        CardSource::Flag | CardSource::Driver => Vec::new(),
    };
    match plan::plan(&request) {
        Ok(mut plan) => {
            plan.notes.extend(chosen.notes.iter().chain(&model.notes).cloned());
            show_plan(args, &chosen, &plan, &other_cards)
        }
        Err(PlanError::DoesNotFit(error)) => show_does_not_fit(args, &chosen, &error, &other_cards),
        Err(error) => Err(usage(&error)),
    }
}

fn request<'a>(args: &PlanArgs, model: &'a model::Model, chosen: &ChosenCards) -> PlanRequest<'a> {
    let mut limits = EngineLimits::for_model(&model.spec);
    if let Some(max_model_len) = args.max_model_len {
        limits = limits.with_max_model_len(&model.spec, max_model_len);
    }
    limits.gpu_memory_utilization = args.gpu_memory_utilization;
    limits.max_num_seqs = args.max_num_seqs;
    limits.max_num_batched_tokens = args.max_num_batched_tokens.unwrap_or(limits.max_num_batched_tokens);
    let typical_len_tokens = match (args.isl, args.osl) {
        (None, None) => TYPICAL_LEN_TOKENS,
        (isl, osl) => isl.unwrap_or(0).saturating_add(osl.unwrap_or(0)),
    };
    PlanRequest {
        model_name: &model.name,
        spec: &model.spec,
        weights: model.weights,
        card: chosen.card.clone(),
        gpus: chosen.gpus,
        tensor_parallel_size: args.tensor_parallel_size,
        limits,
        typical_len_tokens,
        kv_cache_dtype: args.kv_cache_dtype,
        sliding: SlidingLayers::KeepWindow,
    }
}

fn usage(error: &PlanError) -> anyhow::Error {
    Failure::usage(error.to_string()).into()
}

fn show_plan(args: &PlanArgs, chosen: &ChosenCards, plan: &Plan, others: &[CardRow]) -> anyhow::Result<ExitCode> {
    let text = if args.json {
        json(&PlanJson { plan, card_source: chosen.source, other_cards: others })?
    } else {
        render::plan(plan, &chosen.headline, others, look())
    };
    print(&text)?;
    Ok(ExitCode::from(exit::OK))
}

fn show_does_not_fit(
    args: &PlanArgs,
    chosen: &ChosenCards,
    error: &DoesNotFit,
    others: &[CardRow],
) -> anyhow::Result<ExitCode> {
    if args.json {
        print(&json(&DoesNotFitJson {
            schema: plan::SCHEMA,
            does_not_fit: error,
            card_source: chosen.source,
            other_cards: others,
        })?)?;
    } else {
        print(&render::cards_only(&chosen.headline, others))?;
    }
    let failure = Failure::does_not_fit(error.to_string());
    let changes: Vec<String> = error.changes.iter().map(ToString::to_string).collect();
    let hint = match changes.as_slice() {
        [] => "no single change makes it fit: a smaller or quantised model would".to_owned(),
        changes => format!("any one of these makes it fit: {}", changes.join("; ")),
    };
    Err(failure.hint(hint).into())
}

fn look() -> render::Look {
    let terminal = std::io::stdout().is_terminal();
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    if terminal && !dumb { render::Look::Blocks } else { render::Look::Plain }
}

fn json(value: &impl Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// A reader that has seen enough (`mserve plan | head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}
