//! Kimi Linear and K3: delta attention with a latent attention layer now and then, experts on narrowed vectors.

use super::super::architecture::Architecture;
use super::super::base::Base;
use super::super::json::Value;
use super::super::{ConfigError, fields::Fields, limits};
use super::deepseek;
use crate::model::{
    DType, LatentAttentionSpec, LayerSpec, Mixer, ModelSpec, MoeSpec, OutputGate, Router, StateKind, StateSpec,
};

pub(in super::super) fn spec(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let gate = if base.flag("mla_use_output_gate")? { OutputGate::PerElement } else { OutputGate::None };
    let latent = Mixer::Latent(LatentAttentionSpec { gate, ..deepseek::latent(&base)? });
    let (delta, linear_layers) = linear(&base)?;
    let delta = Mixer::State(delta);
    let moe = base.with_shared(base.experts()?)?;
    let moe = MoeSpec {
        latent_size: base.get(&["routed_expert_hidden_size"], limits::HIDDEN)?,
        router: Router::ScoreCorrected,
        ..moe
    };
    let ffns = base.dense_then_experts(base.mlp()?, moe)?;
    let layers = ffns.into_iter().enumerate().map(|(i, ffn)| {
        let mixer = if linear_layers[i] { delta.clone() } else { latent.clone() };
        LayerSpec { mixer, ffn }
    });
    base.spec(layers.collect())
}

/// The linear layers' mixer, and which layers they are: in `linear_attn_config`, or flat as transformers 5 writes it.
fn linear(base: &Base<'_>) -> Result<(StateSpec, Vec<bool>), ConfigError> {
    const FIELD: &str = "linear_attn_config";
    if let Some(linear) = base.text.object(FIELD)? {
        return Ok((delta(&linear)?, kda_layers(base, &linear)?));
    }
    let Some(kinds) = base.words("layer_types")?.filter(|_| base.text.value("linear_num_heads").is_some()) else {
        return Err(ConfigError::Missing {
            field: base.text.path(FIELD),
            expected: "an object that describes the linear layers".to_owned(),
        });
    };
    let linear = |kind: &str| match kind {
        "linear_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(base.text.unsupported("layer_types", other, "supported: linear_attention, full_attention")),
    };
    Ok((delta(&base.text)?, kinds.into_iter().map(linear).collect::<Result<_, _>>()?))
}

fn delta(linear: &Fields<'_>) -> Result<StateSpec, ConfigError> {
    let heads = linear.required_uint(&["linear_num_heads", "num_heads"], limits::HEADS)?;
    let head_dim = linear.required_uint(&["linear_head_dim", "head_dim"], limits::HEAD_DIM)?;
    let full_rank = linear.boolean("use_full_rank_gate")?.unwrap_or(false);
    Ok(StateSpec {
        kind: StateKind::KimiDelta,
        value_heads: heads,
        value_head_dim: head_dim,
        key_heads: heads,
        key_head_dim: head_dim,
        conv_kernel: linear
            .required_uint(&["short_conv_kernel_size", "linear_conv_kernel_dim"], limits::CONV_KERNEL)?,
        state_dtype: Some(DType::F32),
        dt_rank: if full_rank { 0 } else { head_dim },
        bias: false,
        conv_bias: false,
    })
}

/// `kda_layers` counts from one.
fn kda_layers(base: &Base<'_>, linear: &Fields<'_>) -> Result<Vec<bool>, ConfigError> {
    const FIELD: &str = "kda_layers";
    let Some(list) = linear.list(FIELD)? else {
        let expected = "the numbers of the linear layers, from 1".to_owned();
        return Err(ConfigError::Missing { field: linear.path(FIELD), expected });
    };
    let mut linear_layers = vec![false; base.layers as usize];
    for value in list {
        let number = value.as_u64().filter(|&n| n >= 1 && n <= base.layers);
        let Some(slot) = number.and_then(|n| linear_layers.get_mut(n as usize - 1)) else {
            let shown = match value {
                Value::Number(number) => number.to_string(),
                other => kind(other).to_owned(),
            };
            return Err(linear.out_of_range(FIELD, &shown, format!("numbers of layers, 1 to {}", base.layers)));
        };
        *slot = true;
    }
    Ok(linear_layers)
}

fn kind(value: &Value<'_>) -> &'static str {
    if value.is_string() { "a string" } else { "no number" }
}
