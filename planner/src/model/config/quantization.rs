//! `quantization_config` and `hf_quant_config.json`: which form each weight is stored in. Methods that are not known
//! are refused by name.

mod compressed_tensors;
mod modelopt;
mod patterns;

use super::json::Value;
use super::{ConfigError, fields::Fields};
use crate::model::{Element, Packed, Quantization, Rules, Scales, Storage, StoredWeights};
use std::sync::Arc;

pub(super) const SUPPORTED: &str = "supported: awq, gptq, auto-round, fp8, fbgemm_fp8, modelopt, compressed-tensors, \
                                    mxfp4, bitsandbytes";
pub(super) const GROUP_COLUMNS: std::ops::RangeInclusive<u64> = 1..=131_072;

/// `text` is where a multimodal file may keep it.
pub(super) fn read(root: &Fields<'_>, text: &Fields<'_>) -> Result<Quantization, ConfigError> {
    let Some(q) = root.object("quantization_config")?.or(text.object("quantization_config")?) else {
        return Ok(Quantization::None);
    };
    let stored = match q.string(&["quant_method"])? {
        Some((_, "awq" | "awq_marlin")) => integers(&q, "awq")?,
        Some((_, "gptq" | "gptq_marlin")) => integers(&q, "gptq")?,
        Some((_, "auto-round" | "auto_round" | "intel/auto-round")) => auto_round(&q)?,
        Some((_, "fp8")) => fp8(&q, text)?,
        Some((_, "fbgemm_fp8")) => everywhere("fbgemm_fp8", Packed::fp8(Scales::Row), skipped(&q)?),
        Some((_, "compressed-tensors")) => compressed_tensors::read(&q)?,
        Some((_, "mxfp4")) => {
            StoredWeights { linear: Storage::Plain, ..everywhere("mxfp4", Packed::MXFP4, skipped(&q)?) }
        }
        Some((_, "bitsandbytes")) => bitsandbytes(&q)?,
        Some((_, "modelopt" | "modelopt_fp4" | "modelopt_mixed")) | None => modelopt::read(&q)?,
        Some((name, other)) => return Err(q.unsupported(name, other, SUPPORTED)),
    };
    let kv_cache_fp8 = fp8_kv_cache(&q)?;
    Ok(Quantization::Stored(StoredWeights { kv_cache_fp8, ..stored }))
}

/// `hf_quant_config.json` of ModelOpt.
pub(super) fn from_hf_quant_config(root: &Fields<'_>) -> Result<Option<Quantization>, ConfigError> {
    let Some(q) = root.object("quantization")? else { return Ok(None) };
    let stored = modelopt::read(&q)?;
    Ok(Some(Quantization::Stored(StoredWeights { kv_cache_fp8: fp8_kv_cache(&q)?, ..stored })))
}

pub(super) fn everywhere(method: &str, packed: Packed, rules: Rules) -> StoredWeights {
    let storage = Storage::Packed(packed);
    StoredWeights {
        method: method.to_owned(),
        linear: storage,
        experts: storage,
        rules: Arc::new(rules),
        kv_cache_fp8: false,
    }
}

/// Modules that stay as they are, under any of the names for the list.
pub(super) fn skipped(q: &Fields<'_>) -> Result<Rules, ConfigError> {
    let mut rules = Rules::default();
    for field in ["modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "llm_int8_skip_modules"] {
        for entry in q.list(field)?.unwrap_or_default() {
            let Value::String(name) = entry else { return Err(q.wrong_type(field, entry, "a list of strings")) };
            patterns::add(q, field, &mut rules, name, Storage::Plain)?;
        }
    }
    Ok(rules)
}

fn integers(q: &Fields<'_>, method: &str) -> Result<StoredWeights, ConfigError> {
    let packed = integer_groups(q, method == "gptq" || q.boolean("zero_point")? != Some(false))?;
    if let Some(dynamic) = q.object("dynamic")?
        && dynamic.keys() > 0
    {
        return Err(q.unsupported("dynamic", "set", "supported: one form for all modules"));
    }
    let mut stored = everywhere(method, packed, skipped(q)?);
    if q.boolean("lm_head")? == Some(true) {
        patterns::add(q, "lm_head", Arc::make_mut(&mut stored.rules), "lm_head", stored.linear)?;
    }
    Ok(stored)
}

fn integer_groups(q: &Fields<'_>, zero_points: bool) -> Result<Packed, ConfigError> {
    const GROUP: &str = "group_size";
    let bits = q.required_uint(&["bits", "w_bit"], 2..=8)?;
    if ![2, 3, 4, 8].contains(&bits) {
        return Err(q.out_of_range("bits", &bits, "2, 3, 4 or 8"));
    }
    // -1: one group for a whole row.
    let scales = match q.value(GROUP).and_then(Value::as_i64) {
        Some(-1) => Scales::Row,
        _ => Scales::Group { columns: q.required_uint(&[GROUP, "q_group_size"], GROUP_COLUMNS)? },
    };
    Ok(Packed::integers(bits, scales, zero_points))
}

/// Intel's auto-round packs as GPTQ or AWQ do; single modules may keep 16 bits.
fn auto_round(q: &Fields<'_>) -> Result<StoredWeights, ConfigError> {
    let mut stored = everywhere("auto-round", integer_groups(q, true)?, skipped(q)?);
    let Some(extra) = q.object("extra_config")? else { return Ok(stored) };
    for (name, value) in extra.entries() {
        let Value::Object(map) = value else { return Err(extra.wrong_type(name, value, "an object")) };
        let module = Fields::new(map);
        let storage = match module.uint(&["bits"], 2..=16)? {
            Some(16) => Storage::Plain,
            Some(bits) => {
                let columns = module.uint(&["group_size"], GROUP_COLUMNS)?.unwrap_or(128);
                Storage::Packed(Packed::integers(bits, Scales::Group { columns }, true))
            }
            None => continue,
        };
        patterns::add(q, "extra_config", Arc::make_mut(&mut stored.rules), name, storage)?;
    }
    Ok(stored)
}

/// One scale a tensor, or float32 ones for blocks. DeepSeek-V4 says of its experts that they are FP4.
fn fp8(q: &Fields<'_>, text: &Fields<'_>) -> Result<StoredWeights, ConfigError> {
    let packed = Packed::fp8(block_scales(q)?.unwrap_or(Scales::Tensor));
    let mut stored = everywhere("fp8", packed, skipped(q)?);
    match text.string(&["expert_dtype"])? {
        None | Some((_, "fp8")) => {}
        Some((_, "fp4")) => stored.experts = Storage::Packed(Packed::MXFP4),
        Some((name, other)) => return Err(text.unsupported(name, other, "supported: fp4, fp8")),
    }
    Ok(stored)
}

pub(super) fn block_scales(q: &Fields<'_>) -> Result<Option<Scales>, ConfigError> {
    const FIELD: &str = "weight_block_size";
    let sizes = match q.list(FIELD)? {
        None => return Ok(None),
        Some(list) => list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>(),
    };
    match sizes.as_deref() {
        Some(&[rows, columns]) if GROUP_COLUMNS.contains(&rows) && GROUP_COLUMNS.contains(&columns) => {
            Ok(Some(Scales::Block { rows, columns }))
        }
        _ => Err(q.out_of_range(FIELD, "another list", "two block sizes of 1 to 131072")),
    }
}

fn bitsandbytes(q: &Fields<'_>) -> Result<StoredWeights, ConfigError> {
    let four = q.boolean("load_in_4bit")?.or(q.boolean("_load_in_4bit")?) == Some(true);
    let eight = q.boolean("load_in_8bit")?.or(q.boolean("_load_in_8bit")?) == Some(true);
    let packed = match (four, eight) {
        (true, false) => {
            // One absolute maximum for 64 elements, in float32 or again quantised to 8 bits.
            let scale_bits = if q.boolean("bnb_4bit_use_double_quant")? == Some(true) { 8 } else { 32 };
            let element = match q.string(&["bnb_4bit_quant_type"])? {
                Some((_, "nf4")) => Element::NormalFloat,
                _ => Element::Float,
            };
            Packed { element, bits: 4, scales: Scales::Run { elements: 64 }, scale_bits }
        }
        (false, true) => Packed { element: Element::Integer, bits: 8, scales: Scales::Row, scale_bits: 32 },
        _ => return Err(q.out_of_range("load_in_4bit", &four, "true, or load_in_8bit true")),
    };
    Ok(everywhere("bitsandbytes", packed, skipped(q)?))
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
            Some(Value::String(other)) => return Err(q.unsupported(field, other, "supported: FP8")),
            Some(other) => return Err(q.wrong_type(field, other, "`FP8` or an object")),
        }
    }
    Ok(false)
}
