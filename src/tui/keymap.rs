//! The keys. Footer, help screen and `update` all read this one table.

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Up,
    Down,
    PageUp,
    PageDown,
    First,
    Last,
    NextPanel,
    Logs,
    OnlyThisReplica,
    Follow,
    Filter,
    Freeze,
    Restart,
    Stop,
    Help,
    Repaint,
    Back,
    Quit,
}

#[derive(Debug)]
pub struct Binding {
    pub command: Command,
    keys: &'static [Key],
    /// How the keys are written, for people.
    pub label: &'static str,
    /// Two words for the bottom line; empty where it has no place there.
    pub short: &'static str,
    pub help: &'static str,
}

#[derive(Debug, Clone, Copy)]
enum Key {
    Plain(KeyCode),
    Ctrl(char),
}

use Key::{Ctrl, Plain};

const fn char(c: char) -> Key {
    Plain(KeyCode::Char(c))
}

pub const KEYMAP: &[Binding] = &[
    bind(Command::Quit, &[char('q'), Ctrl('c')], "q", "quit", "leave the dashboard; what is deployed stays up"),
    bind(Command::Help, &[char('?'), Plain(KeyCode::F(1))], "?", "help", "this list"),
    bind(Command::Up, &[Plain(KeyCode::Up), char('k')], "Up k", "", "previous replica, or scroll the log up"),
    bind(Command::Down, &[Plain(KeyCode::Down), char('j')], "Down j", "", "next replica, or scroll the log down"),
    bind(Command::PageUp, &[Plain(KeyCode::PageUp), Ctrl('b')], "PgUp", "", "a page up"),
    bind(Command::PageDown, &[Plain(KeyCode::PageDown), Ctrl('f')], "PgDn", "", "a page down"),
    bind(Command::First, &[Plain(KeyCode::Home), char('g')], "Home g", "", "first replica, or oldest line"),
    bind(Command::Last, &[Plain(KeyCode::End), char('G')], "End G", "", "last replica, or newest line"),
    bind(
        Command::NextPanel,
        &[Plain(KeyCode::Tab), Plain(KeyCode::BackTab)],
        "Tab",
        "panel",
        "between replicas and log",
    ),
    bind(Command::Logs, &[char('l')], "l", "log", "to the log; again for the whole screen; again back"),
    bind(
        Command::OnlyThisReplica,
        &[char('o'), Plain(KeyCode::Enter)],
        "o Enter",
        "only this",
        "log of the selected replica only, or of all",
    ),
    bind(Command::Follow, &[char('f')], "f", "follow", "follow the newest line, or hold the log still"),
    bind(Command::Filter, &[char('/')], "/", "filter", "only log lines that contain a text"),
    bind(Command::Freeze, &[char(' ')], "Space", "freeze", "hold the figures still; collection goes on"),
    bind(Command::Restart, &[char('R')], "R", "restart", "restart the selected replica (asks)"),
    bind(Command::Stop, &[char('S')], "S", "stop", "stop the whole deployment (asks)"),
    bind(Command::Back, &[Plain(KeyCode::Esc)], "Esc", "", "back: close a box, leave the log, clear the filter"),
    bind(Command::Repaint, &[Ctrl('l')], "Ctrl-L", "", "draw the screen anew"),
];

const fn bind(
    command: Command,
    keys: &'static [Key],
    label: &'static str,
    short: &'static str,
    help: &'static str,
) -> Binding {
    Binding { command, keys, label, short, help }
}

impl Command {
    /// Does it change the deployment? Such commands are absent in read-only mode.
    pub const fn acts(self) -> bool {
        matches!(self, Self::Restart | Self::Stop)
    }
}

impl Key {
    fn is(self, event: KeyEvent) -> bool {
        let held = event.modifiers - KeyModifiers::SHIFT;
        match self {
            Plain(code) => held.is_empty() && event.code == code,
            Ctrl(c) => held == KeyModifiers::CONTROL && event.code == KeyCode::Char(c),
        }
    }
}

pub fn command(event: KeyEvent) -> Option<Command> {
    KEYMAP.iter().find(|binding| binding.keys.iter().any(|key| key.is(event))).map(|binding| binding.command)
}

/// Bindings that work now.
pub fn active(read_only: bool) -> impl Iterator<Item = &'static Binding> {
    KEYMAP.iter().filter(move |binding| !(read_only && binding.command.acts()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_means_two_things() {
        let mut seen: Vec<String> = Vec::new();
        for key in KEYMAP.iter().flat_map(|b| b.keys) {
            let name = format!("{key:?}");
            assert!(!seen.contains(&name), "{name} is bound twice");
            seen.push(name);
        }
    }

    #[test]
    fn destructive_keys_are_upper_case() {
        for binding in KEYMAP.iter().filter(|b| b.command.acts()) {
            assert!(binding.keys.iter().all(|k| matches!(k, Plain(KeyCode::Char(c)) if c.is_uppercase())));
        }
    }

    #[test]
    fn control_is_not_the_letter() {
        let key = |code, modifiers| command(KeyEvent::new(code, modifiers));
        assert_eq!(key(KeyCode::Char('l'), KeyModifiers::NONE), Some(Command::Logs));
        assert_eq!(key(KeyCode::Char('l'), KeyModifiers::CONTROL), Some(Command::Repaint));
        assert_eq!(key(KeyCode::Char('R'), KeyModifiers::SHIFT), Some(Command::Restart));
        assert_eq!(key(KeyCode::Char('r'), KeyModifiers::NONE), None);
        assert_eq!(key(KeyCode::Char('S'), KeyModifiers::ALT), None);
    }
}
