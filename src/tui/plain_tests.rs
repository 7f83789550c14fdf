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
