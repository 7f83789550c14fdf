//! compressed-tensors (llm-compressor): groups of modules with a form each, and modules left out.

use super::super::json::Value;
use super::super::{ConfigError, fields::Fields};
use super::{GROUP_COLUMNS, SUPPORTED, everywhere, patterns, skipped};
use crate::model::{Element, Packed, Scales, Storage, StoredWeights};

const GROUPS: &str = "config_groups";

pub(super) fn read(q: &Fields<'_>) -> Result<StoredWeights, ConfigError> {
    let missing = || ConfigError::Missing {
        field: q.path(GROUPS),
        expected: "an object with at least one group that has weights".to_owned(),
    };
    let groups = q.object(GROUPS)?.ok_or_else(missing)?;
    let mut rules = skipped(q)?;
    let mut of_all = None;
    let mut any = None;
    for (name, group) in groups.entries() {
        let Value::Object(map) = group else { return Err(groups.wrong_type(name, group, "an object")) };
        let group = Fields::new(map);
        let Some(weights) = group.object("weights")? else { continue };
        let packed = form(q, &group, &weights)?;
        any = Some(packed);
        for target in group.list("targets")?.unwrap_or_default() {
            match target {
                Value::String(class) if class == "Linear" => of_all = of_all.or(Some(packed)),
                Value::String(class) if class == "FusedMoE" => {}
                Value::String(module) => {
                    patterns::add(q, GROUPS, &mut rules, module, Storage::Packed(packed))?;
                }
                other => return Err(group.wrong_type("targets", other, "a list of strings")),
            }
        }
        if group.list("targets")?.is_none() {
            of_all = of_all.or(Some(packed));
        }
    }
    let any = any.ok_or_else(missing)?;
    let mut stored = everywhere("compressed-tensors", of_all.unwrap_or(any), rules);
    if of_all.is_none() {
        (stored.linear, stored.experts) = (Storage::Plain, Storage::Plain);
    }
    Ok(stored)
}

/// Of one group. A scale is as wide as the format has it: a byte in the microscaling ones, 16 bits for integers.
fn form(q: &Fields<'_>, group: &Fields<'_>, weights: &Fields<'_>) -> Result<Packed, ConfigError> {
    let bits = weights.required_uint(&["num_bits"], 1..=16)?;
    let format = match group.string(&["format"])? {
        Some((_, format)) => format,
        None => q.string(&["format"])?.map_or("", |(_, format)| format),
    };
    let scales = scales(weights)?;
    let zero_points = weights.boolean("symmetric")? == Some(false);
    match (weights.string(&["type"])?.map(|(_, kind)| kind), bits) {
        (Some("int"), 2 | 3 | 4 | 8) => Ok(Packed::integers(bits, scales, zero_points)),
        (Some("float"), 8) if format.starts_with("mxfp8") => Ok(Packed::MXFP8),
        (Some("float"), 8) => Ok(Packed::fp8(scales)),
        (Some("float"), 4) => Ok(Packed { element: Element::Float, bits: 4, scales, scale_bits: 8 }),
        (kind, bits) => {
            let value = format!("{bits}-bit {}", kind.unwrap_or("?"));
            Err(q.unsupported(GROUPS, &value, SUPPORTED))
        }
    }
}

fn scales(weights: &Fields<'_>) -> Result<Scales, ConfigError> {
    let group = weights.value("group_size").filter(|v| v.as_i64() != Some(-1));
    if group.is_some() {
        let columns = weights.required_uint(&["group_size"], GROUP_COLUMNS)?;
        return Ok(Scales::Group { columns });
    }
    Ok(match weights.string(&["strategy"])? {
        Some((_, "block")) => match weights.list("block_structure")? {
            Some([rows, columns]) => match (rows.as_u64(), columns.as_u64()) {
                (Some(rows @ 1..=131_072), Some(columns @ 1..=131_072)) => Scales::Block { rows, columns },
                _ => return Err(weights.out_of_range("block_structure", "another list", "two block sizes")),
            },
            _ => Scales::Block { rows: 128, columns: 128 },
        },
        Some((_, "channel")) => Scales::Row,
        _ => Scales::Tensor,
    })
}
