//! Gemma 1, 3n and 4. Gemma 2 and 3 run, and are read with the decoders that do.

use super::super::architecture::Architecture;
use super::super::base::{Base, attention_layer};
use super::super::fields::{Fields, printable};
use super::super::json::Value;
use super::super::{ConfigError, limits};
use crate::model::{
    Activation, AttentionSpec, Extras, Ffn, KvOrigin, Mask, MlpSpec, ModelSpec, MoeSpec, Norm, PerLayerInput, QkNorm,
};
use std::collections::BTreeMap;

/// All Gemmas scale embeddings, offset norms and tie the head.
fn gemma_spec(base: &Base<'_>, spec: ModelSpec) -> Result<ModelSpec, ConfigError> {
    let spec = base.tied_by_default(spec)?;
    Ok(ModelSpec {
        embedding_scale: Some((base.hidden as f64).sqrt()),
        norm: Norm { unit_offset: true, ..spec.norm },
        final_logit_softcap: base.text.float(&["final_logit_softcapping"], limits::SOFTCAP)?,
        ..spec
    })
}

pub(in super::super) fn first(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let mlp = MlpSpec { activation: Activation::GeluTanh, ..base.mlp()? };
    gemma_spec(&base, base.spec(base.uniform(base.attention(base.kv_heads()?)?, mlp))?)
}

/// Gemma 2 within image models (PaliGemma 2): a window in every second layer.
pub(in super::super) fn second(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.kv_heads()?)?;
    let mlp = MlpSpec { activation: Activation::GeluTanh, ..base.mlp()? };
    let window = base.get(&["sliding_window"], limits::POSITIONS)?.unwrap_or(4096);
    let layers = (0..base.layers).map(|i| {
        let mask = if i.is_multiple_of(2) { Mask::Sliding { window } } else { Mask::Causal };
        attention_layer(AttentionSpec { mask, ..attention.clone() }, Ffn::Dense(mlp))
    });
    gemma_spec(&base, base.spec(layers.collect())?)
}

/// Gemma 3n and 4: full layers with heads of their own, the last layers without a cache of theirs.
pub(in super::super) fn later(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let sliding = AttentionSpec { qk_norm: QkNorm::PerHead, ..base.attention(base.kv_heads()?)? };
    let full = full_attention(&base, &sliding)?;
    let masks = base.masks(|i| !(i + 1).is_multiple_of(6))?;
    let shared = base.get(&["num_kv_shared_layers"], 0..=base.layers)?.unwrap_or(0);
    let first_shared = (base.layers - shared) as usize;
    let ffns = ffns(&base, first_shared)?;
    let own = own_heads(&base)?;
    let mut layers = Vec::with_capacity(masks.len());
    for (i, (mask, ffn)) in masks.iter().copied().zip(ffns).enumerate() {
        let of_kind = if matches!(mask, Mask::Sliding { .. }) { &sliding } else { &full };
        let mut attention = AttentionSpec { mask, ..of_kind.clone() };
        if let Some(&(head_dim, kv_heads)) = own.get(&(i as u64)) {
            attention.num_kv_heads = kv_heads.unwrap_or(attention.num_kv_heads);
            attention.head_dim = head_dim.unwrap_or(attention.head_dim);
            attention.value_head_dim = attention.head_dim;
        }
        if i >= first_shared {
            // The last layer of the same kind that keeps a cache.
            if let Some(layer) = masks[..first_shared].iter().rposition(|other| *other == mask) {
                attention.kv = KvOrigin::SharedWith { layer: layer as u64 };
            }
        }
        layers.push(attention_layer(attention, ffn));
    }
    let spec = gemma_spec(&base, base.spec(layers)?)?;
    let width = base.get(&["hidden_size_per_layer_input"], 0..=*limits::HIDDEN.end())?.filter(|&width| width > 0);
    let vocab_size = base.get(&["vocab_size_per_layer_input"], limits::VOCAB)?.unwrap_or(spec.vocab_size);
    let laurel_rank = base.get(&["laurel_rank"], 0..=*limits::RANK.end())?.unwrap_or(0);
    let altup_inputs = base.get(&["altup_num_inputs"], 0..=64)?.unwrap_or(0);
    let per_layer_input = width.map(|width| PerLayerInput { vocab_size, width, laurel_rank, altup_inputs });
    Ok(ModelSpec { extras: Extras { per_layer_input, ..spec.extras }, ..spec })
}

/// Head size and KV heads of a layer that has its own.
type OwnHeads = BTreeMap<u64, (Option<u64>, Option<u64>)>;

/// `per_layer_config` (transformers 5.24): what single layers have otherwise, by their number.
fn own_heads(base: &Base<'_>) -> Result<OwnHeads, ConfigError> {
    const FIELD: &str = "per_layer_config";
    let mut own = BTreeMap::new();
    let Some(layers) = base.text.object(FIELD)? else { return Ok(own) };
    for (number, value) in layers.entries() {
        let layer = number.parse::<u64>().ok().filter(|&layer| layer < base.layers);
        let (Some(layer), Value::Object(map)) = (layer, value) else {
            let expected = format!("objects by the number of a layer, 0 to {}", base.layers - 1);
            return Err(base.text.out_of_range(FIELD, &printable(number), expected));
        };
        let fields = Fields::new(map);
        if let Some((other, _)) = fields.entries().find(|(name, _)| !["head_dim", "num_key_value_heads"].contains(name))
        {
            return Err(base.text.unsupported(FIELD, other, "supported: head_dim, num_key_value_heads"));
        }
        let kv_heads = fields.uint(&["num_key_value_heads"], limits::HEADS)?;
        if let Some(kv_heads) = kv_heads.filter(|kv_heads| !base.heads.is_multiple_of(*kv_heads)) {
            let expected = format!("KV heads that divide num_attention_heads, {}", base.heads);
            return Err(base.text.out_of_range(FIELD, &kv_heads, expected));
        }
        own.insert(layer, (fields.uint(&["head_dim"], limits::HEAD_DIM)?, kv_heads));
    }
    Ok(own)
}

fn full_attention(base: &Base<'_>, sliding: &AttentionSpec) -> Result<AttentionSpec, ConfigError> {
    let head_dim = base.get(&["global_head_dim"], limits::HEAD_DIM)?.unwrap_or(sliding.head_dim);
    let kv_heads = base.get(&["num_global_key_value_heads"], limits::HEADS)?.unwrap_or(sliding.num_kv_heads);
    if !base.heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of num_attention_heads, {}", base.heads);
        return Err(base.text.out_of_range("num_global_key_value_heads", &kv_heads, expected));
    }
    let kv = if base.flag("attention_k_eq_v")? { KvOrigin::KeyIsValue } else { KvOrigin::Projected };
    Ok(AttentionSpec { num_kv_heads: kv_heads, head_dim, value_head_dim: head_dim, kv, ..sliding.clone() })
}

fn ffns(base: &Base<'_>, first_shared: usize) -> Result<Vec<Ffn>, ConfigError> {
    // Gemma 3n lists a width for each layer.
    let widths = match base.text.value("intermediate_size") {
        Some(value) if value.is_array() => base.numbers("intermediate_size", base.layers as usize)?,
        _ => None,
    };
    let width = |i: usize| match &widths {
        Some(widths) => match widths.get(i) {
            Some(width) if limits::INTERMEDIATE.contains(width) => Ok(*width),
            _ => Err(base.text.out_of_range("intermediate_size", "another list", "a width for each layer")),
        },
        None => base.need("intermediate_size", limits::INTERMEDIATE),
    };
    let wide = base.flag("use_double_wide_mlp")?;
    let moe = if base.flag("enable_moe_block")? { Some(base.experts()?) } else { None };
    (0..base.layers as usize)
        .map(|i| {
            let double = if wide && i >= first_shared { 2 } else { 1 };
            let mlp =
                MlpSpec { activation: Activation::GeluTanh, ..MlpSpec::gated(width(i)? * double, Activation::Gelu) };
            Ok(match moe {
                Some(moe) => Ffn::Experts(MoeSpec { dense: Some(mlp), ..moe }),
                None => Ffn::Dense(mlp),
            })
        })
        .collect()
}
