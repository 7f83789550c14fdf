//! Outputs equal to Hugging Face's, on tiny random models of every family that runs. `make_goldens.py` made them.
#![allow(clippy::unwrap_used)]

use super::steps::{Chunk, golden, golden_dir, load, max_abs_error, rows, spec, whole};
use mserve_planner::model::{Pooling, Task};
use serde::de::DeserializeOwned;

/// The goldens are f32 with six decimals; both sides round differently.
const TOLERANCE: f32 = 1e-4;

fn field<T: DeserializeOwned>(golden: &serde_json::Value, name: &str) -> T {
    T::deserialize(&golden[name]).unwrap()
}

fn decoder(name: &str) {
    let golden = golden(name);
    let ids: Vec<Vec<u32>> = field(&golden, "input_ids");
    let mut backend = load(name, &spec(&golden_dir(name)));
    let chunks: Vec<_> = ids.iter().enumerate().map(|(i, ids)| whole(i, ids)).collect();
    let ours = rows(&mut backend, &chunks);
    let last: Vec<Vec<f32>> = field(&golden, "logits_last");
    for (i, (ours, theirs)) in ours.iter().zip(&last).enumerate() {
        let error = max_abs_error(ours, theirs);
        assert!(error < TOLERANCE, "{name}, sequence {i}: {error}");
    }
    // Every position of the first sequence, decoded token by token through the cache.
    let all: Vec<Vec<f32>> = field(&golden, "logits_all");
    for (start, theirs) in all.iter().enumerate() {
        let chunk = Chunk { sequence: 5, tokens: &ids[0], start, end: start + 1 };
        let error = max_abs_error(&rows(&mut backend, &[chunk])[0], theirs);
        assert!(error < TOLERANCE, "{name}, position {start}: {error}");
    }
}

#[test]
fn llama() {
    decoder("llama");
}

#[test]
fn llama_with_linear_rope_scaling_and_biases() {
    decoder("llama-linear");
}

#[test]
fn llama_with_yarn() {
    decoder("llama-yarn");
}

#[test]
fn mistral_with_a_sliding_window() {
    decoder("mistral");
}

#[test]
fn qwen2() {
    decoder("qwen2");
}

#[test]
fn qwen3() {
    decoder("qwen3");
}

fn encoder(name: &str) {
    let golden = golden(name);
    let ids: Vec<Vec<u32>> = field(&golden, "input_ids");
    for (field_name, pooling) in [("mean", Pooling::Mean), ("cls", Pooling::Cls)] {
        let spec = spec(&golden_dir(name)).with_task(Task::Embed { pooling });
        let mut backend = load(name, &spec);
        let chunks: Vec<_> = ids.iter().enumerate().map(|(i, ids)| whole(i, ids)).collect();
        let theirs: Vec<Vec<f32>> = field(&golden, field_name);
        for (i, (ours, theirs)) in rows(&mut backend, &chunks).iter().zip(&theirs).enumerate() {
            let norm = theirs.iter().map(|v| v * v).sum::<f32>().sqrt();
            let theirs: Vec<f32> = theirs.iter().map(|v| v / norm).collect();
            let error = max_abs_error(ours, &theirs);
            assert!(error < TOLERANCE, "{name}, {field_name} of text {i}: {error}");
        }
    }
}

#[test]
fn bert() {
    encoder("bert");
}

#[test]
fn xlm_roberta() {
    encoder("xlm-roberta");
}

fn classifier(name: &str) {
    let golden = golden(name);
    let ids: Vec<Vec<u32>> = field(&golden, "input_ids");
    let mut backend = load(name, &spec(&golden_dir(name)));
    let chunks: Vec<_> = ids.iter().enumerate().map(|(i, ids)| whole(i, ids)).collect();
    let theirs: Vec<Vec<f32>> = field(&golden, "scores");
    for (i, (ours, theirs)) in rows(&mut backend, &chunks).iter().zip(&theirs).enumerate() {
        let error = max_abs_error(ours, theirs);
        assert!(error < TOLERANCE, "{name}, text {i}: {error}");
    }
}

#[test]
fn bert_classifier() {
    classifier("bert-classifier");
}

#[test]
fn xlm_roberta_reranker() {
    classifier("xlm-roberta-reranker");
}
