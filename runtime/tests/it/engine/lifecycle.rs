//! What ends a request besides its last token: clients that leave, devices that fail, engines that stop.

use super::toy_backend::{FAILS_STEP, LOSES_DEVICE, PANICS, ToyBackend, ToyKind, expected_greedy};
use super::*;
use futures::executor::block_on;
use mserve_runtime::engine::{AdmissionError, EngineStartError, RequestError, Shutdown};
use std::sync::mpsc::channel;

fn last_event(mut stream: TokenStream) -> TokenEvent {
    let mut last = None;
    while let Some(event) = stream.blocking_next() {
        last = Some(event);
    }
    last.unwrap()
}

#[test]
fn a_dropped_stream_frees_its_blocks_and_hurts_nobody() {
    one_by_one_and_pipelined(|| {
        let (engine, gate) = gated(64, config());
        let stays = prompt(1, 20);
        let stream = engine.generate(request(&stays, greedy(40))).unwrap();
        let mut leaves = engine.generate(request(&prompt(2, 20), greedy(150))).unwrap();
        gate.send(()).unwrap();
        gate.send(()).unwrap();
        assert!(matches!(leaves.blocking_next(), Some(TokenEvent::Token(_))));
        drop(leaves);
        drop(gate);
        assert_eq!(collect(stream).0, expected_greedy(&stays, 40));
        wait_until_empty(&engine);
        assert!(engine.metrics().contains("finished_reason=\"abort\",model_name=\"toy\"} 1"));
    });
}

#[test]
fn a_prompt_is_dropped_between_its_chunks() {
    let (gate, receiver) = channel();
    let backend = ToyBackend::new(ToyKind::Generate, 64, BLOCK_SIZE).gated(receiver);
    let seen = Arc::clone(&backend.seen);
    let limits = EngineConfig { max_num_batched_tokens: 16, ..config() };
    let engine = Engine::start(Box::new(backend), limits).unwrap();
    let stream = engine.generate(request(&prompt(1, 100), greedy(5))).unwrap();
    gate.send(()).unwrap();
    gate.send(()).unwrap();
    while engine.load().steps_total < 2 {
        std::thread::yield_now();
    }
    assert!(engine.load().kv_cache_usage > 0.0);
    drop(stream);
    // The third chunk may be on its way already.
    drop(gate);
    wait_until_empty(&engine);
    assert!(seen.lock().unwrap().steps <= 3, "of seven chunks");
}

#[test]
fn leaving_with_a_complete_text_is_a_stop() {
    one_by_one_and_pipelined(|| {
        let (engine, gate) = gated(64, config());
        let mut stream = engine.generate(request(&prompt(1, 5), greedy(100))).unwrap();
        gate.send(()).unwrap();
        stream.blocking_next();
        stream.stop();
        drop(gate);
        wait_until_empty(&engine);
        assert!(engine.metrics().contains("finished_reason=\"stop\",model_name=\"toy\"} 1"));
    });
}

#[test]
fn a_slow_reader_stops_nobody() {
    one_by_one_and_pipelined(|| {
        let engine = start(64, config());
        let unread = engine.generate(request(&prompt(1, 5), greedy(60))).unwrap();
        let read = engine.generate(request(&prompt(2, 5), greedy(60))).unwrap();
        assert_eq!(collect(read).0.len(), 60);
        wait_until_empty(&engine);
        assert_eq!(collect(unread).0, expected_greedy(&prompt(1, 5), 60));
    });
}

#[test]
fn the_queue_is_bounded_by_requests() {
    one_by_one_and_pipelined(|| {
        let (engine, gate) = gated(64, EngineConfig { max_num_seqs: 1, max_num_queued_reqs: 2, ..config() });
        let streams: Vec<_> =
            (0..3).map(|seed| engine.generate(request(&prompt(seed, 4), greedy(2))).unwrap()).collect();
        let refused = engine.generate(request(&prompt(9, 4), greedy(2)));
        assert!(matches!(refused, Err(AdmissionError::QueueFull { .. })), "{refused:?}");
        assert_eq!(engine.load().requests_total, 3);
        drop(gate);
        for stream in streams {
            assert_eq!(collect(stream).0.len(), 2);
        }
        collect(engine.generate(request(&prompt(9, 4), greedy(2))).unwrap());
    });
}

#[test]
fn the_queue_is_bounded_by_tokens() {
    one_by_one_and_pipelined(|| {
        let limits = EngineConfig { max_num_seqs: 1, max_num_queued_reqs: 7, max_model_len: 100, ..config() };
        let (engine, gate) = gated(64, limits);
        // 8 * 100 / 4 tokens may wait; whether the first still does makes no difference.
        let mut streams = vec![engine.generate(request(&prompt(0, 10), greedy(1))).unwrap()];
        streams.extend((1..3).map(|seed| engine.generate(request(&prompt(seed, 90), greedy(1))).unwrap()));
        let refused = engine.generate(request(&prompt(9, 90), greedy(1)));
        assert!(matches!(refused, Err(AdmissionError::QueueFull { .. })), "{refused:?}");
        drop(gate);
        streams.into_iter().for_each(|stream| drop(collect(stream)));
    });
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let engine = start(8, EngineConfig { max_model_len: 100, ..config() });
    let refused = |prompt: &[u32]| engine.generate(request(prompt, greedy(5))).unwrap_err();
    assert_eq!(refused(&[]), AdmissionError::EmptyPrompt);
    assert_eq!(refused(&[1; 100]), AdmissionError::PromptTooLong { prompt_tokens: 100, max_model_len: 100 });
    assert_eq!(refused(&[1; 32]), AdmissionError::PoolTooSmall { needed_blocks: 9, total_blocks: 8 });
    assert_eq!(refused(&[100]), AdmissionError::TokenOutOfVocabulary { token_id: 100, vocab_size: 100 });
    let logit_bias = (0..500).map(|id| (id % 100, 1.0)).collect();
    let named = SamplingParams { logit_bias, stop_token_ids: vec![7; 13], ..greedy(5) };
    let refused = engine.generate(request(&[1], named)).unwrap_err();
    assert_eq!(refused, AdmissionError::TooManyNamedTokens { named: 513, most: 512 });
    assert_eq!(engine.load().requests_total, 0);
}

#[test]
fn a_failed_step_fails_its_requests_only() {
    one_by_one_and_pipelined(|| {
        let engine = start(64, EngineConfig { max_num_seqs: 1, ..config() });
        let bad = engine.generate(request(&[1, FAILS_STEP], greedy(5))).unwrap();
        let good = engine.generate(request(&[1, 2], greedy(5))).unwrap();
        assert_eq!(last_event(bad), TokenEvent::Failed(RequestError::Device("this step went wrong".to_owned())));
        assert_eq!(collect(good).0, expected_greedy(&[1, 2], 5));
        wait_until_empty(&engine);
        assert!(engine.metrics().contains("finished_reason=\"error\",model_name=\"toy\"} 1"));
    });
}

#[test]
fn a_lost_device_ends_the_engine_and_everyone_hears_of_it() {
    one_by_one_and_pipelined(|| {
        for (token, expected) in [(LOSES_DEVICE, "fell off the bus"), (PANICS, "unheard-of token")] {
            let (gate, receiver) = channel();
            let backend = ToyBackend::new(ToyKind::Generate, 64, BLOCK_SIZE).gated(receiver);
            let seen = Arc::clone(&backend.seen);
            let engine = Engine::start(Box::new(backend), EngineConfig { max_num_seqs: 2, ..config() }).unwrap();
            let stopped = engine.stopped();
            let ask = |prompt: &[u32]| engine.generate(request(prompt, greedy(5))).unwrap();
            let mut streams = vec![ask(&[4, token])];
            while seen.lock().unwrap().begun == 0 {
                std::thread::yield_now();
            }
            // These are still in the channel when the engine ends.
            streams.extend([ask(&[1, 2, 3]), ask(&[5, 6]), ask(&[7])]);
            drop(gate);
            for stream in streams {
                let TokenEvent::Failed(RequestError::Device(why)) = last_event(stream) else { panic!("not failed") };
                assert!(why.contains(expected), "{why}");
            }
            assert!(block_on(stopped).1.contains(expected));
            let refused = engine.generate(request(&[1], greedy(5))).unwrap_err();
            assert!(matches!(&refused, AdmissionError::Stopped { why } if why.contains(expected)), "{refused}");
            assert_eq!((engine.load().running, engine.load().kv_cache_usage), (0, 0.0));
        }
    });
}

#[tokio::test]
async fn shutdown_lets_what_runs_finish() {
    let engine = start(64, config());
    let stream = engine.generate(request(&[1, 2], greedy(200))).unwrap();
    assert_eq!(engine.shutdown(Duration::from_secs(60)).await, Shutdown::Done { failed: 0 });
    let text = tokio::task::spawn_blocking(|| collect(stream).0).await.unwrap();
    assert_eq!(text, expected_greedy(&[1, 2], 200));
    let refused = engine.generate(request(&[1], greedy(5))).unwrap_err();
    assert!(matches!(refused, AdmissionError::Stopped { .. }));
    // Once more does no harm.
    assert_eq!(engine.shutdown(Duration::ZERO).await, Shutdown::Done { failed: 0 });
}

#[tokio::test]
async fn shutdown_cuts_off_what_takes_too_long() {
    let (engine, gate) = gated(64, EngineConfig { max_num_seqs: 1, ..config() });
    let streams: Vec<_> = (0..3).map(|_| engine.generate(request(&[1, 2], greedy(200))).unwrap()).collect();
    gate.send(()).unwrap();
    let handle = engine.clone();
    let shutdown = tokio::spawn(async move { handle.shutdown(Duration::ZERO).await });
    while !matches!(engine.generate(request(&[1], greedy(1))), Err(AdmissionError::Stopped { .. })) {
        tokio::task::yield_now().await;
    }
    drop(gate);
    assert_eq!(shutdown.await.unwrap(), Shutdown::Done { failed: 3 });
    for mut stream in streams {
        let mut last = None;
        while let Some(event) = stream.next().await {
            last = Some(event);
        }
        assert_eq!(last, Some(TokenEvent::Failed(RequestError::ShuttingDown)));
    }
}

#[test]
fn an_engine_without_handles_finishes_its_work_and_ends() {
    one_by_one_and_pipelined(|| {
        let backend = ToyBackend::new(ToyKind::Generate, 64, BLOCK_SIZE);
        let seen = Arc::downgrade(&backend.seen);
        let engine = Engine::start(Box::new(backend), config()).unwrap();
        let stream = engine.generate(request(&[1, 2], greedy(30))).unwrap();
        drop(engine);
        assert_eq!(collect(stream).0, expected_greedy(&[1, 2], 30));
        let give_up = Instant::now() + Duration::from_secs(20);
        while seen.strong_count() > 0 {
            assert!(Instant::now() < give_up, "the device is still held");
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn limits_are_checked_against_the_device() {
    let too_long = EngineConfig { max_model_len: 5000, ..config() };
    let refused = Engine::start(Box::new(ToyBackend::new(ToyKind::Generate, 4, 4)), too_long).unwrap_err();
    assert!(matches!(refused, EngineStartError::TooLarge { field: "max_model_len", value: 5000, most: 4096 }));
}

/// Everything at once: prompts that share starts, a pool too small for them, chunks, clients that leave at any time.
#[test]
fn two_thousand_mixed_requests_leave_nothing_behind() {
    one_by_one_and_pipelined(|| {
        let limits = EngineConfig { max_num_queued_reqs: 4000, max_num_batched_tokens: 24, ..config() };
        let (engine, gate) = gated(40, limits);
        let mut random = fastrand::Rng::with_seed(11);
        let mut streams = Vec::new();
        for number in 0..2000_u32 {
            let shared = prompt(number % 5, random.usize(0..30));
            let ask = [shared, prompt(1000 + number, random.usize(1..20))].concat();
            let max_tokens = random.usize(1..25);
            let stream = engine.generate(request(&ask, greedy(max_tokens))).unwrap();
            streams.push((ask, max_tokens, stream, random.u32(0..10)));
        }
        drop(gate);
        let mut finished = 0;
        for (ask, max_tokens, mut stream, mood) in streams {
            match mood {
                0 => drop(stream),
                1 => drop(stream.blocking_next()),
                _ => {
                    assert_eq!(collect(stream).0, expected_greedy(&ask, max_tokens));
                    finished += 1;
                }
            }
        }
        assert!(finished > 1000);
        wait_until_empty(&engine);
        let load = engine.load();
        assert!(load.preemptions_total > 0 && load.prefix_cache_hit_rate.unwrap() > 0.1, "{load:?}");
        assert_eq!(load.requests_total, 2000);
    });
}
