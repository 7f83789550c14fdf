//! Screens as text at the sizes that matter. Colour is checked apart, by style.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::tui::fixtures::{self, NOW, keys, resize};
use crate::tui::message::Message;
use crate::tui::theme::{Charset, Palette};
use crate::tui::update::update;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::style::{Color, Modifier};

const ANSI: Theme = Theme::new(Palette::Ansi, Charset::Unicode);
const MONO_ASCII: Theme = Theme::new(Palette::Mono, Charset::Ascii);

type MakeState = fn() -> State;

fn screen(state: &mut State, width: u16, height: u16, theme: Theme) -> TestBackend {
    resize(state, width, height);
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(state, &theme, frame)).unwrap();
    terminal.backend().clone()
}

#[test]
fn each_state_at_each_size() {
    let states: [(&str, MakeState); 6] = [
        ("connecting", || fixtures::state(None)),
        ("empty", || fixtures::state(Some(fixtures::empty()))),
        ("starting", || fixtures::state(Some(fixtures::starting()))),
        ("loaded", fixtures::loaded_state),
        ("one_down", fixtures::down_state),
        ("gpus", fixtures::gpu_state),
    ];
    for (name, make) in states {
        for (width, height) in [(120, 40), (80, 24), (40, 10)] {
            let backend = screen(&mut make(), width, height, ANSI);
            insta::assert_snapshot!(format!("{name}_{width}x{height}"), backend);
        }
    }
}

#[test]
fn ascii_is_ascii_and_mono_has_no_colour() {
    for mut state in [fixtures::loaded_state(), fixtures::down_state(), fixtures::gpu_state()] {
        keys(&mut state, "?");
        for mode in ["open help", "main view"] {
            for (width, height) in [(120, 40), (80, 24), (40, 10), (30, 5)] {
                let backend = screen(&mut state, width, height, MONO_ASCII);
                for cell in &backend.buffer().content {
                    assert!(cell.symbol().is_ascii(), "{:?} in {mode} {width}x{height}", cell.symbol());
                    assert_eq!((cell.fg, cell.bg), (Color::Reset, Color::Reset), "{:?} in {mode}", cell.symbol());
                }
            }
            state.mode = crate::tui::state::Mode::Normal;
        }
    }
    insta::assert_snapshot!("one_down_ascii_120x40", screen(&mut fixtures::down_state(), 120, 40, MONO_ASCII));
    insta::assert_snapshot!("gpus_ascii_80x24", screen(&mut fixtures::gpu_state(), 80, 24, MONO_ASCII));
}

#[test]
fn without_colour_the_badge_is_reversed_and_the_selection_marked() {
    let backend = screen(&mut fixtures::down_state(), 80, 24, MONO_ASCII);
    let buffer = backend.buffer();
    assert!(buffer[(8, 0)].modifier.contains(Modifier::REVERSED), "badge");
    let row = (0..24).find(|&y| buffer[(0, y)].symbol() == ">").unwrap();
    assert!(buffer[(2, row)].modifier.contains(Modifier::BOLD), "selected row");
}

#[test]
fn only_what_is_meant_to_be_dim_is() {
    let backend = screen(&mut fixtures::loaded_state(), 80, 24, ANSI);
    let dim_at = |text: &str, row: u16| {
        let line: Vec<&str> = (0..80).map(|x| backend.buffer()[(x, row)].symbol()).collect();
        let x = line.concat().find(text).unwrap() as u16;
        backend.buffer()[(x, row)].modifier.contains(Modifier::DIM)
    };
    assert!(!dim_at("mserve", 0) && dim_at("14:02:11", 0));
    assert!(!dim_at("replicas", 2) && dim_at("running", 1));
}

#[test]
fn trouble_is_coloured() {
    let backend = screen(&mut fixtures::down_state(), 120, 40, ANSI);
    let colour_of = |glyph: &str| {
        let cell = backend.buffer().content.iter().find(|cell| cell.symbol() == glyph).unwrap();
        cell.fg
    };
    assert_eq!(colour_of("▲"), Color::Yellow);
    assert_eq!(colour_of("✗"), Color::Red);
}

#[test]
fn boxes() {
    let mut state = fixtures::loaded_state();
    keys(&mut state, "?");
    insta::assert_snapshot!("help_80x24", screen(&mut state, 80, 24, ANSI));
    insta::assert_snapshot!("help_40x10", screen(&mut state, 40, 10, ANSI));
    let mut state = fixtures::loaded_state();
    keys(&mut state, "jR");
    insta::assert_snapshot!("confirm_restart_80x24", screen(&mut state, 80, 24, ANSI));
    let mut state = fixtures::loaded_state();
    keys(&mut state, "Sst");
    insta::assert_snapshot!("confirm_stop_40x10", screen(&mut state, 40, 10, ANSI));
}

#[test]
fn the_log_filtered_and_over_the_whole_screen() {
    let mut state = fixtures::loaded_state();
    keys(&mut state, "/request 1");
    insta::assert_snapshot!("filter_80x24", screen(&mut state, 80, 24, ANSI));
    let mut state = fixtures::loaded_state();
    resize(&mut state, 80, 24);
    keys(&mut state, "ollkk");
    insta::assert_snapshot!("log_screen_80x24", screen(&mut state, 80, 24, ANSI));
}

#[test]
fn a_lost_launcher_is_louder_than_its_last_words() {
    let mut state = fixtures::loaded_state();
    update(&mut state, NOW - 9.0, Message::Snapshot(Box::new(fixtures::under_load())));
    update(&mut state, NOW, Message::Lost("connection refused".into()));
    insta::assert_snapshot!("lost_80x24", screen(&mut state, 80, 24, ANSI));
}

#[test]
fn no_size_and_no_name_breaks_it() {
    let names =
        ["", "日本語の長い名前のモデル-0", "e\u{301}\u{200d}👩‍👩‍👧‍👧-9", "a-very-long-name-that-goes-on-and-on-and-on-12"];
    let mut status = fixtures::with_gpus();
    for (i, name) in names.into_iter().enumerate() {
        let mut replica = fixtures::one_down().replicas[i % 3].clone();
        replica.id = name.into();
        replica.state_age_s = f64::NAN;
        status.replicas.push(replica);
    }
    status.gpus.extend(status.gpus.clone());
    status.gpus[0].memory_total_bytes = 0;
    status.gpus[1].utilization_percent = Some(u32::MAX);
    status.events[0].text = "\u{1b}[2J wide 日本語".repeat(30);
    let mut state = fixtures::gpu_state();
    fixtures::feed(&mut state, Message::Snapshot(Box::new(status)));
    for mode in ["", "?", "R", "Sst", "/x"] {
        keys(&mut state, mode);
        for width in (1..200).step_by(7) {
            for height in [1, 2, 5, 9, 10, 11, 13, 17, 24, 60] {
                screen(&mut state, width, height, ANSI);
            }
        }
        state.mode = crate::tui::state::Mode::Normal;
    }
}
