//! Decoders with windows in some layers, and what else is theirs: EXAONE MoE, Arcee's AFM and Trinity, Hunyuan 3, CWM,
//! FlexOlmo, Command-A with experts; Solar Open and LongCat beside them.

use super::super::architecture::Architecture;
use super::super::base::{Base, attention_layer};
use super::super::{ConfigError, fields::Fields, limits};
use super::{deepseek, llama_like};
use crate::model::{
    AttentionSpec, Ffn, LayerSpec, Mask, Mixer, MlpSpec, ModelSpec, MoeSpec, NormKind, OutputGate, QkNorm, Router,
};

fn with_masks(attention: &AttentionSpec, masks: Vec<Mask>, ffns: Vec<Ffn>) -> Vec<LayerSpec> {
    let layers = masks.into_iter().zip(ffns);
    layers.map(|(mask, ffn)| attention_layer(AttentionSpec { mask, ..attention.clone() }, ffn)).collect()
}

/// Grouped queries with QK norm, routed and shared experts behind a few dense layers.
fn experts(base: &Base<'_>, attention: &AttentionSpec, masks: Vec<Mask>) -> Result<ModelSpec, ConfigError> {
    let moe = MoeSpec { router: Router::ScoreCorrected, ..base.with_shared(base.experts()?)? };
    let ffns = base.dense_then_experts(base.mlp_or(&moe)?, moe)?;
    base.spec(with_masks(attention, masks, ffns))
}

/// EXAONE MoE: windows by letters (`LLLG`) or a list.
pub(in super::super) fn exaone_moe(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec { qk_norm: QkNorm::PerHead, ..base.attention(base.kv_heads()?)? };
    let masks = base.masks(llama_like::sliding_pattern(&base)?)?;
    experts(&base, &attention, masks)
}

/// Arcee's Trinity: gated attention, every fourth layer whole.
pub(in super::super) fn afmoe(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let every = base.get(&["global_attn_every_n_layers"], limits::LAYERS)?.unwrap_or(4);
    let attention = base.attention(base.kv_heads()?)?;
    let attention = AttentionSpec { qk_norm: QkNorm::PerHead, gate: OutputGate::PerElement, ..attention };
    let masks = base.masks(|i| !(i + 1).is_multiple_of(every))?;
    experts(&base, &attention, masks)
}

/// Hunyuan 3.
pub(in super::super) fn hunyuan3(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec { qk_norm: QkNorm::PerHead, ..base.attention(base.kv_heads()?)? };
    let masks = vec![Mask::Causal; base.layers as usize];
    experts(&base, &attention, masks)
}

/// Solar Open: experts in all layers.
pub(in super::super) fn solar_open(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.kv_heads()?)?;
    let masks = vec![Mask::Causal; base.layers as usize];
    experts(&base, &attention, masks)
}

/// CWM: Llama with windows where `layer_types` says so.
pub(in super::super) fn cwm(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let masks = base.masks(|i| !i.is_multiple_of(4))?;
    let ffns = vec![Ffn::Dense(base.mlp()?); base.layers as usize];
    base.spec(with_masks(&base.attention(base.kv_heads()?)?, masks, ffns))
}

/// AFM-4.5B: Llama with squared ReLU between two products.
pub(in super::super) fn arcee(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let mlp = MlpSpec { gated: false, ..base.mlp()? };
    base.spec(base.uniform(base.attention(base.kv_heads_or_all()?)?, mlp))
}

/// LongCat-Flash: each layer attends twice, with an MLP behind each and experts beside both. Some of the experts that a
/// token may pick do nothing.
pub(in super::super) fn longcat(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let latent = deepseek::latent(&base)?;
    let mlp = base.mlp_of(base.need("ffn_hidden_size", limits::INTERMEDIATE)?)?;
    let moe = MoeSpec { router: Router::ScoreCorrected, dense: Some(mlp), ..base.experts()? };
    let half = |ffn: Ffn| LayerSpec { mixer: Mixer::Latent(latent.clone()), ffn };
    let halves = [half(Ffn::Experts(moe)), half(Ffn::Dense(mlp))];
    let layers = halves.iter().cycle().take(2 * base.layers as usize).cloned().collect();
    base.spec(layers)
}

/// Command-A with experts: one norm for attention and experts side by side.
pub(in super::super) fn cohere2_moe(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.kv_heads_or_all()?)?;
    let every = base.get(&["sliding_window_pattern"], limits::LAYERS)?.unwrap_or(4);
    let masks = base.masks(|i| !(i + 1).is_multiple_of(every))?;
    let moe = base.with_shared(base.experts()?)?;
    let ffns = base.dense_then_experts(base.mlp()?, moe)?;
    let spec = base.tied_by_default(base.spec(with_masks(&attention, masks, ffns))?)?;
    Ok(ModelSpec { norm: base.norm(NormKind::Layer)?, ..spec })
}
