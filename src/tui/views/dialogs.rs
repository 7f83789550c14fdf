//! Boxes over the screen: help, and the questions before anything is stopped.

use super::super::format;
use super::super::keymap;
use super::super::state::{Mode, STOP_WORD, State};
use super::super::theme::{Level, Theme};
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, Clear, Paragraph, Wrap};

pub fn draw(state: &State, area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    match &state.mode {
        Mode::Normal | Mode::Filter { .. } => {}
        Mode::Help { scroll } => help(state.read_only, *scroll, area, theme, frame),
        Mode::ConfirmRestart { id } => {
            let text = confirm_restart(state, id, theme);
            question("restart", text, area, theme, frame);
        }
        Mode::ConfirmStop { typed } => question("stop", confirm_stop(state, typed, theme), area, theme, frame),
    }
}

fn help(read_only: bool, scroll: u16, area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let bindings: Vec<_> = keymap::active(read_only).collect();
    let wide = bindings.iter().map(|binding| binding.label.len()).max().unwrap_or(0);
    let mut lines: Vec<Line<'_>> = bindings
        .iter()
        .map(|b| Line::from(vec![Span::styled(format!("{:<wide$}  ", b.label), theme.accent()), Span::raw(b.help)]))
        .collect();
    lines.push(Line::default());
    lines.push(Line::styled("KV: cache blocks in use. t/s: tokens a second. 95: 95th percentile.", theme.dim()));
    lines.push(Line::styled("A dash means unknown. Any other key closes this.", theme.dim()));
    let text = Text::from(lines);
    let wide = (text.width() as u16 + 4).min(area.width);
    let paragraph = Paragraph::new(text).wrap(Wrap { trim: false });
    let all = paragraph.line_count(wide.saturating_sub(4)) as u16;
    let place = centred(area, wide, all + 2);
    let shown = place.height.saturating_sub(2);
    let title = if shown < all { " keys (j k scroll) " } else { " keys " };
    boxed(title, paragraph.scroll((scroll.min(all.saturating_sub(shown)), 0)), place, theme, frame);
}

fn confirm_restart<'a>(state: &State, id: &str, theme: &Theme) -> Text<'a> {
    let replica = state.replicas().iter().find(|replica| replica.id == id);
    let cost = match replica.map(|replica| replica.in_flight) {
        Some(0) => "Nothing is in flight there.".to_owned(),
        Some(n) => format!("{} in flight there get the drain time to finish.", requests(n)),
        None => "It is not in the newest snapshot.".to_owned(),
    };
    Text::from(vec![
        Line::styled(format!("Restart {id}?"), theme.strong()),
        Line::from(cost),
        Line::default(),
        choices(&[("y", "restart"), ("Esc", "leave it")], theme),
    ])
}

fn confirm_stop<'a>(state: &State, typed: &str, theme: &Theme) -> Text<'a> {
    let replicas = state.replicas().len();
    let in_flight = state.status.as_ref().map_or(0, |status| status.router.in_flight);
    let endpoint = state.status.as_ref().map_or("", |status| &status.endpoint).to_owned();
    Text::from(vec![
        Line::styled(format!("Stop the deployment at {endpoint}?"), theme.strong()),
        Line::from(format!("{replicas} replicas end; {} in flight may finish first.", requests(in_flight))),
        Line::default(),
        Line::from(vec![
            Span::raw(format!("Type {STOP_WORD}: ")),
            Span::styled(typed.to_owned(), theme.level(Level::Bad)),
            Span::styled(" ", theme.selected()),
        ]),
        choices(&[("Enter", "stop"), ("Esc", "leave it")], theme),
    ])
}

fn requests(n: u64) -> String {
    if n == 1 { "1 request".to_owned() } else { format!("{} requests", format::count(n)) }
}

fn choices<'a>(keys: &[(&'static str, &'static str)], theme: &Theme) -> Line<'a> {
    let mut spans = Vec::new();
    for (key, meaning) in keys {
        spans.push(Span::styled(*key, theme.accent()));
        spans.push(Span::raw(format!(" {meaning}   ")));
    }
    Line::from(spans)
}

fn question(title: &str, text: Text<'_>, area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let wide = (text.width() as u16 + 4).max(36);
    let paragraph = Paragraph::new(text).wrap(Wrap { trim: false });
    let inner_width = wide.min(area.width).saturating_sub(4);
    let high = paragraph.line_count(inner_width) as u16 + 2;
    boxed(&format!(" {title} "), paragraph, centred(area, wide, high), theme, frame);
}

fn boxed(title: &str, paragraph: Paragraph<'_>, place: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let block = Block::bordered()
        .border_set(theme.borders())
        .title(Span::styled(title.to_owned(), theme.strong()))
        .padding(ratatui::widgets::Padding::horizontal(1));
    frame.render_widget(Clear, place);
    frame.render_widget(paragraph.block(block), place);
}

fn centred(area: Rect, width: u16, height: u16) -> Rect {
    let (width, height) = (width.min(area.width), height.min(area.height));
    Rect::new(area.x + (area.width - width) / 2, area.y + (area.height - height) / 2, width, height)
}
