//! One bar for each GPU: what its memory is used for.

use mserve_planner::memory::{Budget, TermKind};
use mserve_planner::plan::{Plan, PlanOption};
use mserve_planner::units::format_bytes;
use std::fmt::Write;

/// Cells of a bar.
const WIDTH: u64 = 50;
/// More GPUs than this are summed up in one line.
const MAX_BARS: u64 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::commands::plan) enum Look {
    /// For terminals.
    Blocks,
    /// For files and pipes: ASCII.
    Plain,
}

/// Parts of a card in the order in which they are drawn.
#[derive(Debug, Clone, Copy)]
struct Parts {
    weights: u64,
    kv: u64,
    overhead: u64,
    total: u64,
}

impl Parts {
    /// Without a cache the pool is not taken.
    fn of(budget: &Budget, has_cache: bool) -> Self {
        let weights = budget.term(TermKind::Weights);
        let kv = if has_cache { budget.kv_pool_bytes } else { 0 };
        Self { weights, kv, overhead: budget.without_kv_bytes() - weights, total: budget.total_bytes }
    }

    fn free(self) -> u64 {
        self.total.saturating_sub(self.weights + self.kv + self.overhead)
    }
}

/// Bars of all GPUs with a legend, for one option.
pub(super) fn bars(plan: &Plan, option: &PlanOption, look: Look) -> String {
    let parts = Parts::of(&option.per_gpu, !option.kv.is_empty());
    let used = draw(parts, look);
    let idle = draw(Parts { weights: 0, kv: 0, overhead: 0, ..parts }, look);
    let mut out = String::new();
    for gpu in 0..plan.gpus.min(MAX_BARS) {
        let replica = gpu / option.tensor_parallel_size;
        let _ = if gpu < option.gpus_used {
            writeln!(out, "gpu{gpu:<3} |{used}| replica {replica}")
        } else {
            writeln!(out, "gpu{gpu:<3} |{idle}| idle")
        };
    }
    if plan.gpus > MAX_BARS {
        let _ = writeln!(
            out,
            "and {} GPUs more: {} used, {} idle",
            plan.gpus - MAX_BARS,
            option.gpus_used,
            option.gpus_idle
        );
    }
    let [w, k, o, free] = symbols(look);
    let _ = writeln!(
        out,
        "{w} weights {}  {k} KV cache {}  {o} overhead {}  {free} free {}",
        format_bytes(parts.weights),
        format_bytes(parts.kv),
        format_bytes(parts.overhead),
        format_bytes(parts.free())
    );
    let terms = option.per_gpu.terms.iter().filter(|t| t.name != TermKind::Weights);
    let terms: Vec<String> =
        terms.map(|t| format!("{} {} ({})", t.name.label(), format_bytes(t.bytes), source(t.source))).collect();
    let _ = writeln!(out, "overhead: {}", terms.join(", "));
    out
}

fn source(source: mserve_planner::memory::Source) -> &'static str {
    use mserve_planner::memory::Source;
    match source {
        Source::Computed => "computed",
        Source::Checkpoint => "checkpoint",
        Source::Measured => "measured",
        Source::Calibrated => "calibrated",
        Source::Assumed => "assumed",
    }
}

fn symbols(look: Look) -> [char; 4] {
    match look {
        Look::Blocks => ['█', '▓', '▒', '░'],
        Look::Plain => ['W', 'K', 'o', '.'],
    }
}

/// Borders are rounded, so the cells always add up to the width.
fn draw(parts: Parts, look: Look) -> String {
    let cell = |bytes: u64| (bytes as f64 / parts.total.max(1) as f64 * WIDTH as f64).round() as u64;
    let borders = [0, parts.weights, parts.weights + parts.kv, parts.weights + parts.kv + parts.overhead, parts.total];
    let cells = borders.windows(2).map(|pair| cell(pair[1]).min(WIDTH) - cell(pair[0]).min(WIDTH));
    symbols(look).into_iter().zip(cells).map(|(symbol, n)| symbol.to_string().repeat(n as usize)).collect()
}
