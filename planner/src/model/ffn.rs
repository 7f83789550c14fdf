//! What works on each token alone: a dense MLP, or experts that a router picks from.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "ffn")]
pub enum Ffn {
    Dense(MlpSpec),
    Experts(MoeSpec),
    /// A layer that is its mixer alone.
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MlpSpec {
    pub intermediate_size: u64,
    pub activation: Activation,
    /// act(gate) * up, two matrices in, one out.
    pub gated: bool,
    pub bias: bool,
}

impl MlpSpec {
    pub fn gated(intermediate_size: u64, activation: Activation) -> Self {
        Self { intermediate_size, activation, gated: true, bias: false }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MoeSpec {
    pub num_experts: u64,
    /// Experts that one token passes.
    pub top_k: u64,
    pub expert: MlpSpec,
    /// Passed by every token; shared experts of one size are one MLP of their widths together.
    pub shared: Option<MlpSpec>,
    /// The shared MLP has a gate of one column (Qwen).
    pub shared_gate: bool,
    /// A dense MLP beside the experts, with norms of its own (Gemma 4, Arctic).
    pub dense: Option<MlpSpec>,
    /// Experts work on vectors of this width, projected down before and up after (Nemotron 3 Super, Kimi K3).
    pub latent_size: Option<u64>,
    pub router: Router,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Router {
    Plain,
    /// A bias in the product (gpt-oss).
    Biased,
    /// A correction added to the scores for the choice alone (DeepSeek-V3).
    ScoreCorrected,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    Silu,
    /// Exact, with erf.
    Gelu,
    GeluTanh,
    Relu,
    Tanh,
    /// relu(x)^2 (Nemotron).
    ReluSquared,
    /// Gated forms with limits of their own, planned as any other: gpt-oss and MiniMax M3 (swigluoai), Phi-3-small
    /// (gegelu), Kimi K3 (situ), Apertus (xielu).
    Special,
}
