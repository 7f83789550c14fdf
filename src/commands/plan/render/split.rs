//! A split of cards between an LLM and small models as text.

use super::speed::rate;
use super::tables::table;
use mserve_planner::memory::KvCacheDtype;
use mserve_planner::plan::PlanRequest;
use mserve_planner::split::{Side, Split, SplitOption, Workload};
use mserve_planner::units::{format_bytes, format_count};
use std::fmt::Write;

/// More rows than this help nobody; the JSON has all.
const MAX_ROWS: usize = 12;

pub(in crate::commands::plan) fn split(
    split: &Split,
    headline: &str,
    notes: &[String],
    request: &PlanRequest<'_>,
) -> String {
    let mut out = format!("{headline}\n\n");
    let shape = request.demand.shape;
    let (low, high) = split.workload.range();
    let range = if low == high { format!("{low}") } else { format!("{low:.0} to {high:.0}") };
    let _ = writeln!(
        out,
        "LLM      {}: {} prompt and {} output tokens a request, on {}",
        request.model_name,
        format_count(shape.input_tokens),
        format_count(shape.output_tokens),
        request.demand.engine
    );
    let _ = writeln!(
        out,
        "workload {}: {range} requests to small models for each to the LLM, of {} tokens; compared at {}",
        split.workload.name(),
        format_count(split.slm_tokens),
        split.ratio
    );
    small_models(&mut out, split);
    let _ = write!(out, "\nRanked by LLM requests/s served with their small ones:\n{}", options(split));
    if split.options.len() > MAX_ROWS {
        let _ = writeln!(out, "and {} more (--json has all)", split.options.len() - MAX_ROWS);
    }
    wanted(&mut out, split);
    if !notes.is_empty() {
        out.push('\n');
    }
    for note in notes {
        let _ = writeln!(out, "note: {note}");
    }
    out
}

fn small_models(out: &mut String, split: &Split) {
    for model in &split.slm_card.models {
        let _ = writeln!(
            out,
            "SLM      {} ({}): {} replicas a card of {} each, {} requests/s a card ({:.1} ms a batch, {:.1} ms of host)",
            model.name,
            model.kind.label(),
            model.replicas,
            format_bytes(model.bytes),
            rate(model.requests_per_s),
            model.batch_ms,
            model.host_ms
        );
    }
    let _ = writeln!(
        out,
        "         all on one card: {}, {} requests/s ({} when always busy)",
        format_bytes(split.slm_card.bytes),
        rate(split.slm_card.requests_per_s),
        rate(split.slm_card.busy_requests_per_s)
    );
}

fn options(split: &Split) -> String {
    let header = [
        "",
        "LLM GPUs",
        "SLM GPUs",
        "KV",
        "TP x replicas",
        "LLM req/s",
        "SLM req/s",
        "served",
        "TTFT ms",
        "TPOT ms",
        "idle",
        "why not",
    ];
    let rows = split.options.iter().take(MAX_ROWS).enumerate().map(|(i, o)| cells(i, o));
    table(&header, rows)
}

fn cells(index: usize, o: &SplitOption) -> Vec<String> {
    let rates = o.llm.speed.as_ref().map(|speed| speed.replica);
    let idle = match o.limited_by {
        Side::Llm => format!("SLM {:.0} %", 100.0 * o.idle.slm),
        Side::Slm => format!("LLM {:.0} %", 100.0 * o.idle.llm),
    };
    vec![
        if index == 0 { ">".to_owned() } else { String::new() },
        o.llm_gpus.to_string(),
        format!("{}{}", o.slm_gpus, if o.co_located { " + shared" } else { "" }),
        kv(o),
        format!("{} x {}", o.llm.tensor_parallel_size, o.llm.replicas),
        rate(o.llm_requests_per_s),
        rate(o.slm_requests_per_s),
        rate(o.served_requests_per_s),
        rates.map_or_else(String::new, |r| format!("{:.0}", r.ttft_ms)),
        rates.map_or_else(String::new, |r| format!("{:.1}", r.tpot_ms)),
        idle,
        o.lost_because.clone(),
    ]
}

fn kv(option: &SplitOption) -> String {
    match option.kv_cache_dtype {
        KvCacheDtype::Auto => format!("{:?}", option.llm.kv.dtype).to_ascii_lowercase(),
        KvCacheDtype::Fp16 => "fp16".to_owned(),
        KvCacheDtype::Bf16 => "bf16".to_owned(),
        KvCacheDtype::Fp8 => "fp8".to_owned(),
    }
}

fn wanted(out: &mut String, split: &Split) {
    let wants: Vec<String> = split
        .wanted
        .iter()
        .map(|w| {
            let cards = if w.low == w.high { w.low.to_string() } else { format!("{}-{}", w.low, w.high) };
            let mark =
                if w.workload == split.workload && !matches!(split.workload, Workload::Ratio(_)) { "*" } else { "" };
            format!("{}{mark} {cards}", w.workload.name())
        })
        .collect();
    let _ = writeln!(
        out,
        "\nBeside an LLM side of {} requests/s, of at most {} GPUs the small models want: {}",
        rate(split.llm_rate_for_wanted),
        split.gpus,
        wants.join(", ")
    );
}
