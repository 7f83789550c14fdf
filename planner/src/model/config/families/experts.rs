//! Grouped-query attention with experts: Mixtral, Phi-MoE, MiniMax, MiMo, Step, gpt-oss, Llama 4, DBRX, Granite MoE,
//! Hunyuan.

use super::super::architecture::Architecture;
use super::super::base::{Base, attention_layer, per_head};
use super::super::{ConfigError, fields::Fields, limits};
use crate::model::{
    Activation, AttentionSpec, Extras, Family, Ffn, IndexerSpec, KvOrigin, LayerSpec, Mask, Mixer, MlpSpec, ModelSpec,
    MoeSpec, NormKind, OutputGate, QkNorm, Router, StateKind, StateSpec,
};

fn all_layers(base: &Base<'_>, attention: AttentionSpec, moe: MoeSpec) -> Vec<LayerSpec> {
    vec![attention_layer(attention, Ffn::Experts(moe)); base.layers as usize]
}

fn window(base: &Base<'_>) -> Result<Mask, ConfigError> {
    Ok(match base.get(&["sliding_window"], limits::POSITIONS)? {
        Some(window) if window < base.context()? => Mask::Sliding { window },
        _ => Mask::Causal,
    })
}

pub(in super::super) fn mixtral(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec { mask: window(&base)?, ..base.attention(base.kv_heads()?)? };
    base.spec(all_layers(&base, attention, base.experts()?))
}

pub(in super::super) fn phi_moe(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec { mask: window(&base)?, ..base.attention(base.kv_heads()?)? };
    let spec = base.spec(all_layers(&base, attention, base.experts()?))?;
    let extras = Extras { lm_head_bias: base.flag("lm_head_bias")?, ..spec.extras };
    Ok(ModelSpec { norm: base.norm(NormKind::Layer)?, extras, ..spec })
}

pub(in super::super) fn mini_max_m2(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let qk_norm = match base.text.string(&["qk_norm_type"])? {
        _ if !base.flag("use_qk_norm")? => QkNorm::None,
        Some((_, "per_head")) => QkNorm::PerHead,
        _ => QkNorm::AllHeads,
    };
    let attention = AttentionSpec { qk_norm, ..base.attention(base.kv_heads()?)? };
    let moe = MoeSpec { router: Router::ScoreCorrected, ..base.experts()? };
    base.spec(all_layers(&base, attention, moe))
}

/// MiniMax M3: blocks of keys picked by an indexer in most layers.
pub(in super::super) fn mini_max_m3(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec {
        qk_norm: per_head(base.flag("use_qk_norm")?),
        gate: if base.flag("attention_output_gate")? { OutputGate::PerElement } else { OutputGate::None },
        ..base.attention(base.kv_heads()?)?
    };
    let sparse = sparse_layers(&base)?;
    let dense = base.mlp_of(base.need("dense_intermediate_size", limits::INTERMEDIATE)?)?;
    let moe = base.experts()?;
    let shared = match base.get(&["shared_intermediate_size"], 0..=*limits::INTERMEDIATE.end())? {
        Some(0) | None => None,
        Some(size) => Some(MlpSpec { intermediate_size: size, ..moe.expert }),
    };
    let moe = MoeSpec { shared, router: Router::ScoreCorrected, ..moe };
    let layers = base.dense_then_experts(dense, moe)?.into_iter().zip(sparse);
    let layers = layers.map(|(ffn, indexer)| attention_layer(AttentionSpec { indexer, ..attention.clone() }, ffn));
    let spec = base.spec(layers.collect())?;
    let norm = crate::model::Norm { unit_offset: base.flag("use_gemma_norm")?, ..spec.norm };
    let mtp_layers = base.get(&["num_mtp_modules"], 0..=64)?.unwrap_or(spec.extras.mtp_layers);
    Ok(ModelSpec { norm, extras: Extras { mtp_layers, ..spec.extras }, ..spec })
}

fn sparse_layers(base: &Base<'_>) -> Result<Vec<Option<IndexerSpec>>, ConfigError> {
    let none = vec![None; base.layers as usize];
    let Some(sparse) = base.text.object("sparse_attention_config")? else { return Ok(none) };
    if sparse.boolean("use_sparse_attention")? == Some(false) {
        return Ok(none);
    }
    let blocks = sparse.required_uint(&["sparse_topk_blocks"], 1..=65_536)?;
    let indexer = IndexerSpec {
        num_heads: sparse.required_uint(&["sparse_num_index_heads"], limits::HEADS)?,
        head_dim: sparse.required_uint(&["sparse_index_dim"], limits::HEAD_DIM)?,
        topk: blocks * sparse.required_uint(&["sparse_block_size"], 1..=65_536)?,
        own: true,
    };
    let layers = base.flags(&sparse, "sparse_attention_freq")?.unwrap_or(vec![true; base.layers as usize]);
    Ok(layers.into_iter().map(|on| on.then_some(indexer)).collect())
}

/// MiniMax-01 and M1: lightning attention in most layers.
pub(in super::super) fn mini_max_01(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.kv_heads()?)?;
    let head_dim = attention.head_dim;
    let state = StateSpec {
        kind: StateKind::Lightning,
        value_heads: base.heads,
        value_head_dim: head_dim,
        key_heads: base.heads,
        key_head_dim: head_dim,
        conv_kernel: 0,
        state_dtype: Some(crate::model::DType::F32),
        dt_rank: 0,
        bias: false,
        conv_bias: false,
    };
    let full = match base.flags(&base.text, "attn_type_list")? {
        Some(full) => full,
        None => base
            .words("layer_types")?
            .ok_or_else(|| ConfigError::Missing {
                field: base.text.path("attn_type_list"),
                expected: "0 (lightning) or 1 (full) for each layer".to_owned(),
            })?
            .into_iter()
            .map(|kind| kind == "full_attention")
            .collect(),
    };
    let moe = base.experts()?;
    let layers = full.into_iter().map(|full| {
        let mixer = if full { Mixer::Attention(attention.clone()) } else { Mixer::State(state.clone()) };
        LayerSpec { mixer, ffn: Ffn::Experts(moe) }
    });
    base.spec(layers.collect())
}

/// MiMo-V2: sliding layers with heads of their own, narrower values, sinks.
pub(in super::super) fn mimo_v2(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let full = base.attention(base.kv_heads()?)?;
    let full = AttentionSpec {
        value_head_dim: base.get(&["v_head_dim"], limits::HEAD_DIM)?.unwrap_or(full.head_dim),
        sinks: base.flag("add_full_attention_sink_bias")?,
        ..full
    };
    let heads = base.get(&["swa_num_attention_heads"], limits::HEADS)?.unwrap_or(full.num_heads);
    // transformers 5 lists kinds of layers and leaves out how they differ.
    let kv_heads = match base.text.value("hybrid_layer_pattern") {
        None if base.text.value("layer_types").is_some() => base.need("swa_num_key_value_heads", limits::HEADS)?,
        _ => base.get(&["swa_num_key_value_heads"], limits::HEADS)?.unwrap_or(full.num_kv_heads),
    };
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of swa_num_attention_heads, {heads}");
        return Err(base.text.out_of_range("swa_num_key_value_heads", &kv_heads, expected));
    }
    let window = base.need("sliding_window", limits::POSITIONS)?;
    let sliding = AttentionSpec {
        num_heads: heads,
        num_kv_heads: kv_heads,
        head_dim: base.get(&["swa_head_dim"], limits::HEAD_DIM)?.unwrap_or(full.head_dim),
        value_head_dim: base.get(&["swa_v_head_dim"], limits::HEAD_DIM)?.unwrap_or(full.value_head_dim),
        mask: Mask::Sliding { window },
        sinks: base.flag("add_swa_attention_sink_bias")?,
        ..full.clone()
    };
    let slides = match base.flags(&base.text, "hybrid_layer_pattern")? {
        Some(slides) => slides,
        None if base.text.value("layer_types").is_some() => {
            base.masks(|_| false)?.iter().map(|mask| mask.reach().is_some()).collect()
        }
        None => {
            return Err(ConfigError::Missing {
                field: base.text.path("hybrid_layer_pattern"),
                expected: "0 (full) or 1 (sliding) for each layer".to_owned(),
            });
        }
    };
    let moe = MoeSpec { router: Router::ScoreCorrected, ..base.with_shared(base.experts()?)? };
    let ffns = base.dense_then_experts(base.mlp()?, moe)?;
    let layers = ffns
        .into_iter()
        .zip(slides)
        .map(|(ffn, slides)| attention_layer(if slides { sliding.clone() } else { full.clone() }, ffn));
    base.spec(layers.collect())
}

/// Step 3.5 and 3.7: windows in three of four layers (with more heads where the file says so), gated heads.
pub(in super::super) fn step(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let groups = base.get(&["num_attention_groups"], limits::HEADS)?;
    let full = base.attention(match groups {
        Some(groups) if base.heads.is_multiple_of(groups) => groups,
        _ => base.kv_heads()?,
    })?;
    let full = AttentionSpec { qk_norm: QkNorm::PerHead, gate: OutputGate::PerHead, ..full };
    let mut sliding = full.clone();
    if let Some(other) = base.text.object("attention_other_setting")? {
        sliding.num_heads = other.uint(&["num_attention_heads"], limits::HEADS)?.unwrap_or(full.num_heads);
        sliding.num_kv_heads = other.uint(&["num_attention_groups"], limits::HEADS)?.unwrap_or(full.num_kv_heads);
        sliding.head_dim = other.uint(&["head_dim"], limits::HEAD_DIM)?.unwrap_or(full.head_dim);
        sliding.value_head_dim = sliding.head_dim;
        if !sliding.num_heads.is_multiple_of(sliding.num_kv_heads) {
            let expected = format!("a divisor of num_attention_heads, {}", sliding.num_heads);
            return Err(other.out_of_range("num_attention_groups", &sliding.num_kv_heads, expected));
        }
    }
    let moe = base.experts()?;
    let shared = base.get(&["share_expert_dim", "share_expert_dims"], limits::INTERMEDIATE)?;
    let shared = shared.map(|size| MlpSpec { intermediate_size: size, ..moe.expert });
    let router = if base.flag("use_moe_router_bias")? { Router::ScoreCorrected } else { Router::Plain };
    let ffns = base.dense_then_experts(base.mlp()?, MoeSpec { shared, router, ..moe })?;
    let masks = base.masks(|i| !i.is_multiple_of(4))?;
    let layers = ffns.into_iter().zip(masks).map(|(ffn, mask)| {
        let attention = if matches!(mask, Mask::Sliding { .. }) { &sliding } else { &full };
        attention_layer(AttentionSpec { mask, ..attention.clone() }, ffn)
    });
    base.spec(layers.collect())
}

/// gpt-oss: a window in every second layer, sinks, biases everywhere.
pub(in super::super) fn gpt_oss(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let bias = base.text.boolean("attention_bias")?.unwrap_or(true);
    let attention =
        AttentionSpec { sinks: true, qkv_bias: bias, output_bias: bias, ..base.attention(base.kv_heads()?)? };
    let moe = base.experts()?;
    let expert = MlpSpec { bias: true, activation: Activation::Special, ..moe.expert };
    let moe = MoeSpec { expert, router: Router::Biased, ..moe };
    let layers = base
        .masks(|i| i.is_multiple_of(2))?
        .into_iter()
        .map(|mask| attention_layer(AttentionSpec { mask, ..attention.clone() }, Ffn::Experts(moe)));
    base.spec(layers.collect())
}

/// Llama 4: chunks in three of four layers, experts with a shared one in every layer or every second.
pub(in super::super) fn llama4(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let qk_norm = if base.flag("use_qk_norm")? { QkNorm::Weightless } else { QkNorm::None };
    let attention = AttentionSpec { qk_norm, ..base.attention(base.kv_heads()?)? };
    let chunk = base.get(&["attention_chunk_size"], limits::POSITIONS)?;
    let interval = base.get(&["nope_layer_interval"], limits::LAYERS)?.unwrap_or(4);
    let rotates = match base.text.list("no_rope_layers")? {
        None | Some([]) => None,
        Some(_) => base.flags(&base.text, "no_rope_layers")?,
    };
    let words = base.words("layer_types")?;
    let chunked = |i: u64| match (&words, &rotates) {
        (Some(words), _) => words[i as usize] == "chunked_attention",
        (None, Some(rotates)) => rotates[i as usize],
        (None, None) => !(i + 1).is_multiple_of(interval),
    };
    let step = base.get(&["interleave_moe_layer_step"], 0..=*limits::LAYERS.end())?.unwrap_or(1);
    let moe = base.experts()?;
    let moe = MoeSpec { shared: Some(moe.expert), ..moe };
    let dense = base.mlp_of(base.need("intermediate_size_mlp", limits::INTERMEDIATE)?)?;
    let layers = (0..base.layers).map(|i| {
        let mask = match chunk {
            Some(chunk) if chunked(i) => Mask::Chunked { chunk },
            _ => Mask::Causal,
        };
        let ffn = if step > 0 && (i + 1).is_multiple_of(step) { Ffn::Experts(moe) } else { Ffn::Dense(dense) };
        attention_layer(AttentionSpec { mask, ..attention.clone() }, ffn)
    });
    base.spec(layers.collect())
}

pub(in super::super) fn dbrx(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let missing = |field: &str| ConfigError::Missing { field: field.to_owned(), expected: "an object".to_owned() };
    let attn = base.text.object("attn_config")?.ok_or_else(|| missing("attn_config"))?;
    let ffn = base.text.object("ffn_config")?.ok_or_else(|| missing("ffn_config"))?;
    let kv_heads = attn.required_uint(&["kv_n_heads"], limits::HEADS)?;
    if !base.heads.is_multiple_of(kv_heads) {
        return Err(attn.out_of_range("kv_n_heads", &kv_heads, format!("a divisor of n_heads, {}", base.heads)));
    }
    let num_experts = ffn.required_uint(&["moe_num_experts"], limits::EXPERTS)?;
    let expert = MlpSpec::gated(ffn.required_uint(&["ffn_hidden_size"], limits::INTERMEDIATE)?, Activation::Silu);
    let moe = MoeSpec {
        num_experts,
        top_k: ffn.required_uint(&["moe_top_k"], 1..=num_experts)?,
        expert,
        shared: None,
        shared_gate: false,
        dense: None,
        latent_size: None,
        router: Router::Plain,
    };
    let spec = base.spec(all_layers(&base, base.attention(kv_heads)?, moe))?;
    Ok(ModelSpec { norm: base.norm(NormKind::Layer)?, ..spec })
}

/// Granite MoE, tied; one shared MLP where the file has its width.
pub(in super::super) fn granite_moe(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let layers = all_layers(&base, base.attention(base.kv_heads()?)?, granite_experts(&base)?);
    base.tied_by_default(base.spec(layers)?)
}

pub(super) fn granite_experts(base: &Base<'_>) -> Result<MoeSpec, ConfigError> {
    let moe = base.experts()?;
    let shared = base.get(&["shared_intermediate_size"], 0..=*limits::INTERMEDIATE.end())?.filter(|&size| size > 0);
    Ok(MoeSpec { shared: shared.map(|size| MlpSpec { intermediate_size: size, ..moe.expert }), ..moe })
}

/// Hunyuan with experts: a shared one beside them.
pub(in super::super) fn hunyuan(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    debug_assert_eq!(arch.family, Family::Hunyuan);
    let attention = AttentionSpec { qk_norm: per_head(base.flag("use_qk_norm")?), ..base.attention(base.kv_heads()?)? };
    let moe = base.experts()?;
    let count = base.same(&["num_shared_expert"], 0..=64)?.unwrap_or(1);
    let width = count * base.mlp()?.intermediate_size;
    let shared =
        (base.flag("use_mixed_mlp_moe")? && width > 0).then_some(MlpSpec { intermediate_size: width, ..moe.expert });
    let skipped = base.get(&["moe_layer_num_skipped"], 0..=base.layers)?.unwrap_or(0);
    let moe = MoeSpec { shared, ..moe };
    let of_layer = |i: u64| if i < skipped { base.mlp().map(Ffn::Dense) } else { Ok(Ffn::Experts(moe)) };
    let ffns = (0..base.layers).map(of_layer).collect::<Result<Vec<_>, _>>()?;
    let layers = ffns.into_iter().zip(shared_caches(&base, &attention)?);
    base.spec(layers.map(|(ffn, attention)| attention_layer(attention, ffn)).collect())
}

/// Cross-layer attention: of so many layers the first keeps the keys and values of all.
pub(super) fn shared_caches(base: &Base<'_>, attention: &AttentionSpec) -> Result<Vec<AttentionSpec>, ConfigError> {
    let share = match base.flag("use_cla")? {
        true => base.get(&["cla_share_factor"], 1..=*limits::LAYERS.end())?.unwrap_or(2),
        false => 1,
    };
    let kv = |i: u64| match i % share {
        0 => attention.kv,
        behind => KvOrigin::SharedWith { layer: i - behind },
    };
    Ok((0..base.layers).map(|i| AttentionSpec { kv: kv(i), ..attention.clone() }).collect())
}

/// Grok: experts, and in Grok 2 a dense MLP beside them.
pub(in super::super) fn grok(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let dense = if base.flag("residual_moe")? { Some(base.mlp()?) } else { None };
    let moe = MoeSpec { dense, ..base.experts()? };
    base.spec(all_layers(&base, base.attention(base.kv_heads()?)?, moe))
}
