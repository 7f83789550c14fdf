//! Qwen with experts, with gated delta nets (Qwen3-Next, Qwen3.5), the first Qwen, and text sides of the VL models.

use super::super::architecture::Architecture;
use super::super::base::{Base, attention_layer, per_head};
use super::super::json::Value;
use super::super::{ConfigError, fields::Fields, limits};
use crate::model::{
    AttentionSpec, DType, Family, Ffn, LayerSpec, Mixer, MlpSpec, ModelSpec, MoeSpec, OutputGate, StateKind, StateSpec,
};

/// Qwen 1: one product for q, k and v, an MLP of half the stated width on each side.
pub(in super::super) fn first(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.kv_heads_or_all()?)?;
    let stated = base.need("intermediate_size", limits::INTERMEDIATE)?;
    if stated < 2 {
        return Err(base.text.out_of_range("intermediate_size", &stated, "2 or more: half of it is on each side"));
    }
    let mlp = base.mlp_of(stated / 2)?;
    base.spec(base.uniform(AttentionSpec { qkv_bias: true, ..attention }, mlp))
}

/// Dense text sides of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.
pub(in super::super) fn vision_language(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    no_windows(&base)?;
    let third = arch.family == Family::Qwen3;
    let attention = base.attention(base.kv_heads()?)?;
    let attention = AttentionSpec { qkv_bias: !third || attention.qkv_bias, qk_norm: per_head(third), ..attention };
    base.spec(base.uniform(attention, base.mlp()?))
}

/// Published files state a window and switch it off.
fn no_windows(base: &Base<'_>) -> Result<(), ConfigError> {
    if base.flag("use_sliding_window")? {
        return Err(base.text.unsupported("use_sliding_window", &true, "supported: false"));
    }
    Ok(())
}

/// Qwen2-MoE and Qwen3-MoE, and the latter's VL form.
pub(in super::super) fn moe(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    no_windows(&base)?;
    let third = arch.family == Family::Qwen3Moe;
    let attention = base.attention(base.kv_heads()?)?;
    let attention = AttentionSpec { qkv_bias: !third || attention.qkv_bias, qk_norm: per_head(third), ..attention };
    let layers = ffns(&base)?.into_iter().map(|ffn| attention_layer(attention.clone(), ffn));
    base.spec(layers.collect())
}

/// Qwen3-Next and Qwen3.5: three gated delta nets, then gated attention.
pub(in super::super) fn next(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec {
        qk_norm: per_head(true),
        gate: match base.text.boolean("attn_output_gate")? {
            Some(false) => OutputGate::None,
            _ => OutputGate::PerElement,
        },
        ..base.attention(base.kv_heads()?)?
    };
    let delta = Mixer::State(delta_net(&base)?);
    let linear = linear_layers(&base)?;
    let layers = ffns(&base)?.into_iter().zip(linear).map(|(ffn, linear)| {
        let mixer = if linear { delta.clone() } else { Mixer::Attention(attention.clone()) };
        LayerSpec { mixer, ffn }
    });
    base.spec(layers.collect())
}

fn delta_net(base: &Base<'_>) -> Result<StateSpec, ConfigError> {
    let (value_heads, key_heads) =
        (base.need("linear_num_value_heads", limits::HEADS)?, base.need("linear_num_key_heads", limits::HEADS)?);
    if !value_heads.is_multiple_of(key_heads) {
        let expected = format!("a divisor of linear_num_value_heads, {value_heads}");
        return Err(base.text.out_of_range("linear_num_key_heads", &key_heads, expected));
    }
    Ok(StateSpec {
        kind: StateKind::GatedDeltaNet,
        value_heads,
        value_head_dim: base.need("linear_value_head_dim", limits::HEAD_DIM)?,
        key_heads,
        key_head_dim: base.need("linear_key_head_dim", limits::HEAD_DIM)?,
        conv_kernel: base.need("linear_conv_kernel_dim", limits::CONV_KERNEL)?,
        state_dtype: state_dtype(base)?,
        dt_rank: 0,
        bias: false,
        conv_bias: false,
    })
}

/// What the file says of the state's type; nothing: as the model is served.
pub(super) fn state_dtype(base: &Base<'_>) -> Result<Option<DType>, ConfigError> {
    match base.text.string(&["mamba_ssm_dtype", "mamba_ssm_cache_dtype"])? {
        None | Some((_, "auto")) => Ok(None),
        Some((_, "float32")) => Ok(Some(DType::F32)),
        Some((_, "bfloat16")) => Ok(Some(DType::BF16)),
        Some((_, "float16")) => Ok(Some(DType::F16)),
        Some((name, other)) => Err(base.text.unsupported(name, other, "supported: float32, bfloat16, float16")),
    }
}

/// `layer_types`, or every `full_attention_interval`-th layer attends.
fn linear_layers(base: &Base<'_>) -> Result<Vec<bool>, ConfigError> {
    if let Some(kinds) = base.words("layer_types")? {
        let linear = |kind: &str| match kind {
            "linear_attention" => Ok(true),
            "full_attention" => Ok(false),
            other => Err(base.text.unsupported("layer_types", other, "supported: linear_attention, full_attention")),
        };
        return kinds.into_iter().map(linear).collect();
    }
    let interval = base.need("full_attention_interval", limits::LAYERS)?;
    Ok((0..base.layers).map(|i| !(i + 1).is_multiple_of(interval)).collect())
}

/// Experts in every layer but those of `mlp_only_layers` and off `decoder_sparse_step`; dense models have none.
fn ffns(base: &Base<'_>) -> Result<Vec<Ffn>, ConfigError> {
    if base.text.value("num_experts").is_none() && base.arch.family == Family::Qwen3Next {
        return Ok(vec![Ffn::Dense(base.mlp()?); base.layers as usize]);
    }
    let moe = base.experts()?;
    let shared = base.get(&["shared_expert_intermediate_size"], 0..=*limits::INTERMEDIATE.end())?.unwrap_or(0);
    let shared_mlp = MlpSpec { intermediate_size: shared, ..moe.expert };
    let moe = MoeSpec { shared: (shared > 0).then_some(shared_mlp), shared_gate: shared > 0, ..moe };
    let step = base.get(&["decoder_sparse_step"], limits::LAYERS)?.unwrap_or(1);
    let dense_only: Vec<u64> =
        base.text.list("mlp_only_layers")?.unwrap_or_default().iter().filter_map(Value::as_u64).collect();
    let sparse = |i: u64| (i + 1).is_multiple_of(step) && !dense_only.contains(&i);
    (0..base.layers).map(|i| if sparse(i) { Ok(Ffn::Experts(moe)) } else { base.mlp().map(Ffn::Dense) }).collect()
}
