//! Fit the constants of the speed model to the tables in `perf/measured.rs`, and print them with their residuals:
//! `cargo run -p mserve-planner --release --example fit_speed`.
//!
//! Each engine is fitted once over both models and all sizes: the sum of squared relative errors, by a pattern search
//! from the present constants. Nothing here depends on a model's name.
#![allow(clippy::unwrap_used)]

use mserve_planner::model::{ModelSpec, parse_config};
use mserve_planner::perf::measured::{MEASURED, Measured, Shape, What, mean_error, residuals};
use mserve_planner::perf::{Engine, EngineSpeed};

const LARGE: &[u8] = include_bytes!("../tests/fixtures/configs/meta-llama__Meta-Llama-3.1-8B.json");
const ENCODER: &[u8] = include_bytes!("../tests/fixtures/configs/BAAI__bge-large-en-v1.5.json");
const SMALL: &[u8] = include_bytes!("../tests/fixtures/shapes/Qwen2.5-0.5B.json");

/// A constant that is fitted: its name, and where it is.
type Parameter = (&'static str, fn(&mut EngineSpeed) -> &mut f64, (f64, f64));

const PARAMETERS: &[Parameter] = &[
    ("memory", |s| &mut s.memory, (0.80, 0.95)),
    ("matrix", |s| &mut s.matrix, (0.60, 0.82)),
    ("sharpness", |s| &mut s.sharpness, (1.5, 5.0)),
    ("attention_memory", |s| &mut s.attention_memory, (0.5, 0.92)),
    ("attention_matrix", |s| &mut s.attention_matrix, (0.40, 0.50)),
    ("product_s", |s| &mut s.product_s, (0.5e-6, 8e-6)),
    ("attention_s", |s| &mut s.attention_s, (1e-6, 12e-6)),
    ("small_s", |s| &mut s.small_s, (0.2e-6, 6e-6)),
    ("step_s", |s| &mut s.step_s, (1e-6, 2e-3)),
    ("sequence_s", |s| &mut s.sequence_s, (0.01e-6, 30e-6)),
    ("prefill_step_s", |s| &mut s.prefill_step_s, (0.05e-3, 10e-3)),
    ("request_s", |s| &mut s.request_s, (0.1e-3, 10e-3)),
];

/// Encoders come after all else: nobody's decode step depends on them.
const ONE_SHOT: Parameter = ("one_shot_model", |s| &mut s.one_shot_model, (0.3, 1.2));

fn main() {
    let specs = [LARGE, SMALL, ENCODER].map(|json| parse_config(json).unwrap());
    for engine in [Engine::Mserve, Engine::Vllm] {
        let rows: Vec<&Measured> = MEASURED.iter().filter(|row| row.engine == engine).collect();
        let steps = fit(*engine.speed(), PARAMETERS, |speed| loss(speed, &rows, &specs));
        let texts: Vec<&Measured> = rows.iter().filter(|row| row.what == What::Texts).copied().collect();
        let squares = |speed: &EngineSpeed| {
            let errors = texts.iter().flat_map(|row| residuals(row, spec(row.model, &specs), speed));
            errors.map(|r| r.error().powi(2)).sum()
        };
        let fitted = fit(steps, &[ONE_SHOT], squares);
        println!("{engine}:");
        for (name, field, _) in PARAMETERS.iter().chain([&ONE_SHOT]) {
            println!("    {name}: {:.3e},", field(&mut fitted.clone()));
        }
        print_residuals(&rows, &specs, &fitted);
    }
}

fn spec(shape: Shape, specs: &[ModelSpec; 3]) -> &ModelSpec {
    match shape {
        Shape::Large => &specs[0],
        Shape::Small => &specs[1],
        Shape::Encoder => &specs[2],
    }
}

/// Decode steps are what the constants are for; first tokens came over HTTP and weigh less. The small model's errors
/// weigh less too: it is the harder one by nature, and the large ones are what people serve.
fn loss(speed: &EngineSpeed, rows: &[&Measured], specs: &[ModelSpec; 3]) -> f64 {
    let weight = |row: &Measured| match (row.what, row.model) {
        (What::DecodeStep, Shape::Large) => 1.0,
        (What::DecodeStep, _) => 0.4,
        (What::FirstToken, _) => 0.05,
        (What::Served, Shape::Large) => 0.1,
        (What::Served, _) => 0.05,
        // One constant of their own: see below.
        (What::Texts, _) => 0.0,
    };
    let of_row = |row: &&Measured| {
        let errors = residuals(row, spec(row.model, specs), speed);
        weight(row) * errors.iter().map(|r| r.error().powi(2)).sum::<f64>()
    };
    rows.iter().map(of_row).sum()
}

/// Try each constant a step up and down; smaller steps when none helps.
fn fit(start: EngineSpeed, parameters: &[Parameter], loss: impl Fn(&EngineSpeed) -> f64) -> EngineSpeed {
    let (mut best, mut best_loss) = (start, loss(&start));
    let mut factor: f64 = 1.5;
    while factor > 1.0005 {
        let before = best_loss;
        for (_, field, (low, high)) in parameters {
            for by in [factor, 1.0 / factor] {
                let mut tried = best;
                let value = field(&mut tried);
                *value = (*value * by).clamp(*low, *high);
                let tried_loss = loss(&tried);
                if tried_loss < best_loss {
                    (best, best_loss) = (tried, tried_loss);
                }
            }
        }
        if best_loss > before * 0.9999 {
            factor = 1.0 + (factor - 1.0) * 0.7;
        }
    }
    best
}

fn print_residuals(rows: &[&Measured], specs: &[ModelSpec; 3], speed: &EngineSpeed) {
    for row in rows {
        let errors = residuals(row, spec(row.model, specs), speed);
        println!("  {} {:?}: mean error {:.1} %", row.model.name(), row.what, 100.0 * mean_error(&errors));
        for r in errors {
            println!(
                "    {:>5}  measured {:8.2} ms  predicted {:8.2} ms  {:+6.1} %",
                r.size,
                r.measured_ms,
                r.predicted_ms,
                100.0 * r.error()
            );
        }
    }
}
