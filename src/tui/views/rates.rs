//! Throughput over the last minutes. The axis starts at 0 and its top never falls; both are printed with the number.

use super::super::format;
use super::super::history::Series;
use super::super::state::State;
use super::super::theme::Theme;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::text::Span;
use ratatui::widgets::{RenderDirection, Sparkline};

/// A panel narrower than this cannot hold its title.
const PANEL_WIDTH: u16 = 36;
/// Sparklines take whole numbers: rates are drawn in tenths.
const SCALE: f64 = 10.0;

pub fn draw(state: &State, area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let panels = [
        (Series::Generation, "generated", "tok/s"),
        (Series::Prompt, "prompts", "tok/s"),
        (Series::InFlight, "running+waiting", "requests"),
    ];
    let shown = usize::from(area.width / PANEL_WIDTH).clamp(1, panels.len());
    let places = Layout::horizontal(vec![Constraint::Fill(1); shown]).spacing(1).split(area);
    for (&(series, name, unit), &place) in panels.iter().zip(places.iter()) {
        panel(state, series, (name, unit), place, theme, frame);
    }
}

fn panel(state: &State, series: Series, (name, unit): (&str, &str), area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let now = state.history.newest_first(series).next().flatten();
    let axis = state.history.axis(series);
    let title = vec![
        Span::raw(format!("{name} ")),
        Span::styled(format::or_unknown(now, format::mark), theme.strong()),
        Span::raw(format!(" {unit} ")),
        Span::styled(format!("0-{}", format::mark(axis)), theme.dim()),
    ];
    let inner = super::section(title, area, theme, frame);
    let values: Vec<Option<u64>> = state
        .history
        .newest_first(series)
        .take(usize::from(inner.width))
        .map(|value| value.map(|v| (v * SCALE).round() as u64))
        .collect();
    let sparkline = Sparkline::default()
        .data(values)
        .max((axis * SCALE) as u64)
        .direction(RenderDirection::RightToLeft)
        .bar_set(theme.bars())
        .absent_value_symbol(" ")
        .style(theme.level(super::super::theme::Level::Busy));
    frame.render_widget(sparkline, inner);
}
