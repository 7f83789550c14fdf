//! Predicted speed against what was measured, and what must hold for every card and load.
#![allow(clippy::unwrap_used)]

use crate::fixtures;
use mserve_planner::gpus::{GPUS, find};
use mserve_planner::memory::KvCacheDtype;
use mserve_planner::model::{ModelSpec, parse_config};
use mserve_planner::perf::measured::{MEASURED, Measured, Shape, What, mean_error, residuals};
use mserve_planner::perf::serving::{Replica, RequestShape};
use mserve_planner::perf::{Engine, Machine, Step, extract, step_time};

const LLAMA_8B: &str = "meta-llama__Meta-Llama-3.1-8B";

fn spec(shape: Shape) -> ModelSpec {
    match shape {
        Shape::Large => fixtures::spec(LLAMA_8B),
        Shape::Encoder => fixtures::spec("BAAI__bge-large-en-v1.5"),
        Shape::Small => parse_config(include_bytes!("../fixtures/shapes/Qwen2.5-0.5B.json")).unwrap(),
    }
}

/// Largest mean error over the sizes that a row may have.
fn allowed(row: &Measured) -> f64 {
    match (row.what, row.engine, row.model) {
        (What::DecodeStep, Engine::Mserve, Shape::Large) => 0.05,
        (What::DecodeStep, Engine::Mserve, Shape::Small) => 0.10,
        (What::DecodeStep, _, Shape::Large) => 0.06,
        (What::DecodeStep, ..) => 0.20,
        (What::FirstToken | What::Served, _, Shape::Large) => 0.15,
        (What::Texts, ..) => 0.08,
        (What::FirstToken | What::Served, ..) => 0.30,
    }
}

#[test]
fn speed_is_predicted_as_it_was_measured() {
    for row in MEASURED {
        let errors = residuals(row, &spec(row.model), row.engine.speed());
        let mean = mean_error(&errors);
        println!("{} {} {:?}: mean error {:.1} %", row.engine, row.model.name(), row.what, 100.0 * mean);
        for r in &errors {
            let error = 100.0 * r.error();
            println!(
                "  {:>5} {:8.2} ms measured {:8.2} predicted {error:+6.1} %",
                r.size, r.measured_ms, r.predicted_ms
            );
        }
        assert!(mean <= allowed(row), "{} {} {:?}: {mean}", row.engine, row.model.name(), row.what);
    }
}

fn with_replica<T>(
    spec: &ModelSpec,
    gpu: &str,
    engine: Engine,
    tp: u64,
    shape: (u64, u64),
    f: impl FnOnce(&Replica<'_>) -> T,
) -> T {
    let gpu = find(gpu).unwrap();
    let program = engine.program(spec);
    let work = extract(&program, spec, gpu, engine.speed(), tp, KvCacheDtype::Auto.resolve(spec));
    let machine = Machine { gpu, tensor_parallel_size: tp, engine: engine.speed() };
    let shape = RequestShape { input_tokens: shape.0, output_tokens: shape.1 };
    f(&Replica { work: &work, machine, shape, max_num_batched_tokens: 8192 })
}

#[test]
fn a_heavier_load_is_never_faster_for_one_and_never_slower_for_all() {
    for gpu in GPUS {
        let spec = fixtures::spec(LLAMA_8B);
        with_replica(&spec, gpu.name, Engine::Vllm, 1, (1024, 256), |replica| {
            let rates: Vec<_> = [1.0, 2.0, 4.0, 16.0, 64.0, 256.0].map(|c| replica.at(c)).into();
            for pair in rates.windows(2) {
                assert!(pair[1].requests_per_s >= pair[0].requests_per_s * 0.999, "{}: {rates:?}", gpu.name);
                assert!(pair[1].tpot_ms >= pair[0].tpot_ms * 0.999, "{}: {rates:?}", gpu.name);
                assert!(pair[1].ttft_ms >= pair[0].ttft_ms * 0.999, "{}: {rates:?}", gpu.name);
            }
            assert!(rates.iter().all(|r| r.requests_per_s.is_finite() && r.ttft_ms > 0.0));
        });
    }
}

#[test]
fn tensor_parallelism_shortens_a_step_and_pays_for_its_exchanges() {
    let spec = fixtures::spec("meta-llama__Meta-Llama-3.1-70B");
    let step = |tp: u64, gpu: &str| {
        let gpu = find(gpu).unwrap();
        let program = Engine::Vllm.program(&spec);
        let speed = Engine::Vllm.speed();
        let work = extract(&program, &spec, gpu, speed, tp, KvCacheDtype::Auto.resolve(&spec));
        step_time(&work, &Step::decode(4.0, 1024.0), &Machine { gpu, tensor_parallel_size: tp, engine: speed })
    };
    let (one, four) = (step(1, "h200"), step(4, "h200"));
    assert!(four.seconds < one.seconds / 2.0 && four.seconds > one.seconds / 4.0, "{} {}", one.seconds, four.seconds);
    // 70B at TP 4: 160 all-reduces of a step, 5 to 8 us each with a one-shot kernel.
    let exchange = |time: &mserve_planner::perf::StepTime| {
        time.ops.iter().find(|op| op.kind == mserve_planner::perf::OpKind::Exchange).map_or(0.0, |op| op.seconds)
    };
    assert_eq!(exchange(&one), 0.0);
    let at_four = exchange(&four) * 1e3;
    assert!((0.8..1.8).contains(&at_four), "{at_four} ms");
    assert!(exchange(&step(4, "l40s")) > 2.0 * exchange(&four), "PCIe is slower than NVLink");
}
