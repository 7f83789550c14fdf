//! NVIDIA ModelOpt: one algorithm for all modules but those left out, or one for each module named.

use super::super::json::Value;
use super::super::{ConfigError, fields::Fields};
use super::{GROUP_COLUMNS, SUPPORTED, block_scales, everywhere, patterns, skipped};
use crate::model::{Packed, Rules, Scales, Storage, StoredWeights};
use std::sync::Arc;

const LAYERS: &str = "quantized_layers";

pub(super) fn read(q: &Fields<'_>) -> Result<StoredWeights, ConfigError> {
    let Some((name, algorithm)) = q.string(&["quant_algo"])? else {
        return match q.object(LAYERS)? {
            Some(_) => mixed(q),
            None => Err(ConfigError::Missing {
                field: q.path("quant_method"),
                expected: SUPPORTED.replace("supported: ", "one of "),
            }),
        };
    };
    if algorithm == "MIXED_PRECISION" {
        return mixed(q);
    }
    let packed = form(q, name, algorithm, q)?;
    Ok(everywhere("modelopt", packed, skipped(q)?))
}

fn form(q: &Fields<'_>, name: &str, algorithm: &str, sizes: &Fields<'_>) -> Result<Packed, ConfigError> {
    let group = |default: u64| Ok::<_, ConfigError>(sizes.uint(&["group_size"], GROUP_COLUMNS)?.unwrap_or(default));
    Ok(match algorithm {
        "FP8" => Packed::fp8(Scales::Tensor),
        "FP8_PER_CHANNEL_PER_TOKEN" => Packed::fp8(Scales::Row),
        "FP8_PB_WO" => Packed::fp8(block_scales(q)?.unwrap_or(Scales::Block { rows: 128, columns: 128 })),
        "NVFP4" | "W4A16_NVFP4" | "NVFP4_AWQ" | "W4A8_NVFP4_FP8" => {
            Packed { scales: Scales::Group { columns: group(16)? }, ..Packed::NVFP4 }
        }
        "MXFP8" => Packed::MXFP8,
        "MXFP4" | "W4A8_MXFP4_FP8" => Packed::MXFP4,
        "W4A16_AWQ" | "W4A8_AWQ" | "INT4_AWQ" => Packed::integers(4, Scales::Group { columns: group(128)? }, false),
        "W8A16" | "W8A8_SQ_PER_CHANNEL" => Packed::integers(8, Scales::Row, false),
        other => return Err(q.unsupported(name, other, "supported: FP8, NVFP4, MXFP8, MXFP4, W4A16_AWQ")),
    })
}

/// Modules are named with an algorithm each; the others stay plain, or FP8 where the file describes that beside.
fn mixed(q: &Fields<'_>) -> Result<StoredWeights, ConfigError> {
    let mut rules = skipped(q)?;
    if let Some(layers) = q.object(LAYERS)? {
        add_layers(q, &layers, &mut rules)?;
    }
    let fp8 = block_scales(q)?.map(|scales| Storage::Packed(Packed::fp8(scales)));
    let experts = match q.string(&["moe_quant_algo"])? {
        Some((name, algorithm)) => Storage::Packed(form(q, name, algorithm, q)?),
        None => fp8.unwrap_or(Storage::Plain),
    };
    let linear = fp8.unwrap_or(Storage::Plain);
    Ok(StoredWeights { method: "modelopt".to_owned(), linear, experts, rules: Arc::new(rules), kv_cache_fp8: false })
}

fn add_layers(q: &Fields<'_>, layers: &Fields<'_>, rules: &mut Rules) -> Result<(), ConfigError> {
    // Thousands in a row say the same: it is read once.
    let mut before: Option<(Fields<'_>, Option<Storage>)> = None;
    for (name, value) in layers.entries() {
        let Value::Object(map) = value else { return Err(layers.wrong_type(name, value, "an object")) };
        let layer = Fields::new(map);
        let storage = match before {
            Some((same, storage)) if same.is(&layer) => storage,
            _ => layer_form(q, &layer)?,
        };
        before = Some((layer, storage));
        if let Some(storage) = storage {
            patterns::add(q, LAYERS, rules, name, storage)?;
        }
    }
    Ok(())
}

fn layer_form(q: &Fields<'_>, layer: &Fields<'_>) -> Result<Option<Storage>, ConfigError> {
    let Some((field, algorithm)) = layer.string(&["quant_algo"])? else { return Ok(None) };
    Ok(Some(Storage::Packed(form(q, field, algorithm, layer)?)))
}
