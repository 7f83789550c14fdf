//! What engines lose against the roofline: the one table of constants.
//!
//! Efficiencies are shares of the data sheet's figure; latencies are what an op costs beyond its bytes and flops
//! (launch gap, ramp-up, tail), inside a CUDA graph. They were fitted once, for each engine together over a model of
//! 8 and one of 0.5 billion parameters, to the tables in [`super::measured`]:
//! `cargo run -p mserve-planner --example fit_speed` fits again and prints this table and the residuals.
//! Links and one-shot all-reduce: four H200, measured with NCCL 2.28 and the bundled runtime's kernel.

use crate::model::{ModelSpec, Program, families};
use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// The bundled runtime.
    #[default]
    Mserve,
    Vllm,
    Sglang,
}

impl Engine {
    /// The ops of a model as this engine runs them.
    pub fn program(self, spec: &ModelSpec) -> Program {
        match self {
            Self::Mserve => families::program(spec),
            Self::Vllm | Self::Sglang => families::whole_layers(spec),
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mserve => "mserve",
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EngineSpeed {
    /// Share of the bandwidth that streaming a matrix reaches.
    pub memory: f64,
    /// Share of the dense rate that a large product reaches.
    pub matrix: f64,
    /// Exponent of the norm that joins the two limits; infinite would be a sharp roofline.
    pub sharpness: f64,
    /// Share of the bandwidth that decode attention reaches on its KV.
    pub attention_memory: f64,
    /// Share of the dense rate that prefill attention reaches.
    pub attention_matrix: f64,
    /// Beyond bytes and flops: each matrix product, each attention, each other op.
    pub product_s: f64,
    pub attention_s: f64,
    pub small_s: f64,
    /// Host time that the device waits for: each step, each sequence of it, each step with prompts.
    pub step_s: f64,
    pub sequence_s: f64,
    pub prefill_step_s: f64,
    /// What a request waits for while the device works for others: HTTP, tokenizer, hand-over between threads.
    pub request_s: f64,
    /// Bytes that the sampler reads and writes for one logit.
    pub sampler_bytes_per_logit: f64,
    /// fp8 (and fp4) products, and products that widen their weights first, against half-precision ones.
    pub fp8: f64,
    pub weight_only: f64,
    /// Grouped products of experts, few rows each, against plain ones. Assumed: no model with experts was measured.
    pub grouped: f64,
    /// Rates of models that do not generate against those of prompts: PyTorch runs 32 texts of 512 tokens through
    /// BERT-large in 24 ms on an H200 (fp16, SDPA); no engine here was measured on encoders yet.
    pub one_shot_model: f64,
    /// All-reduce: latency, and share of the link.
    pub one_shot_s: f64,
    pub one_shot_link: f64,
    pub ring_s: f64,
    pub ring_link: f64,
    /// Where the constants come from.
    pub source: &'static str,
}

const MSERVE: EngineSpeed = EngineSpeed {
    memory: 0.800,
    matrix: 0.760,
    sharpness: 5.0,
    attention_memory: 0.816,
    attention_matrix: 0.400,
    product_s: 0.772e-6,
    attention_s: 1.00e-6,
    small_s: 1.57e-6,
    step_s: 39.0e-6,
    sequence_s: 1.68e-6,
    prefill_step_s: 0.415e-3,
    request_s: 0.832e-3,
    sampler_bytes_per_logit: 4.0,
    fp8: 0.86,
    weight_only: 0.85,
    grouped: 0.75,
    one_shot_model: 0.756,
    one_shot_s: 6.1e-6,
    one_shot_link: 0.31,
    ring_s: 10.0e-6,
    ring_link: 0.67,
    source: "fitted to the bundled runtime on an H200, 2026-11-28",
};

const VLLM: EngineSpeed = EngineSpeed {
    memory: 0.898,
    matrix: 0.720,
    sharpness: 5.0,
    attention_memory: 0.920,
    attention_matrix: 0.443,
    product_s: 2.13e-6,
    attention_s: 3.69e-6,
    small_s: 0.817e-6,
    step_s: 0.945e-3,
    sequence_s: 12.8e-6,
    prefill_step_s: 3.86e-3,
    request_s: 2.64e-3,
    sampler_bytes_per_logit: 12.0,
    one_shot_model: 0.782,
    source: "fitted to vLLM 0.26 on an H200, November 2026",
    ..MSERVE
};

/// SGLang uses vLLM's kinds of kernels; its scheduler runs one batch ahead, so that host time is hidden but for the
/// step itself. Not measured here.
const SGLANG: EngineSpeed = EngineSpeed {
    sequence_s: 5.0e-6,
    source: "assumed: vLLM's kernels, a third of its host time a sequence (scheduler one batch ahead)",
    ..VLLM
};

pub(super) fn speed(engine: Engine) -> &'static EngineSpeed {
    match engine {
        Engine::Mserve => &MSERVE,
        Engine::Vllm => &VLLM,
        Engine::Sglang => &SGLANG,
    }
}
