#![allow(clippy::unwrap_used)]

use super::*;
use crate::tui::fixtures::{self, NOW, feed, keys, press};

fn selected(state: &State) -> &str {
    state.selected.as_deref().unwrap()
}

#[test]
fn the_selection_moves_and_stays_with_its_replica() {
    let mut state = fixtures::loaded_state();
    assert_eq!(selected(&state), "demo-0");
    keys(&mut state, "kj");
    assert_eq!(selected(&state), "demo-1");
    let mut status = fixtures::under_load();
    status.replicas.remove(0);
    feed(&mut state, Message::Snapshot(Box::new(status.clone())));
    assert_eq!((selected(&state), state.selected_index()), ("demo-1", Some(0)));
    keys(&mut state, "Gj");
    assert_eq!(selected(&state), "demo-embed-0");
    status.replicas.pop();
    feed(&mut state, Message::Snapshot(Box::new(status)));
    assert_eq!(selected(&state), "demo-1", "a replica that went leaves the selection to the first");
}

#[test]
fn moving_over_nothing_is_nothing() {
    let mut state = fixtures::state(None);
    assert!(keys(&mut state, "jkgGRoSf/ ").is_empty());
    assert_eq!(state.selected, None);
}

#[test]
fn quit_is_q_in_the_main_view_and_a_letter_in_a_field() {
    let mut state = fixtures::loaded_state();
    keys(&mut state, "/q?");
    assert_eq!(state.log_view.needle, "q?");
    press(&mut state, KeyCode::Enter);
    assert_eq!(keys(&mut state, "q"), [Effect::Quit(Outcome::Quit)]);
    keys(&mut state, "/");
    let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(feed(&mut state, Message::Key(interrupt)), Some(Effect::Quit(Outcome::Quit)));
}

#[test]
fn a_filter_is_live_and_esc_brings_the_old_one_back() {
    let mut state = fixtures::loaded_state();
    keys(&mut state, "/Request 1");
    assert_eq!(state.logs.count(&state.log_view), 11);
    press(&mut state, KeyCode::Enter);
    keys(&mut state, "/x");
    assert_eq!(state.logs.count(&state.log_view), 0);
    press(&mut state, KeyCode::Backspace);
    assert_eq!(state.logs.count(&state.log_view), 11);
    keys(&mut state, "yz");
    press(&mut state, KeyCode::Esc);
    assert_eq!(state.log_view.needle, "Request 1");
}

#[test]
fn the_log_narrows_to_the_selected_replica_and_back() {
    let mut state = fixtures::loaded_state();
    keys(&mut state, "jo");
    assert_eq!(state.log_view.only.as_deref(), Some("demo-1"));
    assert_eq!(state.logs.count(&state.log_view), 14);
    keys(&mut state, "ko");
    assert_eq!(state.log_view.only.as_deref(), Some("demo-0"));
    keys(&mut state, "o");
    assert_eq!(state.log_view.only, None);
}

#[test]
fn scrolling_the_log_holds_it_and_f_follows_again() {
    let mut state = fixtures::loaded_state();
    fixtures::resize(&mut state, 120, 40);
    keys(&mut state, "lk");
    assert!(!state.log_view.follows());
    assert_eq!(selected(&state), "demo-0", "the selection does not move with the log");
    keys(&mut state, "f");
    assert!(state.log_view.follows());
    keys(&mut state, "f");
    assert!(!state.log_view.follows());
    keys(&mut state, "gG");
    assert!(state.log_view.follows());
}

#[test]
fn esc_walks_back_and_never_out() {
    let mut state = fixtures::loaded_state();
    keys(&mut state, "o/tokens");
    press(&mut state, KeyCode::Enter);
    keys(&mut state, "l");
    assert_eq!((state.focus, state.log_zoom), (Focus::Logs, Zoom::Screen));
    press(&mut state, KeyCode::Esc);
    assert_eq!((state.focus, state.log_zoom), (Focus::Logs, Zoom::Pane));
    press(&mut state, KeyCode::Esc);
    assert_eq!(state.focus, Focus::Replicas);
    press(&mut state, KeyCode::Esc);
    assert_eq!(state.log_view.needle, "");
    press(&mut state, KeyCode::Esc);
    assert_eq!(state.log_view.only, None);
    assert_eq!(press(&mut state, KeyCode::Esc), None);
}

#[test]
fn a_restart_is_asked_with_the_name_and_only_y_does_it() {
    let mut state = fixtures::loaded_state();
    assert!(keys(&mut state, "jRxR").is_empty());
    assert_eq!(state.mode, Mode::ConfirmRestart { id: "demo-1".into() });
    assert!(keys(&mut state, "n").is_empty());
    assert_eq!(state.mode, Mode::Normal);
    let effects = keys(&mut state, "Ry");
    assert_eq!(effects, [Effect::Act(Action::RestartReplica { id: "demo-1".into() })]);
    assert_eq!(state.notice().unwrap().text, "restarting demo-1 ...");
}

#[test]
fn stopping_takes_the_typed_word() {
    let mut state = fixtures::loaded_state();
    keys(&mut state, "Sy");
    assert_eq!(press(&mut state, KeyCode::Enter), None);
    press(&mut state, KeyCode::Backspace);
    keys(&mut state, "stop");
    assert_eq!(press(&mut state, KeyCode::Enter), Some(Effect::Act(Action::StopDeployment)));
}

#[test]
fn after_a_stop_the_silence_of_the_launcher_ends_the_dashboard() {
    let mut state = fixtures::loaded_state();
    assert_eq!(feed(&mut state, Message::Lost("refused".into())), None);
    let done = Message::ActionDone { action: Action::StopDeployment, result: Ok("stopping".into()) };
    feed(&mut state, done);
    assert_eq!(feed(&mut state, Message::Lost("refused".into())), Some(Effect::Quit(Outcome::Stopped)));
}

#[test]
fn a_failed_action_is_said() {
    let mut state = fixtures::loaded_state();
    let action = Action::RestartReplica { id: "demo-1".into() };
    feed(&mut state, Message::ActionDone { action, result: Err("no replica demo-1".into()) });
    assert_eq!(state.notice().unwrap().text, "no replica demo-1");
    update(&mut state, NOW + NOTICE_S + 1.0, Message::Tick);
    assert_eq!(state.notice(), None);
}

#[test]
fn read_only_and_a_lost_launcher_refuse_actions() {
    let mut state = fixtures::loaded_state();
    state.read_only = true;
    assert!(keys(&mut state, "RySstop").is_empty());
    assert_eq!(state.mode, Mode::Normal);
    assert!(state.notice().unwrap().text.contains("read-only"));
    let mut state = fixtures::loaded_state();
    feed(&mut state, Message::Lost("refused".into()));
    keys(&mut state, "R");
    assert_eq!(state.mode, Mode::Normal);
    assert!(state.notice().unwrap().text.contains("not connected"));
}

#[test]
fn freezing_keeps_the_figures_and_goes_on_recording() {
    let mut state = fixtures::loaded_state();
    let before = state.status.clone();
    keys(&mut state, " ");
    let axis = |state: &State| state.history.axis(crate::tui::history::Series::Generation);
    let low = axis(&state);
    let mut status = fixtures::under_load();
    status.replicas[0].load = Some(fixtures::load(90_000.0));
    feed(&mut state, Message::Snapshot(Box::new(status.clone())));
    assert_eq!(state.status, before);
    assert!(axis(&state) > low);
    keys(&mut state, " ");
    feed(&mut state, Message::Snapshot(Box::new(status.clone())));
    assert_eq!(state.status, Some(status));
}

#[test]
fn silence_is_noticed_even_without_an_error() {
    let mut state = fixtures::loaded_state();
    assert_eq!(state.silence_s(), None);
    update(&mut state, NOW + 2.0, Message::Tick);
    assert_eq!(state.silence_s(), None);
    update(&mut state, NOW + 9.0, Message::Tick);
    assert_eq!(state.silence_s(), Some(9.0));
    update(&mut state, NOW + 10.0, Message::Lost("refused".into()));
    assert_eq!(state.silence_s(), Some(10.0), "counted from the last word, not from the first error");
}

#[test]
fn a_new_launcher_starts_its_log_numbers_over() {
    let mut state = fixtures::loaded_state();
    let kept = state.logs.kept();
    feed(&mut state, Message::Logs(fixtures::log_lines(2)));
    assert_eq!(state.logs.kept(), kept, "lines seen already");
    let status = Status { pid: 9, ..fixtures::under_load() };
    feed(&mut state, Message::Snapshot(Box::new(status)));
    feed(&mut state, Message::Logs(fixtures::log_lines(2)));
    assert_eq!((state.logs.kept(), state.logs.missed), (kept + 2, 0));
}

#[test]
fn help_scrolls_and_any_other_key_closes_it() {
    let mut state = fixtures::loaded_state();
    keys(&mut state, "?jj");
    assert_eq!(state.mode, Mode::Help { scroll: 2 });
    assert!(keys(&mut state, "q").is_empty());
    assert_eq!(state.mode, Mode::Normal);
}
