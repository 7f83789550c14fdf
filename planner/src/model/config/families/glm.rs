//! ChatGLM, GLM-4 and GLM-4.5 with experts. GLM-5 has DeepSeek's geometry.

use super::super::architecture::Architecture;
use super::super::base::{Base, attention_layer, per_head};
use super::super::{ConfigError, fields::Fields};
use crate::model::{AttentionSpec, Family, MlpSpec, ModelSpec, MoeSpec, Router};

pub(in super::super) fn chat_glm(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    if base.text.boolean("rmsnorm")? == Some(false) {
        return Err(base.text.unsupported("rmsnorm", &false, "supported: true"));
    }
    let kv_heads = if base.flag("multi_query_attention")? { base.kv_heads()? } else { base.heads };
    let bias = base.flag("add_bias_linear")?;
    let attention =
        AttentionSpec { qkv_bias: base.flag("add_qkv_bias")? || bias, output_bias: bias, ..base.attention(kv_heads)? };
    let mlp = MlpSpec { bias, ..base.mlp()? };
    base.spec(base.uniform(attention, mlp))
}

/// GLM-4 and GLM-4-0414: biases on q, k and v alone.
pub(in super::super) fn glm4(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec { output_bias: false, ..base.attention(base.kv_heads()?)? };
    base.spec(base.uniform(attention, base.mlp()?))
}

/// GLM-4.5 to 4.7, and the same shape elsewhere: dense layers first, then experts with shared ones.
pub(in super::super) fn moe(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.kv_heads()?)?;
    let attention = AttentionSpec {
        qkv_bias: attention.qkv_bias || base.flag("use_qkv_bias")?,
        output_bias: false,
        qk_norm: per_head(base.flag("use_qk_norm")?),
        ..attention
    };
    let moe = base.with_shared(base.experts()?)?;
    let corrected = arch.family == Family::Glm4Moe || base.flag("moe_use_aux_loss_free_bias")?;
    let router = if corrected { Router::ScoreCorrected } else { Router::Plain };
    let ffns = base.dense_then_experts(base.mlp()?, MoeSpec { router, ..moe })?;
    base.spec(ffns.into_iter().map(|ffn| attention_layer(attention.clone(), ffn)).collect())
}
