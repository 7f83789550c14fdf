//! `mserve plan -i`: change what a plan depends on with keys, and see the figures move.

mod state;
#[cfg(test)]
mod tests;
mod view;

use crate::exit::Failure;
use crate::tui::{Charset, Palette, Screen, Theme, has_screen, terminal_size};
use anyhow::Context;
use crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers, read};
use mserve_planner::plan::PlanRequest;
use mserve_planner::split::{SmallModel, Workload};
use state::Explorer;
use std::process::ExitCode;

/// The small models of a split, and how many requests go to them.
#[derive(Debug)]
pub(super) struct Beside {
    pub models: Vec<SmallModel>,
    pub workload: Workload,
    pub tokens: u64,
}

/// Until the user leaves.
pub(super) fn run(request: PlanRequest<'_>, beside: Option<Beside>) -> anyhow::Result<ExitCode> {
    if !has_screen() {
        let failure = Failure::usage("--interactive needs a terminal");
        return Err(failure.hint("without it the same figures are printed").into());
    }
    let theme = theme();
    let mut explorer = Explorer::new(request, beside);
    let mut screen = Screen::take()?;
    loop {
        screen.draw_with(|frame| view::draw(&explorer, theme, frame))?;
        match read().context("cannot read the terminal")? {
            Event::Key(key) if key.kind == KeyEventKind::Press => {
                if leaves(key) {
                    return Ok(ExitCode::SUCCESS);
                }
                explorer.key(key.code);
            }
            Event::Resize(..) => screen.resize(terminal_size())?,
            _ => {}
        }
    }
}

/// In raw mode Ctrl-C is a key like others.
fn leaves(key: KeyEvent) -> bool {
    let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    control_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
}

fn theme() -> Theme {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    Theme::new(if no_color { Palette::Mono } else { Palette::Ansi }, Charset::Unicode)
}
