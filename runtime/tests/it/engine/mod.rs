//! The engine over a toy device, through its public face only.
#![allow(clippy::unwrap_used)]

mod encode;
mod figures;
mod generate;
mod idle;
mod lifecycle;
mod pipelined;
mod sampling;
pub mod toy_backend;

use futures::FutureExt;
use mserve_runtime::engine::{
    Engine, EngineConfig, EngineHandle, FinishReason, GenerateRequest, SamplingParams, TokenEvent, TokenStream, Usage,
};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};
use toy_backend::{HARMLESS, ToyBackend, ToyKind, one_by_one_and_pipelined};

pub const BLOCK_SIZE: usize = 4;

pub fn config() -> EngineConfig {
    EngineConfig {
        model_name: "toy".to_owned(),
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_model_len: 512,
        max_num_queued_reqs: 64,
        enable_prefix_caching: true,
    }
}

pub fn start(num_blocks: usize, config: EngineConfig) -> EngineHandle {
    Engine::start(Box::new(ToyBackend::new(ToyKind::Generate, num_blocks, BLOCK_SIZE)), config).unwrap()
}

/// An engine whose every step waits for a word, or for the sender to go: what is asked before that is there together.
pub fn gated(num_blocks: usize, config: EngineConfig) -> (EngineHandle, Sender<()>) {
    let (gate, receiver) = channel();
    let backend = ToyBackend::new(ToyKind::Generate, num_blocks, BLOCK_SIZE).gated(receiver);
    (Engine::start(Box::new(backend), config).unwrap(), gate)
}

pub fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() }
}

pub fn request(prompt: &[u32], params: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        request_id: "test".to_owned(),
        prompt_token_ids: prompt.to_vec(),
        params: Arc::new(params),
        eos_token_ids: Arc::new([]),
        choice_index: 0,
    }
}

/// A prompt that no other seed shares a block with.
pub fn prompt(seed: u32, len: usize) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(u64::from(seed));
    (0..len).map(|_| random.u32(0..HARMLESS)).collect()
}

/// The tokens of a request that must end well.
pub fn collect(mut stream: TokenStream) -> (Vec<u32>, FinishReason, Usage) {
    let mut tokens = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            TokenEvent::Token(token) => tokens.push(token.token_id),
            TokenEvent::Finished { reason, usage } => {
                assert_eq!(stream.blocking_next(), None);
                return (tokens, reason, usage);
            }
            TokenEvent::Failed(error) => panic!("{error}"),
        }
    }
    panic!("the stream ended without a last event");
}

/// Cancelled requests are noticed at the next step, so wait for the engine to be empty.
pub fn wait_until_empty(engine: &EngineHandle) {
    let give_up = Instant::now() + Duration::from_secs(20);
    loop {
        let load = engine.load();
        if (load.running, load.waiting) == (0, 0) && load.kv_cache_usage == 0.0 {
            assert_eq!(engine.stopped().now_or_never(), None, "empty because it ended");
            return;
        }
        assert!(Instant::now() < give_up, "not empty: {load:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
