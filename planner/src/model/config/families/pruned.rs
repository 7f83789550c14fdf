//! Models whose layers differ in kind: Nemotron's pruned Llamas (DeciLM), and Llama 3.2 with image layers (Mllama).

use super::super::architecture::Architecture;
use super::super::base::{Base, attention_layer};
use super::super::json::Value;
use super::super::{ConfigError, fields::Fields, limits};
use crate::model::{AttentionSpec, Ffn, LayerSpec, Mixer, ModelSpec, QkNorm};

const BLOCKS: &str = "block_configs";

pub(in super::super) fn deci_lm(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let blocks = base.text.list(BLOCKS)?.ok_or_else(|| ConfigError::Missing {
        field: base.text.path(BLOCKS),
        expected: "attention and ffn of each layer".to_owned(),
    })?;
    if blocks.len() as u64 != base.layers {
        let expected = format!("one entry for each of the {} layers", base.layers);
        return Err(base.text.out_of_range(BLOCKS, &format!("a list of {}", blocks.len()), expected));
    }
    let layers = blocks.iter().map(|block| match block {
        Value::Object(map) => block_layer(&base, &Fields::new(map)),
        other => Err(base.text.wrong_type(BLOCKS, other, "a list of objects")),
    });
    let layers = layers.collect::<Result<Vec<_>, _>>()?;
    base.spec(layers)
}

fn block_layer(base: &Base<'_>, block: &Fields<'_>) -> Result<LayerSpec, ConfigError> {
    let part = |name: &'static str| {
        let part = block.object(name)?.ok_or_else(|| ConfigError::Missing {
            field: format!("{BLOCKS}.{name}"),
            expected: "an object".to_owned(),
        })?;
        if part.boolean("replace_with_linear")? == Some(true) {
            return Err(part.unsupported("replace_with_linear", &true, "supported: false"));
        }
        Ok((part.boolean("no_op")? == Some(true), part))
    };
    let (skips_attention, attention) = part("attention")?;
    let (skips_ffn, ffn) = part("ffn")?;
    let mixer = if skips_attention {
        Mixer::None
    } else {
        let group = attention.required_uint(&["n_heads_in_group"], limits::HEADS)?;
        if !base.heads.is_multiple_of(group) {
            let expected = format!("a divisor of num_attention_heads, {}", base.heads);
            return Err(attention.out_of_range("n_heads_in_group", &group, expected));
        }
        Mixer::Attention(base.attention(base.heads / group)?)
    };
    let ffn = if skips_ffn {
        Ffn::None
    } else {
        let multiple = ffn.required_float("ffn_mult", 1e-3..=64.0)?;
        Ffn::Dense(base.mlp_of(width(multiple, base.hidden).min(*limits::INTERMEDIATE.end()))?)
    };
    Ok(LayerSpec { mixer, ffn })
}

/// Two thirds of the multiple, rounded up to 256.
fn width(multiple: f64, hidden: u64) -> u64 {
    let width = (2.0 * multiple * hidden as f64 / 3.0) as u64;
    width.max(1).next_multiple_of(256)
}

pub(in super::super) fn mllama(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.kv_heads()?)?;
    let cross = AttentionSpec { qk_norm: QkNorm::PerHead, rope: None, ..attention.clone() };
    let list = base.text.list("cross_attention_layers")?.unwrap_or_default();
    let crossing: Vec<u64> = list.iter().filter_map(Value::as_u64).collect();
    let mlp = base.mlp()?;
    let layers = (0..base.layers).map(|i| {
        if crossing.contains(&i) {
            LayerSpec { mixer: Mixer::Cross(cross.clone()), ffn: Ffn::Dense(mlp) }
        } else {
            attention_layer(attention.clone(), Ffn::Dense(mlp))
        }
    });
    base.spec(layers.collect())
}
