//! Step times that were measured, as data for the fit and for the tests that hold it.

use super::serving::{Replica, RequestShape};
use super::{Engine, Machine, Step, step_time};
use super::{EngineSpeed, extract};
use crate::gpus::{GpuModel, find};
use crate::memory::{DEFAULT_MAX_NUM_BATCHED_TOKENS, KvCacheDtype};
use crate::model::ModelSpec;

/// One row of measurements: a model at some sizes of step.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    pub engine: Engine,
    /// Which of the two models: the large or the small one.
    pub model: Shape,
    pub what: What,
    /// Size and milliseconds.
    pub points: &'static [(u64, f64)],
    pub source: &'static str,
}

/// Shapes that were measured, with random weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Llama-3.1-8B
    Large,
    /// Qwen2.5-0.5B
    Small,
    /// BERT-large
    Encoder,
}

impl Shape {
    pub fn name(self) -> &'static str {
        match self {
            Self::Large => "Llama-3.1-8B",
            Self::Small => "Qwen2.5-0.5B",
            Self::Encoder => "BERT-large",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// A decode step of that many sequences with contexts of 1,024 tokens.
    DecodeStep,
    /// The first token of one prompt of that many tokens.
    FirstToken,
    /// Milliseconds between two output tokens of all users together, for that many users with 1,024 prompt and 128
    /// output tokens, over HTTP.
    Served,
    /// 32 texts of that many tokens, in one step.
    Texts,
}

/// The card of all of them.
pub const CARD: &str = "h200";
const CONTEXT_TOKENS: f64 = 1024.0;
const TEXTS: f64 = 32.0;

const VLLM_SOURCE: &str = "vLLM 0.26 (FlashAttention-3, CUDA graphs, torch.compile) on one H200, November 2026";
const PYTORCH_SOURCE: &str = "PyTorch (fp16, SDPA) on one H200, November 2026";
const MSERVE_SOURCE: &str = "BENCHMARKS.md, one H200, 2026-11-28";

pub const MEASURED: &[Measured] = &[
    Measured {
        engine: Engine::Vllm,
        model: Shape::Large,
        what: What::DecodeStep,
        points: &[(1, 5.12), (8, 5.22), (32, 6.45), (64, 7.72), (128, 10.8), (256, 18.7)],
        source: VLLM_SOURCE,
    },
    Measured {
        engine: Engine::Vllm,
        model: Shape::Small,
        what: What::DecodeStep,
        points: &[(1, 1.62), (8, 1.69), (32, 1.96), (64, 2.61), (128, 4.01), (256, 5.69)],
        source: VLLM_SOURCE,
    },
    Measured {
        engine: Engine::Vllm,
        model: Shape::Large,
        what: What::FirstToken,
        points: &[(128, 12.9), (2048, 49.5), (8000, 210.0)],
        source: VLLM_SOURCE,
    },
    Measured {
        engine: Engine::Vllm,
        model: Shape::Small,
        what: What::FirstToken,
        points: &[(128, 6.9), (2048, 17.5), (8000, 23.7)],
        source: VLLM_SOURCE,
    },
    Measured {
        engine: Engine::Mserve,
        model: Shape::Large,
        what: What::DecodeStep,
        points: &[(1, 4.16), (8, 4.74), (32, 5.64), (64, 6.83), (128, 9.18), (256, 15.24)],
        source: MSERVE_SOURCE,
    },
    Measured {
        engine: Engine::Mserve,
        model: Shape::Small,
        what: What::DecodeStep,
        points: &[(1, 0.541), (8, 0.603), (32, 0.777), (64, 0.889), (128, 1.475), (256, 1.888)],
        source: MSERVE_SOURCE,
    },
    Measured {
        engine: Engine::Mserve,
        model: Shape::Large,
        what: What::FirstToken,
        points: &[(1024, 21.0)],
        source: MSERVE_SOURCE,
    },
    Measured {
        engine: Engine::Mserve,
        model: Shape::Small,
        what: What::FirstToken,
        points: &[(1024, 2.98)],
        source: MSERVE_SOURCE,
    },
    Measured {
        engine: Engine::Vllm,
        model: Shape::Large,
        what: What::Served,
        points: &[(1, 1e3 / 196.0), (8, 1e3 / 1207.0), (64, 1e3 / 3294.0), (256, 1e3 / 3879.0)],
        source: VLLM_SOURCE,
    },
    Measured {
        engine: Engine::Vllm,
        model: Shape::Small,
        what: What::Served,
        points: &[(1, 1e3 / 605.0), (32, 1e3 / 10561.0), (256, 1e3 / 16944.0)],
        source: VLLM_SOURCE,
    },
    Measured {
        engine: Engine::Mserve,
        model: Shape::Large,
        what: What::Served,
        points: &[(1, 1e3 / 235.4), (8, 1e3 / 1310.5), (64, 1e3 / 3523.3), (256, 1e3 / 4314.2)],
        source: MSERVE_SOURCE,
    },
    Measured {
        engine: Engine::Mserve,
        model: Shape::Small,
        what: What::Served,
        points: &[(1, 1e3 / 1889.4), (8, 1e3 / 11597.6), (64, 1e3 / 35283.8), (256, 1e3 / 54516.8)],
        source: MSERVE_SOURCE,
    },
    // No engine of ours was measured on encoders: PyTorch stands for all.
    Measured {
        engine: Engine::Vllm,
        model: Shape::Encoder,
        what: What::Texts,
        points: &[(512, 24.0)],
        source: PYTORCH_SOURCE,
    },
    // No engine of ours was measured on encoders: PyTorch stands for all.
    Measured {
        engine: Engine::Mserve,
        model: Shape::Encoder,
        what: What::Texts,
        points: &[(512, 24.0)],
        source: PYTORCH_SOURCE,
    },
];

/// A measurement beside what the model says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Residual {
    pub size: u64,
    pub measured_ms: f64,
    pub predicted_ms: f64,
}

impl Residual {
    /// predicted / measured - 1
    pub fn error(&self) -> f64 {
        self.predicted_ms / self.measured_ms - 1.0
    }
}

/// What `speed` predicts for a row, with `spec` of the row's model.
pub fn residuals(row: &Measured, spec: &ModelSpec, speed: &EngineSpeed) -> Vec<Residual> {
    let Ok(gpu) = find(CARD) else { return Vec::new() };
    let predict = |size: u64| predict_ms(row, size as f64, spec, gpu, speed);
    row.points.iter().map(|&(size, measured_ms)| Residual { size, measured_ms, predicted_ms: predict(size) }).collect()
}

fn predict_ms(row: &Measured, size: f64, spec: &ModelSpec, gpu: &GpuModel, speed: &EngineSpeed) -> f64 {
    let program = row.engine.program(spec);
    let work = extract(&program, spec, gpu, speed, 1, KvCacheDtype::Auto.resolve(spec));
    let machine = Machine { gpu, tensor_parallel_size: 1, engine: speed };
    let time_ms = |step: Step| step_time(&work, &step, &machine).seconds * 1e3;
    match row.what {
        What::DecodeStep => time_ms(Step::decode(size, CONTEXT_TOKENS)),
        What::FirstToken => time_ms(Step::prefill(size, size)) + speed.request_s * 1e3,
        What::Served => {
            let shape = RequestShape { input_tokens: 1024, output_tokens: 128 };
            let max_num_batched_tokens = match row.engine {
                Engine::Mserve => DEFAULT_MAX_NUM_BATCHED_TOKENS,
                Engine::Vllm | Engine::Sglang => 8192,
            };
            let replica = Replica { work: &work, machine, shape, max_num_batched_tokens };
            1e3 / replica.at(size).output_tokens_per_s
        }
        What::Texts => {
            let shape = RequestShape { input_tokens: size as u64, output_tokens: 0 };
            let replica = Replica { work: &work, machine, shape, max_num_batched_tokens: 1 << 20 };
            1e3 * TEXTS / replica.at(TEXTS).requests_per_s
        }
    }
}

/// Mean of the absolute errors.
pub fn mean_error(residuals: &[Residual]) -> f64 {
    residuals.iter().map(|r| r.error().abs()).sum::<f64>() / residuals.len().max(1) as f64
}
