//! The bundled demo model writes the continuation that Hugging Face's implementation writes.
#![allow(clippy::unwrap_used)]

use super::steps::{Chunk, spec};
use mserve_runtime::cpu::{CpuBackend, CpuOptions};
use mserve_runtime::engine::{Backend, RowOutput, RowSampling, SamplingParams};
use mserve_runtime::weights::Checkpoint;
use serde::Deserialize;
use std::path::Path;
use std::sync::Arc;

/// Tokens of the prompt in the golden's `token_ids`.
const PROMPT_TOKENS: usize = 6;

#[test]
fn greedy_continuation_is_the_golden_one() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/demo-model");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    let expected: Vec<u32> = Deserialize::deserialize(&golden["token_ids"]).unwrap();
    let options = CpuOptions { threads: 2, kv_cache_bytes: 8 << 20, ..Default::default() };
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mut heard = Vec::new();
    let mut backend =
        CpuBackend::load(&spec(&dir), &checkpoint, &options, &mut |done, total| heard.push((done, total))).unwrap();
    assert_eq!(heard.first().map(|h| h.0), Some(0));
    assert!(heard.last().is_some_and(|(done, total)| done == total), "progress ends at its total: {heard:?}");

    let mut tokens = expected[..PROMPT_TOKENS].to_vec();
    let mut start = 0;
    while tokens.len() < expected.len() {
        let chunk = Chunk { sequence: 0, tokens: &tokens, start, end: tokens.len() };
        let mut batch = super::steps::batch(&[chunk], options.block_size);
        batch.sequences[0].sampling = Some(greedy());
        start = tokens.len();
        match backend.step(&batch).unwrap().as_slice() {
            [RowOutput::Token(token)] => tokens.push(token.token_id),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(tokens, expected);
}

fn greedy() -> RowSampling {
    RowSampling {
        params: Arc::new(SamplingParams { temperature: 0.0, ..Default::default() }),
        seed: 0,
        step: 0,
        prompt_token_ids: Arc::new([]),
        output_token_ids: Vec::new(),
        forbidden_token_ids: Vec::new(),
    }
}
