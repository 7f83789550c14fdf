//! One file per family: the whole architecture, for planner, loader and every backend.

mod bert;
mod gemma;
mod llama;
mod phi3;

use super::{Family, ModelSpec, Program};

/// The ops of a model, in order.
pub fn program(spec: &ModelSpec) -> Program {
    match spec.family {
        Family::Llama | Family::Mistral | Family::Qwen2 | Family::Qwen3 => llama::program(spec),
        Family::Bert | Family::XlmRoberta => bert::program(spec),
        Family::Phi3 => phi3::program(spec),
        Family::Gemma2 | Family::Gemma3 => gemma::program(spec),
    }
}
