//! Speed as text: one row an option.

use super::tables::table;
use mserve_planner::perf::Basis;
use mserve_planner::plan::{Plan, PlanOption};
use mserve_planner::units::format_count;
use std::fmt::Write;

/// Rates of all options at their loads, with what sets the load and what takes the time. Empty when no card's rates
/// are known.
pub(super) fn speeds(plan: &Plan) -> String {
    let rows: Vec<Vec<String>> = plan.options.iter().enumerate().filter_map(|(i, o)| cells(plan, i, o)).collect();
    if rows.is_empty() {
        return String::new();
    }
    let shape = plan.demand.shape;
    let generates = shape.output_tokens > 0;
    // Of all options: the least that any of them rests on.
    let bases = plan.options.iter().filter_map(|option| option.speed.as_ref()).map(|speed| speed.basis);
    let basis = bases.max().map_or("", Basis::label);
    let mut out = String::new();
    let _ = if generates {
        writeln!(
            out,
            "\nSpeed of {} at {} prompt and {} output tokens a request (ms; predicted: {basis}):",
            plan.demand.engine,
            format_count(shape.input_tokens),
            format_count(shape.output_tokens)
        )
    } else {
        writeln!(out, "\nSpeed at {} tokens a text (ms; predicted: {basis}):", format_count(shape.input_tokens))
    };
    let header: Vec<&str> = if generates {
        vec![
            "",
            "TP",
            "at once",
            "set by",
            "TTFT",
            "TPOT",
            "requests/s",
            "tokens/s",
            "alone TTFT",
            "TPOT",
            "slowest part",
        ]
    } else {
        vec!["", "TP", "at once", "set by", "latency", "texts/s", "slowest part"]
    };
    out.push_str(&table(&header, rows.into_iter()));
    out
}

fn cells(plan: &Plan, index: usize, option: &PlanOption) -> Option<Vec<String>> {
    let speed = option.speed.as_ref()?;
    let (load, alone) = (&speed.replica, &speed.alone);
    let mut cells = vec![
        if index == 0 { ">".to_owned() } else { String::new() },
        option.tensor_parallel_size.to_string(),
        format!("{} x {:.0}", option.replicas, load.concurrency),
        speed.load_limit.label().to_owned(),
        format!("{:.0}", load.ttft_ms),
    ];
    if plan.demand.shape.output_tokens > 0 {
        cells.extend([
            format!("{:.1}", load.tpot_ms),
            rate(speed.requests_per_s),
            format_count(speed.output_tokens_per_s as u64),
            format!("{:.0}", alone.ttft_ms),
            format!("{:.1}", alone.tpot_ms),
        ]);
    } else {
        cells.push(rate(speed.requests_per_s));
    }
    cells.push(speed.bottleneck.label());
    Some(cells)
}

/// Three digits or so.
pub(super) fn rate(per_s: f64) -> String {
    match per_s {
        r if r >= 100.0 => format_count(r.round() as u64),
        r if r >= 10.0 => format!("{r:.1}"),
        r => format!("{r:.2}"),
    }
}
