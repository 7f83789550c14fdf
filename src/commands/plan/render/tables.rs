use comfy_table::{CellAlignment, Table, presets};
use mserve_planner::memory::TermKind;
use mserve_planner::plan::{CardRow, Concurrency, Plan, PlanOption};
use mserve_planner::units::{format_bytes, format_count};

/// One row an option, best first.
pub(super) fn options(plan: &Plan) -> String {
    let full = format!("requests of {}", format_count(plan.limits.max_model_len));
    let typical = format!("requests of {}", format_count(plan.typical_len_tokens));
    let mut header = vec!["", "TP", "replicas", "GPUs", "weights/GPU", "KV/GPU", "KV tokens/replica", &full];
    let two_lengths = full != typical;
    if two_lengths {
        header.push(&typical);
    }
    let rows = plan.options.iter().enumerate().map(|(i, o)| {
        let mut cells = vec![
            if i == 0 { ">".to_owned() } else { String::new() },
            o.tensor_parallel_size.to_string(),
            o.replicas.to_string(),
            format!("{}/{}", o.gpus_used, plan.gpus),
            format_bytes(o.per_gpu.term(TermKind::Weights)),
            kv_pool(o),
            kv_tokens(o),
            concurrency(&o.full, o.replicas),
        ];
        if two_lengths {
            cells.push(concurrency(&o.typical, o.replicas));
        }
        cells
    });
    table(&header, rows)
}

/// One row a card: its best option.
pub(super) fn cards(rows: &[CardRow]) -> String {
    let header =
        ["card", "memory", "TP x replicas", "KV/GPU", "KV tokens/replica", "full-length requests", "typical requests"];
    let rows = rows.iter().map(|row| {
        let mut cells = vec![row.card.name.clone(), format_bytes(row.card.memory_total_bytes)];
        match &row.best {
            None if row.max_model_len_that_fits > 0 => {
                cells.push(format!("up to {} tokens", format_count(row.max_model_len_that_fits)));
            }
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

fn kv_pool(option: &PlanOption) -> String {
    if option.kv.is_empty() { "-".to_owned() } else { format_bytes(option.per_gpu.kv_pool_bytes) }
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
pub(super) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
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
