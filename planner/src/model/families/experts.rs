//! Routers, experts and what stands beside them.

use super::planned::Emit;
use crate::model::{BufferId, Feature, MlpSpec, MoeSpec, Role, Router, Shard, WeightId};

pub(super) fn experts(e: &mut Emit<'_, '_>, moe: &MoeSpec, x: BufferId, add: BufferId) -> BufferId {
    let hidden = e.spec.hidden_size;
    let mut weights = Vec::new();
    router(e, moe, &mut weights);
    let width = moe.latent_size.unwrap_or(hidden);
    if let Some(latent) = moe.latent_size {
        for (part, out, width) in [("fc1_latent_proj", latent, hidden), ("fc2_latent_proj", hidden, latent)] {
            let parent = e.names.router.rsplit_once('.').map_or("mlp", |(parent, _)| parent);
            let name = e.name(parent, part);
            weights.push(e.matrix(&name, out, width, Shard::Replicated));
        }
    }
    routed(e, moe, width, &mut weights);
    let hidden_parts = ["gate_proj", "up_proj", "down_proj"];
    if let Some(shared) = &moe.shared {
        let parts = if e.names.experts.starts_with("ffn.") { e.names.expert_parts } else { hidden_parts };
        e.mlp(shared, e.names.shared, parts, hidden, &mut weights);
        if moe.shared_gate {
            let name = e.name("mlp", "shared_expert_gate.weight");
            weights.push(e.p.weight(name, &[1, hidden], Shard::Replicated));
        }
    }
    if let Some(dense) = &moe.dense {
        e.mlp(dense, e.names.mlp, e.names.mlp_parts, hidden, &mut weights);
    }
    let inner = moe.expert.intermediate_size * if moe.expert.gated { 2 } else { 1 };
    let scratch = moe.top_k.saturating_mul(inner.max(width));
    e.op(Feature::Experts, "mixture of experts", (x, Some(add)), weights, scratch)
}

fn router(e: &mut Emit<'_, '_>, moe: &MoeSpec, weights: &mut Vec<WeightId>) {
    let name = e.name("", e.names.router);
    let shape = [moe.num_experts, e.spec.hidden_size];
    weights.push(e.p.weight_as(Role::Router, format!("{name}.weight"), &shape, Shard::Replicated));
    let bias = match moe.router {
        Router::Plain => return,
        Router::Biased => "bias",
        Router::ScoreCorrected => "e_score_correction_bias",
    };
    weights.push(e.vector(&format!("{name}.{bias}"), moe.num_experts, Shard::Replicated));
}

fn routed(e: &mut Emit<'_, '_>, moe: &MoeSpec, width: u64, weights: &mut Vec<WeightId>) {
    let MlpSpec { intermediate_size: inner, gated, bias, .. } = moe.expert;
    let [gate, up, down] = e.names.expert_parts;
    let mut project = |part: &str, out: u64, width: u64, shard: Shard| {
        let name = e.name(e.names.experts, part);
        let shape = [moe.num_experts, out, width];
        weights.push(e.p.weight_as(Role::Experts, format!("{name}.weight"), &shape, shard));
        if bias {
            weights.push(e.p.weight(format!("{name}.bias"), &[moe.num_experts, out], Shard::Replicated));
        }
    };
    match (gated, up) {
        (true, "") => project(gate, 2 * inner, width, Shard::FusedGateUp),
        (true, up) => {
            project(gate, inner, width, Shard::Column);
            project(up, inner, width, Shard::Column);
        }
        (false, up) => project(if up.is_empty() { gate } else { up }, inner, width, Shard::Column),
    }
    project(down, width, inner, Shard::Row);
}
