#![allow(clippy::unwrap_used)]

use super::*;
use crate::tui::fixtures::{self, NOW, utc};

#[test]
fn the_table() {
    insta::assert_snapshot!("table_one_down", table(&fixtures::one_down(), 120, utc()));
    insta::assert_snapshot!("table_gpus_80", table(&fixtures::with_gpus(), 80, utc()));
    insta::assert_snapshot!("table_empty", table(&fixtures::empty(), 120, utc()));
}

#[test]
fn the_lines() {
    insta::assert_snapshot!("lines_one_down", lines(&fixtures::one_down(), NOW, utc()));
    insta::assert_snapshot!("lines_starting", lines(&fixtures::starting(), NOW, utc()));
}

#[test]
fn figures_that_are_no_numbers_become_null_and_dash() {
    let mut status = fixtures::under_load();
    let load = status.replicas[0].load.as_mut().unwrap();
    load.generation_tokens_per_s = f64::NAN;
    load.kv_cache_usage = f64::INFINITY;
    let mut out = Vec::new();
    write_snapshot(&status, Plain::JsonOnce, utc(), &mut out).unwrap();
    let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
    assert!(value["replicas"][0]["load"]["generation_tokens_per_s"].is_null());
    assert!(lines(&status, NOW, utc()).contains("kv=- in=1.2k/s out=- "));
}

async fn written(statuses: Vec<Result<Status, String>>, plain: Plain) -> (String, anyhow::Result<()>) {
    let mut out = Vec::new();
    let source = fixtures::Scripted::new(statuses);
    let result = run_plain(&source, plain, Duration::from_millis(1), &mut out).await;
    (String::from_utf8(out).unwrap(), result)
}

fn failed() -> Result<Status, String> {
    Err("refused".to_owned())
}

#[tokio::test]
async fn a_source_that_never_answered_is_an_error_at_once() {
    let (out, result) = written(vec![failed(), Ok(fixtures::empty())], Plain::Lines).await;
    assert_eq!((out.as_str(), result.unwrap_err().to_string().as_str()), ("", "refused"));
}

#[tokio::test]
async fn a_few_missed_polls_are_forgiven_and_many_are_the_end() {
    let mut script = vec![Ok(fixtures::empty())];
    script.extend((1..POLLS_MISSED).map(|_| failed()));
    script.push(Ok(fixtures::empty()));
    let (out, result) = written(script, Plain::Lines).await;
    assert_eq!(out.lines().count(), 2);
    assert!(result.is_ok());
    let mut script = vec![Ok(fixtures::empty())];
    script.extend((0..POLLS_MISSED).map(|_| failed()));
    let (_, result) = written(script, Plain::Json).await;
    assert_eq!(format!("{:#}", result.unwrap_err()), "the launcher answers no more: refused");
}

#[tokio::test]
async fn once_is_once() {
    let script = || vec![Ok(fixtures::empty()), Ok(fixtures::empty())];
    let (out, _) = written(script(), Plain::JsonOnce).await;
    assert_eq!(out.lines().count(), 1);
    let (out, _) = written(script(), Plain::Table { width: 100 }).await;
    assert_eq!(out.matches("http://127.0.0.1:8000").count(), 1);
}
