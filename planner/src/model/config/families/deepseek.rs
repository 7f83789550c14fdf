//! DeepSeek V2, V3, V3.2 and what follows their geometry: Kimi K2, GLM-5, MiniCPM3.

use super::super::architecture::Architecture;
use super::super::base::Base;
use super::super::{ConfigError, fields::Fields, limits};
use crate::model::{
    Family, Ffn, IndexerSpec, LatentAttentionSpec, LayerSpec, Mixer, ModelSpec, MoeSpec, OutputGate, Router,
};

pub(in super::super) fn spec(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    if arch.name == "DeepseekForCausalLM" || base.text.boolean("use_mla")? == Some(false) {
        return grouped(&base);
    }
    let latent = latent(&base)?;
    let indexers = indexers(&base)?;
    let layers = indexers.into_iter().zip(ffns(&base)?).map(|(indexer, ffn)| LayerSpec {
        mixer: Mixer::Latent(LatentAttentionSpec { indexer, ..latent.clone() }),
        ffn,
    });
    base.spec(layers.collect())
}

/// MiniCPM3: the same attention with dense layers and tied embeddings.
pub(in super::super) fn mini_cpm3(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let layer = LayerSpec { mixer: Mixer::Latent(latent(&base)?), ffn: Ffn::Dense(base.mlp()?) };
    base.tied_by_default(base.spec(vec![layer; base.layers as usize])?)
}

/// DeepSeekMoE, the first: plain multi-head attention.
fn grouped(base: &Base<'_>) -> Result<ModelSpec, ConfigError> {
    let attention = base.attention(base.kv_heads_or_all()?)?;
    let layers = ffns(base)?.into_iter().map(|ffn| LayerSpec { mixer: Mixer::Attention(attention.clone()), ffn });
    base.spec(layers.collect())
}

pub(super) fn latent(base: &Base<'_>) -> Result<LatentAttentionSpec, ConfigError> {
    let qk_rope_head_dim = base.need("qk_rope_head_dim", limits::HEAD_DIM)?;
    // Left out where it is hidden / heads (MiniCPM3).
    let v_head_dim = match base.get(&["v_head_dim"], limits::HEAD_DIM)? {
        Some(dim) => dim,
        None => super::super::decoder::quotient(&base.text, base.hidden, base.heads)?,
    };
    Ok(LatentAttentionSpec {
        num_heads: base.heads,
        q_lora_rank: base.get(&["q_lora_rank"], limits::RANK)?,
        kv_lora_rank: base.need("kv_lora_rank", limits::RANK)?,
        qk_nope_head_dim: base.need("qk_nope_head_dim", limits::HEAD_DIM)?,
        qk_rope_head_dim,
        v_head_dim,
        rope: base.rope(qk_rope_head_dim)?,
        bias: base.flag("attention_bias")?,
        gate: OutputGate::None,
        indexer: None,
    })
}

/// One for each layer where the file describes sparse attention; `indexer_types` says which layers share one.
fn indexers(base: &Base<'_>) -> Result<Vec<Option<IndexerSpec>>, ConfigError> {
    let Some(num_heads) = base.get(&["index_n_heads"], limits::HEADS)? else {
        return Ok(vec![None; base.layers as usize]);
    };
    let indexer = IndexerSpec {
        num_heads,
        head_dim: base.need("index_head_dim", limits::HEAD_DIM)?,
        topk: base.need("index_topk", limits::POSITIONS)?,
        own: true,
    };
    let Some(kinds) = base.words("indexer_types")? else { return Ok(vec![Some(indexer); base.layers as usize]) };
    let of = |kind: &str| match kind {
        "full" => Ok(Some(indexer)),
        "shared" => Ok(Some(IndexerSpec { own: false, ..indexer })),
        other => Err(base.text.unsupported("indexer_types", other, "supported: full, shared")),
    };
    kinds.into_iter().map(of).collect()
}

fn ffns(base: &Base<'_>) -> Result<Vec<Ffn>, ConfigError> {
    let dense = base.mlp()?;
    if base.text.value("n_routed_experts").is_none() {
        return Ok(vec![Ffn::Dense(dense); base.layers as usize]);
    }
    let moe = base.with_shared(base.experts()?)?;
    let corrected = matches!(base.text.string(&["topk_method"])?, Some((_, "noaux_tc")))
        || matches!(base.arch.family, Family::DeepseekV3 | Family::GlmMoeDsa);
    let router = if corrected { Router::ScoreCorrected } else { Router::Plain };
    base.dense_then_experts(dense, MoeSpec { router, ..moe })
}
