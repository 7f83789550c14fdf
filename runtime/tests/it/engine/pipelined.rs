//! What is particular to a device that takes the next step before the tokens of this one are known.

use super::toy_backend::{FAILS_STEP, Seen, expected_greedy};
use super::*;
use mserve_runtime::engine::{AdmissionError, RequestError, Shutdown, TokenEvent};
use std::sync::Mutex;

fn engine(backend: ToyBackend, config: EngineConfig) -> (EngineHandle, Arc<Mutex<Seen>>) {
    let seen = Arc::clone(&backend.seen);
    (Engine::start(Box::new(backend), config).unwrap(), seen)
}

fn device() -> ToyBackend {
    ToyBackend::new(ToyKind::Generate, 64, BLOCK_SIZE).taking(2)
}

#[test]
fn every_step_but_the_first_is_sent_ahead_and_none_past_the_last_token() {
    let (engine, seen) = engine(device(), config());
    assert_eq!(collect(engine.generate(request(&[1, 2], greedy(20))).unwrap()).0, expected_greedy(&[1, 2], 20));
    wait_until_empty(&engine);
    let seen = seen.lock().unwrap().clone();
    assert_eq!((seen.steps, seen.ahead), (20, 19));
}

#[test]
fn a_stop_is_seen_one_step_late_and_the_step_too_many_changes_nothing() {
    let (engine, seen) = engine(device(), config());
    let text = expected_greedy(&[1, 2], 10);
    let eos_token_ids = Arc::new([text[6]]);
    let at = text.iter().position(|token| *token == text[6]).unwrap();
    let ask = GenerateRequest { eos_token_ids, ..request(&[1, 2], greedy(100)) };
    let (tokens, reason, _) = collect(engine.generate(ask).unwrap());
    assert_eq!((tokens.as_slice(), reason), (&text[..at], FinishReason::Stop { stop_token_id: None }));
    wait_until_empty(&engine);
    assert_eq!(seen.lock().unwrap().steps, at + 2);
}

#[test]
fn penalties_wait_for_the_token_before() {
    let (engine, seen) = engine(device(), config());
    let params = SamplingParams { presence_penalty: 0.5, ..greedy(12) };
    assert_eq!(collect(engine.generate(request(&[1, 2], params)).unwrap()).0.len(), 12);
    assert_eq!(seen.lock().unwrap().ahead, 0);
}

/// Preempted and resumed on the way: the pool holds half of what they come to.
#[test]
fn penalties_run_ahead_on_a_device_that_counts() {
    let texts = |backend: ToyBackend| {
        let (engine, seen) = engine(backend, EngineConfig { enable_prefix_caching: false, ..config() });
        let ask = |seed: u32| {
            let params = SamplingParams { presence_penalty: 1.5, frequency_penalty: 0.5, ..greedy(40) };
            let plain = seed.is_multiple_of(3).then(|| greedy(40));
            engine.generate(request(&prompt(seed, 9), plain.unwrap_or(params))).unwrap()
        };
        let streams: Vec<_> = (0..6).map(ask).collect();
        let texts: Vec<Vec<u32>> = streams.into_iter().map(|stream| collect(stream).0).collect();
        let preemptions = engine.load().preemptions_total;
        (texts, preemptions, seen.lock().unwrap().clone())
    };
    let small = || ToyBackend::new(ToyKind::Generate, 160 / BLOCK_SIZE, BLOCK_SIZE);
    let (expected, _, _) = texts(small().taking(1));
    let (found, preemptions, seen) = texts(small().taking(2).counting());
    assert_eq!(found, expected);
    assert!(preemptions > 0 && seen.ahead > seen.steps / 2, "{preemptions} preemptions, {seen:?}");
}

/// One request fails while the steps of others go on around it, whether the device says so early or late.
#[test]
fn a_step_that_fails_between_others_hurts_only_those_in_it() {
    for backend in [device(), device().refusing_early()] {
        let (engine, _) = engine(backend, EngineConfig { max_num_seqs: 1, ..config() });
        for seed in 0..20 {
            let beside = engine.generate(request(&prompt(seed, 9), greedy(30))).unwrap();
            let mut bad = engine.generate(request(&[1, FAILS_STEP], greedy(5))).unwrap();
            let after = engine.generate(request(&prompt(100 + seed, 9), greedy(30))).unwrap();
            assert!(matches!(bad.blocking_next(), Some(TokenEvent::Failed(RequestError::Device(_)))));
            assert_eq!(collect(after).0, expected_greedy(&prompt(100 + seed, 9), 30));
            assert_eq!(collect(beside).0, expected_greedy(&prompt(seed, 9), 30));
        }
        wait_until_empty(&engine);
    }
}

#[tokio::test]
async fn shutdown_finishes_or_cuts_off_what_is_under_way() {
    for (drain_for, failed) in [(Duration::from_secs(60), 0), (Duration::ZERO, 3)] {
        let (gate, receiver) = channel();
        let (engine, seen) = engine(device().gated(receiver), config());
        let ask = |seed| engine.generate(request(&prompt(seed, 5), greedy(50))).unwrap();
        let streams: Vec<_> = (0..3).map(ask).collect();
        gate.send(()).unwrap();
        // The second step waits for a word, or is behind the one that does.
        while seen.lock().unwrap().ahead == 0 {
            tokio::task::yield_now().await;
        }
        let handle = engine.clone();
        let shutdown = tokio::spawn(async move { handle.shutdown(drain_for).await });
        while !matches!(engine.generate(request(&[1], greedy(1))), Err(AdmissionError::Stopped { .. })) {
            tokio::task::yield_now().await;
        }
        drop(gate);
        assert_eq!(shutdown.await.unwrap(), Shutdown::Done { failed });
        for mut stream in streams {
            let mut last = None;
            while let Some(event) = stream.next().await {
                last = Some(event);
            }
            assert_eq!(matches!(last, Some(TokenEvent::Finished { .. })), failed == 0, "{last:?}");
        }
    }
}
