//! Snapshots and states for the tests of this module.
#![allow(clippy::unwrap_used)]

use super::message::{Effect, Message};
use super::state::State;
use super::update::update;
use crate::status::{
    Event, GpuStatus, HostStatus, LogLine, ModelKind, ReplicaState, ReplicaStatus, RouterStatus, SCHEMA, Status,
};
use chrono::{FixedOffset, Offset, Utc};
use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use mserve_runtime::engine::EngineLoad;
use ratatui::layout::Size;

/// 2026-11-20 14:02:11 UTC
pub const NOW: f64 = 1_795_183_331.0;

pub fn utc() -> FixedOffset {
    Utc.fix()
}

pub fn load(generation_tokens_per_s: f64) -> EngineLoad {
    EngineLoad {
        running: 31,
        waiting: 0,
        kv_cache_usage: 0.78,
        kv_blocks_total: 15_800,
        kv_block_size: 16,
        kv_cache_bytes: 62 << 30,
        max_model_len: 32_768,
        prompt_tokens_per_s: 1_240.0,
        generation_tokens_per_s,
        prefix_cache_hit_rate: Some(0.38),
        ttft_p50_ms: Some(190.0),
        ttft_p95_ms: Some(280.0),
        itl_p50_ms: Some(18.0),
        itl_p95_ms: Some(23.4),
        ..EngineLoad::default()
    }
}

/// Ready, and nothing known of its engine.
pub fn replica(id: &str) -> ReplicaStatus {
    ReplicaStatus {
        id: id.to_owned(),
        model: "demo".into(),
        kind: ModelKind::Chat,
        devices: vec!["cpu".into()],
        pid: Some(4_411),
        port: Some(41_801),
        state: ReplicaState::Ready,
        state_age_s: 8_040.0,
        restarts: 0,
        last_exit: None,
        in_flight: 0,
        load: None,
    }
}

pub fn empty() -> Status {
    Status {
        schema: SCHEMA,
        version: "0.1.0".into(),
        pid: 4_400,
        endpoint: "http://127.0.0.1:8000".into(),
        uptime_s: 8_040.0,
        replicas: Vec::new(),
        router: RouterStatus::default(),
        gpus: Vec::new(),
        host: HostStatus {
            cpu_percent: Some(41.6),
            cpus: 8,
            memory_total_bytes: 32 << 30,
            memory_available_bytes: 20 << 30,
        },
        events: Vec::new(),
    }
}

fn three() -> Vec<ReplicaStatus> {
    let embed = ReplicaStatus { model: "demo-embed".into(), kind: ModelKind::Embedding, ..replica("demo-embed-0") };
    vec![replica("demo-0"), replica("demo-1"), embed]
}

fn event(ago_s: f64, replica: Option<&str>, text: &str) -> Event {
    Event { at_unix_s: NOW - ago_s, replica: replica.map(Into::into), text: text.into() }
}

pub fn starting() -> Status {
    let mut status = Status { replicas: three(), uptime_s: 4.0, ..empty() };
    for replica in &mut status.replicas {
        replica.state_age_s = 3.2;
        replica.port = None;
    }
    let phase = |phase: &str, done, total| ReplicaState::Starting { phase: phase.into(), done, total };
    status.replicas[0].state = phase("warmup", 0, 0);
    status.replicas[1].state = phase("weights", 360, 1_000);
    status.replicas[2].state = phase("starting", 0, 0);
    status.events = vec![event(4.0, None, "launch: 3 replicas of 2 models on the CPU")];
    status
}

pub fn under_load() -> Status {
    let mut status = Status { replicas: three(), ..empty() };
    status.replicas[0].load = Some(load(1_640.0));
    status.replicas[0].in_flight = 31;
    let busy = EngineLoad { running: 44, waiting: 3, kv_cache_usage: 0.912, ttft_p95_ms: Some(490.0), ..load(1_910.0) };
    status.replicas[1].load = Some(busy);
    status.replicas[1].in_flight = 47;
    let encoder = EngineLoad {
        running: 8,
        prompt_tokens_per_s: 22_400.0,
        ttft_p50_ms: Some(3.1),
        ttft_p95_ms: Some(7.9),
        max_model_len: 512,
        ..EngineLoad::default()
    };
    status.replicas[2].load = Some(encoder);
    status.router = RouterStatus { requests_total: 12_345, errors_total: 3, retries_total: 2, in_flight: 86 };
    status.events = vec![
        event(8_038.0, Some("demo-0"), "ready after 1.9 s"),
        event(8_037.5, Some("demo-1"), "ready after 2.1 s"),
        event(8_037.0, Some("demo-embed-0"), "ready after 0.8 s"),
    ];
    status
}

pub fn one_down() -> Status {
    let mut status = under_load();
    let died = "signal 9 (killed), maybe by the kernel for want of memory";
    status.replicas[1] = ReplicaStatus {
        state: ReplicaState::Backoff { restart_in_s: 17.2 },
        state_age_s: 2.0,
        restarts: 2,
        pid: None,
        port: None,
        load: None,
        last_exit: Some(died.into()),
        ..replica("demo-1")
    };
    status.replicas[2] = ReplicaStatus {
        state: ReplicaState::Failed { why: "tokenizer has 10 entries, the vocabulary 12".into() },
        pid: None,
        port: None,
        load: None,
        ..status.replicas[2].clone()
    };
    status.events.push(event(2.0, Some("demo-1"), &format!("ended: {died}; restart 3 of 5 in 18 s")));
    status
}

fn gpu(index: u32) -> GpuStatus {
    GpuStatus {
        index,
        uuid: format!("GPU-{index}{index}{index}{index}"),
        name: "NVIDIA H200".into(),
        memory_total_bytes: 140 << 30,
        memory_used_bytes: if index == 3 { 0 } else { (120 + u64::from(index)) << 30 },
        utilization_percent: (index != 2).then_some(if index == 3 { 0 } else { 90 + index }),
        temperature_c: Some(58 + 8 * index),
        power_w: (index != 2).then_some(612.4),
    }
}

pub fn with_gpus() -> Status {
    let mut status = under_load();
    status.gpus = (0..4).map(gpu).collect();
    status.replicas[0].devices = vec!["GPU-0000".into()];
    status.replicas[1].devices = vec!["GPU-1111".into(), "GPU-2222".into()];
    status.replicas[2].devices = vec!["GPU-0000".into()];
    status
}

pub fn log_lines(count: u64) -> Vec<LogLine> {
    let line = |seq: u64| LogLine {
        seq,
        at_unix_ms: (NOW as u64 - 60 + seq) * 1_000,
        replica: if seq.is_multiple_of(3) { "demo-1".into() } else { "demo-0".into() },
        text: format!("INFO request {seq} finished: stop, {} tokens", 100 + seq),
    };
    (0..count).map(line).collect()
}

/// A state at [`NOW`] that has seen this snapshot.
pub fn state(status: Option<Status>) -> State {
    let mut state = State::new(false, 1.0, utc());
    state.now_unix_s = NOW;
    if let Some(status) = status {
        feed(&mut state, Message::Snapshot(Box::new(status)));
    }
    state
}

/// Two minutes of load with a gap in it, then the snapshot.
fn lived_in(last: Status) -> State {
    let mut state = state(None);
    for i in 0..90_u32 {
        let mut status = under_load();
        let wave = f64::from(i % 30) / 30.0;
        status.replicas[0].load = Some(load(400.0 + 1_500.0 * wave));
        status.router.requests_total = 12_345 - u64::from(90 - i) * 41;
        let at = NOW - f64::from(90 - i);
        if (40..44).contains(&i) {
            update(&mut state, at, Message::Lost("no answer".into()));
        } else {
            update(&mut state, at, Message::Snapshot(Box::new(status)));
        }
    }
    feed(&mut state, Message::Snapshot(Box::new(last)));
    feed(&mut state, Message::Logs(log_lines(40)));
    state
}

pub fn loaded_state() -> State {
    lived_in(under_load())
}

pub fn down_state() -> State {
    lived_in(one_down())
}

pub fn gpu_state() -> State {
    lived_in(with_gpus())
}

pub fn resize(state: &mut State, width: u16, height: u16) {
    feed(state, Message::Resize(Size::new(width, height)));
}

pub fn feed(state: &mut State, message: Message) -> Option<Effect> {
    update(state, NOW, message)
}

/// Type the text, key by key.
pub fn keys(state: &mut State, text: &str) -> Vec<Effect> {
    text.chars().filter_map(|c| press(state, KeyCode::Char(c))).collect()
}

pub fn press(state: &mut State, code: KeyCode) -> Option<Effect> {
    feed(state, Message::Key(KeyEvent::new(code, KeyModifiers::NONE)))
}
