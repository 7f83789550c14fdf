//! The formula behind each figure of a plan's best option, with its numbers, and where they come from.

use crate::gpus;
use crate::memory::{CacheKind, Source, TermKind};
use crate::perf::{Basis, OpTime, StepTime};
use crate::plan::{Plan, PlanOption, PlanRequest, Timed};
use crate::units::{format_bytes, format_bytes_per_token, format_count};
use serde::Serialize;

/// One figure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explained {
    pub figure: String,
    /// Its value and how it comes about: `6.52 GiB = 36.00 GiB - 24.24 GiB - ...`
    pub formula: String,
    /// measured | calibrated | roofline | computed | checkpoint | assumed, and by what.
    pub source: String,
}

fn row(figure: &str, formula: String, source: impl Into<String>) -> Explained {
    Explained { figure: figure.to_owned(), formula, source: source.into() }
}

/// Figures of the best option, in the order in which they follow from one another.
pub fn explain(request: &PlanRequest<'_>, plan: &Plan) -> Vec<Explained> {
    let Some(best) = plan.options.first() else { return Vec::new() };
    let mut rows = memory(plan, best);
    rows.extend(cache(plan, best));
    let program = request.demand.engine.program(request.spec);
    if let Some(timed) = Timed::new(request, &program, best.tensor_parallel_size) {
        rows.extend(speed(best, &timed));
    }
    rows
}

fn memory(plan: &Plan, best: &PlanOption) -> Vec<Explained> {
    let budget = &best.per_gpu;
    let mut rows = vec![row(
        "share of a card",
        format!(
            "{} = {} x {} (memory of {})",
            format_bytes(budget.requested_bytes),
            plan.limits.gpu_memory_utilization,
            format_bytes(budget.total_bytes),
            plan.card.name
        ),
        "asked for; total as the driver reports it",
    )];
    for term in &budget.terms {
        let formula = match term.name {
            TermKind::Weights => format!(
                "{} on each of {} ranks, {} in all",
                format_bytes(term.bytes),
                best.tensor_parallel_size,
                format_bytes(plan.model.weights_bytes)
            ),
            TermKind::Activations => format!(
                "{}: buffers alive together in a step of {} tokens",
                format_bytes(term.bytes),
                format_count(plan.limits.max_num_batched_tokens)
            ),
            _ => format_bytes(term.bytes),
        };
        rows.push(row(term.name.label(), formula, source(term.source)));
    }
    let terms: Vec<String> = budget.terms.iter().map(|term| format_bytes(term.bytes)).collect();
    rows.push(row(
        "KV pool",
        format!(
            "{} = {} - {}",
            format_bytes(budget.kv_pool_bytes),
            format_bytes(budget.requested_bytes),
            terms.join(" - ")
        ),
        "computed",
    ));
    rows
}

fn source(source: Source) -> &'static str {
    match source {
        Source::Computed => "computed from config.json",
        Source::Checkpoint => "checkpoint: its safetensors headers",
        Source::Measured => "measured on one card, taken for all",
        Source::Calibrated => "calibrated: a boot log of this model and card",
        Source::Assumed => "assumed: taken over from another engine's logs",
    }
}

fn cache(plan: &Plan, best: &PlanOption) -> Vec<Explained> {
    let kv = &best.kv;
    if kv.is_empty() {
        return vec![row("KV cache", "none: every text passes in one step".to_owned(), "computed from config.json")];
    }
    let tp = best.tensor_parallel_size;
    let mut rows: Vec<Explained> = kv
        .groups
        .iter()
        .map(|group| {
            let each = format_bytes_per_token(group.bytes_per_entry_per_layer);
            let (layers, what, dtype) = (group.layers, holds(group.kind), kv.dtype);
            let (figure, total) = match group.kind {
                CacheKind::State => ("KV per sequence", group.bytes_per_sequence()),
                _ => ("KV per token", group.bytes_per_token()),
            };
            let total = format_bytes_per_token(total);
            row(
                figure,
                format!("{total} = {layers} layers ({what}) x {each} in {dtype:?} at TP {tp}"),
                "computed from config.json",
            )
        })
        .collect();
    rows.push(row(
        "KV blocks",
        format!(
            "{} = {} / {} ({} tokens a block)",
            format_count(best.num_blocks),
            format_bytes(best.per_gpu.kv_pool_bytes),
            format_bytes(kv.block_bytes()),
            kv.block_size_tokens
        ),
        "computed",
    ));
    for concurrency in [&best.full, &best.typical] {
        let per_request = kv.blocks_per_request(concurrency.tokens, plan.limits.max_num_batched_tokens);
        rows.push(row(
            &format!("requests of {} tokens", format_count(concurrency.tokens)),
            format!(
                "{:.2} a replica = {} blocks / {} a request; {} = min(that, {}) x {} replicas",
                concurrency.kv_per_replica.unwrap_or(0.0),
                format_count(best.num_blocks),
                format_count(per_request),
                format_count(concurrency.requests_total),
                plan.limits.max_num_seqs,
                best.replicas
            ),
            "computed",
        ));
    }
    rows
}

/// What of a sequence a cache keeps.
fn holds(kind: CacheKind) -> String {
    match kind {
        CacheKind::Full => "all tokens".to_owned(),
        CacheKind::Sliding { window_tokens } => format!("the last {}", format_count(window_tokens)),
        CacheKind::Chunked { chunk_tokens } => format!("the chunk of {}", format_count(chunk_tokens)),
        CacheKind::Compressed { tokens_per_entry } => format!("one entry for {tokens_per_entry} tokens"),
        CacheKind::Indexer => "keys of the indexer".to_owned(),
        CacheKind::State => "recurrent state".to_owned(),
    }
}

fn speed(best: &PlanOption, timed: &Timed) -> Vec<Explained> {
    let Some(speed) = &best.speed else { return Vec::new() };
    let replica = timed.replica();
    let machine = timed.machine();
    let engine = machine.engine;
    let fitted = match timed.basis() {
        Basis::Calibrated => format!("calibrated: {}", engine.source),
        Basis::Roofline => format!("roofline: constants {}", engine.source),
        Basis::Assumed => format!("assumed: kernels counted, constants {}", engine.source),
    };
    let gpu = machine.gpu;
    let mut rows = vec![row(
        "card",
        format!(
            "{:.2} TB/s x {:.3} read, {:.0} TFLOP/s x {:.3} multiplied",
            gpu.memory_bandwidth_bytes_per_s as f64 / 1e12,
            engine.memory,
            gpu.rates.half_flops_per_s as f64 / 1e12,
            engine.matrix
        ),
        gpus::find(gpu.name).map_or("", |gpu| gpu.source),
    )];
    let users = speed.replica.concurrency;
    if replica.shape.output_tokens == 0 {
        rows.extend(step(&format!("step of {users:.0} texts"), &replica.prompt_step(users), &fitted));
        rows.push(row(
            "rate",
            format!(
                "{:.1} texts/s = {} replicas x {users:.0} / {:.1} ms",
                speed.requests_per_s,
                best.replicas,
                speed.replica.ttft_ms - 1e3 * engine.request_s
            ),
            fitted,
        ));
        return rows;
    }
    let (input, output) = (replica.shape.input_tokens, replica.shape.output_tokens);
    rows.extend(step(&format!("decode step of {users:.0} sequences"), &replica.decode_step(users), &fitted));
    rows.push(row(
        "time per output token",
        format!(
            "{:.2} ms = mean step with {users:.0} requests under way, {:.0} % of the time in steps that read prompts",
            speed.replica.tpot_ms,
            100.0 * speed.replica.prefill_share
        ),
        fitted.clone(),
    ));
    rows.push(row(
        "time to first token",
        format!(
            "{:.0} ms: the prompt of {} tokens, half a step, prompts that came first, {:.1} ms of host ({:.0} ms alone)",
            speed.replica.ttft_ms,
            format_count(input),
            1e3 * engine.request_s,
            speed.alone.ttft_ms
        ),
        fitted.clone(),
    ));
    rows.push(row(
        "request rate",
        format!(
            "{:.2}/s = {} replicas x {:.2}/s; {:.0} output tokens/s = that x {}",
            speed.requests_per_s,
            best.replicas,
            speed.replica.requests_per_s,
            speed.output_tokens_per_s,
            format_count(output)
        ),
        format!("computed; the load of {users:.0} a replica is set by {}", speed.load_limit.label()),
    ));
    rows
}

/// A step, op kind by op kind.
fn step(name: &str, time: &StepTime, source: &str) -> Vec<Explained> {
    let parts: Vec<String> = time.ops.iter().map(|op| format!("{:.2}", 1e3 * op.seconds)).collect();
    let total =
        format!("{:.2} ms = {} + {:.2} of host", 1e3 * time.seconds, parts.join(" + "), 1e3 * time.host_seconds);
    let mut rows = vec![row(name, total, source)];
    let of = |op: &OpTime| {
        format!(
            "{:.2} ms: {} ops, {:.2} GB, {:.2} TFLOP",
            1e3 * op.seconds,
            op.launches,
            op.bytes / 1e9,
            op.flops / 1e12
        )
    };
    rows.extend(time.ops.iter().map(|op| row(&format!("  {}", op.kind.label()), of(op), "roofline")));
    rows
}
