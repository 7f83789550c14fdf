//! The weights of every kind of mixer.

use super::planned::Emit;
use crate::model::{
    AttentionSpec, BufferId, CompressedAttentionSpec, Feature, IndexerSpec, KvOrigin, LatentAttentionSpec, Mixer,
    OutputGate, QkNorm, Shard, StateKind, StateSpec, WeightId,
};

pub(super) fn mixer(e: &mut Emit<'_, '_>, mixer: &Mixer, x: BufferId, add: BufferId) -> BufferId {
    let mut weights = Vec::new();
    let (feature, detail, width) = match mixer {
        Mixer::None => return add,
        Mixer::Attention(a) => {
            let width = attention(e, a, e.names.mixer, &mut weights);
            (Feature::Attention, a.variant().unwrap_or("this family's attention"), width)
        }
        Mixer::Cross(a) => {
            let width = attention(e, a, "cross_attn", &mut weights);
            (Feature::CrossAttention, "attention to an image's tokens", width)
        }
        Mixer::Latent(a) => (Feature::LatentAttention, "latent attention", latent(e, a, &mut weights)),
        Mixer::Compressed(a) => (Feature::CompressedAttention, "compressed attention", compressed(e, a, &mut weights)),
        Mixer::State(s) => {
            let width = state(e, s, state_name(e, s.kind), &mut weights);
            (Feature::StateMixer, kind_name(s.kind), width)
        }
        Mixer::Parallel { attention: a, state: s } => {
            let width = attention(e, a, e.names.mixer, &mut weights) + state(e, s, "mamba", &mut weights);
            (Feature::StateMixer, "attention and state side by side", width)
        }
    };
    e.op(feature, detail, (x, Some(add)), weights, width)
}

/// What messages call it.
fn kind_name(kind: StateKind) -> &'static str {
    match kind {
        StateKind::Mamba1 => "Mamba",
        StateKind::Mamba2 => "Mamba-2",
        StateKind::GatedDeltaNet => "gated delta net",
        StateKind::KimiDelta => "Kimi delta attention",
        StateKind::Lightning => "lightning attention",
        StateKind::ShortConv => "short convolution",
    }
}

fn state_name(e: &Emit<'_, '_>, kind: StateKind) -> &'static str {
    match kind {
        StateKind::GatedDeltaNet => "linear_attn",
        StateKind::ShortConv => "conv",
        _ if e.names.mixer == "mixer" => "mixer",
        StateKind::Mamba1 | StateKind::Mamba2 => "mamba",
        StateKind::KimiDelta | StateKind::Lightning => "self_attn",
    }
}

fn projection(
    e: &mut Emit<'_, '_>,
    name: &str,
    (out, width): (u64, u64),
    shard: Shard,
    bias: bool,
    weights: &mut Vec<WeightId>,
) {
    weights.push(e.matrix(name, out, width, shard));
    if bias {
        let shard = if shard == Shard::Row { Shard::Replicated } else { shard };
        weights.push(e.vector(&format!("{name}.bias"), out, shard));
    }
}

fn attention(e: &mut Emit<'_, '_>, a: &AttentionSpec, parent: &str, weights: &mut Vec<WeightId>) -> u64 {
    let hidden = e.spec.hidden_size;
    let (q, k, v) = (a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, a.num_kv_heads * a.value_head_dim);
    let (kv_own, value_own) = match a.kv {
        KvOrigin::Projected => (true, true),
        KvOrigin::KeyIsValue => (true, false),
        KvOrigin::SharedWith { .. } => (false, false),
    };
    let kv_shard = Shard::KvHeads { heads: a.num_kv_heads };
    match e.names.qkv {
        [fused] if kv_own && value_own && a.head_dim == a.value_head_dim => {
            let name = e.name(parent, fused);
            let shard = Shard::FusedQkv { heads: a.num_heads, kv_heads: a.num_kv_heads };
            projection(e, &name, (q + k + v, hidden), shard, a.qkv_bias, weights);
        }
        names => {
            let part = |i: usize| names.get(i).copied().unwrap_or(["q_proj", "k_proj", "v_proj"][i]);
            let (q_name, k_name, v_name) = (e.name(parent, part(0)), e.name(parent, part(1)), e.name(parent, part(2)));
            projection(e, &q_name, (q, hidden), Shard::Column, a.qkv_bias, weights);
            if kv_own {
                projection(e, &k_name, (k, hidden), kv_shard, a.qkv_bias, weights);
            }
            if value_own {
                projection(e, &v_name, (v, hidden), kv_shard, a.qkv_bias, weights);
            }
        }
    }
    let outputs = a.num_heads * a.value_head_dim;
    let gate = match a.gate {
        OutputGate::None => 0,
        OutputGate::PerElement => outputs,
        OutputGate::PerHead => a.num_heads,
    };
    if gate > 0 {
        let name = e.name(parent, "g_proj");
        projection(e, &name, (gate, hidden), Shard::Column, false, weights);
    }
    let name = e.name(parent, e.names.output);
    projection(e, &name, (hidden, outputs), Shard::Row, a.output_bias, weights);
    let norms = match a.qk_norm {
        QkNorm::None | QkNorm::Weightless => (0, 0),
        QkNorm::PerHead => (a.head_dim, if kv_own { a.head_dim } else { 0 }),
        QkNorm::AllHeads => (q, if kv_own { k } else { 0 }),
    };
    for (part, len) in [("q_norm.weight", norms.0), ("k_norm.weight", norms.1)] {
        if len > 0 {
            let name = e.name(parent, part);
            weights.push(e.vector(&name, len, Shard::Replicated));
        }
    }
    if a.sinks {
        let name = e.name(parent, "sinks");
        weights.push(e.vector(&name, a.num_heads, Shard::Column));
    }
    if let Some(indexer) = &a.indexer {
        block_indexer(e, indexer, parent, weights);
    }
    q + k + v + outputs
}

/// MiniMax M3: queries and one key of its own, both normed.
fn block_indexer(e: &mut Emit<'_, '_>, indexer: &IndexerSpec, parent: &str, weights: &mut Vec<WeightId>) {
    let hidden = e.spec.hidden_size;
    for (part, out) in [("index_q_proj", indexer.num_heads * indexer.head_dim), ("index_k_proj", indexer.head_dim)] {
        let name = e.name(parent, part);
        projection(e, &name, (out, hidden), Shard::Replicated, false, weights);
    }
    for part in ["index_q_norm.weight", "index_k_norm.weight"] {
        let name = e.name(parent, part);
        weights.push(e.vector(&name, indexer.head_dim, Shard::Replicated));
    }
}

fn latent(e: &mut Emit<'_, '_>, a: &LatentAttentionSpec, weights: &mut Vec<WeightId>) -> u64 {
    let hidden = e.spec.hidden_size;
    let parent = e.names.mixer;
    let q = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim);
    match a.q_lora_rank {
        Some(rank) => {
            let (down, up) = (e.name(parent, "q_a_proj"), e.name(parent, "q_b_proj"));
            projection(e, &down, (rank, hidden), Shard::Replicated, a.bias, weights);
            let norm = e.name(parent, "q_a_layernorm.weight");
            weights.push(e.vector(&norm, rank, Shard::Replicated));
            projection(e, &up, (q, rank), Shard::Column, false, weights);
        }
        None => {
            let name = e.name(parent, "q_proj");
            projection(e, &name, (q, hidden), Shard::Column, false, weights);
        }
    }
    let (down, up) = (e.name(parent, "kv_a_proj_with_mqa"), e.name(parent, "kv_b_proj"));
    projection(e, &down, (a.latent_dim(), hidden), Shard::Replicated, a.bias, weights);
    let norm = e.name(parent, "kv_a_layernorm.weight");
    weights.push(e.vector(&norm, a.kv_lora_rank, Shard::Replicated));
    let kv = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim);
    projection(e, &up, (kv, a.kv_lora_rank), Shard::Column, false, weights);
    let outputs = a.num_heads * a.v_head_dim;
    if a.gate == OutputGate::PerElement {
        let name = e.name(parent, "g_proj");
        projection(e, &name, (outputs, hidden), Shard::Column, false, weights);
    }
    let name = e.name(parent, "o_proj");
    projection(e, &name, (hidden, outputs), Shard::Row, a.bias, weights);
    if let Some(indexer) = a.indexer.as_ref().filter(|i| i.own) {
        token_indexer(e, indexer, a.q_lora_rank.unwrap_or(hidden), weights);
    }
    q + kv + a.latent_dim() + outputs
}

/// DeepSeek-V3.2's lightning indexer.
fn token_indexer(e: &mut Emit<'_, '_>, indexer: &IndexerSpec, q_width: u64, weights: &mut Vec<WeightId>) {
    let hidden = e.spec.hidden_size;
    let parent = format!("{}.indexer", e.names.mixer);
    let parts = [
        ("wq_b", indexer.num_heads * indexer.head_dim, q_width),
        ("wk", indexer.head_dim, hidden),
        ("weights_proj", indexer.num_heads, hidden),
    ];
    for (part, out, width) in parts {
        let name = e.name(&parent, part);
        projection(e, &name, (out, width), Shard::Replicated, false, weights);
    }
    for part in ["k_norm.weight", "k_norm.bias"] {
        let name = e.name(&parent, part);
        weights.push(e.vector(&name, indexer.head_dim, Shard::Replicated));
    }
}

fn compressed(e: &mut Emit<'_, '_>, a: &CompressedAttentionSpec, weights: &mut Vec<WeightId>) -> u64 {
    let hidden = e.spec.hidden_size;
    let parent = e.names.mixer;
    let outputs = a.num_heads * a.head_dim;
    let parts = [
        ("wq_a", a.q_lora_rank, hidden, Shard::Replicated),
        ("wq_b", outputs, a.q_lora_rank, Shard::Column),
        ("wkv", a.head_dim, hidden, Shard::Replicated),
        ("wo_a", a.o_groups * a.o_lora_rank, outputs / a.o_groups.max(1), Shard::Column),
        ("wo_b", hidden, a.o_groups * a.o_lora_rank, Shard::Row),
    ];
    for (part, out, width, shard) in parts {
        let name = e.name(parent, part);
        projection(e, &name, (out, width), shard, false, weights);
    }
    for (part, len) in [("q_norm.weight", a.q_lora_rank), ("kv_norm.weight", a.head_dim), ("attn_sink", a.num_heads)] {
        let name = e.name(parent, part);
        weights.push(e.vector(&name, len, Shard::Replicated));
    }
    if a.tokens_per_state > 0 {
        compressor(e, parent, a.tokens_per_state, a.head_dim, weights);
    }
    if let Some(indexer) = &a.indexer {
        let parent = format!("{parent}.indexer");
        let parts = [
            ("wq_b", indexer.num_heads * indexer.head_dim, a.q_lora_rank),
            ("weights_proj", indexer.num_heads, hidden),
        ];
        for (part, out, width) in parts {
            let name = e.name(&parent, part);
            projection(e, &name, (out, width), Shard::Replicated, false, weights);
        }
        compressor(e, &parent, a.tokens_per_state, indexer.head_dim, weights);
    }
    2 * outputs + a.head_dim + a.q_lora_rank
}

/// States over few tokens overlap: twice the width.
fn compressor(e: &mut Emit<'_, '_>, parent: &str, tokens: u64, head_dim: u64, weights: &mut Vec<WeightId>) {
    let width = if tokens <= 4 { 2 * head_dim } else { head_dim };
    let hidden = e.spec.hidden_size;
    let parent = format!("{parent}.compressor");
    for part in ["wkv.weight", "wgate.weight"] {
        let name = e.name(&parent, part);
        weights.push(e.p.weight(name, &[width, hidden], Shard::Replicated));
    }
    let (ape, norm) = (e.name(&parent, "ape"), e.name(&parent, "norm.weight"));
    weights.push(e.p.weight(ape, &[tokens, width], Shard::Replicated));
    weights.push(e.vector(&norm, head_dim, Shard::Replicated));
}

fn state(e: &mut Emit<'_, '_>, s: &StateSpec, parent: &str, weights: &mut Vec<WeightId>) -> u64 {
    let hidden = e.spec.hidden_size;
    let (inner, heads, keys) = (s.inner_size(), s.value_heads, s.key_heads * s.key_head_dim);
    let key_shard = Shard::Groups { groups: s.key_heads.max(1) };
    let mut matrices: Vec<(&str, u64, u64, Shard)> = Vec::new();
    let mut vectors: Vec<(&str, u64)> = Vec::new();
    match s.kind {
        StateKind::Mamba1 => {
            matrices.push(("in_proj", 2 * inner, hidden, Shard::Column));
            matrices.push(("x_proj", s.dt_rank + 2 * s.key_head_dim, inner, Shard::Row));
            matrices.push(("dt_proj", inner, s.dt_rank, Shard::Column));
            matrices.push(("out_proj", hidden, inner, Shard::Row));
            vectors.extend([("dt_proj.bias", inner), ("A_log", inner * s.key_head_dim), ("D", inner)]);
        }
        StateKind::Mamba2 => {
            matrices.push(("in_proj", 2 * inner + 2 * keys + heads, hidden, Shard::Column));
            matrices.push(("out_proj", hidden, inner, Shard::Row));
            vectors.extend([("A_log", heads), ("D", heads), ("dt_bias", heads), ("norm.weight", inner)]);
        }
        StateKind::GatedDeltaNet => {
            matrices.push(("in_proj_qkv", inner + 2 * keys, hidden, Shard::Column));
            matrices.push(("in_proj_z", inner, hidden, Shard::Column));
            matrices.push(("in_proj_ba", 2 * heads, hidden, Shard::Column));
            matrices.push(("out_proj", hidden, inner, Shard::Row));
            vectors.extend([("A_log", heads), ("dt_bias", heads), ("norm.weight", s.value_head_dim)]);
        }
        StateKind::KimiDelta => {
            matrices.push(("q_proj", keys, hidden, key_shard));
            matrices.push(("k_proj", keys, hidden, key_shard));
            matrices.push(("v_proj", inner, hidden, Shard::Column));
            matrices.push(("f_a_proj", s.value_head_dim, hidden, Shard::Replicated));
            matrices.push(("f_b_proj", inner, s.value_head_dim, Shard::Column));
            if s.dt_rank == 0 {
                matrices.push(("g_proj", inner, hidden, Shard::Column));
            } else {
                matrices.push(("g_a_proj", s.dt_rank, hidden, Shard::Replicated));
                matrices.push(("g_b_proj", inner, s.dt_rank, Shard::Column));
            }
            matrices.push(("b_proj", heads, hidden, Shard::Column));
            matrices.push(("o_proj", hidden, inner, Shard::Row));
            vectors.extend([("A_log", heads), ("dt_bias", inner), ("o_norm.weight", s.value_head_dim)]);
        }
        StateKind::Lightning => {
            matrices.push(("qkv_proj", 3 * inner, hidden, Shard::Column));
            matrices.push(("output_gate", inner, hidden, Shard::Column));
            matrices.push(("out_proj", hidden, inner, Shard::Row));
            vectors.push(("norm.weight", inner));
        }
        StateKind::ShortConv => {
            matrices.push(("in_proj", 3 * inner, hidden, Shard::Column));
            matrices.push(("out_proj", hidden, inner, Shard::Row));
        }
    }
    for (part, out, width, shard) in matrices {
        let name = e.name(parent, part);
        projection(e, &name, (out, width), shard, s.bias, weights);
    }
    for (part, len) in vectors {
        let name = e.name(parent, part);
        weights.push(e.vector(&name, len, Shard::Column));
    }
    let channels = s.conv_channels();
    if s.conv_kernel > 0 && channels > 0 {
        let name = e.name(parent, "conv1d.weight");
        weights.push(e.p.weight(name, &[channels, s.conv_kernel], Shard::Column));
        if s.conv_bias {
            let name = e.name(parent, "conv1d.bias");
            weights.push(e.vector(&name, channels, Shard::Column));
        }
    }
    2 * inner + 2 * keys + heads
}
