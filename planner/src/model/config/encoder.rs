//! BERT and RoBERTa (XLM-R): learned positions, LayerNorm, biases everywhere, nothing cached.

use super::architecture::{self, Architecture};
use super::{ConfigError, decoder, fields::Fields, limits, quantization};
use crate::model::{
    Activation, AttentionSpec, Extras, Family, Ffn, LayerSpec, Mask, Mixer, MlpSpec, ModelSpec, Norm, NormKind,
    Positions, Quantization,
};

pub(super) fn spec(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    refuse_variants(root)?;
    let hidden = root.required_uint(&["hidden_size"], limits::HIDDEN)?;
    let heads = root.required_uint(&["num_attention_heads"], limits::HEADS)?;
    let layers = root.required_uint(&["num_hidden_layers"], limits::LAYERS)?;
    let vocab = root.required_uint(&["vocab_size"], limits::VOCAB)?;
    let (positions, context) = positions(arch.family, root, vocab)?;
    let layer = LayerSpec { mixer: Mixer::Attention(attention(root, hidden, heads)?), ffn: Ffn::Dense(mlp(root)?) };
    let eps = root.float(&["layer_norm_eps"], limits::EPS)?.unwrap_or(1e-12);
    Ok(ModelSpec {
        architecture: arch.name.to_owned(),
        family: arch.family,
        task: architecture::task(arch, root)?,
        hidden_size: hidden,
        vocab_size: vocab,
        max_position_embeddings: context,
        dtype: super::dtype(root, root)?,
        norm: Norm { kind: NormKind::Layer, eps, unit_offset: false },
        positions,
        embedding_scale: None,
        tied_embeddings: true,
        final_logit_softcap: None,
        layers: vec![layer; layers as usize],
        quantization: Quantization::None,
        extras: Extras::default(),
    })
}

/// Forms of BERT that the Program does not describe.
fn refuse_variants(root: &Fields<'_>) -> Result<(), ConfigError> {
    if let Some((field, kind)) = root.string(&["position_embedding_type"])?
        && kind != "absolute"
    {
        return Err(root.unsupported(field, kind, "supported: absolute"));
    }
    for field in ["is_decoder", "add_cross_attention"] {
        if root.boolean(field)? == Some(true) {
            return Err(root.unsupported(field, &true, "supported: false"));
        }
    }
    match quantization::read(root, root)? {
        Quantization::None => Ok(()),
        Quantization::Stored(stored) => {
            Err(root.unsupported("quantization_config", &stored.method, "supported for encoders: none"))
        }
    }
}

/// The table, and the tokens that fit it: RoBERTa's first position stands after the padding index.
fn positions(family: Family, root: &Fields<'_>, vocab: u64) -> Result<(Positions, u64), ConfigError> {
    const FIELD: &str = "max_position_embeddings";
    let rows = root.required_uint(&[FIELD], limits::POSITIONS)?;
    let offset = match family {
        Family::XlmRoberta => root.uint(&["pad_token_id"], 0..=vocab - 1)?.unwrap_or(1) + 1,
        _ => 0,
    };
    if rows <= offset {
        let expected = format!("more than the {offset} rows that padding takes");
        return Err(root.out_of_range(FIELD, &rows, expected));
    }
    let token_types = root.uint(&["type_vocab_size"], limits::TOKEN_TYPES)?.unwrap_or(2);
    Ok((Positions::Learned { rows, offset, token_types }, rows - offset))
}

fn attention(root: &Fields<'_>, hidden: u64, heads: u64) -> Result<AttentionSpec, ConfigError> {
    let head_dim = decoder::quotient(root, hidden, heads)?;
    let grouped = AttentionSpec::grouped(heads, heads, head_dim);
    Ok(AttentionSpec { mask: Mask::Bidirectional, qkv_bias: true, output_bias: true, ..grouped })
}

fn mlp(root: &Fields<'_>) -> Result<MlpSpec, ConfigError> {
    Ok(MlpSpec {
        intermediate_size: root.required_uint(&["intermediate_size"], limits::INTERMEDIATE)?,
        activation: super::activation(root, &["hidden_act"], Activation::Gelu)?,
        gated: false,
        bias: true,
    })
}
