//! Is anything down, how much traffic: the top lines.

use super::super::format;
use super::super::health::Overall;
use super::super::logs::printable;
use super::super::state::{Link, State};
use super::super::theme::{Level, Theme};
use super::columns::kv_usage;
use crate::status::{ReplicaState, Status};
use mserve_runtime::engine::EngineLoad;
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

/// Room for `  14:02:11` at the end of the first line.
const CLOCK_WIDTH: u16 = 10;
const CLOCK_FROM_WIDTH: u16 = 60;

pub fn draw(state: &State, area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let has_clock = area.width >= CLOCK_FROM_WIDTH;
    let mut lines = vec![identity(state, area.width - if has_clock { CLOCK_WIDTH } else { 0 }, theme)];
    let trouble = trouble(state, theme);
    if area.height as usize > 1 + usize::from(trouble.is_some()) {
        lines.push(state.status.as_ref().map_or_else(Line::default, |status| totals(state, status, area.width, theme)));
    }
    lines.extend(trouble);
    for (line, row) in lines.into_iter().zip(area.rows()) {
        super::draw_cut(line, row, theme, frame);
    }
    if has_clock {
        // A line's style fills its area, so the area is no larger than the text.
        let clock = Line::from(format::clock(state.now_unix_s, state.utc_offset));
        let width = (clock.width() as u16).min(area.width);
        let corner = Rect { x: area.right() - width, width, height: 1, ..area };
        frame.render_widget(clock.style(theme.dim()), corner);
    }
}

fn identity<'a>(state: &'a State, width: u16, theme: &Theme) -> Line<'a> {
    let mut pieces = vec![vec![Span::styled("mserve", theme.strong())], badge(state, theme)];
    for (on, word) in [(state.frozen, "FROZEN"), (state.read_only, "read-only")] {
        if on {
            pieces.push(vec![Span::styled(format!("[{word}]"), theme.level(Level::Warn))]);
        }
    }
    if let Some(status) = &state.status {
        pieces.push(vec![Span::raw(status.endpoint.as_str())]);
        pieces.push(super::figure("up", format::span(status.uptime_s), theme));
    }
    super::as_many_as_fit(pieces, width)
}

/// The state in a word. Silence counts for more than what was heard last.
fn badge<'a>(state: &State, theme: &Theme) -> Vec<Span<'a>> {
    let tag = |level: Level, text: String| {
        let style = theme.level(level).patch(theme.selected());
        Span::styled(format!(" {} {text} ", theme.glyph(level)), style)
    };
    let mut spans = Vec::new();
    match (&state.link, state.silence_s()) {
        (Link::Connecting, _) => spans.push(tag(Level::Busy, "CONNECTING".into())),
        (Link::Lost { .. }, Some(silence)) => spans.push(tag(Level::Bad, format!("LOST {}", format::span(silence)))),
        (_, Some(silence)) => spans.push(tag(Level::Warn, format!("STALE {}", format::span(silence)))),
        (Link::Ended, _) => spans.push(tag(Level::Off, "END OF REPLAY".into())),
        _ => {}
    }
    if let Some(status) = &state.status {
        if !spans.is_empty() {
            spans.push(Span::raw(" "));
        }
        let overall = Overall::of(status);
        let ready = status.replicas.iter().filter(|r| matches!(r.state, ReplicaState::Ready)).count();
        spans.push(tag(overall.level(), overall.word().to_owned()));
        spans.push(Span::raw(format!(" {ready}/{} ready", status.replicas.len())));
    }
    spans
}

/// Load first, bookkeeping last: a narrow screen cuts from the end.
fn totals<'a>(state: &State, status: &Status, width: u16, theme: &Theme) -> Line<'a> {
    let loads = || status.replicas.iter().filter_map(|r| r.load.as_ref());
    let sum = |value: fn(&EngineLoad) -> u64| {
        format::or_unknown(loads().map(value).reduce(u64::saturating_add), format::count)
    };
    let kv_max = loads().filter_map(kv_usage).reduce(f64::max);
    let router = &status.router;
    let errors = match state.history.error_share() {
        Some(share) => format!("{} (now {})", format::count(router.errors_total), format::percent(share)),
        None => format::count(router.errors_total),
    };
    let figures = [
        ("req/s", format::or_unknown(state.history.requests_per_s(), format::short)),
        ("running", sum(|l| l.running)),
        ("waiting", sum(|l| l.waiting)),
        ("KV max", format::or_unknown(kv_max, format::percent)),
        ("errors", errors),
        ("in flight", format::count(router.in_flight)),
        ("retries", format::count(router.retries_total)),
        ("requests", format::count(router.requests_total)),
    ];
    let pieces = figures.into_iter().map(|(name, value)| super::figure(name, value, theme)).collect();
    super::as_many_as_fit(pieces, width)
}

/// The worst of what is wrong now, and how many more there are.
fn trouble<'a>(state: &State, theme: &Theme) -> Option<Line<'a>> {
    let concerns = state.concerns();
    let worst = concerns.first()?;
    let of = if concerns.len() > 1 { format!("(1 of {}) ", concerns.len()) } else { String::new() };
    let text = format!("{} {of}{}", theme.glyph(worst.level), printable(&worst.text));
    Some(Line::styled(text, theme.level(worst.level)))
}
