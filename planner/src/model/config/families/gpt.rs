//! Decoders from before Llama: GPT-2, GPT-J, GPT-NeoX, GPT-BigCode, OPT, BLOOM, MPT, Falcon, Phi.

use super::super::architecture::Architecture;
use super::super::base::Base;
use super::super::{ConfigError, fields::Fields, limits};
use crate::model::{Activation, AttentionSpec, Extras, MlpSpec, ModelSpec, NormKind, Positions};

/// LayerNorm and biases everywhere.
fn biased(base: &Base<'_>, kv_heads: u64) -> Result<AttentionSpec, ConfigError> {
    Ok(AttentionSpec { qkv_bias: true, output_bias: true, ..base.attention(kv_heads)? })
}

/// Two products with an activation between; four times as wide as the model unless the file says otherwise.
fn two_products(base: &Base<'_>, activation: Activation, bias: bool) -> Result<MlpSpec, ConfigError> {
    const NAMES: [&str; 5] = ["intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "ff_intermediate_size"];
    let width = base.get(&NAMES, limits::INTERMEDIATE)?.unwrap_or(4 * base.hidden);
    let stated = base.text.string(&["hidden_act", "activation_function"])?;
    let activation = if stated.is_some() { base.mlp_of(width)?.activation } else { activation };
    Ok(MlpSpec { intermediate_size: width, activation, gated: false, bias })
}

fn layer_norm(base: &Base<'_>, spec: ModelSpec) -> Result<ModelSpec, ConfigError> {
    Ok(ModelSpec { norm: base.norm(NormKind::Layer)?, ..spec })
}

/// Learned positions: as many as the context, and those that padding takes.
fn learned(spec: ModelSpec, offset: u64) -> ModelSpec {
    let rows = spec.max_position_embeddings + offset;
    ModelSpec { positions: Positions::Learned { rows, offset, token_types: 0 }, ..spec }
}

/// GPT-2, and GPT-BigCode (StarCoder) with one KV head.
pub(in super::super) fn gpt2(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let big_code = arch.family == crate::model::Family::GptBigCode;
    let one = big_code && base.text.boolean("multi_query")?.unwrap_or(true);
    let attention = AttentionSpec { rope: None, ..biased(&base, if one { 1 } else { base.heads })? };
    let mlp = two_products(&base, Activation::GeluTanh, true)?;
    let spec = base.tied_by_default(base.spec(base.uniform(attention, mlp))?)?;
    Ok(learned(layer_norm(&base, spec)?, 0))
}

pub(in super::super) fn gpt_j(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.heads)?;
    let mlp = two_products(&base, Activation::GeluTanh, true)?;
    let spec = layer_norm(&base, base.spec(base.uniform(attention, mlp))?)?;
    Ok(ModelSpec { extras: Extras { lm_head_bias: true, ..spec.extras }, ..spec })
}

pub(in super::super) fn gpt_neox(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let mlp = two_products(&base, Activation::Gelu, true)?;
    let attention = match base.text.boolean("attention_bias")? {
        Some(false) => base.attention(base.heads)?,
        _ => biased(&base, base.heads)?,
    };
    layer_norm(&base, base.spec(base.uniform(attention, mlp))?)
}

pub(in super::super) fn opt(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    if let Some(width) = base.get(&["word_embed_proj_dim"], limits::HIDDEN)?
        && width != base.hidden
    {
        return Err(base.text.unsupported("word_embed_proj_dim", &width, "supported: hidden_size"));
    }
    let attention = AttentionSpec { rope: None, ..biased(&base, base.heads)? };
    let mlp = two_products(&base, Activation::Relu, true)?;
    let spec = base.tied_by_default(base.spec(base.uniform(attention, mlp))?)?;
    Ok(learned(layer_norm(&base, spec)?, 2))
}

pub(in super::super) fn bloom(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    // Files of the large models say nothing of the length that they were trained on: 2,048.
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec { rope: None, ..biased(&base, base.heads)? };
    let mlp =
        MlpSpec { intermediate_size: 4 * base.hidden, activation: Activation::GeluTanh, gated: false, bias: true };
    let spec = base.tied_by_default(base.spec(base.uniform(attention, mlp))?)?;
    layer_norm(&base, spec)
}

pub(in super::super) fn mpt(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let bias = base.text.boolean("no_bias")? == Some(false);
    let kv_heads = match base.text.object("attn_config")? {
        Some(config) => config.uint(&["kv_n_heads"], limits::HEADS)?.unwrap_or(base.heads),
        None => base.heads,
    };
    if !base.heads.is_multiple_of(kv_heads) {
        return Err(base.text.out_of_range("kv_n_heads", &kv_heads, format!("a divisor of n_heads, {}", base.heads)));
    }
    let attention = AttentionSpec { rope: None, qkv_bias: bias, output_bias: bias, ..base.attention(kv_heads)? };
    let ratio = base.get(&["expansion_ratio"], 1..=64)?.unwrap_or(4);
    let mlp = MlpSpec { intermediate_size: ratio * base.hidden, activation: Activation::Gelu, gated: false, bias };
    let spec = base.tied_by_default(base.spec(base.uniform(attention, mlp))?)?;
    layer_norm(&base, spec)
}

/// Falcon 7B has one KV head, 40B and 180B have groups.
pub(in super::super) fn falcon(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let grouped = base.flag("new_decoder_architecture")?;
    let kv_heads = match (grouped, base.text.boolean("multi_query")?.unwrap_or(true)) {
        (true, _) => base.kv_heads_or_all()?,
        (false, true) => 1,
        (false, false) => base.heads,
    };
    let bias = base.flag("bias")?;
    let attention = AttentionSpec { qkv_bias: bias, output_bias: bias, ..base.attention(kv_heads)? };
    let mlp = two_products(&base, Activation::Gelu, bias)?;
    let spec = base.tied_by_default(base.spec(base.uniform(attention, mlp))?)?;
    layer_norm(&base, spec)
}

/// Phi 1 and 2: attention and MLP side by side behind one norm, a biased head.
pub(in super::super) fn phi(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = biased(&base, base.kv_heads_or_all()?)?;
    let mlp = two_products(&base, Activation::GeluTanh, true)?;
    let spec = layer_norm(&base, base.spec(base.uniform(attention, mlp))?)?;
    Ok(ModelSpec { extras: Extras { lm_head_bias: true, ..spec.extras }, ..spec })
}

/// Phi-3-small: GeGELU, biases, tied embeddings. Its block-sparse layers keep the whole cache, as engines have it.
pub(in super::super) fn phi3_small(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = biased(&base, base.kv_heads()?)?;
    let mlp = MlpSpec { bias: true, activation: Activation::Special, ..base.mlp()? };
    let spec = base.tied_by_default(base.spec(base.uniform(attention, mlp))?)?;
    layer_norm(&base, spec)
}
