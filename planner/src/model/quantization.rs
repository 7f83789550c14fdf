//! How a checkpoint stores its linear weights: one form by default, others for the modules that rules name.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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
    pub rules: Rules,
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

impl Quantization {
    /// Form of the weight of `module` (a tensor's name without `.weight`).
    pub fn storage(&self, module: &str, role: Role) -> Storage {
        let Self::Stored(stored) = self else { return Storage::Plain };
        match (role, stored.rules.find(module)) {
            (Role::Never, _) => Storage::Plain,
            (_, Some(storage)) => storage,
            (Role::Linear, None) => stored.linear,
            (Role::Experts, None) => stored.experts,
            (Role::Router | Role::Head, None) => Storage::Plain,
        }
    }
}

/// Exceptions from the default, by module. Names may leave off prefixes such as `model.`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    /// Whole names, of a module or of one that it is part of.
    exact: BTreeMap<String, Storage>,
    /// Names with `*` that begin with their layer (`layers.3`), by layer: files repeat them for each.
    of_layer: BTreeMap<String, Vec<(String, Storage)>>,
    /// Other names with `*`; the first that fits counts.
    globs: Vec<(String, Storage)>,
}

/// More names than a file needs (22,000 in MiniMax-M3-NVFP4).
const MAX_NAMES: usize = 100_000;
/// More patterns than a file needs that are tried on every module.
const MAX_GLOBS: usize = 64;

/// Parts of a name that checkpoints put before or leave off.
const WRAPPERS: [&str; 6] = ["model", "language_model", "backbone", "transformer", "text_model", "llm"];

impl Rules {
    /// False when there are more rules than any real file has.
    #[must_use]
    pub fn add(&mut self, pattern: &str, storage: Storage) -> bool {
        let pattern = stem(pattern).to_owned();
        if !pattern.contains('*') {
            self.exact.entry(pattern).or_insert(storage);
            return self.exact.len() <= MAX_NAMES;
        }
        match layer_of(&pattern) {
            Some(layer) => {
                let of_layer = self.of_layer.entry(layer.to_owned()).or_default();
                of_layer.push((pattern, storage));
                of_layer.len() <= MAX_GLOBS && self.of_layer.len() <= MAX_NAMES
            }
            None => {
                self.globs.push((pattern, storage));
                self.globs.len() <= MAX_GLOBS
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.of_layer.is_empty() && self.globs.is_empty()
    }

    fn find(&self, module: &str) -> Option<Storage> {
        if self.is_empty() {
            return None;
        }
        // Experts are one tensor here and many in a file: the first stands for all.
        let first = module.replace(".*", ".0");
        let module = stem(&first);
        if let Some(storage) = ancestors(module).find_map(|name| self.exact.get(name)) {
            return Some(*storage);
        }
        // A short name without a path (`gate`, `lm_head`) means every module that ends in it (vLLM, `is_layer_skipped`).
        let last = module.rsplit('.').next().unwrap_or(module);
        if let Some(storage) = self.exact.get(last) {
            return Some(*storage);
        }
        let of_layer = layer_of(module).and_then(|layer| self.of_layer.get(layer));
        let globs = of_layer.into_iter().flatten().chain(&self.globs);
        let mut fitting = globs.filter(|(glob, _)| ancestors(module).any(|name| glob_fits(glob, name)));
        fitting.next().map(|(_, storage)| *storage)
    }
}

/// The module and what it is part of, innermost first.
fn ancestors(module: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(module), |name| name.rfind('.').map(|dot| &name[..dot]))
}

/// `layers.3` of `layers.3.self_attn*`, when the name begins so.
fn layer_of(name: &str) -> Option<&str> {
    let (list, rest) = name.split_once('.')?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    (digits > 0 && !list.contains('*')).then(|| &name[..list.len() + 1 + digits])
}

fn stem(name: &str) -> &str {
    let mut rest = name;
    while let Some((head, tail)) = rest.split_once('.') {
        if !WRAPPERS.contains(&head) {
            break;
        }
        rest = tail;
    }
    rest
}

/// `*` stands for any text. Linear in the pattern times the name.
pub(super) fn glob_fits(glob: &str, text: &str) -> bool {
    let mut parts = glob.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_fit_whole_names() {
        for (glob, text, fits) in [
            ("layers.0.mlp*", "layers.0.mlp.gate", true),
            ("layers.0.mlp*", "layers.10.mlp.gate", false),
            ("*.attn.*", "layers.3.attn.wq_a", true),
            ("*.attn.*", "layers.3.attn", false),
            ("*self_attn*", "layers.3.self_attn.q_proj", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b", "ab", true),
            ("a*b", "a", false),
        ] {
            assert_eq!(glob_fits(glob, text), fits, "{glob} {text}");
        }
    }

    #[test]
    fn rules_know_wrappers_parents_and_short_names() {
        let mut rules = Rules::default();
        let fp8 = Storage::Packed(Packed::fp8(Scales::Tensor));
        for (pattern, storage) in [
            ("model.language_model.layers.0.self_attn", Storage::Plain),
            ("gate", Storage::Plain),
            ("layers.1.ffn.experts", fp8),
            ("language_model.model.layers.2.mlp*", fp8),
            ("model.layers.*.linear_attn", fp8),
        ] {
            assert!(rules.add(pattern, storage));
        }
        assert_eq!(rules.find("model.layers.2.mlp.up_proj"), Some(fp8));
        assert_eq!(rules.find("model.layers.20.mlp.up_proj"), None);
        assert_eq!(rules.find("model.layers.9.linear_attn.in_proj_z"), Some(fp8));
        assert_eq!(rules.find("model.layers.0.self_attn.q_proj"), Some(Storage::Plain));
        assert_eq!(rules.find("model.layers.1.self_attn.q_proj"), None);
        assert_eq!(rules.find("model.layers.7.mlp.gate"), Some(Storage::Plain));
        assert_eq!(rules.find("layers.1.ffn.experts.*.w1"), Some(fp8));
    }

    #[test]
    fn packed_bytes_count_their_scales() {
        assert_eq!(Packed::NVFP4.bytes(4, 32), 64 + 8);
        assert_eq!(Packed::MXFP4.bytes(4, 32), 64 + 4);
        assert_eq!(Packed::fp8(Scales::Block { rows: 128, columns: 128 }).bytes(129, 128), 129 * 128 + 8);
        // 4 bits, 128 columns a group: a 2-byte scale and half a byte of zero point.
        assert_eq!(Packed::integers(4, Scales::Group { columns: 128 }, true).bytes(2, 256), 256 + 10);
    }
}
