//! The main table, and one line on the selected replica.

use super::super::format;
use super::super::health;
use super::super::logs::printable;
use super::super::state::{Focus, State};
use super::super::theme::{Level, Theme};
use super::columns::{Column, KV_GAUGE_WIDTH, SPACING, Widths, fitting, kv_usage};
use crate::status::{GpuStatus, ReplicaState, ReplicaStatus};
use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, HighlightSpacing, Row, Table, TableState};

const MARKER_WIDTH: u16 = 2;
/// A start's progress bar is no wider than this.
const PROGRESS_WIDTH: u16 = 30;

pub fn draw(state: &State, area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let focused = state.focus == Focus::Replicas;
    let title = Span::styled("replicas", if focused { theme.accent() } else { Style::new() });
    let mut inner = super::section(vec![title], area, theme, frame);
    let replicas = state.replicas();
    if replicas.is_empty() {
        frame.render_widget(Line::styled(nothing(state), theme.dim()), inner);
        return;
    }
    // The detail line comes only when every row and the column titles have their place.
    if usize::from(inner.height) >= replicas.len() + 2 {
        inner.height -= 1;
        let below = Rect { y: inner.bottom(), height: 1, ..inner };
        if let Some(replica) = state.selected_replica() {
            frame.render_widget(detail(replica, below.width, theme), below);
        }
        inner.height = inner.height.min(replicas.len() as u16 + 1);
    }
    draw_table(state, inner, theme, frame);
}

fn nothing(state: &State) -> String {
    use super::super::state::Link;
    match &state.link {
        Link::Lost { error, .. } => error.clone(),
        Link::Connecting => "waiting for the first snapshot".to_owned(),
        Link::Live { .. } | Link::Ended => "no replicas".to_owned(),
    }
}

fn draw_table(state: &State, area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let gpus = state.status.as_ref().map_or([].as_slice(), |status| &status.gpus);
    let width = area.width.saturating_sub(MARKER_WIDTH);
    let widths = Widths::of(state.replicas(), gpus, width);
    let columns = fitting(width, widths);
    let header = columns.iter().map(|&column| aligned(column, Span::raw(column.title())));
    let rows = state.replicas().iter().map(|replica| row(replica, gpus, &columns, widths, theme));
    let table = Table::new(rows, columns.iter().map(|c| Constraint::Length(c.width(widths))))
        .header(Row::new(header).style(theme.dim()))
        .column_spacing(SPACING)
        .highlight_spacing(HighlightSpacing::Always)
        .highlight_symbol("> ")
        .row_highlight_style(theme.strong());
    let mut selection = TableState::new().with_selected(state.selected_index());
    frame.render_stateful_widget(table, area, &mut selection);
}

fn row<'a>(
    replica: &'a ReplicaStatus,
    gpus: &[GpuStatus],
    columns: &[Column],
    widths: Widths,
    theme: &Theme,
) -> Row<'a> {
    let measured = replica.load.is_some();
    let mut cells = Vec::with_capacity(columns.len());
    let mut rest = columns;
    while let [column, after @ ..] = rest {
        if column.needs_load() && !measured {
            let (spanned, later): (Vec<Column>, Vec<Column>) = rest.iter().partition(|c| c.needs_load());
            let width: u16 = spanned.iter().map(|c| c.width(widths) + SPACING).sum();
            cells.push(Cell::new(explanation(replica, width, theme)).column_span(spanned.len() as u16));
            cells.extend(later.iter().map(|&column| cell(column, replica, gpus, widths, theme)));
            break;
        }
        cells.push(cell(*column, replica, gpus, widths, theme));
        rest = after;
    }
    Row::new(cells)
}

/// In place of figures that do not exist yet or no more: how far the start is, or why it ended.
fn explanation<'a>(replica: &'a ReplicaStatus, width: u16, theme: &Theme) -> Line<'a> {
    if let ReplicaState::Starting { done, total, .. } = &replica.state
        && let Some(share) = health::progress(*done, *total)
    {
        let (filled, empty) = theme.gauge(share, PROGRESS_WIDTH.min(width.saturating_sub(SPACING)));
        return Line::from(vec![Span::styled(filled, theme.level(Level::Busy)), Span::styled(empty, theme.dim())]);
    }
    let text = printable(health::reason(replica).unwrap_or(format::UNKNOWN));
    let text = format::cut(&text, usize::from(width.saturating_sub(SPACING)), theme.ellipsis());
    Line::styled(text, theme.level(health::level(&replica.state)))
}

fn cell<'a>(column: Column, replica: &ReplicaStatus, gpus: &[GpuStatus], widths: Widths, theme: &Theme) -> Cell<'a> {
    let text = column.text(replica, gpus);
    match column {
        Column::Replica => {
            Cell::new(format::cut_front(&printable(&text), usize::from(column.width(widths)), theme.ellipsis()))
        }
        Column::State => {
            let level = health::level(&replica.state);
            Cell::new(Span::styled(format!("{} {text}", theme.glyph(level)), theme.level(level)))
        }
        Column::KvGauge => kv_gauge(replica, &text, theme),
        Column::Kv => {
            let level = replica.load.as_ref().and_then(kv_usage).map(health::kv_level);
            let style = level.filter(|&l| l > Level::Good).map_or_else(Style::new, |l| theme.level(l));
            aligned(column, Span::styled(text, style))
        }
        Column::Waiting if replica.load.as_ref().is_some_and(|l| l.waiting > 0) => {
            aligned(column, Span::styled(text, theme.level(Level::Warn)))
        }
        Column::Restarts if replica.restarts > 0 => aligned(column, Span::styled(text, theme.level(Level::Warn))),
        _ => aligned(column, Span::raw(text)),
    }
}

fn kv_gauge<'a>(replica: &ReplicaStatus, text: &str, theme: &Theme) -> Cell<'a> {
    let Some(share) = replica.load.as_ref().and_then(kv_usage) else {
        return Cell::new(Span::raw(text.to_owned()));
    };
    let (filled, empty) = theme.gauge(share, KV_GAUGE_WIDTH);
    let level = theme.level(health::kv_level(share));
    Cell::new(Line::from(vec![
        Span::styled(filled, level),
        Span::styled(empty, theme.dim()),
        Span::raw(format!(" {text:>4}")),
    ]))
}

fn aligned<'a>(column: Column, span: Span<'a>) -> Cell<'a> {
    let alignment = if column.is_text() { Alignment::Left } else { Alignment::Right };
    Cell::new(Line::from(span).alignment(alignment))
}

fn detail<'a>(replica: &ReplicaStatus, width: u16, theme: &Theme) -> Line<'a> {
    let mut figures = vec![
        ("pid", format::or_unknown(replica.pid, |pid| pid.to_string())),
        ("port", format::or_unknown(replica.port, |port| port.to_string())),
        ("in flight", format::count(replica.in_flight)),
    ];
    if let Some(exit) = &replica.last_exit {
        figures.push(("last exit", format::cut(&printable(exit), 50, theme.ellipsis())));
    }
    if let Some(load) = &replica.load {
        if load.kv_blocks_total > 0 {
            let tokens = (load.kv_blocks_total.saturating_mul(load.kv_block_size)) as f64;
            let used = tokens * load.kv_cache_usage;
            figures.push((
                "KV",
                format!(
                    "{} of {} tokens, {} GiB",
                    format::short(used),
                    format::short(tokens),
                    format::gib(load.kv_cache_bytes)
                ),
            ));
        }
        figures.push(("TTFT p50", format::or_unknown(load.ttft_p50_ms, format::millis)));
        figures.push(("ITL p50", format::or_unknown(load.itl_p50_ms, format::millis)));
        figures.push(("context", format::count(load.max_model_len)));
    }
    let mut pieces = vec![vec![Span::styled(format!("  {}", printable(&replica.model)), theme.accent())]];
    pieces.extend(figures.into_iter().map(|(name, value)| super::figure(name, value, theme)));
    super::as_many_as_fit(pieces, width)
}
