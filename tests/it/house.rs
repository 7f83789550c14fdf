//! The rules of the house, held by tests instead of by review: who may use whom, how large a file may grow, where
//! `unsafe` may stand.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

const FILE_LINES_MAX: usize = 500;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(directory: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join(directory)];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty(), "{directory} holds no Rust file: has it moved?");
    found
}

fn name(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

/// Every `file: word` where a file under `directory` contains one of `words` outside a comment.
fn mentions(directory: &str, words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for path in rust_files(directory) {
        let text = fs::read_to_string(&path).unwrap();
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
            found.extend(words.iter().filter(|w| line.contains(**w)).map(|w| format!("{}: {w}", name(&path))));
        }
    }
    found
}

#[test]
fn planner_is_pure() {
    let forbidden = ["std::fs", "std::net", "std::process", "std::thread", "std::env", "std::time", "tokio", "candle"];
    assert_eq!(mentions("planner/src", &forbidden), Vec::<String>::new());
}

#[test]
fn dependencies_point_one_way() {
    let of = |manifest: &str| {
        let text = fs::read_to_string(root().join(manifest)).unwrap();
        let parsed: toml::Table = text.parse().unwrap();
        let names = parsed["dependencies"].as_table().unwrap().keys().cloned().collect::<Vec<_>>();
        names.into_iter().filter(|n| n.starts_with("mserve")).collect::<Vec<_>>()
    };
    assert_eq!(of("planner/Cargo.toml"), Vec::<String>::new());
    assert_eq!(of("runtime/Cargo.toml"), ["mserve-planner"]);
    assert_eq!(of("Cargo.toml"), ["mserve-planner", "mserve-runtime"]);
}

#[test]
fn runtime_never_sees_the_terminal() {
    let forbidden = ["ratatui", "crossterm", "clap::", "indicatif", "comfy_table", "nvml_wrapper"];
    assert_eq!(mentions("runtime/src", &forbidden), Vec::<String>::new());
}

#[test]
fn the_engine_does_not_know_http_and_backends_do_not_know_the_engine_loop() {
    assert_eq!(
        mentions("runtime/src/engine", &["axum", "crate::server", "crate::tokenizer", "crate::cpu"]),
        Vec::<String>::new()
    );
    assert_eq!(
        mentions("runtime/src/cpu", &["axum", "crate::server", "crate::tokenizer", "tokio", "crate::cuda"]),
        Vec::<String>::new()
    );
    assert_eq!(
        mentions("runtime/src/cuda", &["axum", "crate::server", "crate::tokenizer", "tokio", "crate::cpu"]),
        Vec::<String>::new()
    );
}

#[test]
fn router_supervisor_and_tui_do_not_import_one_another() {
    let rooms = ["router", "supervisor", "tui"];
    for room in rooms {
        let others: Vec<String> = rooms
            .iter()
            .filter(|other| **other != room)
            .flat_map(|other| [format!("crate::{other}"), format!("super::{other}")])
            .collect();
        let others: Vec<&str> = others.iter().map(String::as_str).collect();
        assert_eq!(mentions(&format!("src/{room}"), &others), Vec::<String>::new());
    }
}

#[test]
fn unsafe_stays_in_its_corner() {
    let marks = ["{", "fn", "impl"].map(|what| ["unsafe", what].join(" "));
    let marks: Vec<&str> = marks.iter().map(String::as_str).chain(["allow(unsafe_code)"]).collect();
    let mut found: Vec<String> =
        ["src", "planner/src", "runtime/src"].iter().flat_map(|room| mentions(room, &marks)).collect();
    found.retain(|at| !at.starts_with("runtime/src/cuda/"));
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn files_stay_small() {
    let long: Vec<String> = ["src", "planner/src", "runtime/src", "tests", "planner/tests", "runtime/tests"]
        .iter()
        .flat_map(|directory| rust_files(directory))
        .filter_map(|path| {
            let lines = fs::read_to_string(&path).unwrap().lines().count();
            (lines > FILE_LINES_MAX).then(|| format!("{}: {lines} lines", name(&path)))
        })
        .collect();
    assert_eq!(long, Vec::<String>::new(), "one file, one room: split it");
}

#[test]
fn no_room_is_called_after_nothing() {
    let vague = ["utils", "util", "common", "helpers", "misc", "manager"];
    let found: Vec<String> = ["src", "planner/src", "runtime/src"]
        .iter()
        .flat_map(|directory| rust_files(directory))
        .filter(|path| vague.iter().any(|v| path.file_stem().is_some_and(|s| s == *v)))
        .map(|path| name(&path))
        .collect();
    assert_eq!(found, Vec::<String>::new());
}
