//! The kernels: their sources, which variants exist, and how a launch is shaped. Pure: nothing here touches a device.
//!
//! Sources are header-free CUDA C++ (`*.cu`, one op a file), embedded as text; every file opens with what it does, the
//! shapes and layouts of its arguments and the rate to expect. `ptx.cuh` holds the machine's instructions, `prelude.cuh`
//! the arithmetic they share; both precede each file. `wgmma.cuh`, `wide.cuh`, `linear.cuh` and `logits.cuh` precede those
//! that name them. The CPU emulation (`tests/cuda_emulation`) compiles the same files.
//!
//! Arguments are device pointers, i32, f32 and the copy engine's maps only, in the order of the `.cu` file's entry.

mod chain;
mod decode;
mod fused;
mod geometry;
mod sample_row;
mod wide;

pub use super::module::Geometry;
pub use chain::{CHAIN_BOX_ROWS, CHAIN_ROWS, ChainSizes, chain_block, chain_for};
pub use decode::{Decode, DecodeLaunch, Shares};
pub use fused::{After, FUSED, Fused, FusedShape, fused_for};
pub use geometry::{
    Prefill, Products, SCAN_BLOCKS, bests, embed, gated_act, gather, prefill_tiles, product, rms_norm, rope, sample,
    sample_parts, sample_scan, token_state_reset,
};
pub use sample_row::{SAMPLE_ROW_WORDS, SampleRow};
pub use wide::{WIDE, WIDE_ROWS_MIN, Wide, WideResult, head_bests, head_parts};

use super::compile::KernelSource;

/// Tokens of a KV block; the layout of the cache is compiled into the kernels.
pub const BLOCK_SIZE: u32 = 16;
/// Head dimensions that the attention kernels are written for (16 and 32: test and demo models).
pub const HEAD_DIMS: [u32; 6] = [16, 32, 64, 80, 96, 128];
/// Query rows of one block of the prefill attention.
pub const PREFILL_ROWS: u32 = 128;

const PTX: &str = include_str!("ptx.cuh");
const PRELUDE: &str = include_str!("prelude.cuh");
const WGMMA: &str = include_str!("wgmma.cuh");
const WIDE_PRODUCT: &str = include_str!("wide.cuh");
const LINEAR: &str = include_str!("linear.cuh");
const LOGITS: &str = include_str!("logits.cuh");

/// A `.cu` file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelFile {
    /// File name without `.cu`.
    pub name: &'static str,
    body: &'static str,
    /// Its `extern "C"` kernels.
    pub entries: &'static [&'static str],
    pub variants: Variants,
}

/// How often a file is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variants {
    Once,
    /// Once, for Hopper only.
    Hopper,
    /// For each head dimension of the model.
    HeadDims,
    /// For those of the model's head dimensions that are listed, and for Hopper only: its warpgroup products.
    HopperHeadDims(&'static [u32]),
}

macro_rules! file {
    ($name:literal, $variants:expr, [$($entry:literal),+ $(,)?]) => {
        KernelFile {
            name: $name,
            body: include_str!(concat!($name, ".cu")),
            entries: &[$($entry),+],
            variants: $variants,
        }
    };
}

pub const FILES: [KernelFile; 19] = [
    file!("embed", Variants::Once, ["embed"]),
    file!("rms_norm", Variants::Once, ["rms_norm", "rms_norm_add", "add_rms_norm"]),
    file!("qk_norm_rope_kv_write", Variants::HeadDims, ["qk_norm_rope_kv_write"]),
    file!("attn_decode", Variants::HeadDims, ["attn_decode_w4", "attn_decode_w8"]),
    file!("attn_prefill", Variants::HeadDims, ["attn_prefill"]),
    file!("attn_prefill_wgmma", Variants::HopperHeadDims(&[64, 128]), ["attn_prefill_wgmma"]),
    file!("gated_act", Variants::Once, ["silu_mul", "gelu_mul", "gelu_tanh_mul"]),
    file!("gather", Variants::Once, ["gather_rows", "gather_last_rows"]),
    file!(
        "gemv",
        Variants::Once,
        [
            "gemv_r1_u4_s1",
            "gemv_r2_u4_s1",
            "gemv_r4_u2_s1",
            "gemv_r1_u4_s4",
            "gemv_r2_u4_s4",
            "gemv_r1_u4_s2",
            "skinny_t1_w4",
            "skinny_t1_w8",
            "skinny_t1_w16",
            "skinny_t2_w8",
            "skinny_t2_w16",
        ]
    ),
    file!(
        "fused_linear",
        Variants::Once,
        [
            "fused_gemv_plain",
            "fused_gemv_gated",
            "fused_gemv_rotated",
            "fused_m8_plain_t1_w8",
            "fused_m8_plain_t1_w16",
            "fused_m8_gated_t2_w8",
            "fused_m8_rotated_t1_w16",
            "fused_m16_plain_t1_w16",
            "fused_m16_gated_t2_w8",
            "fused_m16_rotated_t1_w8",
        ]
    ),
    file!(
        "tile_linear",
        Variants::Once,
        ["tile_m32_plain_c8", "tile_m32_gated_c2", "tile_m32_rotated_c8", "tile_m64_plain_c8", "tile_m64_rotated_c8",]
    ),
    file!(
        "wide_linear",
        Variants::Hopper,
        ["wide_gated_n256", "wide_gated_n224", "wide_gated_n160", "wide_plain_n256", "wide_plain_n192"]
    ),
    file!(
        "wide_rotated",
        Variants::Hopper,
        ["wide_rotated_n192_d64", "wide_rotated_n64_d64", "wide_rotated_n256_d128",]
    ),
    file!("wide_head", Variants::Hopper, ["wide_head_n256", "wide_head_beside_n256"]),
    file!("split_linear", Variants::Hopper, ["split_gated", "split_plain_s4", "split_plain_s8"]),
    file!("chain_linear", Variants::Hopper, ["chain_linear"]),
    file!("sample_scan", Variants::Once, ["sample_scan"]),
    file!("sample", Variants::Once, ["sample"]),
    file!("token_state", Variants::Once, ["token_state_reset"]),
];

/// The file called `name`.
pub fn file(name: &str) -> Option<&'static KernelFile> {
    FILES.iter().find(|f| f.name == name)
}

impl KernelFile {
    /// The head dimensions that it is compiled for; `None` where it does not depend on one.
    pub fn variants_for(&self, head_dims: &[u32], compute_capability: (i32, i32)) -> Vec<Option<u32>> {
        let hopper = compute_capability.0 == 9;
        let listed = |list: &[u32]| head_dims.iter().filter(|d| list.contains(d)).copied().map(Some).collect();
        match self.variants {
            Variants::Once => vec![None],
            Variants::HeadDims => listed(head_dims),
            Variants::Hopper if hopper => vec![None],
            Variants::HopperHeadDims(dims) if hopper => listed(dims),
            Variants::Hopper | Variants::HopperHeadDims(_) => Vec::new(),
        }
    }

    /// The text and options for one compilation. `head_dim` only for files that are compiled per head dimension.
    pub fn source(&self, head_dim: Option<u32>, compute_capability: (i32, i32)) -> KernelSource {
        let name = head_dim.map_or_else(|| self.name.to_owned(), |d| format!("{}_{d}", self.name));
        let shared: &[&str] = match self.name {
            "chain_linear" => &[WGMMA, LINEAR],
            "wide_linear" | "wide_rotated" => &[WGMMA, WIDE_PRODUCT],
            "wide_head" => &[WGMMA, LOGITS, WIDE_PRODUCT],
            _ if matches!(self.variants, Variants::Hopper | Variants::HopperHeadDims(_)) => &[WGMMA],
            "fused_linear" | "tile_linear" => &[LINEAR],
            "sample" | "sample_scan" => &[LOGITS],
            _ => &[],
        };
        let shared = shared.join("\n");
        let text = format!("{PTX}\n{PRELUDE}\n{shared}\n#line 1 \"{}.cu\"\n{}", self.name, self.body);
        let mut options: Vec<String> = head_dim.iter().map(|d| format!("-DHEAD_DIM={d}")).collect();
        match self.name {
            "attn_prefill" => options.push(format!("-DKEY_TILE={}", prefill_key_tile(compute_capability))),
            "attn_decode" => options.push(format!("-DSTAGES={}", decode_stages(compute_capability))),
            _ => {}
        }
        KernelSource { name, text, options }
    }
}

/// All that a model with these head dimensions needs, in the order of [`FILES`].
pub fn sources(head_dims: &[u32], compute_capability: (i32, i32)) -> Vec<KernelSource> {
    let of = |f: &KernelFile| -> Vec<KernelSource> {
        let variants = f.variants_for(head_dims, compute_capability);
        variants.into_iter().map(|d| f.source(d, compute_capability)).collect()
    };
    FILES.iter().flat_map(of).collect()
}

/// Keys that the prefill attention takes at a time: what two blocks on a multiprocessor leave room for.
pub const fn prefill_key_tile(compute_capability: (i32, i32)) -> u32 {
    if has_227_kib(compute_capability) { 64 } else { 32 }
}

/// Tiles that each warp of the decode attention has under way.
pub const fn decode_stages(compute_capability: (i32, i32)) -> u32 {
    if has_227_kib(compute_capability) { 3 } else { 2 }
}

/// Of shared memory for a block: Hopper and the large Blackwells.
const fn has_227_kib(compute_capability: (i32, i32)) -> bool {
    compute_capability.0 >= 9 && compute_capability.0 < 12
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_entry_is_in_its_file_and_no_entry_is_forgotten() {
        for f in FILES {
            let lines = || f.body.lines().map(str::trim_start);
            let made = |prefix: &str| lines().filter(|l| l.starts_with(prefix)).count();
            // The macros of some files hold a KERNEL line each that declares nothing by itself.
            let macros = ["GEMV(", "SKINNY(", "FUSED(", "DECODE(", "WIDE(", "ROTATED(", "SPLIT(", "HEAD("];
            let by_macro: usize = macros.iter().map(|m| made(m)).sum();
            let definitions: usize = macros.iter().map(|m| made(&format!("#define {m}"))).sum();
            let declared = made("KERNEL") + by_macro - definitions;
            assert_eq!(declared, f.entries.len(), "{}", f.name);
            for entry in f.entries {
                let macro_made = f.name == "gemv" && entry.starts_with("gemv_");
                assert!(macro_made || f.body.contains(entry), "{entry} of {}", f.name);
            }
        }
    }

    #[test]
    fn sources_say_everything_that_a_compilation_needs() {
        let all = sources(&[64, 128], (9, 0));
        assert_eq!(all.len(), FILES.len() + 4);
        assert_eq!(sources(&[64, 128], (8, 9)).len(), FILES.len() - 3);
        assert_eq!(sources(&[80], (9, 0)).len(), FILES.len() - 1);
        let prefill = all.iter().find(|s| s.name == "attn_prefill_128").unwrap();
        assert_eq!(prefill.options, ["-DHEAD_DIM=128", "-DKEY_TILE=64"]);
        assert!(!prefill.text.contains("#include"));
        assert_eq!(file("attn_prefill").unwrap().source(Some(64), (8, 9)).options[1], "-DKEY_TILE=32");
        assert_eq!(file("attn_decode").unwrap().source(Some(64), (9, 0)).options[1], "-DSTAGES=3");
    }
}
