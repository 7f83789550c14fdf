//! The screens: functions of state, area and theme. They read, never change.

mod columns;
mod dialogs;
mod footer;
mod hardware;
mod header;
pub mod layout;
mod logs;
mod rates;
mod replicas;

pub use columns::{Column, Widths, fitting, kv_usage};

use super::state::State;
use super::theme::Theme;
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph, Wrap};

type View = fn(&State, Rect, &Theme, &mut Frame<'_>);

pub fn draw(state: &State, theme: &Theme, frame: &mut Frame<'_>) {
    let area = frame.area();
    if area.is_empty() {
        return;
    }
    if layout::too_small(area) {
        let (width, height) = (area.width, area.height);
        let text =
            format!("{width}x{height} is too small: the dashboard needs {}x{}", layout::MIN_WIDTH, layout::MIN_HEIGHT);
        frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }), area);
        return;
    }
    let areas = layout::areas(state, area);
    header::draw(state, areas.header, theme, frame);
    let sections: [(Rect, View); 5] = [
        (areas.replicas, replicas::draw),
        (areas.rates, rates::draw),
        (areas.hardware, hardware::draw),
        (areas.events, logs::draw_events),
        (areas.logs, logs::draw),
    ];
    for (section, draw) in sections.into_iter().filter(|(section, _)| !section.is_empty()) {
        draw(state, section, theme, frame);
    }
    footer::draw(state, areas.footer, theme, frame);
    dialogs::draw(state, area, theme, frame);
}

/// `name value`, the name dim.
fn figure<'a>(name: &'a str, value: String, theme: &Theme) -> Vec<Span<'a>> {
    vec![Span::styled(name, theme.dim()), Span::raw(" "), Span::raw(value)]
}

/// The pieces in one line, two blanks apart; the first that does not fit whole ends it.
fn as_many_as_fit<'a>(pieces: Vec<Vec<Span<'a>>>, width: u16) -> Line<'a> {
    let mut line = Line::default();
    for piece in pieces {
        let gap = if line.spans.is_empty() { 0 } else { 2 };
        let wide: usize = piece.iter().map(Span::width).sum();
        if line.width() + gap + wide > usize::from(width) && !line.spans.is_empty() {
            break;
        }
        line.spans.push(Span::raw(" ".repeat(gap)));
        line.spans.extend(piece);
    }
    line
}

/// A line that is too long ends in a mark, so that nobody takes the part for the whole.
fn draw_cut(line: Line<'_>, row: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let cut = line.width() > usize::from(row.width);
    frame.render_widget(line, row);
    if cut && row.width > 0 {
        let last = Rect { x: row.right() - 1, width: 1, ..row };
        frame.render_widget(Span::styled(theme.ellipsis(), theme.accent()), last);
    }
}

/// A rule with a title on it, and the space below.
fn section<'a>(title: Vec<Span<'a>>, area: Rect, theme: &Theme, frame: &mut Frame<'_>) -> Rect {
    let mut spans = vec![Span::raw(" ")];
    spans.extend(title);
    spans.push(Span::raw(" "));
    let block = Block::new()
        .borders(Borders::TOP)
        .border_set(theme.borders())
        .border_style(theme.dim())
        .title_style(Style::new().remove_modifier(Modifier::DIM))
        .title(Line::from(spans));
    let inner = block.inner(area);
    frame.render_widget(block, area);
    inner
}

#[cfg(test)]
mod tests;
