use comfy_table::{CellAlignment, Table, presets};
use mserve_planner::memory::TermKind;
use mserve_planner::plan::{CardRow, Concurrency, Plan, PlanOption};
use mserve_planner::units::{GIB, format_count};

/// One row an option, best first.
pub(super) fn options(plan: &Plan) -> String {
    let full = format!("requests of {}", format_count(plan.limits.max_model_len));
    let typical = format!("requests of {}", format_count(plan.typical_len_tokens));
    let header = ["", "TP", "replicas", "GPUs", "weights/GPU", "KV/GPU", "KV tokens/replica", &full, &typical];
    let rows = plan.options.iter().enumerate().map(|(i, o)| {
        vec![
            if i == 0 { ">".to_owned() } else { String::new() },
            o.tensor_parallel_size.to_string(),
            o.replicas.to_string(),
            format!("{}/{}", o.gpus_used, plan.gpus),
            gib(o.per_gpu.term(TermKind::Weights)),
            kv_pool(o),
            kv_tokens(o),
            concurrency(&o.full, o.replicas),
            concurrency(&o.typical, o.replicas),
        ]
    });
    table(&header, rows)
}

/// One row a card: its best option.
pub(super) fn cards(rows: &[CardRow]) -> String {
    let header =
        ["card", "memory", "TP x replicas", "KV/GPU", "KV tokens/replica", "full-length requests", "typical requests"];
    let rows = rows.iter().map(|row| {
        let mut cells = vec![row.card.name.clone(), gib(row.card.memory_total_bytes)];
        match &row.best {
            None => cells.push("does not fit".to_owned()),
            Some(o) => cells.extend([
                format!("{} x {}", o.tensor_parallel_size, o.replicas),
                kv_pool(o),
                kv_tokens(o),
                o.full.requests_total.to_string(),
                o.typical.requests_total.to_string(),
            ]),
        }
        cells
    });
    table(&header, rows)
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / GIB as f64)
}

fn kv_pool(option: &PlanOption) -> String {
    if option.kv.is_empty() { "-".to_owned() } else { gib(option.per_gpu.kv_pool_bytes) }
}

fn kv_tokens(option: &PlanOption) -> String {
    if option.kv.is_empty() { "-".to_owned() } else { format_count(option.kv_cache_tokens) }
}

/// `8 x 27.6 = 216`: replicas, what the KV of one holds, whole requests of all. Without a cache the limit is
/// max_num_seqs.
fn concurrency(c: &Concurrency, replicas: u64) -> String {
    let each = c.kv_per_replica.map_or_else(|| c.requests_per_replica.to_string(), |held| format!("{held:.2}"));
    format!("{replicas} x {each} = {}", format_count(c.requests_total))
}

/// Aligned columns without lines; numbers to the right.
fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).force_no_tty();
    table.set_header(header.iter().copied()).add_rows(rows);
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if i > 0 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt() + "\n"
}
