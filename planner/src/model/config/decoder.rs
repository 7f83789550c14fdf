//! Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma 2 and Gemma 3: rotary decoders that differ in attributes.

use super::architecture::{self, Architecture, Head};
use super::rope::{self, RopeDefaults};
use super::{ConfigError, fields::Fields, limits, masks, quantization};
use crate::model::{
    Activation, AttentionSpec, Extras, Family, Ffn, LayerSpec, Mask, Mixer, MlpSpec, ModelSpec, Norm, NormKind,
    Pooling, Positions, QkNorm, RopeScaling, RopeSpec, Task,
};

pub(super) fn spec(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let text = text_fields(arch, root)?;
    let family = arch.family;
    let geometry = Geometry::read(arch, &text)?;
    let ropes = Ropes::read(&text, family, geometry.head_dim)?;
    let context = match family {
        // Gemma 3 states the stretched length beside a linear factor.
        Family::Gemma3 => geometry.stated_positions,
        _ => rope::context_length(geometry.stated_positions, &ropes.full.scaling),
    };
    let bidirectional = bidirectional(&text)?;
    let masks = masks::masks(&text, family, geometry.layers, context)?;
    let masks = masks.into_iter().map(|mask| if bidirectional { Mask::Bidirectional } else { mask });
    let attention = attention(&text, family, &geometry)?;
    let mlp = mlp(&text, family, geometry.intermediate)?;
    let layers = masks
        .map(|mask| {
            let rope = Some(ropes.of(mask).clone());
            let attention = AttentionSpec { mask, rope, ..attention.clone() };
            LayerSpec { mixer: Mixer::Attention(attention), ffn: Ffn::Dense(mlp) }
        })
        .collect();
    Ok(ModelSpec {
        architecture: arch.name.to_owned(),
        family,
        task: task(arch, root, bidirectional)?,
        hidden_size: geometry.hidden,
        vocab_size: geometry.vocab,
        max_position_embeddings: context,
        dtype: super::dtype(root, &text)?,
        norm: norm(&text, family)?,
        positions: Positions::Rope,
        embedding_scale: gemma(family).then(|| (geometry.hidden as f64).sqrt()),
        tied_embeddings: tied(root, &text, family)?,
        final_logit_softcap: match family {
            Family::Gemma2 | Family::Gemma3 => text.float(&["final_logit_softcapping"], limits::SOFTCAP)?,
            _ => None,
        },
        layers,
        quantization: quantization::read(root, &text)?,
        extras: Extras::default(),
    })
}

fn gemma(family: Family) -> bool {
    matches!(family, Family::Gemma2 | Family::Gemma3)
}

/// Where the language model is described: the file itself, or `text_config` of an image-and-text model.
fn text_fields<'a>(arch: &Architecture, root: &Fields<'a>) -> Result<Fields<'a>, ConfigError> {
    if !nested(arch) {
        return Ok(*root);
    }
    root.object("text_config")?.ok_or_else(|| ConfigError::Missing {
        field: "text_config".to_owned(),
        expected: "an object that describes the language model".to_owned(),
    })
}

fn nested(arch: &Architecture) -> bool {
    arch.name == "Gemma3ForConditionalGeneration"
}

#[derive(Debug)]
struct Geometry {
    hidden: u64,
    layers: u64,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
    intermediate: u64,
    vocab: u64,
    stated_positions: u64,
}

impl Geometry {
    fn read(arch: &Architecture, text: &Fields<'_>) -> Result<Self, ConfigError> {
        let hidden = text.required_uint(&["hidden_size"], limits::HIDDEN)?;
        let layers = text.required_uint(&["num_hidden_layers"], limits::LAYERS)?;
        let intermediate = text.required_uint(&["intermediate_size"], limits::INTERMEDIATE)?;
        // transformers leaves class defaults out of a nested object; these are Gemma3TextConfig's.
        let default = |value: u64| nested(arch).then_some(value);
        let or_default = |name: &'static str, range, value: Option<u64>| match value {
            Some(value) => Ok(text.uint(&[name], range)?.unwrap_or(value)),
            None => text.required_uint(&[name], range),
        };
        let heads = or_default("num_attention_heads", limits::HEADS, default(8))?;
        let vocab = or_default("vocab_size", limits::VOCAB, default(262_208))?;
        let stated_positions = match default(131_072) {
            Some(value) => text.uint(&["max_position_embeddings"], limits::POSITIONS)?.unwrap_or(value),
            None => rope::stated_positions(text)?,
        };
        let kv_heads = kv_heads(arch.family, text, heads, default(4))?;
        let head_dim = head_dim(text, hidden, heads, default(256))?;
        Ok(Self { hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, stated_positions })
    }
}

fn kv_heads(family: Family, text: &Fields<'_>, heads: u64, nested_default: Option<u64>) -> Result<u64, ConfigError> {
    const NAMES: [&str; 4] = ["num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num"];
    let kv_heads = match (text.uint(&NAMES, limits::HEADS)?, family) {
        (Some(kv_heads), _) => kv_heads,
        // Multi-head attention, as files from before grouped queries say by leaving the field out.
        (None, Family::Llama | Family::Phi3) => heads,
        (None, _) => nested_default.ok_or_else(|| ConfigError::Missing {
            field: text.path(NAMES[0]),
            expected: format!("a divisor of num_attention_heads, {heads}"),
        })?,
    };
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of num_attention_heads, {heads}");
        return Err(text.out_of_range(NAMES[0], &kv_heads, expected));
    }
    Ok(kv_heads)
}

/// Explicit wins over hidden / heads: Qwen3, Gemma and Mistral-Nemo differ from the quotient.
fn head_dim(text: &Fields<'_>, hidden: u64, heads: u64, nested_default: Option<u64>) -> Result<u64, ConfigError> {
    let head_dim = match text.uint(&["head_dim", "kv_channels"], limits::HEAD_DIM)?.or(nested_default) {
        Some(head_dim) => head_dim,
        None => quotient(text, hidden, heads)?,
    };
    if !head_dim.is_multiple_of(2) {
        return Err(text.out_of_range("head_dim", &head_dim, "an even number: rotary positions turn pairs"));
    }
    Ok(head_dim)
}

/// hidden_size / num_attention_heads, which must divide.
pub(super) fn quotient(fields: &Fields<'_>, hidden: u64, heads: u64) -> Result<u64, ConfigError> {
    let head_dim = hidden / heads;
    if !hidden.is_multiple_of(heads) || !limits::HEAD_DIM.contains(&head_dim) {
        let expected = format!("{heads} (num_attention_heads) times a head size of 1 to {}", limits::HEAD_DIM.end());
        return Err(fields.out_of_range("hidden_size", &hidden, expected));
    }
    Ok(head_dim)
}

/// The rope of full layers and of sliding ones; they differ in Gemma 3 only.
#[derive(Debug)]
struct Ropes {
    full: RopeSpec,
    sliding: RopeSpec,
}

impl Ropes {
    fn read(text: &Fields<'_>, family: Family, head_dim: u64) -> Result<Self, ConfigError> {
        let theta = if family == Family::Gemma3 { 1e6 } else { 1e4 };
        let full = rope::read(text, head_dim, RopeDefaults { theta, layer_type: "full_attention" })?;
        let sliding = if family == Family::Gemma3 { gemma3_local(text, head_dim)? } else { full.clone() };
        Ok(Self { full, sliding })
    }

    fn of(&self, mask: Mask) -> &RopeSpec {
        match mask {
            Mask::Sliding { .. } => &self.sliding,
            _ => &self.full,
        }
    }
}

fn gemma3_local(text: &Fields<'_>, head_dim: u64) -> Result<RopeSpec, ConfigError> {
    const LAYER_TYPE: &str = "sliding_attention";
    const THETA: f64 = 1e4;
    if let Some(parameters) = text.object("rope_parameters")?
        && parameters.object(LAYER_TYPE)?.is_some()
    {
        return rope::read(text, head_dim, RopeDefaults { theta: THETA, layer_type: LAYER_TYPE });
    }
    let theta = text.float(&["rope_local_base_freq"], limits::ROPE_THETA)?.unwrap_or(THETA);
    Ok(RopeSpec { theta, rotary_dim: head_dim, scaling: RopeScaling::None })
}

/// Attributes that all layers share; mask and rope are set per layer.
fn attention(text: &Fields<'_>, family: Family, geometry: &Geometry) -> Result<AttentionSpec, ConfigError> {
    let bias = text.boolean("attention_bias")?.unwrap_or(false);
    let (qkv_bias, output_bias) = match family {
        Family::Qwen2 => (true, false),
        Family::Mistral | Family::Phi3 => (false, false),
        _ => (bias, bias),
    };
    let scale_of = match family {
        Family::Gemma2 | Family::Gemma3 => {
            text.float(&["query_pre_attn_scalar"], 1.0..=1e6)?.unwrap_or(256.0) // class default
        }
        _ => geometry.head_dim as f64,
    };
    let softcap = match family {
        Family::Gemma2 | Family::Gemma3 => text.float(&["attn_logit_softcapping"], limits::SOFTCAP)?,
        _ => None,
    };
    let qk_norm = if matches!(family, Family::Qwen3 | Family::Gemma3) { QkNorm::PerHead } else { QkNorm::None };
    let grouped = AttentionSpec::grouped(geometry.heads, geometry.kv_heads, geometry.head_dim);
    Ok(AttentionSpec { scale: scale_of.powf(-0.5), softcap, qk_norm, qkv_bias, output_bias, ..grouped })
}

fn mlp(text: &Fields<'_>, family: Family, intermediate_size: u64) -> Result<MlpSpec, ConfigError> {
    let activation = if gemma(family) {
        // `hidden_act` of early Gemma files is wrong and transformers reads `hidden_activation`.
        super::activation(text, &["hidden_activation"], Activation::GeluTanh)?
    } else {
        super::activation(text, &["hidden_act"], Activation::Silu)?
    };
    let bias = family == Family::Llama && text.boolean("mlp_bias")?.unwrap_or(false);
    Ok(MlpSpec { intermediate_size, activation, gated: true, bias })
}

fn norm(text: &Fields<'_>, family: Family) -> Result<Norm, ConfigError> {
    let eps = text.float(&["rms_norm_eps"], limits::EPS)?.unwrap_or(match family {
        Family::Phi3 => 1e-5,
        _ => 1e-6,
    });
    Ok(Norm { kind: NormKind::Rms, eps, unit_offset: gemma(family) })
}

/// Left out of a file when it equals the class default: true for Gemma, false for the others.
fn tied(root: &Fields<'_>, text: &Fields<'_>, family: Family) -> Result<bool, ConfigError> {
    Ok(super::base::tied(text, root)?.unwrap_or_else(|| gemma(family)))
}

/// Embedding models made of a causal one (gte-Qwen2) say so: every token sees every token.
fn bidirectional(text: &Fields<'_>) -> Result<bool, ConfigError> {
    if text.boolean("use_bidirectional_attention")? == Some(true) {
        return Err(text.unsupported("use_bidirectional_attention", &true, "supported: false"));
    }
    Ok(text.boolean("is_causal")? == Some(false))
}

/// A model that is not causal cannot generate, whatever class name its file carries.
fn task(arch: &Architecture, root: &Fields<'_>, bidirectional: bool) -> Result<Task, ConfigError> {
    match arch.head {
        Head::LanguageModel if bidirectional => Ok(Task::Embed { pooling: Pooling::LastToken }),
        _ => architecture::task(arch, root),
    }
}
