//! Kernels of the ops that are planned as a whole: how many products and how many small ones (norms, rotation and cache
//! writes, sorting, gates) an engine with fused kernels launches for each. Counted in vLLM's layers; each costs a launch.

use crate::model::{
    AttentionSpec, CompressedAttentionSpec, Feature, Ffn, IndexerSpec, LatentAttentionSpec, LayerSpec, Mixer, MoeSpec,
    OutputGate, StateKind, StateSpec,
};
use serde::Serialize;
use std::ops::Add;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Kernels {
    pub products: u64,
    pub small: u64,
}

impl Add for Kernels {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { products: self.products + other.products, small: self.small + other.small }
    }
}

const fn kernels(products: u64, small: u64) -> Kernels {
    Kernels { products, small }
}

impl Kernels {
    pub(super) const ONE_PRODUCT: Self = kernels(1, 0);

    /// Of a planned op, without attention over the context and the update of a state, which are ops of their own.
    pub(super) fn of(feature: Feature, layer: &LayerSpec) -> Self {
        match feature {
            Feature::Mlp => kernels(2, 1),
            Feature::Experts => match &layer.ffn {
                Ffn::Experts(moe) => experts(moe),
                _ => kernels(2, 1),
            },
            Feature::PerLayerInput => kernels(2, 2),
            // Two mixings: each maps the streams to factors, normalises those and applies them.
            Feature::HyperConnections => kernels(2, 4),
            Feature::Attention
            | Feature::CrossAttention
            | Feature::LatentAttention
            | Feature::CompressedAttention
            | Feature::StateMixer => mixer(&layer.mixer),
        }
    }
}

fn mixer(mixer: &Mixer) -> Kernels {
    match mixer {
        Mixer::Attention(a) | Mixer::Cross(a) => attention(a),
        Mixer::Latent(a) => latent(a),
        Mixer::Compressed(a) => compressed(a),
        Mixer::State(s) => state(s),
        Mixer::Parallel { attention: a, state: s } => attention(a) + state(s),
        Mixer::None => Kernels::default(),
    }
}

/// q, k and v in one product, then rotation with the write to the cache; the output's product.
fn attention(a: &AttentionSpec) -> Kernels {
    let gate = if a.gate == OutputGate::None { kernels(0, 0) } else { kernels(0, 1) };
    kernels(2, 1) + gate + a.indexer.as_ref().map_or(kernels(0, 0), indexer)
}

/// Down, up, keys into the latent, values out of it, output; without a latent of queries one less.
fn latent(a: &LatentAttentionSpec) -> Kernels {
    let products = if a.q_lora_rank.is_some() { 5 } else { 4 };
    kernels(products, 2) + a.indexer.as_ref().filter(|i| i.own).map_or(kernels(0, 0), indexer)
}

/// Queries, key and weights; norm, rotation, quantisation, scores and the choice.
fn indexer(_: &IndexerSpec) -> Kernels {
    kernels(3, 5)
}

fn compressed(a: &CompressedAttentionSpec) -> Kernels {
    let compressor = if a.tokens_per_state > 0 { kernels(1, 2) } else { kernels(0, 0) };
    kernels(4, 3) + compressor + a.indexer.as_ref().map_or(kernels(0, 0), |i| indexer(i) + kernels(1, 2))
}

/// Products in and out, the convolution, the gated norm.
fn state(s: &StateSpec) -> Kernels {
    match s.kind {
        StateKind::Mamba1 => kernels(4, 2),
        StateKind::Mamba2 => kernels(2, 2),
        StateKind::GatedDeltaNet => kernels(3, 2),
        StateKind::KimiDelta => kernels(6, 3),
        StateKind::Lightning => kernels(3, 1),
        StateKind::ShortConv => kernels(2, 1),
    }
}

/// The router, the choice, two for sorting tokens by expert, two grouped products with the activation between, and the
/// weighted sum; what stands beside the experts.
fn experts(moe: &MoeSpec) -> Kernels {
    let beside = |there: bool, kernels: Kernels| if there { kernels } else { Kernels::default() };
    kernels(3, 5)
        + beside(moe.shared.is_some(), kernels(2, 2))
        + beside(moe.dense.is_some(), kernels(2, 2))
        + beside(moe.latent_size.is_some(), kernels(2, 0))
}
