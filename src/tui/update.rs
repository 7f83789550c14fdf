//! The only place where the state changes. No IO, no clock: both come in as arguments.

use super::Outcome;
use super::keymap::{self, Command};
use super::message::{Effect, Message};
use super::source::Action;
use super::state::{Focus, Link, Mode, Notice, STOP_WORD, State, Zoom};
use super::theme::Level;
use super::views::layout;
use crate::status::{ReplicaState, Status};
use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

const NOTICE_S: f64 = 6.0;
const FILTER_CHARS: usize = 100;
/// More than the help has, however narrow; the view stops at its end.
const HELP_LINES: u16 = 80;

pub fn update(state: &mut State, now_unix_s: f64, message: Message) -> Option<Effect> {
    state.now_unix_s = now_unix_s;
    match message {
        Message::Key(key) => on_key(state, key),
        Message::Resize(size) => {
            state.size = size;
            Some(Effect::Repaint)
        }
        Message::Tick => None,
        Message::Snapshot(status) => {
            on_snapshot(state, *status);
            None
        }
        Message::Logs(lines) => {
            state.logs.extend(lines);
            None
        }
        Message::LogsFailed(error) => {
            notify(state, Level::Warn, format!("no log: {error}"));
            None
        }
        Message::Lost(error) => on_lost(state, error),
        Message::Ended => {
            state.link = Link::Ended;
            None
        }
        Message::ActionDone { action, result } => {
            on_action_done(state, &action, result);
            None
        }
    }
}

fn on_snapshot(state: &mut State, status: Status) {
    state.link = Link::Live { received_unix_s: state.now_unix_s };
    state.history.record(&status, state.now_unix_s);
    if state.frozen {
        return;
    }
    if state.status.as_ref().is_some_and(|old| old.pid != status.pid) {
        state.logs.expect_new_sequence();
    }
    state.status = Some(status);
    if state.selected_index().is_none() {
        state.selected = state.replicas().first().map(|replica| replica.id.clone());
    }
}

fn on_lost(state: &mut State, error: String) -> Option<Effect> {
    if state.stopping {
        return Some(Effect::Quit(Outcome::Stopped));
    }
    state.history.record_gap();
    let since_unix_s = match state.link {
        Link::Lost { since_unix_s, .. } => since_unix_s,
        Link::Live { received_unix_s } => received_unix_s,
        Link::Connecting | Link::Ended => state.now_unix_s,
    };
    state.link = Link::Lost { since_unix_s, error };
    None
}

fn on_action_done(state: &mut State, action: &Action, result: Result<String, String>) {
    if *action == Action::StopDeployment && result.is_ok() {
        state.stopping = true;
    }
    match result {
        Ok(text) => notify(state, Level::Good, text),
        Err(text) => notify(state, Level::Bad, text),
    }
}

fn notify(state: &mut State, level: Level, text: impl Into<String>) {
    state.notice = Some(Notice { level, text: text.into(), until_unix_s: state.now_unix_s + NOTICE_S });
}

fn on_key(state: &mut State, key: KeyEvent) -> Option<Effect> {
    if is_interrupt(key) {
        return Some(Effect::Quit(Outcome::Quit));
    }
    match &mut state.mode {
        Mode::Normal => keymap::command(key).and_then(|command| on_command(state, command)),
        Mode::Help { scroll } => {
            match key.code {
                KeyCode::Down | KeyCode::Char('j') => *scroll = (*scroll + 1).min(HELP_LINES),
                KeyCode::Up | KeyCode::Char('k') => *scroll = scroll.saturating_sub(1),
                _ => state.mode = Mode::Normal,
            }
            None
        }
        Mode::Filter { .. } => {
            on_filter_key(state, key);
            None
        }
        Mode::ConfirmRestart { .. } => on_confirm_restart(state, key),
        Mode::ConfirmStop { .. } => on_confirm_stop(state, key),
    }
}

fn is_interrupt(key: KeyEvent) -> bool {
    key.code == KeyCode::Char('c') && key.modifiers == KeyModifiers::CONTROL
}

fn on_command(state: &mut State, command: Command) -> Option<Effect> {
    match command {
        Command::Quit => return Some(Effect::Quit(Outcome::Quit)),
        Command::Repaint => return Some(Effect::Repaint),
        Command::Up => move_by(state, -1),
        Command::Down => move_by(state, 1),
        Command::PageUp => move_by(state, -page(state)),
        Command::PageDown => move_by(state, page(state)),
        Command::First => move_by(state, -i64::from(u32::MAX)),
        Command::Last => move_by(state, i64::from(u32::MAX)),
        Command::NextPanel => next_panel(state),
        Command::Logs => zoom_logs(state),
        Command::OnlyThisReplica => toggle_only(state),
        Command::Follow => toggle_follow(state),
        Command::Filter => start_filter(state),
        Command::Freeze => state.frozen = !state.frozen,
        Command::Restart => ask_restart(state),
        Command::Stop => ask_stop(state),
        Command::Help => state.mode = Mode::Help { scroll: 0 },
        Command::Back => back(state),
    }
    None
}

fn move_by(state: &mut State, by: i64) {
    match state.focus {
        Focus::Logs => {
            let height = layout::log_lines(state);
            state.logs.scroll(&mut state.log_view, by, height);
        }
        Focus::Replicas => {
            let Some(last) = state.replicas().len().checked_sub(1) else { return };
            let at = state.selected_index().unwrap_or(0) as i64;
            let to = at.saturating_add(by).clamp(0, last as i64) as usize;
            state.selected = Some(state.replicas()[to].id.clone());
        }
    }
}

fn page(state: &State) -> i64 {
    match state.focus {
        Focus::Logs => layout::log_lines(state).max(1) as i64,
        Focus::Replicas => 10,
    }
}

fn next_panel(state: &mut State) {
    state.log_zoom = Zoom::Pane;
    state.focus = match state.focus {
        Focus::Replicas => Focus::Logs,
        Focus::Logs => Focus::Replicas,
    };
}

fn zoom_logs(state: &mut State) {
    (state.focus, state.log_zoom) = match (state.focus, state.log_zoom) {
        (Focus::Replicas, _) => (Focus::Logs, Zoom::Pane),
        (Focus::Logs, Zoom::Pane) => (Focus::Logs, Zoom::Screen),
        (Focus::Logs, Zoom::Screen) => (Focus::Replicas, Zoom::Pane),
    };
}

fn toggle_only(state: &mut State) {
    state.log_view.only = match state.log_view.only.take() {
        Some(only) if Some(&only) == state.selected.as_ref() => None,
        _ => state.selected.clone(),
    };
    state.log_view.bottom = None;
}

fn toggle_follow(state: &mut State) {
    if state.log_view.follows() {
        state.logs.hold(&mut state.log_view);
    } else {
        state.log_view.bottom = None;
    }
}

fn start_filter(state: &mut State) {
    state.focus = Focus::Logs;
    state.mode = Mode::Filter { before: state.log_view.needle.clone() };
}

fn on_filter_key(state: &mut State, key: KeyEvent) {
    let Mode::Filter { before } = &state.mode else { return };
    match key.code {
        KeyCode::Esc => {
            state.log_view.needle.clone_from(before);
            state.mode = Mode::Normal;
        }
        KeyCode::Enter => state.mode = Mode::Normal,
        _ => {
            edit(&mut state.log_view.needle, key);
            state.log_view.bottom = None;
        }
    }
}

/// The few keys of a one-line field: everything else in it is text, also `q` and `?`.
fn edit(field: &mut String, key: KeyEvent) {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Backspace => {
            field.pop();
        }
        KeyCode::Char('u' | 'w') if control => field.clear(),
        KeyCode::Char(c) if !control && field.chars().count() < FILTER_CHARS => field.push(c),
        _ => {}
    }
}

fn ask_restart(state: &mut State) {
    if refuse_action(state) {
        return;
    }
    let Some(replica) = state.selected_replica() else {
        return notify(state, Level::Warn, "no replica is selected");
    };
    if matches!(replica.state, ReplicaState::Draining) {
        let text = format!("{} is draining already", replica.id);
        return notify(state, Level::Warn, text);
    }
    state.mode = Mode::ConfirmRestart { id: replica.id.clone() };
}

fn ask_stop(state: &mut State) {
    if !refuse_action(state) {
        state.mode = Mode::ConfirmStop { typed: String::new() };
    }
}

fn refuse_action(state: &mut State) -> bool {
    if state.read_only {
        notify(state, Level::Warn, "read-only: actions are off");
    } else if !matches!(state.link, Link::Live { .. }) {
        notify(state, Level::Warn, "not connected: nothing to act on");
    } else {
        return false;
    }
    true
}

fn on_confirm_restart(state: &mut State, key: KeyEvent) -> Option<Effect> {
    let Mode::ConfirmRestart { id } = &state.mode else { return None };
    match key.code {
        KeyCode::Char('y') => {
            let action = Action::RestartReplica { id: id.clone() };
            let text = format!("restarting {id} ...");
            state.mode = Mode::Normal;
            notify(state, Level::Busy, text);
            Some(Effect::Act(action))
        }
        KeyCode::Char('n' | 'q') | KeyCode::Esc => {
            state.mode = Mode::Normal;
            None
        }
        _ => None,
    }
}

fn on_confirm_stop(state: &mut State, key: KeyEvent) -> Option<Effect> {
    let Mode::ConfirmStop { typed } = &mut state.mode else { return None };
    match key.code {
        KeyCode::Esc => state.mode = Mode::Normal,
        KeyCode::Enter if typed == STOP_WORD => {
            state.mode = Mode::Normal;
            notify(state, Level::Busy, "stopping the deployment ...");
            return Some(Effect::Act(Action::StopDeployment));
        }
        _ => edit(typed, key),
    }
    None
}

/// One step back towards the plain main view; never out of the dashboard.
fn back(state: &mut State) {
    if state.log_zoom == Zoom::Screen {
        state.log_zoom = Zoom::Pane;
    } else if state.focus == Focus::Logs {
        state.focus = Focus::Replicas;
    } else if !state.log_view.needle.is_empty() {
        state.log_view.needle.clear();
    } else {
        state.log_view.only = None;
    }
}

#[cfg(test)]
#[path = "update_tests.rs"]
mod tests;
