//! What the engine says of itself.

use super::toy_backend::{ToyBackend, ToyKind};
use super::*;
use std::sync::mpsc::channel;

/// The value of a series, by its name and a part of its labels.
fn value(metrics: &str, name: &str, label: &str) -> f64 {
    let line = metrics.lines().find(|line| line.starts_with(&format!("vllm:{name}{{")) && line.contains(label));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{metrics}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn load_follows_the_work() {
    let (gate, receiver) = channel();
    let backend = ToyBackend::new(ToyKind::Generate, 32, BLOCK_SIZE).gated(receiver);
    let engine = Engine::start(Box::new(backend), EngineConfig { max_num_seqs: 2, ..config() }).unwrap();
    let idle = engine.load();
    assert_eq!((idle.running, idle.waiting, idle.stalled_ms, idle.requests_total), (0, 0, 0, 0));
    assert_eq!((idle.kv_blocks_total, idle.kv_block_size, idle.max_model_len), (32, 4, 512));
    assert_eq!((idle.ttft_p50_ms, idle.itl_p95_ms, idle.prefix_cache_hit_rate), (None, None, None));

    let streams: Vec<_> = (0..3).map(|seed| engine.generate(request(&prompt(seed, 8), greedy(6))).unwrap()).collect();
    assert_eq!(engine.load().running + engine.load().waiting, 3);
    // The device is stuck in a step while work waits: the time since the last sign of life grows.
    let give_up = Instant::now() + Duration::from_secs(20);
    while engine.load().stalled_ms == 0 {
        assert!(Instant::now() < give_up);
        std::thread::sleep(Duration::from_millis(1));
    }
    gate.send(()).unwrap();
    gate.send(()).unwrap();
    gate.send(()).unwrap();
    while engine.load().steps_total < 3 {
        assert!(Instant::now() < give_up);
        std::thread::yield_now();
    }
    let busy = engine.load();
    assert_eq!((busy.running, busy.waiting), (2, 1));
    assert!(busy.kv_cache_usage > 0.0);
    drop(gate);
    streams.into_iter().for_each(|stream| drop(collect(stream)));
    wait_until_empty(&engine);
    let done = engine.load();
    assert_eq!((done.prompt_tokens_total, done.generation_tokens_total, done.requests_total), (24, 18, 3));
    assert!(done.generation_tokens_per_s > 0.0 && done.prompt_tokens_per_s > 0.0);
    assert!(done.ttft_p50_ms <= done.ttft_p95_ms && done.itl_p50_ms <= done.itl_p95_ms && done.itl_p50_ms.is_some());
    assert_eq!(done.stalled_ms, 0);
}

#[test]
fn metrics_count_what_happened() {
    one_by_one_and_pipelined(|| {
        let engine = start(32, config());
        for _ in 0..2 {
            collect(engine.generate(request(&prompt(1, 9), greedy(5))).unwrap());
        }
        let metrics = engine.metrics();
        let labels = "engine=\"0\",model_name=\"toy\"";
        for (name, label, expected) in [
            ("prompt_tokens_total", labels, 18.0),
            ("generation_tokens_total", labels, 10.0),
            ("prefix_cache_queries_total", labels, 18.0),
            ("prefix_cache_hits_total", labels, 8.0),
            ("num_preemptions_total", labels, 0.0),
            ("request_success_total", "finished_reason=\"length\"", 2.0),
            ("request_success_total", "finished_reason=\"stop\"", 0.0),
            ("num_requests_running", labels, 0.0),
            ("num_requests_waiting", labels, 0.0),
            ("time_to_first_token_seconds_count", labels, 2.0),
            ("inter_token_latency_seconds_count", labels, 8.0),
            ("e2e_request_latency_seconds_count", labels, 2.0),
            ("request_queue_time_seconds_count", labels, 2.0),
            ("request_prefill_time_seconds_count", labels, 2.0),
            ("request_decode_time_seconds_count", labels, 2.0),
            ("request_inference_time_seconds_count", labels, 2.0),
            ("request_prompt_tokens_sum", labels, 18.0),
            ("request_generation_tokens_sum", labels, 10.0),
            ("iteration_tokens_total_count", labels, 10.0),
            // 9 + 4 tokens, then 1 + 4: the second prompt came from the cache but for its last token.
            ("iteration_tokens_total_sum", labels, 18.0),
            ("cache_config_info", "num_gpu_blocks=\"32\"", 1.0),
            ("cache_config_info", "block_size=\"4\"", 1.0),
        ] {
            assert_eq!(value(&metrics, name, label), expected, "{name} {label}");
        }
        assert!(metrics.contains("# TYPE vllm:time_to_first_token_seconds histogram"));
        assert!(
            metrics.contains("vllm:inter_token_latency_seconds_bucket{engine=\"0\",model_name=\"toy\",le=\"0.025\"}")
        );
    });
}

#[test]
fn a_model_name_cannot_break_the_text() {
    one_by_one_and_pipelined(|| {
        let engine = start(4, EngineConfig { model_name: "a\"b\\c\nd".to_owned(), ..config() });
        assert!(engine.metrics().contains("model_name=\"a\\\"b\\\\c\\nd\""));
    });
}
