//! A plan as text. Plain: no escapes, ASCII bars.

mod bar;
mod speed;
mod split;
mod tables;

pub(super) use bar::Look;
pub(super) use split::split;

use super::cards::FreeCard;
use mserve_planner::engine::{Engine, EngineBudget};
use mserve_planner::explain::Explained;

use mserve_planner::memory::{CacheKind, KvGroup, Source};
use mserve_planner::model::Task;
use mserve_planner::plan::{CardRow, DoesNotFit, ModelSummary, Plan, PlanOption, Rank};
use mserve_planner::units::{format_bytes, format_bytes_per_token, format_count};
use std::fmt::Write;

/// The whole answer. Writing to a String cannot fail.
pub(super) fn plan(
    plan: &Plan,
    headline: &str,
    theirs: Option<&EngineBudget>,
    others: &[CardRow],
    look: Look,
) -> String {
    let mut out = format!("{headline}\n\n");
    header(&mut out, plan);
    let typical = format_count(plan.typical_len_tokens);
    let by = match plan.demand.rank {
        Rank::Concurrency => format!("requests of {typical} tokens at once"),
        Rank::RequestRate
            if plan.demand.targets.request_rate.is_some() || plan.demand.targets.concurrency.is_some() =>
        {
            "GPUs that the targets need, then requests/s".to_owned()
        }
        Rank::RequestRate => "requests/s".to_owned(),
    };
    let _ = write!(out, "\nRanked by {by}:\n{}{}\n", tables::options(plan), speed::speeds(plan));
    if let Some(best) = plan.options.first() {
        out.push_str(&best_option(plan, best, theirs, look));
    }
    for rejected in &plan.rejected {
        let _ = writeln!(out, "TP {} left out: {}", rejected.tensor_parallel_size, rejected.reason);
    }
    if !others.is_empty() {
        let _ = write!(out, "\nThe best on {} of each common card:\n{}", plan.gpus, tables::cards(others));
    }
    if !plan.notes.is_empty() {
        out.push('\n');
    }
    for note in &plan.notes {
        let _ = writeln!(out, "note: {note}");
    }
    out
}

/// When nothing fits: what the plan was for, and the cards that would do.
pub(super) fn cards_only(headline: &str, others: &[CardRow]) -> String {
    if others.is_empty() {
        return format!("{headline}\n");
    }
    format!("{headline}\n\nThe best on as many of each common card:\n{}\n", tables::cards(others))
}

/// What it needs, what holds it, and what is free now.
pub(super) fn does_not_fit(error: &DoesNotFit, largest_free: Option<&FreeCard>) -> String {
    let mut out = format!(
        "\nneeds    {} on {}: {} of weights, {} for one request of {} tokens, {} beside\n",
        format_bytes(error.needed_bytes),
        match error.tensor_parallel_size {
            1 => "one GPU".to_owned(),
            ranks => format!("each of {ranks} GPUs"),
        },
        format_bytes(error.weights_bytes),
        format_bytes(error.kv_bytes),
        format_count(error.max_model_len),
        format_bytes(error.needed_bytes - error.weights_bytes - error.kv_bytes)
    );
    let ratio = error.requested_bytes as f64 / error.total_bytes.max(1) as f64;
    let _ = writeln!(
        out,
        "holds    {} of {}; at {ratio:.2} of its total a card of {} would do{}",
        format_bytes(error.requested_bytes),
        format_bytes(error.total_bytes),
        format_bytes((error.needed_bytes as f64 / ratio) as u64),
        error.smallest_card.map_or_else(String::new, |card| format!(": {card}"))
    );
    if let Some(card) = largest_free {
        let _ = writeln!(
            out,
            "free now GPU {} ({}) has the most: {} of {}",
            card.index,
            card.name,
            format_bytes(card.memory_free_bytes),
            format_bytes(card.memory_total_bytes)
        );
    }
    out
}

/// The lines that the engine prints when it starts, and how sure they are.
fn account(theirs: &EngineBudget) -> String {
    let engine = match theirs.engine {
        Engine::Vllm => "vLLM",
        Engine::Sglang => "SGLang",
    };
    let mut out = format!("{}\n", theirs.lines());
    let assumed: Vec<&str> = theirs.assumed.iter().map(|fact| fact.0.as_str()).collect();
    let _ = writeln!(
        out,
        "  (as {engine} {} prints it, each replica of the best option; +- {}{}{})\n",
        theirs.version,
        format_bytes(theirs.uncertainty_bytes),
        if assumed.is_empty() { "" } else { "; assumed: " },
        assumed.join(", ")
    );
    out
}

/// `--explain`, one figure a line.
pub(super) fn explained(rows: &[Explained]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let width = rows.iter().map(|row| row.figure.len()).max().unwrap_or(0);
    let mut out = "\nHow the best option comes about:\n".to_owned();
    for row in rows {
        let _ = writeln!(out, "{:width$}  {}  [{}]", row.figure, row.formula, row.source);
    }
    out
}

fn header(out: &mut String, plan: &Plan) {
    let model = &plan.model;
    let limits = &plan.limits;
    let parameters = match model.parameters as f64 {
        n if n < 1e9 => format!("{:.1} M", n / 1e6),
        n => format!("{:.2} B", n / 1e9),
    };
    let _ = writeln!(
        out,
        "model    {}: {}, {} layers, {parameters} parameters, {}, context {}",
        model.name,
        model.architecture,
        model.layers,
        stored(model),
        format_count(model.max_position_embeddings)
    );
    let source = match model.weights_source {
        Source::Checkpoint => "from the safetensors headers",
        _ => "computed from config.json",
    };
    let _ = writeln!(out, "weights  {} {source}", format_bytes(model.weights_bytes));
    let _ = writeln!(out, "KV       {}", kv(model));
    let requested = plan.options.first().map_or(0, |o| o.per_gpu.requested_bytes);
    let _ = writeln!(
        out,
        "limits   {} of each GPU ({} of its total {}), max_model_len {}, typical request {}, max_num_seqs {}",
        format_bytes(requested),
        limits.gpu_memory_utilization,
        format_bytes(plan.card.memory_total_bytes),
        format_count(limits.max_model_len),
        format_count(plan.typical_len_tokens),
        limits.max_num_seqs
    );
}

fn stored(model: &ModelSummary) -> String {
    match &model.quantization {
        None => format!("{:?}", model.stored_dtype),
        Some(quantization) if quantization.name() == quantization.method => quantization.name(),
        Some(quantization) => format!("{} ({})", quantization.name(), quantization.method),
    }
}

fn kv(model: &ModelSummary) -> String {
    if model.kv.is_empty() {
        let task = match model.task {
            Task::Embed { .. } => "embedding",
            Task::Classify { .. } => "classification",
            Task::Generate => "generation",
        };
        return format!("none: {task} keeps no cache");
    }
    let total = format_bytes_per_token(model.kv_bytes_per_token);
    let dtype = model.kv.dtype;
    let groups: Vec<String> = model.kv.groups.iter().map(group).collect();
    format!("{total} per token at TP 1 in {dtype:?}: {}", groups.join(" + "))
}

fn group(group: &KvGroup) -> String {
    let layers = group.layers;
    let kind = match group.kind {
        CacheKind::Full => "full".to_owned(),
        CacheKind::Sliding { window_tokens } => format!("sliding (window {})", format_count(window_tokens)),
        CacheKind::Chunked { chunk_tokens } => format!("chunked ({})", format_count(chunk_tokens)),
        CacheKind::Compressed { tokens_per_entry } => format!("compressed (1 entry for {tokens_per_entry} tokens)"),
        CacheKind::Indexer => "indexer".to_owned(),
        CacheKind::State => "recurrent".to_owned(),
    };
    let per = if group.kind == CacheKind::State { " per sequence" } else { "" };
    format!("{layers} {kind} layers x {}{per}", format_bytes_per_token(group.bytes_per_entry_per_layer))
}

fn best_option(plan: &Plan, best: &PlanOption, theirs: Option<&EngineBudget>, look: Look) -> String {
    let mut out = String::new();
    if let Some(theirs) = theirs.filter(|_| !best.kv.is_empty()) {
        out.push_str(&account(theirs));
    } else if let Some(concurrency) = best.full.kv_per_replica {
        let _ = writeln!(out, "GPU KV cache size: {} tokens", format_count(best.kv_cache_tokens));
        let _ = writeln!(
            out,
            "Maximum concurrency for {} tokens per request: {concurrency:.2}x",
            format_count(best.full.tokens)
        );
        let _ = writeln!(
            out,
            "  (each replica of the best option; {} blocks of {} tokens)\n",
            format_count(best.num_blocks),
            best.kv.block_size_tokens
        );
    }
    out.push_str(&bar::bars(plan, best, look));
    out
}
