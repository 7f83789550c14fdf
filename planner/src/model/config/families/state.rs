//! Mamba and what mixes it with attention: Nemotron-H, Jamba, Granite hybrid, Falcon-H1, LFM2.

use super::super::architecture::Architecture;
use super::super::base::{Base, per_head};
use super::super::{ConfigError, fields::Fields, json::Value, limits};
use super::{experts, qwen};
use crate::model::{
    Activation, AttentionSpec, Ffn, LayerSpec, Mixer, MlpSpec, ModelSpec, MoeSpec, Router, StateKind, StateSpec,
};

/// Mamba-2 under the names that Nemotron-H, Granite and Falcon-H1 have for its sizes.
fn mamba2(base: &Base<'_>) -> Result<StateSpec, ConfigError> {
    let any = |names: &[&'static str]| base.text.required_uint(names, limits::STATE);
    let heads = any(&["mamba_num_heads", "mamba_n_heads", "num_heads"])?;
    let head_dim = match base.get(&["mamba_head_dim", "head_dim"], limits::HEAD_DIM)? {
        Some(dim) => dim,
        // Granite and Falcon-H1 may say "auto".
        None => {
            let inner = base.get(&["mamba_d_ssm"], limits::STATE)?;
            let expand = base.get(&["mamba_expand", "expand"], 1..=64)?.unwrap_or(2);
            let inner = inner.unwrap_or(expand * base.hidden);
            if !inner.is_multiple_of(heads) {
                let expected = format!("a divisor of the inner size, {inner}");
                return Err(base.text.out_of_range("mamba_n_heads", &heads, expected));
            }
            inner / heads
        }
    };
    let groups = base.get(&["mamba_n_groups", "n_groups"], limits::STATE)?.unwrap_or(1);
    if !heads.is_multiple_of(groups) {
        return Err(base.text.out_of_range("n_groups", &groups, format!("a divisor of the {heads} heads")));
    }
    Ok(StateSpec {
        kind: StateKind::Mamba2,
        value_heads: heads,
        value_head_dim: head_dim,
        key_heads: groups,
        key_head_dim: any(&["ssm_state_size", "mamba_d_state", "state_size"])?,
        conv_kernel: base.text.required_uint(&["conv_kernel", "mamba_d_conv"], limits::CONV_KERNEL)?,
        state_dtype: qwen::state_dtype(base)?,
        dt_rank: 0,
        bias: base.flag("mamba_proj_bias")? || base.flag("use_bias")?,
        conv_bias: base.text.boolean("use_conv_bias")?.or(base.text.boolean("mamba_conv_bias")?).unwrap_or(true),
    })
}

fn mamba1(base: &Base<'_>) -> Result<StateSpec, ConfigError> {
    let inner = match base.get(&["intermediate_size"], limits::INTERMEDIATE)? {
        // Jamba's is that of its MLP.
        Some(inner) if base.text.value("mamba_expand").is_none() => inner,
        _ => base.get(&["mamba_expand", "expand"], 1..=64)?.unwrap_or(2) * base.hidden,
    };
    // "auto" in older files.
    let stated = base.text.value("time_step_rank").or(base.text.value("mamba_dt_rank"));
    let dt_rank = match stated {
        Some(value) if value.is_string() => None,
        _ => base.get(&["time_step_rank", "mamba_dt_rank"], limits::RANK)?,
    };
    Ok(StateSpec {
        kind: StateKind::Mamba1,
        value_heads: inner,
        value_head_dim: 1,
        key_heads: 1,
        key_head_dim: base.text.required_uint(&["state_size", "mamba_d_state"], limits::STATE)?,
        conv_kernel: base.text.required_uint(&["conv_kernel", "mamba_d_conv"], limits::CONV_KERNEL)?,
        state_dtype: qwen::state_dtype(base)?,
        dt_rank: dt_rank.unwrap_or(base.hidden.div_ceil(16)),
        bias: base.flag("use_bias")? || base.flag("mamba_proj_bias")?,
        conv_bias: base.text.boolean("use_conv_bias")?.or(base.text.boolean("mamba_conv_bias")?).unwrap_or(true),
    })
}

/// Mamba 1 and 2 alone: no positions, so no length; what the tokenizer states, or the usual 2^20.
pub(in super::super) fn mamba(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::without_heads(arch, root)?;
    let second = arch.family == crate::model::Family::Mamba2;
    let state = if second { mamba2(&base)? } else { mamba1(&base)? };
    let layer = LayerSpec { mixer: Mixer::State(state), ffn: Ffn::None };
    base.tied_by_default(base.spec(vec![layer; base.layers as usize])?)
}

/// Nemotron-H: each layer is one of Mamba (M), attention (*), MLP (-) or experts (E).
pub(in super::super) fn nemotron_h(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let text = super::super::base::text_of(root)?;
    let pattern = pattern(&text)?;
    let mut base = base_of_pattern(arch, root, pattern.len() as u64)?;
    base.layers = pattern.len() as u64;
    let state = mamba2(&base)?;
    let attention = base.attention(base.kv_heads()?)?;
    let two_products = |mlp: MlpSpec| MlpSpec { gated: false, ..mlp };
    let moe = if pattern.contains(&'E') { Some(nemotron_experts(&base)?) } else { None };
    let layers = pattern.iter().map(|kind| {
        Ok(match (kind, &moe) {
            ('M', _) => LayerSpec { mixer: Mixer::State(state.clone()), ffn: Ffn::None },
            ('*', _) => LayerSpec { mixer: Mixer::Attention(attention.clone()), ffn: Ffn::None },
            ('E', Some(moe)) => LayerSpec { mixer: Mixer::None, ffn: Ffn::Experts(*moe) },
            _ => LayerSpec { mixer: Mixer::None, ffn: Ffn::Dense(two_products(base.mlp()?)) },
        })
    });
    let layers = layers.collect::<Result<Vec<_>, ConfigError>>()?;
    base.spec(layers)
}

/// The number of layers follows from the pattern; a stated one must agree.
fn base_of_pattern<'a>(arch: &Architecture, root: &Fields<'a>, layers: u64) -> Result<Base<'a>, ConfigError> {
    let text = super::super::base::text_of(root)?;
    if let Some(stated) = text.uint(&["num_hidden_layers"], limits::LAYERS)?
        && stated != layers
    {
        let expected = format!("{layers}, the layers of the pattern");
        return Err(text.out_of_range("num_hidden_layers", &stated, expected));
    }
    let hidden = text.required_uint(&["hidden_size"], limits::HIDDEN)?;
    let heads = text.required_uint(&["num_attention_heads"], limits::HEADS)?;
    Ok(Base { arch: *arch, root: *root, text, hidden, layers, heads })
}

fn pattern(text: &Fields<'_>) -> Result<Vec<char>, ConfigError> {
    const FIELD: &str = "hybrid_override_pattern";
    const LIST: &str = "layers_block_type";
    let kinds: Vec<char> = match text.string(&[FIELD])? {
        Some((_, pattern)) => pattern.chars().filter(|c| *c != '|').collect(),
        None => {
            let list = text.list(LIST)?.ok_or_else(|| ConfigError::Missing {
                field: text.path(FIELD),
                expected: "a letter for each layer: M, *, - or E".to_owned(),
            })?;
            let letter = |value: &Value<'_>| match value.as_str() {
                Some("mamba" | "linear_attention") => Ok('M'),
                Some("attention" | "full_attention") => Ok('*'),
                Some("mlp") => Ok('-'),
                Some("moe") => Ok('E'),
                Some(other) => Err(text.unsupported(LIST, other, "supported: mamba, attention, mlp, moe")),
                None => Err(text.wrong_type(LIST, value, "a list of strings")),
            };
            list.iter().map(letter).collect::<Result<_, _>>()?
        }
    };
    if let Some(other) = kinds.iter().find(|kind| !"M*-E".contains(**kind)) {
        return Err(text.unsupported(FIELD, other, "supported: M, *, -, E"));
    }
    if kinds.is_empty() || kinds.len() as u64 > *limits::LAYERS.end() {
        let expected = format!("1 to {} layers", limits::LAYERS.end());
        return Err(text.out_of_range(FIELD, &format!("a pattern of {}", kinds.len()), expected));
    }
    Ok(kinds)
}

fn nemotron_experts(base: &Base<'_>) -> Result<MoeSpec, ConfigError> {
    let moe = base.experts()?;
    let expert = MlpSpec { gated: false, ..moe.expert };
    let shared = base.get(&["moe_shared_expert_intermediate_size"], limits::INTERMEDIATE)?;
    let count = base.get(&["n_shared_experts"], 0..=64)?.unwrap_or(0);
    let shared = shared.filter(|_| count > 0).map(|size| MlpSpec { intermediate_size: count * size, ..expert });
    let latent_size = base.get(&["moe_latent_size"], limits::HIDDEN)?;
    Ok(MoeSpec { expert, shared, latent_size, router: Router::ScoreCorrected, ..moe })
}

/// Jamba: attention in one layer of eight, experts in every second.
pub(in super::super) fn jamba(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let every = |period: &'static str, offset: &'static str| {
        let period = base.need(period, limits::LAYERS)?;
        let offset = base.need(offset, 0..=*limits::LAYERS.end())?;
        Ok::<_, ConfigError>(move |i: u64| i % period == offset)
    };
    let attends = every("attn_layer_period", "attn_layer_offset")?;
    let routes = every("expert_layer_period", "expert_layer_offset")?;
    let attention = AttentionSpec { rope: None, ..base.attention(base.kv_heads()?)? };
    let (state, moe, mlp) = (mamba1(&base)?, base.experts()?, base.mlp()?);
    let layers = (0..base.layers).map(|i| LayerSpec {
        mixer: if attends(i) { Mixer::Attention(attention.clone()) } else { Mixer::State(state.clone()) },
        ffn: if moe.num_experts > 1 && routes(i) { Ffn::Experts(moe) } else { Ffn::Dense(mlp) },
    });
    base.spec(layers.collect())
}

/// Granite 4: Mamba-2 with attention now and then; experts and a shared MLP, or that alone.
pub(in super::super) fn granite_hybrid(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.kv_heads()?)?;
    let Some(kinds) = base.words("layer_types")?.or(base.words("layers_block_type")?) else {
        return Err(ConfigError::Missing {
            field: base.text.path("layer_types"),
            expected: "mamba or attention, for each layer".to_owned(),
        });
    };
    let ffn = if base.get(&["num_local_experts"], 0..=*limits::EXPERTS.end())?.unwrap_or(0) > 0 {
        Ffn::Experts(experts::granite_experts(&base)?)
    } else {
        Ffn::Dense(base.mlp_of(base.need("shared_intermediate_size", limits::INTERMEDIATE)?)?)
    };
    let states = kinds.iter().any(|kind| ["mamba", "linear_attention"].contains(kind));
    let state = if states { Some(mamba2(&base)?) } else { None };
    let layer = |kind: &str| match (kind, &state) {
        ("mamba" | "linear_attention", Some(state)) => Ok(Mixer::State(state.clone())),
        ("attention" | "full_attention", _) => Ok(Mixer::Attention(attention.clone())),
        (other, _) => Err(base.text.unsupported("layer_types", other, "supported: mamba, attention")),
    };
    let layers = kinds.into_iter().map(|kind| Ok(LayerSpec { mixer: layer(kind)?, ffn: ffn.clone() }));
    let layers = layers.collect::<Result<Vec<_>, ConfigError>>()?;
    base.tied_by_default(base.spec(layers)?)
}

/// Bamba: Mamba-2, and attention in the layers that are listed.
pub(in super::super) fn bamba(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = base.attention(base.kv_heads()?)?;
    let (state, mlp) = (mamba2(&base)?, base.mlp()?);
    let kinds = base.words("layer_types")?.or(base.words("layers_block_type")?);
    let listed = base.numbers("attn_layer_indices", 0)?.unwrap_or_default();
    let attends = |i: u64| match &kinds {
        Some(kinds) => ["attention", "full_attention"].contains(&kinds[i as usize]),
        None => listed.contains(&i),
    };
    let layers = (0..base.layers).map(|i| LayerSpec {
        mixer: if attends(i) { Mixer::Attention(attention.clone()) } else { Mixer::State(state.clone()) },
        ffn: Ffn::Dense(mlp),
    });
    base.spec(layers.collect())
}

/// Falcon-H1: both in every layer.
pub(in super::super) fn falcon_h1(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let mut state = mamba2(&base)?;
    if let Some(dim) = base.get(&["mamba_d_head"], limits::HEAD_DIM)? {
        state.value_head_dim = dim;
    }
    let mixer = Mixer::Parallel { attention: base.attention(base.kv_heads()?)?, state };
    let layer = LayerSpec { mixer, ffn: Ffn::Dense(base.mlp()?) };
    base.spec(vec![layer; base.layers as usize])
}

/// LFM2: short convolutions with attention now and then.
pub(in super::super) fn lfm2(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = AttentionSpec { qk_norm: per_head(true), ..base.attention(base.kv_heads()?)? };
    let state = StateSpec {
        kind: StateKind::ShortConv,
        value_heads: base.hidden,
        value_head_dim: 1,
        key_heads: 1,
        key_head_dim: 1,
        conv_kernel: base.text.required_uint(&["conv_L_cache"], limits::CONV_KERNEL)?,
        state_dtype: None,
        dt_rank: 0,
        bias: base.flag("conv_bias")?,
        conv_bias: base.flag("conv_bias")?,
    };
    let full: Vec<u64> = match base.text.list("full_attn_idxs")? {
        Some(list) => list.iter().filter_map(Value::as_u64).collect(),
        None => Vec::new(),
    };
    let kinds = base.words("layer_types")?;
    let attends = |i: u64| match &kinds {
        Some(kinds) => kinds[i as usize] == "full_attention",
        None => full.contains(&i),
    };
    if kinds.is_none() && full.is_empty() {
        return Err(ConfigError::Missing {
            field: base.text.path("layer_types"),
            expected: "conv or full_attention, for each layer".to_owned(),
        });
    }
    let dense = MlpSpec { activation: Activation::Silu, ..lfm2_mlp(&base)? };
    let ffns = match base.get(&["num_experts"], limits::EXPERTS)? {
        Some(_) => {
            let moe = MoeSpec { router: Router::ScoreCorrected, ..base.experts()? };
            let first = base.get(&["num_dense_layers"], 0..=base.layers)?.unwrap_or(0);
            (0..base.layers).map(|i| if i < first { Ffn::Dense(dense) } else { Ffn::Experts(moe) }).collect()
        }
        None => vec![Ffn::Dense(dense); base.layers as usize],
    };
    let layers = ffns.into_iter().zip(0..).map(|(ffn, i)| {
        let mixer = if attends(i) { Mixer::Attention(attention.clone()) } else { Mixer::State(state.clone()) };
        LayerSpec { mixer, ffn }
    });
    base.tied_by_default(base.spec(layers.collect())?)
}

/// Two thirds of the stated width, rounded up, unless the file switches that off.
fn lfm2_mlp(base: &Base<'_>) -> Result<MlpSpec, ConfigError> {
    let stated = base.text.required_uint(&["intermediate_size", "block_ff_dim"], limits::INTERMEDIATE)?;
    if base.text.boolean("block_auto_adjust_ff_dim")? != Some(true) {
        return base.mlp_of(stated);
    }
    let multiple = base.get(&["block_multiple_of"], limits::INTERMEDIATE)?.unwrap_or(256);
    base.mlp_of((2 * stated / 3).max(1).next_multiple_of(multiple))
}
