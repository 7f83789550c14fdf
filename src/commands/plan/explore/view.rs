//! The explorer's screen.

use super::state::Explorer;
use crate::tui::{Level, Theme};
use mserve_planner::memory::TermKind;
use mserve_planner::plan::{Plan, PlanError, PlanOption};
use mserve_planner::split::{Side, Split};
use mserve_planner::units::{format_bytes, format_bytes_per_token, format_count};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Table, Wrap};

const FIELDS_WIDTH: u16 = 33;

pub(super) fn draw(explorer: &Explorer<'_>, theme: Theme, frame: &mut Frame<'_>) {
    let [title, body, keys] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(3), Constraint::Length(1)]).areas(frame.area());
    frame.render_widget(heading(explorer, theme), title);
    let [left, right] = Layout::horizontal([Constraint::Length(FIELDS_WIDTH), Constraint::Min(20)]).areas(body);
    frame.render_widget(fields(explorer, theme), left);
    match &explorer.plan {
        Ok(plan) => answer(explorer, plan, theme, frame, right),
        Err(error) => frame.render_widget(refusal(error, theme), right),
    }
    let help = " up/down choose   left/right change   r as it was   q leave";
    frame.render_widget(Paragraph::new(Span::styled(help, theme.dim())), keys);
}

fn heading<'a>(explorer: &'a Explorer<'_>, theme: Theme) -> Paragraph<'a> {
    let changed = explorer.fields.iter().filter(|&&field| explorer.is_changed(field)).count();
    let mut spans = vec![
        Span::styled(" mserve plan ", theme.accent()),
        Span::styled(explorer.now.model_name, theme.strong()),
        Span::raw(format!("  {} x {}", explorer.now.gpus, explorer.now.card.name)),
    ];
    if changed > 0 {
        spans.push(Span::styled(format!("  {changed} changed"), theme.level(Level::Warn)));
    }
    Paragraph::new(Line::from(spans))
}

fn block<'a>(title: &'a str, theme: Theme) -> Block<'a> {
    Block::bordered().border_set(theme.borders()).border_style(theme.dim()).title(title)
}

fn fields<'a>(explorer: &Explorer<'_>, theme: Theme) -> Paragraph<'a> {
    let lines: Vec<Line<'_>> = explorer
        .fields
        .iter()
        .enumerate()
        .map(|(i, &field)| {
            let mark = if explorer.is_changed(field) { "*" } else { " " };
            let text = format!(" {:<16}{:>11} {mark} ", field.label(), explorer.value(field));
            let style = if i == explorer.selected { theme.selected() } else { Style::new() };
            Line::styled(text, style)
        })
        .collect();
    Paragraph::new(lines).block(block(" change ", theme))
}

fn refusal<'a>(error: &PlanError, theme: Theme) -> Paragraph<'a> {
    let mut lines = vec![Line::styled(error.to_string(), theme.level(Level::Bad))];
    if let PlanError::DoesNotFit(error) = error {
        for change in &error.changes {
            lines.push(Line::from(format!("would fit with {change}")));
        }
    }
    Paragraph::new(lines).wrap(Wrap { trim: true }).block(block(" does not fit ", theme))
}

fn answer(explorer: &Explorer<'_>, plan: &Plan, theme: Theme, frame: &mut Frame<'_>, area: Rect) {
    let split = match &explorer.split {
        Some(Ok(split)) => 3 + split.options.len().min(3) as u16,
        Some(Err(_)) => 4,
        None => 0,
    };
    let options = 3 + plan.options.len().min(8) as u16;
    let [table, figures, beside] =
        Layout::vertical([Constraint::Length(options), Constraint::Min(3), Constraint::Length(split)]).areas(area);
    frame.render_widget(self::options(plan, table.width, theme), table);
    if let Some(best) = plan.options.first() {
        let width = area.width.saturating_sub(4);
        frame.render_widget(self::figures(explorer, plan, best, width, theme), figures);
    }
    match &explorer.split {
        Some(Ok(split)) => frame.render_widget(self::split(split, beside.width, theme), beside),
        Some(Err(error)) => frame.render_widget(
            Paragraph::new(error.to_string()).wrap(Wrap { trim: true }).block(block(" with small models ", theme)),
            beside,
        ),
        None => {}
    }
}

/// A table's columns: heading, width, and how much it is missed where there is no room (1: the most).
type Column = (&'static str, u16, u8);

/// A table of the columns that have room as a whole: half a number is a wrong one.
fn table<'a>(columns: &[Column], rows: Vec<Vec<String>>, title: &'a str, width: u16, theme: Theme) -> Table<'a> {
    let inner = width.saturating_sub(2);
    let taken = |most: u8| {
        let kept = columns.iter().filter(|column| column.2 <= most);
        kept.map(|column| column.1 + 1).sum::<u16>().saturating_sub(1)
    };
    let most = (1..=columns.len() as u8).take_while(|&most| taken(most) <= inner).last().unwrap_or(1);
    let kept: Vec<usize> = (0..columns.len()).filter(|&i| columns[i].2 <= most).collect();
    let rows = rows.into_iter().enumerate().map(|(i, cells)| {
        let style = if i == 0 { theme.strong() } else { Style::new() };
        Row::new(kept.iter().map(|&column| Cell::from(cells[column].clone())).collect::<Vec<_>>()).style(style)
    });
    let widths: Vec<Constraint> = kept.iter().map(|&i| Constraint::Length(columns[i].1)).collect();
    let header: Vec<&str> = kept.iter().map(|&i| columns[i].0).collect();
    Table::new(rows, widths).header(Row::new(header).style(theme.dim())).block(block(title, theme))
}

fn options<'a>(plan: &Plan, width: u16, theme: Theme) -> Table<'a> {
    const COLUMNS: [Column; 7] = [
        ("TP x repl", 9, 1),
        ("at once", 8, 2),
        ("TTFT ms", 8, 4),
        ("TPOT ms", 8, 5),
        ("req/s", 8, 3),
        ("tok/s", 9, 6),
        ("load set by", 13, 7),
    ];
    let rows = plan.options.iter().map(|o| {
        let speed = o.speed.as_ref();
        let of =
            |figure: fn(&mserve_planner::plan::OptionSpeed) -> String| speed.map_or_else(|| "-".to_owned(), figure);
        vec![
            format!("{} x {}", o.tensor_parallel_size, o.replicas),
            format_count(o.typical.requests_total),
            of(|s| format!("{:.0}", s.replica.ttft_ms)),
            of(|s| format!("{:.1}", s.replica.tpot_ms)),
            of(|s| format!("{:.2}", s.requests_per_s)),
            of(|s| format_count(s.output_tokens_per_s as u64)),
            of(|s| s.load_limit.label().to_owned()),
        ]
    });
    table(&COLUMNS, rows.collect(), " options, best first ", width, theme)
}

/// What users get first, then where the memory goes: a low screen cuts the end.
fn figures<'a>(explorer: &Explorer<'_>, plan: &Plan, best: &PlanOption, width: u16, theme: Theme) -> Paragraph<'a> {
    let mut lines = service(explorer, plan, best, theme);
    lines.extend(memory(best, width, theme));
    if let Some(speed) = &best.speed {
        lines.push(Line::from(format!("slowest    {}", speed.bottleneck.label())));
    }
    Paragraph::new(lines).wrap(Wrap { trim: true }).block(block(" the best ", theme))
}

fn service<'a>(explorer: &Explorer<'_>, plan: &Plan, best: &PlanOption, theme: Theme) -> Vec<Line<'a>> {
    let before = explorer.before.as_ref();
    let compare = |now: f64, was: Option<f64>| delta(now, was, theme);
    let at_once = best.typical.requests_total;
    let mut lines = vec![Line::from(vec![
        Span::raw(format!(
            "holds      {} requests of {} tokens",
            format_count(at_once),
            format_count(plan.typical_len_tokens)
        )),
        compare(at_once as f64, before.map(|b| b.typical.requests_total as f64)),
    ])];
    let Some(speed) = &best.speed else { return lines };
    let was = before.and_then(|b| b.speed.as_ref());
    lines.push(Line::from(vec![
        Span::raw(format!("serves     {:.2} requests/s", speed.requests_per_s)),
        compare(speed.requests_per_s, was.map(|s| s.requests_per_s)),
        Span::raw(format!(", {} tokens/s", format_count(speed.output_tokens_per_s as u64))),
    ]));
    lines.push(Line::from(vec![
        Span::raw(format!("users see  first token {:.0} ms", speed.replica.ttft_ms)),
        compare(speed.replica.ttft_ms, was.map(|s| s.replica.ttft_ms)),
        Span::raw(format!(", {:.1} ms a token", speed.replica.tpot_ms)),
        compare(speed.replica.tpot_ms, was.map(|s| s.replica.tpot_ms)),
    ]));
    lines
}

fn memory<'a>(best: &PlanOption, width: u16, theme: Theme) -> Vec<Line<'a>> {
    let budget = &best.per_gpu;
    let weights = budget.term(TermKind::Weights);
    let mut lines = vec![
        Line::from(format!(
            "each GPU   {} weights + {} KV + {} beside, of {}",
            format_bytes(weights),
            format_bytes(budget.kv_pool_bytes),
            format_bytes(budget.without_kv_bytes() - weights),
            format_bytes(budget.total_bytes)
        )),
        bar(best, width, theme),
    ];
    if !best.kv.is_empty() {
        lines.push(Line::from(format!(
            "KV         {} a token and GPU at TP {}, {} tokens a replica",
            format_bytes_per_token(best.kv.bytes_per_token()),
            best.tensor_parallel_size,
            format_count(best.kv_cache_tokens)
        )));
    }
    lines
}

/// ` (+12 %)` against the start; nothing when it has not moved.
fn delta<'a>(now: f64, was: Option<f64>, theme: Theme) -> Span<'a> {
    let Some(was) = was.filter(|was| *was > 0.0) else { return Span::raw("") };
    let percent = 100.0 * (now / was - 1.0);
    if percent.abs() < 0.5 {
        Span::raw("")
    } else {
        Span::styled(format!(" ({percent:+.0} %)"), theme.level(Level::Busy))
    }
}

/// Weights, cache and the rest of one card.
fn bar<'a>(best: &PlanOption, width: u16, theme: Theme) -> Line<'a> {
    let budget = &best.per_gpu;
    let cells = |bytes: u64| (bytes as f64 / budget.total_bytes.max(1) as f64 * f64::from(width)).round() as usize;
    let weights = budget.term(TermKind::Weights);
    let kv = if best.kv.is_empty() { 0 } else { budget.kv_pool_bytes };
    let rest = budget.without_kv_bytes() - weights;
    let borders = [0, cells(weights), cells(weights + kv), cells(weights + kv + rest)];
    let [w, k, r] = [1, 2, 3].map(|i| borders[i] - borders[i - 1]);
    let free = usize::from(width).saturating_sub(borders[3]);
    Line::from(vec![
        Span::styled("W".repeat(w), theme.level(Level::Busy)),
        Span::styled("K".repeat(k), theme.level(Level::Good)),
        Span::styled("o".repeat(r), theme.level(Level::Warn)),
        Span::styled(".".repeat(free), theme.dim()),
    ])
}

fn split<'a>(split: &Split, width: u16, theme: Theme) -> Table<'a> {
    const COLUMNS: [Column; 8] = [
        ("LLM GPUs", 8, 1),
        ("SLM GPUs", 9, 2),
        ("KV", 5, 8),
        ("LLM req/s", 9, 5),
        ("SLM req/s", 9, 6),
        ("served", 8, 3),
        ("short", 6, 4),
        ("idle", 9, 7),
    ];
    let rows = split.options.iter().take(3).map(|o| {
        let (side, idle) = match o.limited_by {
            Side::Llm => ("LLM", format!("SLM {:.0} %", 100.0 * o.idle.slm)),
            Side::Slm => ("SLM", format!("LLM {:.0} %", 100.0 * o.idle.llm)),
        };
        vec![
            o.llm_gpus.to_string(),
            format!("{}{}", o.slm_gpus, if o.co_located { "+shared" } else { "" }),
            format!("{:?}", o.kv_cache_dtype).to_ascii_lowercase(),
            format!("{:.2}", o.llm_requests_per_s),
            format!("{:.0}", o.slm_requests_per_s),
            format!("{:.2}", o.served_requests_per_s),
            side.to_owned(),
            idle,
        ]
    });
    table(&COLUMNS, rows.collect(), " with small models ", width, theme)
}
