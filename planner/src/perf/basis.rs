//! How much of a predicted time rests on measurements.

use super::Engine;
use super::measured::CARD;
use crate::gpus::GpuModel;
use crate::model::{Feature, Op, Program, Quantization};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// The engine was measured on this card with models of these ops.
    Calibrated,
    /// Its constants, carried over to another card, to several, or to packed weights.
    Roofline,
    /// Ops that nothing was measured of (experts, latent attention, recurrent states), or an engine that was not.
    Assumed,
}

impl Basis {
    pub fn of(
        engine: Engine,
        gpu: &GpuModel,
        tensor_parallel_size: u64,
        program: &Program,
        stored: &Quantization,
    ) -> Self {
        let unmeasured = |op: &Op| match op {
            // Attention and MLP differ from the measured ones in norms and biases.
            Op::Planned(op) => !matches!(op.feature, Feature::Attention | Feature::Mlp),
            _ => false,
        };
        if engine == Engine::Sglang || program.ops.iter().any(unmeasured) {
            return Self::Assumed;
        }
        // Texts that pass in one step: measured in PyTorch only.
        let plain = *stored == Quantization::None && program.cached_attentions().next().is_some();
        if gpu.name == CARD && tensor_parallel_size == 1 && plain { Self::Calibrated } else { Self::Roofline }
    }

    /// For a heading: what the figures under it are.
    pub fn label(self) -> &'static str {
        match self {
            Self::Calibrated => "calibrated on this card",
            Self::Roofline => "roofline, constants measured on an H200",
            Self::Assumed => "roofline, kernels assumed: nothing like it was measured",
        }
    }
}
