//! A worker that does what a test tells it: this test binary, started again with `MOCK_WORKER` set.
//!
//! The test harness of the child prints a few lines of its own; the supervisor takes them for log text.
#![allow(clippy::unwrap_used)]

use axum::http::StatusCode;
use axum::{Router, routing::get};
use mserve::status::ModelKind;
use mserve::supervisor::{ReplicaSpec, WorkerCommand};
use mserve_runtime::engine::EngineLoad;
use mserve_runtime::worker::{FailureKind, ReadyInfo, WorkerEvent};
use std::io::{Read, Write};
use std::time::Duration;

/// A replica whose worker plays `script`: words separated by spaces, see [`play`].
pub fn spec(id: &str, script: &str) -> ReplicaSpec {
    ReplicaSpec {
        id: id.into(),
        model: "mock".into(),
        kind: ModelKind::Chat,
        devices: vec!["cpu".into()],
        command: WorkerCommand {
            program: std::env::current_exe().unwrap(),
            args: ["mock_worker::worker_process", "--exact", "--nocapture"].map(Into::into).to_vec(),
            env: vec![("MOCK_WORKER".into(), script.into()), ("MSERVE_WORKER_TOKEN".into(), "secret".into())],
            env_remove: Vec::new(),
        },
        token: "secret".into(),
    }
}

#[test]
fn worker_process() {
    let Ok(script) = std::env::var("MOCK_WORKER") else { return };
    std::thread::spawn(|| {
        // The death pipe.
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for word in script.split_whitespace() {
            play(word).await;
        }
        std::future::pending::<()>().await;
    });
}

async fn play(word: &str) {
    match word.split_once(':').unwrap_or((word, "")) {
        ("serve", behaviour) => {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            emit(&WorkerEvent::Listening { port });
            let behaviour = behaviour.to_owned();
            let load = get(move || answer_load(behaviour.clone()));
            tokio::spawn(async move { axum::serve(listener, Router::new().route("/load", load)).await });
        }
        ("phase", name) => emit(&WorkerEvent::Phase { phase: name.into(), done: 1, total: 2 }),
        ("ready", _) => emit(&WorkerEvent::Ready(ReadyInfo {
            device: "mock".into(),
            load_ms: 5,
            weight_bytes: 1,
            kv_cache_bytes: 1,
            num_blocks: 1,
            block_size: 16,
            max_model_len: 64,
            max_num_seqs: 2,
        })),
        ("fail", message) => {
            emit(&WorkerEvent::Failed { kind: FailureKind::Config, message: message.into() });
            std::process::exit(2);
        }
        ("log", text) => eprintln!("{text}"),
        ("garbage", _) => emit_line(&"{\"event\":".repeat(100_000)),
        ("exit", code) => std::process::exit(code.parse().unwrap()),
        ("deaf", _) => ignore_sigterm().await,
        (unknown, _) => panic!("the mock worker does not know {unknown:?}"),
    }
}

async fn answer_load(behaviour: String) -> Result<axum::Json<EngineLoad>, StatusCode> {
    let stalled_ms = if behaviour == "stalled" { 3_600_000 } else { 0 };
    match behaviour.as_str() {
        "silent" => std::future::pending().await,
        "failing" => Err(StatusCode::INTERNAL_SERVER_ERROR),
        _ => Ok(axum::Json(EngineLoad { stalled_ms, ..EngineLoad::default() })),
    }
}

async fn ignore_sigterm() {
    let mut terminations = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
    tokio::spawn(async move { while terminations.recv().await.is_some() {} });
    // The handler must be in place before the next word.
    tokio::time::sleep(Duration::ZERO).await;
}

fn emit(event: &WorkerEvent) {
    emit_line(&serde_json::to_string(event).unwrap());
}

fn emit_line(line: &str) {
    let mut out = std::io::stdout().lock();
    // The harness may have left half a line.
    writeln!(out, "\n{line}").unwrap();
    out.flush().unwrap();
}
