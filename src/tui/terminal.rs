//! The terminal: taken, drawn on, and given back whatever happens.

use super::state::State;
use super::theme::Theme;
use super::views;
use anyhow::{Context, bail};
use crossterm::cursor::Show;
use crossterm::terminal::{
    BeginSynchronizedUpdate, EndSynchronizedUpdate, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode,
    enable_raw_mode,
};
use ratatui::backend::CrosstermBackend;
use ratatui::layout::{Rect, Size};
use ratatui::{Frame, Terminal, TerminalOptions, Viewport};
use std::io::{BufWriter, IsTerminal, Stdout, stdin, stdout};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// Is the screen ours now? Cleared by whoever gives it back first: the drop, or the panic hook.
static TAKEN: AtomicBool = AtomicBool::new(false);
static PANIC_HOOK: Once = Once::new();

const FALLBACK: Size = Size::new(80, 24);

/// Can a full-screen program run here?
pub fn has_screen() -> bool {
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb" || term.is_empty());
    !dumb && stdout().is_terminal() && stdin().is_terminal()
}

#[derive(Debug)]
pub struct Screen {
    terminal: Terminal<CrosstermBackend<BufWriter<Stdout>>>,
}

impl Screen {
    /// Take the terminal. It is given back on drop, and before the message of a panic on any thread.
    pub fn take() -> anyhow::Result<Self> {
        PANIC_HOOK.call_once(|| {
            let report = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                give_back();
                report(info);
            }));
        });
        // NO_COLOR is honoured by the theme, and `--color always` overrules it. crossterm 0.29 honours it too, but by
        // writing a bare reset in place of a colour, which also undoes bold and reverse.
        crossterm::style::force_color_output(true);
        enable_raw_mode().context("cannot switch the terminal to raw mode")?;
        TAKEN.store(true, Ordering::SeqCst);
        let screen = Self::on_alternate_screen();
        if screen.is_err() {
            give_back();
        }
        screen.context("cannot draw on the terminal")
    }

    fn on_alternate_screen() -> std::io::Result<Self> {
        crossterm::execute!(stdout(), EnterAlternateScreen)?;
        let backend = CrosstermBackend::new(BufWriter::with_capacity(1 << 16, stdout()));
        // Fixed, because a pty can say it has no size; `resize` follows the terminal's.
        let viewport = Viewport::Fixed(Rect::from((ratatui::layout::Position::ORIGIN, size())));
        Ok(Self { terminal: Terminal::with_options(backend, TerminalOptions { viewport })? })
    }

    /// Take the size and draw everything anew. Not by `Terminal::clear`: that asks the terminal where the cursor is,
    /// and the event stream may swallow the answer.
    pub fn resize(&mut self, size: Size) -> anyhow::Result<()> {
        self.terminal.resize(Rect::new(0, 0, size.width, size.height)).context("cannot draw on the terminal")
    }

    pub fn draw(&mut self, state: &State, theme: &Theme) -> anyhow::Result<()> {
        self.draw_with(|frame| views::draw(state, theme, frame))
    }

    /// One frame of anything.
    pub fn draw_with(&mut self, render: impl FnOnce(&mut Frame<'_>)) -> anyhow::Result<()> {
        if !TAKEN.load(Ordering::SeqCst) {
            bail!("the dashboard ended because a task panicked");
        }
        crossterm::queue!(self.terminal.backend_mut(), BeginSynchronizedUpdate)?;
        let drawn = self.terminal.draw(render).map(|_| ());
        crossterm::execute!(self.terminal.backend_mut(), EndSynchronizedUpdate)?;
        drawn.context("cannot draw on the terminal")
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

/// Back to what the shell expects; errors have nowhere to go.
fn give_back() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        let _ = disable_raw_mode();
        let _ = crossterm::execute!(stdout(), EndSynchronizedUpdate, LeaveAlternateScreen, Show);
    }
}

/// The terminal's size; a pty without one is taken by `$COLUMNS` and `$LINES`, else as 80x24.
pub fn size() -> Size {
    let reported = crossterm::terminal::size().unwrap_or_default();
    usable_size(reported.into(), |name| std::env::var(name).ok())
}

pub fn usable_size(reported: Size, env: impl Fn(&str) -> Option<String>) -> Size {
    let positive = |value: u16| (value > 0).then_some(value);
    let of_env = |name| env(name).and_then(|text| text.trim().parse().ok()).and_then(positive);
    Size {
        width: positive(reported.width).or_else(|| of_env("COLUMNS")).unwrap_or(FALLBACK.width),
        height: positive(reported.height).or_else(|| of_env("LINES")).unwrap_or(FALLBACK.height),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_without_a_size_gets_one() {
        let env = |name: &str| (name == "COLUMNS").then(|| "132".to_owned());
        assert_eq!(usable_size(Size::new(100, 30), env), Size::new(100, 30));
        assert_eq!(usable_size(Size::ZERO, env), Size::new(132, 24));
        assert_eq!(usable_size(Size::ZERO, |_| None), Size::new(80, 24));
        assert_eq!(usable_size(Size::ZERO, |_| Some("0".into())), Size::new(80, 24));
    }
}
