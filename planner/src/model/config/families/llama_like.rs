//! Decoders that are Llama but for biases, norms or names: Yi, XVERSE, InternLM, OLMo, EXAONE, Granite, Baichuan,
//! StarCoder2, StableLM, SmolLM3, Apertus, Nemotron and others.

use super::super::architecture::Architecture;
use super::super::base::{Base, attention_layer, per_head};
use super::super::{ConfigError, fields::Fields, limits};
use super::experts;
use crate::model::{Activation, AttentionSpec, Family, Ffn, Mask, MlpSpec, ModelSpec, NormKind, QkNorm};

/// XVERSE, and image models around a Llama, Mistral or Phi-3: multi-head where KV heads are not stated.
pub(in super::super) fn plain(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.kv_heads_or_all()?)?;
    // Llama files may carry a window that their class does not read.
    let mask = match base.get(&["sliding_window"], limits::POSITIONS)? {
        Some(window) if arch.family != Family::Llama && window < base.context()? => Mask::Sliding { window },
        _ => Mask::Causal,
    };
    base.spec(base.uniform(AttentionSpec { mask, ..attention }, base.mlp()?))
}

/// InternLM2: `bias` for every product of attention.
pub(in super::super) fn intern_lm2(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let bias = base.flag("bias")?;
    let attention = base.attention(base.kv_heads_or_all()?)?;
    base.spec(base.uniform(AttentionSpec { qkv_bias: bias, output_bias: bias, ..attention }, base.mlp()?))
}

/// InternLM 1 and 3 (`bias`, `qkv_bias`), Seed-OSS (`attention_bias`, `attention_out_bias`), MiMo (`attention_bias` on
/// q, k and v).
pub(in super::super) fn biased(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let bias = base.flag("bias")?;
    let attention = base.attention(base.kv_heads_or_all()?)?;
    let attention = AttentionSpec {
        qkv_bias: bias || base.flag("qkv_bias")? || attention.qkv_bias,
        output_bias: bias || base.flag("attention_out_bias")?,
        ..attention
    };
    base.spec(base.uniform(attention, base.mlp()?))
}

/// Baichuan: the 13B has ALiBi instead of rotary positions.
pub(in super::super) fn baichuan(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    base.spec(base.uniform(base.attention(base.kv_heads_or_all()?)?, base.mlp()?))
}

/// OLMo 1: a norm without weights.
pub(in super::super) fn olmo(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let spec = base.spec(base.uniform(base.attention(base.kv_heads_or_all()?)?, base.mlp()?))?;
    Ok(ModelSpec { norm: base.norm(NormKind::Layer)?, ..spec })
}

/// OLMo 2 and 3, EXAONE 4: norms behind the blocks, QK norm, windows in three of four layers where there are any.
pub(in super::super) fn post_norm(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let exaone = arch.family == Family::Exaone4;
    let qk_norm = if exaone { QkNorm::PerHead } else { QkNorm::AllHeads };
    let attention = AttentionSpec { qk_norm, ..base.attention(base.kv_heads_or_all()?)? };
    let slides = sliding_pattern(&base)?;
    let mlp = base.mlp()?;
    let layers = base.masks(slides)?.into_iter().map(|mask| {
        let attention = AttentionSpec { mask, ..attention.clone() };
        attention_layer(attention, Ffn::Dense(mlp))
    });
    base.spec(layers.collect())
}

/// Letters for the layers (`LLLG`: three local, one global), or every n-th layer global.
pub(super) fn sliding_pattern(base: &Base<'_>) -> Result<impl Fn(u64) -> bool, ConfigError> {
    const FIELD: &str = "sliding_window_pattern";
    let local: Vec<bool> = match base.text.value(FIELD) {
        None => Vec::new(),
        Some(value) if value.is_string() => {
            let letters = base.text.string(&[FIELD])?.map_or("", |(_, letters)| letters);
            letters.bytes().take(1024).map(|letter| letter == b'L').collect()
        }
        Some(_) => {
            let every = base.need(FIELD, limits::LAYERS)?;
            (1..=every).map(|i| i < every).collect()
        }
    };
    Ok(move |i: u64| !local.is_empty() && local[i as usize % local.len()])
}

/// OLMoE: QK norm over all heads, experts in every layer.
pub(in super::super) fn olmoe(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec { qk_norm: QkNorm::AllHeads, ..base.attention(base.kv_heads()?)? };
    let layer = attention_layer(attention, Ffn::Experts(base.experts()?));
    base.spec(vec![layer; base.layers as usize])
}

/// StarCoder2: LayerNorm, biases, an MLP without a gate.
pub(in super::super) fn star_coder2(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let bias = base.text.boolean("use_bias")?.unwrap_or(true);
    let mask = match base.get(&["sliding_window"], limits::POSITIONS)? {
        Some(window) if window < base.context()? => Mask::Sliding { window },
        _ => Mask::Causal,
    };
    let attention = AttentionSpec { mask, qkv_bias: bias, output_bias: bias, ..base.attention(base.kv_heads()?)? };
    let mlp = MlpSpec { gated: false, bias, ..base.mlp()? };
    let spec = base.tied_by_default(base.spec(base.uniform(attention, mlp))?)?;
    Ok(ModelSpec { norm: base.norm(NormKind::Layer)?, ..spec })
}

/// StableLM: LayerNorm, biases on q, k and v by a flag.
pub(in super::super) fn stable_lm(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec { qkv_bias: base.flag("use_qkv_bias")?, ..base.attention(base.kv_heads_or_all()?)? };
    let spec = base.spec(base.uniform(attention, base.mlp()?))?;
    Ok(ModelSpec { norm: base.norm(NormKind::Layer)?, ..spec })
}

/// Granite, SmolLM3: Llama with embeddings tied by default.
pub(in super::super) fn tied(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    base.tied_by_default(base.spec(base.uniform(base.attention(base.kv_heads()?)?, base.mlp()?))?)
}

/// Apertus: xIELU between two products, QK norm.
pub(in super::super) fn apertus(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec { qk_norm: QkNorm::PerHead, ..base.attention(base.kv_heads()?)? };
    let mlp = MlpSpec { gated: false, activation: Activation::Special, ..base.mlp()? };
    base.spec(base.uniform(attention, mlp))
}

/// Nemotron (not H): LayerNorm, squared ReLU between two products.
pub(in super::super) fn nemotron(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let mlp = MlpSpec { gated: false, ..base.mlp()? };
    let spec = base.spec(base.uniform(base.attention(base.kv_heads()?)?, mlp))?;
    Ok(ModelSpec { norm: base.norm(NormKind::Layer)?, ..spec })
}

/// Command-R: one norm for attention and MLP side by side; Cohere2 slides in three of four layers.
pub(in super::super) fn cohere(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let qk_norm = if base.flag("use_qk_norm")? { QkNorm::AllHeads } else { QkNorm::None };
    let attention = AttentionSpec { qk_norm, ..base.attention(base.kv_heads_or_all()?)? };
    let pattern = base.get(&["sliding_window_pattern"], limits::LAYERS)?;
    let second = arch.name.starts_with("Cohere2") || matches!(base.text.string(&["model_type"])?, Some((_, "cohere2")));
    let slides = |i: u64| second && !(i + 1).is_multiple_of(pattern.unwrap_or(4));
    let mlp = base.mlp()?;
    let layers = base.masks(slides)?.into_iter().map(|mask| {
        let attention = AttentionSpec { mask, ..attention.clone() };
        attention_layer(attention, Ffn::Dense(mlp))
    });
    let spec = base.tied_by_default(base.spec(layers.collect())?)?;
    Ok(ModelSpec { norm: base.norm(NormKind::Layer)?, ..spec })
}

/// MiniCPM, the first two: Llama with tied embeddings and scaled residuals.
pub(in super::super) fn mini_cpm(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    base.tied_by_default(base.spec(base.uniform(base.attention(base.kv_heads_or_all()?)?, base.mlp()?))?)
}

/// EXAONE 3: Llama under other names (`num_layers`, `activation_function`).
pub(in super::super) fn exaone(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    plain(arch, root)
}

/// Hunyuan dense: QK norm by a flag, tied embeddings by a flag.
pub(in super::super) fn hunyuan(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let qk_norm = per_head(base.flag("use_qk_norm")? || base.flag("qk_norm")?);
    let attention = AttentionSpec { qk_norm, ..base.attention(base.kv_heads()?)? };
    let mlp = base.mlp()?;
    let attentions = experts::shared_caches(&base, &attention)?;
    base.spec(attentions.into_iter().map(|attention| attention_layer(attention, Ffn::Dense(mlp))).collect())
}

/// ERNIE 4.5: `use_bias` for all products.
pub(in super::super) fn ernie(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let bias = base.flag("use_bias")?;
    let attention = AttentionSpec { qkv_bias: bias, output_bias: bias, ..base.attention(base.kv_heads()?)? };
    let mlp = MlpSpec { bias, ..base.mlp()? };
    base.tied_by_default(base.spec(base.uniform(attention, mlp))?)
}
