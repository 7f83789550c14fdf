//! Rotary positions: `rope_theta` and `rope_scaling` (old form `type`, new form `rope_type`), or both together in
//! `rope_parameters` as transformers 5 writes them, there also one object per kind of layer.

use super::{ConfigError, fields::Fields, limits};
use crate::model::{RopeScaling, RopeSpec};

/// What a family assumes when the file says nothing (transformers' configuration classes).
#[derive(Debug, Clone, Copy)]
pub(super) struct RopeDefaults {
    pub(super) theta: f64,
    /// `full_attention` or `sliding_attention`: its own object in `rope_parameters`, where there is one.
    pub(super) layer_type: &'static str,
}

/// The rope of one kind of layer.
pub(super) fn read(fields: &Fields<'_>, head_dim: u64, defaults: RopeDefaults) -> Result<RopeSpec, ConfigError> {
    let parameters = parameters(fields, defaults.layer_type)?;
    let scaling_object = match &parameters {
        Some(parameters) => Some(*parameters),
        None => fields.object("rope_scaling")?,
    };
    let theta = match &parameters {
        Some(parameters) => parameters.float(&["rope_theta"], limits::ROPE_THETA)?,
        None => None,
    };
    let theta = match theta {
        Some(theta) => theta,
        None => fields.float(&["rope_theta"], limits::ROPE_THETA)?.unwrap_or(defaults.theta),
    };
    let rotary_dim = rotary_dim(fields, parameters.as_ref(), head_dim)?;
    let scaling = match scaling_object {
        Some(object) => scaling(fields, &object, rotary_dim)?,
        None => RopeScaling::None,
    };
    Ok(RopeSpec { theta, rotary_dim, scaling })
}

fn parameters<'a>(fields: &Fields<'a>, layer_type: &'static str) -> Result<Option<Fields<'a>>, ConfigError> {
    let Some(parameters) = fields.object("rope_parameters")? else { return Ok(None) };
    Ok(Some(parameters.object(layer_type)?.unwrap_or(parameters)))
}

fn rotary_dim(fields: &Fields<'_>, parameters: Option<&Fields<'_>>, head_dim: u64) -> Result<u64, ConfigError> {
    const FIELD: &str = "partial_rotary_factor";
    let nested = match parameters {
        Some(parameters) => parameters.float(&[FIELD], 0.0..=1.0)?,
        None => None,
    };
    let factor = match nested {
        Some(factor) => factor,
        None => fields.float(&[FIELD], 0.0..=1.0)?.unwrap_or(1.0),
    };
    let dim = (head_dim as f64 * factor) as u64;
    if dim < 2 || !dim.is_multiple_of(2) {
        let value = format!("{factor} of a head_dim of {head_dim}");
        return Err(fields.out_of_range(FIELD, &value, "an even number of rotated dimensions, 2 or more"));
    }
    Ok(dim)
}

fn scaling(fields: &Fields<'_>, scaling: &Fields<'_>, rotary_dim: u64) -> Result<RopeScaling, ConfigError> {
    let Some((name, kind)) = scaling.string(&["rope_type", "type"])? else {
        // An object without a type scales nothing (transformers 5 writes rope_theta alone).
        return match scaling.value("factor") {
            None => Ok(RopeScaling::None),
            Some(_) => Err(ConfigError::Missing {
                field: scaling.path("rope_type"),
                expected: "one of default, linear, dynamic, yarn, llama3, longrope".to_owned(),
            }),
        };
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor(scaling)? }),
        "dynamic" => Ok(RopeScaling::Dynamic {
            factor: factor(scaling)?,
            original_max_position: original_max_position(fields, scaling)?,
        }),
        "llama3" => llama3(fields, scaling),
        "yarn" => yarn(fields, scaling),
        "longrope" | "su" => longrope(fields, scaling, rotary_dim),
        other => Err(scaling.unsupported(name, other, "supported: default, linear, dynamic, yarn, llama3, longrope")),
    }
}

fn factor(scaling: &Fields<'_>) -> Result<f64, ConfigError> {
    scaling.required_float("factor", limits::ROPE_FACTOR)
}

/// Positions of the model before it was stretched: beside the scaling, at the top level (Phi-3), or the context.
fn original_max_position(fields: &Fields<'_>, scaling: &Fields<'_>) -> Result<u64, ConfigError> {
    const FIELD: &str = "original_max_position_embeddings";
    match scaling.uint(&[FIELD], limits::POSITIONS)?.or(fields.uint(&[FIELD], limits::POSITIONS)?) {
        Some(n) => Ok(n),
        None => stated_positions(fields),
    }
}

/// `max_position_embeddings` as the file has it, before scaling.
pub(super) fn stated_positions(fields: &Fields<'_>) -> Result<u64, ConfigError> {
    const NAMES: [&str; 5] =
        ["max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length", "n_positions"];
    fields.required_uint(&NAMES, limits::POSITIONS)
}

fn llama3(fields: &Fields<'_>, scaling: &Fields<'_>) -> Result<RopeScaling, ConfigError> {
    let low = scaling.required_float("low_freq_factor", limits::POSITIVE)?;
    let high = scaling.required_float("high_freq_factor", limits::POSITIVE)?;
    if high <= low {
        return Err(scaling.out_of_range("high_freq_factor", &high, format!("a number above low_freq_factor, {low}")));
    }
    Ok(RopeScaling::Llama3 {
        factor: factor(scaling)?,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position: original_max_position(fields, scaling)?,
    })
}

/// Peng et al. 2023, arXiv:2309.00071; defaults as in transformers' `modeling_rope_utils.py`.
fn yarn(fields: &Fields<'_>, scaling: &Fields<'_>) -> Result<RopeScaling, ConfigError> {
    if scaling.boolean("truncate")? == Some(false) {
        return Err(scaling.unsupported("truncate", &false, "supported: true"));
    }
    if scaling.value("llama_4_scaling_beta").is_some() {
        return Err(scaling.unsupported("llama_4_scaling_beta", "set", "supported: YaRN without it"));
    }
    let factor = factor(scaling)?;
    let mscale = scaling.float(&["mscale"], limits::POSITIVE)?;
    let mscale_all_dim = scaling.float(&["mscale_all_dim"], limits::POSITIVE)?;
    let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let default = match (mscale, mscale_all_dim) {
        (Some(a), Some(b)) => magnitude(a) / magnitude(b),
        _ => magnitude(1.0),
    };
    let attention_factor = scaling.float(&["attention_factor"], limits::POSITIVE)?.unwrap_or(default);
    let beta_fast = scaling.float(&["beta_fast"], limits::POSITIVE)?.unwrap_or(32.0);
    let beta_slow = scaling.float(&["beta_slow"], limits::POSITIVE)?.unwrap_or(1.0);
    let original_max_position = original_max_position(fields, scaling)?;
    Ok(RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, original_max_position })
}

/// Ding et al. 2024, arXiv:2402.13753, as Phi-3 uses it.
fn longrope(fields: &Fields<'_>, scaling: &Fields<'_>, rotary_dim: u64) -> Result<RopeScaling, ConfigError> {
    let short = scaling.floats("short_factor", rotary_dim / 2, limits::POSITIVE)?;
    let long = scaling.floats("long_factor", rotary_dim / 2, limits::POSITIVE)?;
    let original_max_position = original_max_position(fields, scaling)?;
    let stretch = match scaling.float(&["factor"], limits::ROPE_FACTOR)? {
        Some(factor) => factor,
        None => stated_positions(fields)? as f64 / original_max_position as f64,
    };
    let default = if stretch <= 1.0 || original_max_position < 2 {
        1.0
    } else {
        (1.0 + stretch.ln() / (original_max_position as f64).ln()).sqrt()
    };
    let attention_factor = scaling.float(&["attention_factor"], limits::POSITIVE)?.unwrap_or(default);
    Ok(RopeScaling::LongRope { short, long, attention_factor, original_max_position })
}

/// Context length after scaling, by vLLM's rule (`config/model.py`, `_get_and_verify_max_len`): linear and dynamic
/// stretch the stated length, YaRN the original one; llama3 and longrope files state the stretched length already.
pub(super) fn context_length(stated: u64, scaling: &RopeScaling) -> u64 {
    let stretched = |positions: u64, factor: f64| (positions as f64 * factor) as u64;
    let length = match scaling {
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::LongRope { .. } => stated,
        RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor, .. } => stretched(stated, *factor),
        RopeScaling::Yarn { factor, original_max_position, .. } => stretched(*original_max_position, *factor),
    };
    length.min(*limits::POSITIONS.end())
}

/// The same for models that are planned and not run: scalings without a length of their own stretch nothing.
pub(super) fn planned_context(fields: &Fields<'_>, stated: u64) -> Result<u64, ConfigError> {
    let Some(scaling) = fields.object("rope_parameters")?.or(fields.object("rope_scaling")?) else { return Ok(stated) };
    let kind = scaling.string(&["rope_type", "type"])?.map_or("default", |(_, kind)| kind);
    if !matches!(kind, "linear" | "dynamic" | "yarn") {
        return Ok(stated);
    }
    let factor = scaling.float(&["factor"], limits::ROPE_FACTOR)?.unwrap_or(1.0);
    let scaling = match (kind, scaling.uint(&["original_max_position_embeddings"], limits::POSITIONS)?) {
        ("yarn", Some(original_max_position)) => {
            RopeScaling::Yarn { factor, beta_fast: 32.0, beta_slow: 1.0, attention_factor: 1.0, original_max_position }
        }
        _ => RopeScaling::Linear { factor },
    };
    Ok(context_length(stated, &scaling))
}
