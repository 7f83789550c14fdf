//! The bottom line: what the last key did, or the keys that work now.

use super::super::keymap;
use super::super::state::{Mode, State};
use super::super::theme::Theme;
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

pub fn draw(state: &State, area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let line = match &state.mode {
        Mode::Filter { .. } => filter(&state.log_view.needle, theme),
        _ => match state.notice() {
            Some(notice) => {
                let text = format!("{} {}", theme.glyph(notice.level), notice.text);
                Line::styled(text, theme.level(notice.level))
            }
            None => keys(state.read_only, area.width, theme),
        },
    };
    frame.render_widget(line, area);
}

fn filter<'a>(needle: &'a str, theme: &Theme) -> Line<'a> {
    Line::from(vec![
        Span::styled("/", theme.accent()),
        Span::raw(needle),
        Span::styled(" ", theme.selected()),
        Span::styled("   Enter keeps, Esc undoes", theme.dim()),
    ])
}

/// As many keys as fit whole.
fn keys<'a>(read_only: bool, width: u16, theme: &Theme) -> Line<'a> {
    let mut spans = Vec::new();
    let mut used = 0;
    for binding in keymap::active(read_only).filter(|binding| !binding.short.is_empty()) {
        let key = binding.label.split(' ').next().unwrap_or(binding.label);
        let wide = key.len() + binding.short.len() + 3;
        if used + wide > usize::from(width) {
            break;
        }
        used += wide;
        spans.push(Span::styled(key, theme.accent()));
        spans.push(Span::raw(format!(" {}  ", binding.short)));
    }
    Line::from(spans)
}
