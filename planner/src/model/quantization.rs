//! How a checkpoint stores its linear weights: one form by default, others for the modules that rules name.

mod rules;

use serde::{Deserialize, Serialize};
use std::sync::Arc;

use rules::Matcher;
pub use rules::Rules;

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case", tag = "quantization")]
pub enum Quantization {
    /// Plain tensors of [`super::ModelSpec::dtype`].
    #[default]
    None,
    Stored(StoredWeights),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoredWeights {
    /// As the file names it: `awq`, `gptq`, `fp8`, `compressed-tensors`, `modelopt`, `mxfp4`, `bitsandbytes`.
    pub method: String,
    /// Of linear layers that no rule names.
    pub linear: Storage,
    /// Of experts that no rule names.
    pub experts: Storage,
    #[serde(skip)]
    /// Shared: they may be tens of thousands, and specs are cloned.
    pub rules: Arc<Rules>,
    /// The checkpoint asks for an fp8 KV cache under `--kv-cache-dtype auto`.
    pub kv_cache_fp8: bool,
}

/// Form of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "storage")]
pub enum Storage {
    Plain,
    Packed(Packed),
}

/// Elements of a few bits with scales beside them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Packed {
    pub element: Element,
    pub bits: u64,
    pub scales: Scales,
    /// Bits of one scale and its zero point.
    pub scale_bits: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Element {
    Integer,
    Float,
    /// bitsandbytes' NF4.
    NormalFloat,
}

/// What shares one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "scales")]
pub enum Scales {
    Tensor,
    /// One output row.
    Row,
    /// `columns` inputs of one row.
    Group {
        columns: u64,
    },
    Block {
        rows: u64,
        columns: u64,
    },
    /// `elements` one after another in memory, rows or not (bitsandbytes).
    Run {
        elements: u64,
    },
}

impl Packed {
    pub const fn integers(bits: u64, scales: Scales, zero_points: bool) -> Self {
        let scale_bits = if zero_points { 16 + bits } else { 16 };
        Self { element: Element::Integer, bits, scales, scale_bits }
    }

    /// E4M3 with one scale for a tensor or row, or float32 ones for blocks.
    pub const fn fp8(scales: Scales) -> Self {
        Self { element: Element::Float, bits: 8, scales, scale_bits: 32 }
    }

    /// E2M1 in groups of 32 with a power of two each (OCP MX).
    pub const MXFP4: Self =
        Self { element: Element::Float, bits: 4, scales: Scales::Group { columns: 32 }, scale_bits: 8 };
    /// E2M1 in groups of 16 with an E4M3 scale each.
    pub const NVFP4: Self =
        Self { element: Element::Float, bits: 4, scales: Scales::Group { columns: 16 }, scale_bits: 8 };
    pub const MXFP8: Self =
        Self { element: Element::Float, bits: 8, scales: Scales::Group { columns: 32 }, scale_bits: 8 };

    /// Bytes of a matrix, scales included.
    pub fn bytes(&self, rows: u64, columns: u64) -> u64 {
        let elements = rows.saturating_mul(columns);
        let scales = match self.scales {
            Scales::Tensor => 1,
            Scales::Row => rows,
            Scales::Group { columns: group } => rows.saturating_mul(columns.div_ceil(group.max(1))),
            Scales::Block { rows: r, columns: c } => rows.div_ceil(r.max(1)).saturating_mul(columns.div_ceil(c.max(1))),
            Scales::Run { elements: run } => elements.div_ceil(run.max(1)),
        };
        let bits = |count: u64, each: u64| count.saturating_mul(each).div_ceil(8);
        bits(elements, self.bits).saturating_add(bits(scales, self.scale_bits))
    }

    /// Inputs of a row that share a scale, and so stay on one rank.
    pub fn group_columns(&self) -> Option<u64> {
        match self.scales {
            Scales::Group { columns } | Scales::Block { columns, .. } => Some(columns),
            Scales::Tensor | Scales::Row | Scales::Run { .. } => None,
        }
    }

    /// `int4`, `fp8`, `fp4`, `nf4`.
    pub fn name(&self) -> String {
        let element = match self.element {
            Element::Integer => "int",
            Element::Float => "fp",
            Element::NormalFloat => "nf",
        };
        format!("{element}{}", self.bits)
    }
}

/// What a weight is to the quantiser.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Linear,
    Experts,
    /// Routers and heads stay plain unless a rule names them.
    Router,
    Head,
    /// Embeddings, norms, biases, convolutions: never.
    Never,
}

/// Looks up the form of one weight after another of a model.
#[derive(Debug)]
pub struct Forms<'a> {
    stored: Option<(&'a StoredWeights, Matcher<'a>)>,
}

impl<'a> Forms<'a> {
    pub fn new(quantization: &'a Quantization) -> Self {
        let stored = match quantization {
            Quantization::None => None,
            Quantization::Stored(stored) => Some((stored, Matcher::new(&stored.rules))),
        };
        Self { stored }
    }

    /// Form of the weight of `module` (a tensor's name without `.weight`).
    pub fn of(&mut self, module: &str, role: Role) -> Storage {
        let Some((stored, rules)) = &mut self.stored else { return Storage::Plain };
        if role == Role::Never {
            return Storage::Plain;
        }
        rules.find(module).unwrap_or(match role {
            Role::Linear => stored.linear,
            Role::Experts => stored.experts,
            Role::Router | Role::Head | Role::Never => Storage::Plain,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_bytes_count_their_scales() {
        assert_eq!(Packed::NVFP4.bytes(4, 32), 64 + 8);
        assert_eq!(Packed::MXFP4.bytes(4, 32), 64 + 4);
        assert_eq!(Packed::fp8(Scales::Block { rows: 128, columns: 128 }).bytes(129, 128), 129 * 128 + 8);
        // 4 bits, 128 columns a group: a 2-byte scale and half a byte of zero point.
        assert_eq!(Packed::integers(4, Scales::Group { columns: 128 }, true).bytes(2, 256), 256 + 10);
    }
}
