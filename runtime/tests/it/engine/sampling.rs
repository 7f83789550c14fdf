//! When a request ends, and that its text depends on its own seed alone.

use super::toy_backend::expected_greedy;
use super::*;
use mserve_runtime::engine::GenerateRequest;

fn stops(stop_token_id: Option<u32>) -> FinishReason {
    FinishReason::Stop { stop_token_id }
}

/// A prompt whose greedy text has no token twice among its first ten.
fn prompt_without_repeats() -> (Vec<u32>, Vec<u32>) {
    (0..)
        .map(|seed| prompt(seed, 6))
        .find_map(|prompt| {
            let text = expected_greedy(&prompt, 10);
            (0..10).all(|at| !text[..at].contains(&text[at])).then_some((prompt, text))
        })
        .unwrap()
}

fn with_eos(prompt: &[u32], eos: u32, params: SamplingParams) -> GenerateRequest {
    GenerateRequest { eos_token_ids: Arc::new([eos]), ..request(prompt, params) }
}

#[test]
fn end_of_sequence_ends_and_is_not_sent() {
    one_by_one_and_pipelined(|| {
        let engine = start(64, config());
        let (prompt, text) = prompt_without_repeats();
        let (tokens, reason, usage) = collect(engine.generate(with_eos(&prompt, text[4], greedy(10))).unwrap());
        assert_eq!((tokens.as_slice(), reason, usage.completion_tokens), (&text[..4], stops(None), 5));

        let ignoring = SamplingParams { ignore_eos: true, ..greedy(10) };
        let (tokens, reason, _) = collect(engine.generate(with_eos(&prompt, text[4], ignoring)).unwrap());
        assert_eq!((tokens, reason), (text.clone(), FinishReason::Length));

        let stopping = SamplingParams { stop_token_ids: vec![text[3], text[7]], ignore_eos: true, ..greedy(10) };
        let (tokens, reason, _) = collect(engine.generate(with_eos(&prompt, text[0], stopping)).unwrap());
        assert_eq!((tokens.as_slice(), reason), (&text[..3], stops(Some(text[3]))));
    });
}

#[test]
fn nothing_ends_before_min_tokens() {
    one_by_one_and_pipelined(|| {
        let engine = start(64, config());
        let (prompt, text) = prompt_without_repeats();
        // Ends right at the start, were it allowed to.
        let params = SamplingParams { min_tokens: 3, stop_token_ids: vec![text[1]], ..greedy(10) };
        let (tokens, _, _) = collect(engine.generate(with_eos(&prompt, text[0], params)).unwrap());
        assert!(tokens.len() >= 3 && tokens[0] != text[0], "{tokens:?}");
        assert!(!tokens[..3].contains(&text[0]) && !tokens[..3].contains(&text[1]));
        // The token after those may be the end.
        let params = SamplingParams { min_tokens: 3, ..greedy(10) };
        let (tokens, reason, _) = collect(engine.generate(with_eos(&prompt, text[3], params)).unwrap());
        assert_eq!((tokens.as_slice(), reason), (&text[..3], stops(None)));
    });
}

#[test]
fn the_context_and_the_pool_end_a_text() {
    one_by_one_and_pipelined(|| {
        let engine = start(64, EngineConfig { max_model_len: 30, ..config() });
        let (tokens, reason, _) = collect(engine.generate(request(&prompt(1, 20), greedy(100))).unwrap());
        assert_eq!((tokens.len(), reason), (10, FinishReason::Length));

        let engine = start(4, config());
        let (tokens, reason, _) = collect(engine.generate(request(&prompt(1, 5), greedy(100))).unwrap());
        assert_eq!((tokens.len(), reason), (11, FinishReason::Length));

        let (tokens, reason, usage) = collect(engine.generate(request(&prompt(1, 5), greedy(0))).unwrap());
        assert_eq!((tokens.len(), reason, usage.prompt_tokens), (0, FinishReason::Length, 5));
    });
}

fn sampled(seed: Option<u64>) -> SamplingParams {
    SamplingParams { seed, max_tokens: 20, top_p: 0.95, presence_penalty: 0.3, ..SamplingParams::default() }
}

fn choice(prompt: &[u32], seed: Option<u64>, choice_index: u32) -> GenerateRequest {
    GenerateRequest { choice_index, ..request(prompt, sampled(seed)) }
}

#[test]
fn a_seed_gives_the_same_text_in_any_company() {
    one_by_one_and_pipelined(|| {
        let prompt = prompt(1, 9);
        let quiet = start(64, config());
        let alone = collect(quiet.generate(choice(&prompt, Some(7), 0)).unwrap()).0;

        // Chunked, beside others, preempted, in another process.
        let (busy, gate) = gated(24, EngineConfig { max_num_batched_tokens: 8, ..config() });
        let others: Vec<_> =
            (2..10).map(|seed| busy.generate(request(&super::prompt(seed, 25), greedy(30))).unwrap()).collect();
        let beside = busy.generate(choice(&prompt, Some(7), 0)).unwrap();
        drop(gate);
        let beside = collect(beside).0;
        others.into_iter().for_each(|other| drop(collect(other)));
        assert_eq!(alone, beside);
        assert!(busy.load().preemptions_total > 0);
        assert_ne!(alone, collect(quiet.generate(choice(&prompt, Some(8), 0)).unwrap()).0);
        assert_ne!(alone, expected_greedy(&prompt, 20));
    });
}

#[test]
fn choices_differ_and_share_their_prompt() {
    one_by_one_and_pipelined(|| {
        let engine = start(64, config());
        let prompt = prompt(1, 17);
        for seed in [Some(7), None] {
            let streams: Vec<_> = (0..4).map(|index| engine.generate(choice(&prompt, seed, index)).unwrap()).collect();
            let ends: Vec<_> = streams.into_iter().map(collect).collect();
            for (at, (text, _, _)) in ends.iter().enumerate() {
                assert!(ends[..at].iter().all(|(other, _, _)| other != text));
            }
            assert!(ends[1..].iter().all(|(_, _, usage)| usage.cached_tokens == 16), "computed once: {ends:?}");
        }
    });
}

#[test]
fn penalties_hold_after_preemption() {
    one_by_one_and_pipelined(|| {
        let prompts: Vec<_> = (0..10).map(|seed| prompt(seed, 10)).collect();
        let params =
            SamplingParams { repetition_penalty: 1.5, frequency_penalty: 1.0, logprobs: Some(2), ..greedy(30) };
        let run = |num_blocks| {
            let (engine, gate) = gated(num_blocks, config());
            let streams: Vec<_> =
                prompts.iter().map(|prompt| engine.generate(request(prompt, params.clone())).unwrap()).collect();
            drop(gate);
            let texts: Vec<_> = streams.into_iter().map(|stream| collect(stream).0).collect();
            (texts, engine.load().preemptions_total)
        };
        let (calm, none) = run(200);
        let (pressed, some) = run(16);
        assert_eq!(calm, pressed);
        assert!(none == 0 && some > 0);
        assert_ne!(calm[0], expected_greedy(&prompts[0], 30));
    });
}
