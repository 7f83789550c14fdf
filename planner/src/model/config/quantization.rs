//! `quantization_config`: AWQ and GPTQ integers, fp8 in its three spellings. Anything else is refused by name.

use super::{ConfigError, fields::Fields};
use crate::model::Quantization;
use serde_json::Value;

const SUPPORTED: &str =
    "supported: awq, gptq, fp8, modelopt FP8, compressed-tensors with 8-bit floats or grouped 4/8-bit integers";

pub(super) fn read(root: &Fields<'_>) -> Result<Quantization, ConfigError> {
    let Some(q) = root.object("quantization_config")? else { return Ok(Quantization::None) };
    refuse_partial(&q)?;
    match q.string(&["quant_method"])? {
        Some((_, "awq" | "gptq" | "gptq_marlin" | "awq_marlin")) => integers(&q),
        Some((_, "fp8")) => Ok(Quantization::Fp8 { kv_cache: fp8_kv_cache(&q)? }),
        Some((_, "compressed-tensors")) => compressed_tensors(&q),
        Some((_, "modelopt")) | None => modelopt(&q, "quant_algo"),
        Some((name, other)) => Err(q.unsupported(name, other, SUPPORTED)),
    }
}

/// `hf_quant_config.json` of ModelOpt.
pub(super) fn from_hf_quant_config(root: &Fields<'_>) -> Result<Option<Quantization>, ConfigError> {
    match root.object("quantization")? {
        None => Ok(None),
        Some(q) => modelopt(&q, "quant_algo").map(Some),
    }
}

fn integers(q: &Fields<'_>) -> Result<Quantization, ConfigError> {
    const GROUP: &str = "group_size";
    let bits = q.required_uint(&["bits", "w_bit"], 2..=8)?;
    if ![2, 3, 4, 8].contains(&bits) {
        return Err(q.out_of_range("bits", &bits, "2, 3, 4 or 8"));
    }
    // -1: one group for a whole row.
    if q.value(GROUP).and_then(Value::as_i64) == Some(-1) {
        return Ok(Quantization::Grouped { bits, group_size: 0 });
    }
    let group_size = q.required_uint(&[GROUP, "q_group_size"], 1..=131_072)?;
    Ok(Quantization::Grouped { bits, group_size })
}

/// ModelOpt names the algorithm; the KV cache has a field of its own, under one of two names.
fn modelopt(q: &Fields<'_>, field: &'static str) -> Result<Quantization, ConfigError> {
    match q.string(&[field])? {
        Some((_, "FP8")) => Ok(Quantization::Fp8 { kv_cache: fp8_kv_cache(q)? }),
        Some((name, other)) => Err(q.unsupported(name, other, SUPPORTED)),
        None => Err(ConfigError::Missing {
            field: q.path("quant_method"),
            expected: SUPPORTED.replace("supported: ", "one of "),
        }),
    }
}

fn compressed_tensors(q: &Fields<'_>) -> Result<Quantization, ConfigError> {
    const GROUPS: &str = "config_groups";
    let missing = || ConfigError::Missing {
        field: q.path(GROUPS),
        expected: "an object with one group that has weights".to_owned(),
    };
    let groups = match q.value(GROUPS) {
        Some(Value::Object(groups)) => groups,
        Some(other) => return Err(q.wrong_type(GROUPS, other, "an object")),
        None => return Err(missing()),
    };
    // Groups may differ per layer; one is enough for every published model of these families.
    let mut weights = groups.values().filter_map(|group| group.get("weights"));
    let (Some(Value::Object(first)), None) = (weights.next(), weights.next()) else { return Err(missing()) };
    let weights = Fields::new(first);
    let bits = weights.required_uint(&["num_bits"], 1..=16)?;
    match (weights.string(&["type"])?, bits) {
        (Some((_, "float")), 8) => Ok(Quantization::Fp8 { kv_cache: fp8_kv_cache(q)? }),
        (Some((_, "int")), 4 | 8) => {
            Ok(Quantization::Grouped { bits, group_size: weights.uint(&["group_size"], 1..=131_072)?.unwrap_or(0) })
        }
        (kind, bits) => {
            let value = format!("{bits}-bit {}", kind.map_or("?", |(_, kind)| kind));
            Err(q.unsupported(GROUPS, &value, SUPPORTED))
        }
    }
}

/// Under `kv_cache_dtype=auto` a checkpoint that carries KV scales gets an fp8 cache (vLLM).
fn fp8_kv_cache(q: &Fields<'_>) -> Result<bool, ConfigError> {
    for field in ["kv_cache_quant_algo", "kv_cache_scheme"] {
        match q.value(field) {
            None => {}
            Some(Value::String(algo)) if algo == "FP8" => return Ok(true),
            Some(Value::Object(scheme)) => {
                let scheme = Fields::new(scheme);
                let bits = scheme.uint(&["num_bits"], 1..=16)?;
                return match (scheme.string(&["type"])?, bits) {
                    (Some((_, "float")), Some(8)) => Ok(true),
                    _ => Err(q.unsupported(field, "another scheme", "supported: FP8")),
                };
            }
            Some(other) => return Err(q.unsupported(field, other, "supported: FP8")),
        }
    }
    Ok(false)
}

/// Layers left unquantised change the bytes. Names of tensors that are never quantised (norms, head, embeddings)
/// do not matter; a projection does.
fn refuse_partial(q: &Fields<'_>) -> Result<(), ConfigError> {
    for field in ["modules_to_not_convert", "ignore", "exclude_modules"] {
        let Some(list) = q.list(field)? else { continue };
        for entry in list {
            match entry {
                Value::String(name) if name.contains("_proj") => {
                    return Err(q.unsupported(field, name, "supported: every projection of every layer quantised"));
                }
                Value::String(_) => {}
                other => return Err(q.wrong_type(field, other, "a list of strings")),
            }
        }
    }
    Ok(())
}
