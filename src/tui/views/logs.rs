//! The replicas' output and the deployment's events.

use super::super::format;
use super::super::logs::printable;
use super::super::state::{Focus, State};
use super::super::theme::{Level, Theme};
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::Style;
use ratatui::text::{Line, Span};

pub fn draw(state: &State, area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let inner = super::section(title(state, theme), area, theme, frame);
    let page = state.logs.page(&state.log_view, usize::from(inner.height));
    let name_width = page.iter().map(|line| line.replica.chars().count()).max().unwrap_or(0);
    for (line, row) in page.into_iter().zip(inner.rows()) {
        let at = format::clock(line.at_unix_ms as f64 / 1e3, state.utc_offset);
        let mut spans = vec![Span::styled(format!("{at} "), theme.dim())];
        if state.log_view.only.is_none() {
            spans.push(Span::styled(format!("{:<name_width$} ", line.replica), theme.strong()));
        }
        spans.push(Span::raw(line.text.as_str()));
        super::draw_cut(Line::from(spans), row, theme, frame);
    }
}

fn title<'a>(state: &'a State, theme: &Theme) -> Vec<Span<'a>> {
    let view = &state.log_view;
    let style = if state.focus == Focus::Logs { theme.accent() } else { Style::new() };
    let mut spans = vec![Span::styled("log", style), Span::raw("  ")];
    spans.push(Span::raw(view.only.as_deref().unwrap_or("all")));
    if !view.needle.is_empty() {
        spans.push(Span::styled(format!("  /{}/", view.needle), theme.accent()));
    }
    let (shown, kept) = (state.logs.count(view), state.logs.kept());
    let figures =
        if shown == kept { format::count(kept as u64) } else { format!("{shown} of {}", format::count(kept as u64)) };
    spans.push(Span::styled(format!("  {figures} lines"), theme.dim()));
    let (word, style) = if view.follows() { ("  follow", theme.dim()) } else { ("  HELD", theme.level(Level::Warn)) };
    spans.push(Span::styled(word, style));
    if state.logs.missed > 0 {
        spans.push(Span::styled(format!("  missed {}", format::count(state.logs.missed)), theme.level(Level::Warn)));
    }
    spans
}

pub fn draw_events(state: &State, area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let inner = super::section(vec![Span::raw("events")], area, theme, frame);
    let events = state.status.as_ref().map_or([].as_slice(), |status| &status.events);
    let newest = &events[events.len().saturating_sub(usize::from(inner.height))..];
    for (event, row) in newest.iter().zip(inner.rows()) {
        let mut spans =
            vec![Span::styled(format!("{} ", format::clock(event.at_unix_s, state.utc_offset)), theme.dim())];
        if let Some(replica) = &event.replica {
            spans.push(Span::styled(format!("{replica} "), theme.strong()));
        }
        spans.push(Span::raw(printable(&event.text)));
        super::draw_cut(Line::from(spans), row, theme, frame);
    }
}
