//! However a request is run, its text is the same.

use super::toy_backend::{ToyBackend, ToyKind, expected_greedy};
use super::*;

fn streams(engine: &EngineHandle, prompts: &[Vec<u32>], max_tokens: usize) -> Vec<TokenStream> {
    prompts.iter().map(|prompt| engine.generate(request(prompt, greedy(max_tokens))).unwrap()).collect()
}

fn texts(streams: Vec<TokenStream>) -> Vec<Vec<u32>> {
    streams.into_iter().map(|stream| collect(stream).0).collect()
}

fn expected(prompts: &[Vec<u32>], max_tokens: usize) -> Vec<Vec<u32>> {
    prompts.iter().map(|prompt| expected_greedy(prompt, max_tokens)).collect()
}

#[test]
fn one_alone_is_what_the_device_says() {
    one_by_one_and_pipelined(|| {
        let engine = start(64, config());
        let (tokens, reason, usage) = collect(engine.generate(request(&[5, 6, 7], greedy(20))).unwrap());
        assert_eq!(tokens, expected_greedy(&[5, 6, 7], 20));
        assert_eq!(reason, FinishReason::Length);
        assert_eq!(usage, Usage { prompt_tokens: 3, cached_tokens: 0, completion_tokens: 20 });
        wait_until_empty(&engine);
    });
}

#[test]
fn a_batch_is_what_each_is_alone() {
    one_by_one_and_pipelined(|| {
        let prompts: Vec<_> = (0..24).map(|seed| prompt(seed, 1 + seed as usize * 3 % 37)).collect();
        let engine = start(256, config());
        assert_eq!(texts(streams(&engine, &prompts, 24)), expected(&prompts, 24));
        wait_until_empty(&engine);
    });
}

#[test]
fn chunks_change_nothing() {
    one_by_one_and_pipelined(|| {
        let prompts: Vec<_> = (0..12).map(|seed| prompt(seed, 50 + seed as usize * 7)).collect();
        for max_num_batched_tokens in [3, 7, 16] {
            let backend = ToyBackend::new(ToyKind::Generate, 512, BLOCK_SIZE);
            let seen = Arc::clone(&backend.seen);
            let limits = EngineConfig { max_num_batched_tokens, max_num_seqs: 3, ..config() };
            let engine = Engine::start(Box::new(backend), limits).unwrap();
            assert_eq!(texts(streams(&engine, &prompts, 6)), expected(&prompts, 6));
            let seen = seen.lock().unwrap().clone();
            assert!(seen.most_tokens <= max_num_batched_tokens && seen.most_sequences <= 3, "{seen:?}");
            assert!(seen.prompt_chunks > prompts.len(), "prompts were cut: {seen:?}");
        }
    });
}

#[test]
fn preemption_changes_nothing() {
    one_by_one_and_pipelined(|| {
        let prompts: Vec<_> = (0..12).map(|seed| prompt(seed, 10 + seed as usize)).collect();
        for enable_prefix_caching in [false, true] {
            let (engine, gate) = gated(20, EngineConfig { enable_prefix_caching, ..config() });
            let streams = streams(&engine, &prompts, 30);
            drop(gate);
            assert_eq!(texts(streams), expected(&prompts, 30));
            assert!(engine.load().preemptions_total > 0);
            wait_until_empty(&engine);
        }
    });
}

#[test]
fn a_cached_prefix_changes_nothing_and_is_used() {
    one_by_one_and_pipelined(|| {
        let engine = start(64, config());
        let system = prompt(1, 41);
        let asks: Vec<Vec<u32>> = (2..6).map(|seed| [system.clone(), prompt(seed, 5)].concat()).collect();
        for (at, ask) in asks.iter().enumerate() {
            let (tokens, _, usage) = collect(engine.generate(request(ask, greedy(8))).unwrap());
            assert_eq!(tokens, expected_greedy(ask, 8));
            assert_eq!(usage.cached_tokens, if at == 0 { 0 } else { 40 });
        }
        // The very same prompt: one token stays to be computed.
        let whole = prompt(9, 16);
        for cached_tokens in [0, 12] {
            let (tokens, _, usage) = collect(engine.generate(request(&whole, greedy(3))).unwrap());
            assert_eq!(tokens, expected_greedy(&whole, 3));
            assert_eq!(usage.cached_tokens, cached_tokens);
        }
        assert!(engine.load().prefix_cache_hit_rate.unwrap() > 0.5);
        wait_until_empty(&engine);
    });
}

#[test]
fn a_conversation_finds_its_own_answers_again() {
    one_by_one_and_pipelined(|| {
        let engine = start(64, config());
        let mut talk = prompt(3, 10);
        talk.extend(collect(engine.generate(request(&talk, greedy(30))).unwrap()).0);
        talk.extend(prompt(4, 3));
        let (tokens, _, usage) = collect(engine.generate(request(&talk, greedy(5))).unwrap());
        assert_eq!(tokens, expected_greedy(&talk, 5));
        // All but the last generated token were computed: 39 tokens, 9 blocks.
        assert_eq!(usage.cached_tokens, 36);
    });
}
