//! Encoders beside BERT and RoBERTa: ModernBERT, Nomic BERT, DistilBERT, MPNet, DeBERTa, ELECTRA, gte, Jina.

use super::super::architecture::Architecture;
use super::super::base::{Base, attention_layer};
use super::super::{ConfigError, fields::Fields, limits};
use crate::model::{Activation, AttentionSpec, Ffn, Mask, MlpSpec, ModelSpec, NormKind, Positions};

/// A window in two of three layers, gated MLPs, no biases.
pub(in super::super) fn modern_bert(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.heads)?;
    let every = base.get(&["global_attn_every_n_layers"], limits::LAYERS)?.unwrap_or(3);
    let window = base.get(&["local_attention"], limits::POSITIONS)?.unwrap_or(128);
    let mlp = MlpSpec { activation: Activation::Gelu, ..base.mlp()? };
    let layers = (0..base.layers).map(|i| {
        let mask = if i.is_multiple_of(every) { Mask::Bidirectional } else { Mask::BidirectionalSliding { window } };
        attention_layer(AttentionSpec { mask, ..attention.clone() }, Ffn::Dense(mlp))
    });
    encoder(&base, layers.collect())
}

pub(in super::super) fn nomic_bert(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let bias = base.text.boolean("qkv_proj_bias")?.unwrap_or(true);
    let attention =
        AttentionSpec { mask: Mask::Bidirectional, qkv_bias: bias, output_bias: bias, ..base.attention(base.heads)? };
    let width = base.need("n_inner", limits::INTERMEDIATE)?;
    let gated = matches!(base.text.string(&["activation_function"])?, Some((_, "swiglu" | "geglu" | "glu")));
    let bias = base.text.boolean("mlp_fc1_bias")?.unwrap_or(true);
    let mlp = MlpSpec { intermediate_size: width, activation: Activation::Silu, gated, bias };
    encoder(&base, base.uniform(attention, mlp))
}

pub(in super::super) fn distil_bert(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let text = *root;
    let base = Base {
        arch: *arch,
        root: *root,
        text,
        hidden: text.required_uint(&["dim"], limits::HIDDEN)?,
        layers: text.required_uint(&["n_layers"], limits::LAYERS)?,
        heads: text.required_uint(&["n_heads"], limits::HEADS)?,
    };
    let attention = plain_attention(&base)?;
    let width = base.need("hidden_dim", limits::INTERMEDIATE)?;
    let mlp = MlpSpec { intermediate_size: width, activation: Activation::Gelu, gated: false, bias: true };
    let spec = encoder(&base, base.uniform(attention, mlp))?;
    let positions = Positions::Learned { rows: spec.max_position_embeddings, offset: 0, token_types: 0 };
    Ok(ModelSpec { positions, ..spec })
}

/// BERT's: both ways, with biases, without rotation.
fn plain_attention(base: &Base<'_>) -> Result<AttentionSpec, ConfigError> {
    Ok(AttentionSpec {
        mask: Mask::Bidirectional,
        rope: None,
        qkv_bias: true,
        output_bias: true,
        ..base.attention(base.heads)?
    })
}

/// Encoders that are BERT but for their positions and gates: a table of positions (MPNet, ELECTRA), one of distances
/// (DeBERTa), rotary ones (gte) or none (Jina).
pub(in super::super) fn bert_like(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    if let Some(width) = base.get(&["embedding_size"], limits::HIDDEN)?.filter(|&width| width != base.hidden) {
        return Err(base.text.unsupported("embedding_size", &width, "supported: hidden_size"));
    }
    if let Some(kernel) = base.get(&["conv_kernel_size"], 0..=64)?.filter(|&kernel| kernel > 0) {
        return Err(base.text.unsupported("conv_kernel_size", &kernel, "supported: 0"));
    }
    let gated = matches!(arch.name.get(..4), Some("NewM" | "NewF" | "Jina"));
    let attention = plain_attention(&base)?;
    let width = base.need("intermediate_size", limits::INTERMEDIATE)?;
    let mlp = MlpSpec { intermediate_size: width, activation: Activation::Gelu, gated, bias: !gated };
    let spec = encoder(&base, base.uniform(attention, mlp))?;
    let token_types = base.get(&["type_vocab_size"], 0..=*limits::TOKEN_TYPES.end())?.unwrap_or(2);
    let (rows, offset) = match arch.name.get(..4) {
        Some("Debe") => (2 * base.get(&["position_buckets"], limits::POSITIONS)?.unwrap_or(256), 0),
        Some("MPNe") => (spec.max_position_embeddings, 2),
        Some("NewM" | "NewF" | "Jina") => (0, 0),
        _ => (spec.max_position_embeddings, 0),
    };
    // The rows that padding takes are no positions of a text.
    let max_position_embeddings = spec.max_position_embeddings.saturating_sub(offset).max(1);
    let positions = Positions::Learned { rows: rows + token_types, offset, token_types };
    Ok(ModelSpec { positions, max_position_embeddings, ..spec })
}

fn encoder(base: &Base<'_>, layers: Vec<crate::model::LayerSpec>) -> Result<ModelSpec, ConfigError> {
    let spec = base.spec(layers)?;
    Ok(ModelSpec { norm: base.norm(NormKind::Layer)?, tied_embeddings: true, ..spec })
}
