#![allow(clippy::unwrap_used)]
use super::state::Explorer;
use super::{Beside, view};
use crate::tui::{Charset, Palette, Theme};
use crossterm::event::KeyCode;
use mserve_planner::gpus::find;
use mserve_planner::memory::{EngineLimits, KvCacheDtype, SlidingLayers, WeightSource};
use mserve_planner::model::{ModelSpec, parse_config};
use mserve_planner::plan::{Accounting, Card, Demand, PlanRequest};
use mserve_planner::split::{SmallModel, Workload};
use ratatui::Terminal;
use ratatui::backend::TestBackend;

fn spec(name: &str) -> ModelSpec {
    let path = format!("{}/planner/tests/fixtures/configs/{name}.json", env!("CARGO_MANIFEST_DIR"));
    parse_config(&std::fs::read(path).unwrap()).unwrap()
}

fn request(spec: &ModelSpec) -> PlanRequest<'_> {
    PlanRequest {
        model_name: "vicuna-13b",
        spec,
        weights: WeightSource::Program,
        card: Card::from(find("a100-40g").unwrap()),
        gpus: 8,
        tensor_parallel_size: None,
        limits: EngineLimits::for_model(spec).with_max_model_len(spec, 2048),
        demand: Demand::of(1536, 512),
        accounting: Accounting::default(),
        kv_cache_dtype: KvCacheDtype::Auto,
        sliding: SlidingLayers::KeepWindow,
    }
}

fn beside() -> Beside {
    let name = "BAAI__bge-large-en-v1.5";
    let model = SmallModel::new(name, spec(name), WeightSource::Program).unwrap();
    Beside { models: vec![model], workload: Workload::DocQa, tokens: 512 }
}

fn screen(explorer: &Explorer<'_>, width: u16, height: u16) -> String {
    let theme = Theme::new(Palette::Mono, Charset::Ascii);
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| view::draw(explorer, theme, frame)).unwrap();
    terminal.backend().to_string()
}

fn press(explorer: &mut Explorer<'_>, keys: &[KeyCode]) {
    keys.iter().for_each(|&key| explorer.key(key));
}

const DOWN: KeyCode = KeyCode::Down;
const RIGHT: KeyCode = KeyCode::Right;
const LEFT: KeyCode = KeyCode::Left;

#[test]
fn figures_move_with_the_keys() {
    let spec = spec("lmsys__vicuna-13b-v1.5-16k");
    let mut explorer = Explorer::new(request(&spec), Some(beside()));
    insta::assert_snapshot!("explorer_at_the_start", screen(&explorer, 110, 30));
    // KV in fp8, twice the prompt.
    press(&mut explorer, &[DOWN, DOWN, DOWN, RIGHT, RIGHT, RIGHT, DOWN, RIGHT, RIGHT]);
    insta::assert_snapshot!("explorer_changed", screen(&explorer, 110, 30));
    press(&mut explorer, &[KeyCode::Char('r')]);
    assert!(explorer.fields.iter().all(|&field| !explorer.is_changed(field)));
}

#[test]
fn a_narrow_screen_shows_whole_figures() {
    let spec = spec("lmsys__vicuna-13b-v1.5-16k");
    let explorer = Explorer::new(request(&spec), Some(beside()));
    insta::assert_snapshot!("explorer_on_80_columns", screen(&explorer, 80, 24));
}

#[test]
fn every_key_anywhere_leaves_a_screen() {
    let spec = spec("lmsys__vicuna-13b-v1.5-16k");
    let mut explorer = Explorer::new(request(&spec), Some(beside()));
    for _ in 0..explorer.fields.len() {
        for key in [RIGHT, LEFT] {
            for _ in 0..6 {
                press(&mut explorer, &[key]);
            }
            for (width, height) in [(110, 30), (80, 24), (40, 10), (1, 1)] {
                screen(&explorer, width, height);
            }
        }
        press(&mut explorer, &[KeyCode::Char('r'), DOWN]);
    }
}

#[test]
fn what_does_not_fit_says_what_would() {
    let spec = spec("meta-llama__Meta-Llama-3.1-70B");
    let mut explorer = Explorer::new(PlanRequest { gpus: 1, ..request(&spec) }, None);
    let text = screen(&explorer, 110, 30);
    assert!(text.contains("does not fit") && text.contains("would fit with --gpus"), "{text}");
    // Sixteen cards.
    press(&mut explorer, &[DOWN]);
    (0..15).for_each(|_| press(&mut explorer, &[RIGHT]));
    assert!(explorer.plan.is_ok());
}
