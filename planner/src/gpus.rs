//! Common cards, for planning without one in the machine.
//!
//! Memory is what the driver reports as the total (`nvidia-smi`, ECC as shipped); bandwidth is the data sheet's.

use crate::units::MIB;
use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct GpuModel {
    /// What `--gpu` takes.
    pub name: &'static str,
    /// As the driver names it.
    pub full_name: &'static str,
    pub memory_total_bytes: u64,
    pub memory_bandwidth_bytes_per_s: u64,
    pub compute_capability: (u32, u32),
    /// Where memory and bandwidth come from.
    pub source: &'static str,
    /// Has a row of its own when a plan is made without a card.
    pub common: bool,
}

const fn card(
    name: &'static str,
    full_name: &'static str,
    memory_mib: u64,
    bandwidth_gb_per_s: u64,
    compute_capability: (u32, u32),
    source: &'static str,
) -> GpuModel {
    GpuModel {
        name,
        full_name,
        memory_total_bytes: memory_mib * MIB,
        memory_bandwidth_bytes_per_s: bandwidth_gb_per_s * 1_000_000_000,
        compute_capability,
        source,
        common: false,
    }
}

const fn common(gpu: GpuModel) -> GpuModel {
    GpuModel { common: true, ..gpu }
}

/// Smallest memory first, so that the first card that holds a model is the least that does.
pub const GPUS: &[GpuModel] = &[
    common(card("t4", "Tesla T4", 15_360, 320, (7, 5), "nvidia-smi; NVIDIA T4 data sheet")),
    common(card("a10", "NVIDIA A10", 23_028, 600, (8, 6), "nvidia-smi; NVIDIA A10 data sheet")),
    common(card("l4", "NVIDIA L4", 23_034, 300, (8, 9), "nvidia-smi; NVIDIA L4 data sheet")),
    common(card(
        "rtx4090",
        "NVIDIA GeForce RTX 4090",
        24_564,
        1_008,
        (8, 9),
        "nvidia-smi; GeForce RTX 4090 specifications",
    )),
    common(card(
        "rtx3090",
        "NVIDIA GeForce RTX 3090",
        24_576,
        936,
        (8, 6),
        "nvidia-smi; GeForce RTX 3090 specifications",
    )),
    card("a30", "NVIDIA A30", 24_576, 933, (8, 0), "nvidia-smi; NVIDIA A30 data sheet"),
    common(card(
        "rtx5090",
        "NVIDIA GeForce RTX 5090",
        32_607,
        1_792,
        (12, 0),
        "nvidia-smi; GeForce RTX 5090 specifications",
    )),
    card("v100-32g", "Tesla V100-SXM2-32GB", 32_768, 900, (7, 0), "nvidia-smi; NVIDIA V100 data sheet"),
    common(card("a100-40g", "NVIDIA A100-SXM4-40GB", 40_960, 1_555, (8, 0), "nvidia-smi; NVIDIA A100 data sheet")),
    card("a40", "NVIDIA A40", 46_068, 696, (8, 6), "nvidia-smi; NVIDIA A40 data sheet"),
    card("l20", "NVIDIA L20", 46_068, 864, (8, 9), "nvidia-smi; NVIDIA L20 specifications"),
    common(card("l40s", "NVIDIA L40S", 46_068, 864, (8, 9), "nvidia-smi; NVIDIA L40S data sheet")),
    common(card("a6000", "NVIDIA RTX A6000", 49_140, 768, (8, 6), "nvidia-smi, ECC off; RTX A6000 data sheet")),
    card(
        "rtx6000-ada",
        "NVIDIA RTX 6000 Ada Generation",
        49_140,
        960,
        (8, 9),
        "nvidia-smi, ECC off; RTX 6000 Ada data sheet",
    ),
    common(card("h100", "NVIDIA H100 80GB HBM3", 81_559, 3_350, (9, 0), "nvidia-smi; NVIDIA H100 SXM data sheet")),
    common(card("a100-80g", "NVIDIA A100-SXM4-80GB", 81_920, 2_039, (8, 0), "nvidia-smi; NVIDIA A100 data sheet")),
    common(card("h20", "NVIDIA H20", 97_871, 4_000, (9, 0), "nvidia-smi; NVIDIA H20 specifications")),
    card("gh200", "NVIDIA GH200 480GB", 97_871, 4_000, (9, 0), "nvidia-smi; NVIDIA GH200 data sheet, 96 GB HBM3"),
    common(card("h200", "NVIDIA H200", 143_771, 4_800, (9, 0), "nvidia-smi; NVIDIA H200 data sheet")),
    common(card("b200", "NVIDIA B200", 183_359, 8_000, (10, 0), "nvidia-smi; NVIDIA DGX B200 data sheet")),
];

/// The card a plan is made for when there is neither a driver nor a `--gpu`.
pub const DEFAULT_GPU: &str = "h100";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown GPU `{name}`; known: {}", known.join(", "))]
pub struct UnknownGpu {
    pub name: String,
    pub known: Vec<&'static str>,
}

/// Find a card by its short name or the driver's name; case, spaces and dashes do not matter.
///
/// # Errors
/// [`UnknownGpu`] with the list of known names.
pub fn find(name: &str) -> Result<&'static GpuModel, UnknownGpu> {
    let wanted = canonical(name);
    let alias = match wanted.as_str() {
        "a100" | "a10080gb" => "a10080g",
        "a10040gb" => "a10040g",
        "h10080g" | "h10080gb" | "h100sxm" => "h100",
        "v100" | "v10032gb" => "v10032g",
        "a10g" => "a10",
        "rtxa6000" => "a6000",
        other => other,
    };
    GPUS.iter().find(|gpu| canonical(gpu.name) == alias || canonical(gpu.full_name) == wanted).ok_or_else(|| {
        UnknownGpu { name: name.chars().take(60).collect(), known: GPUS.iter().map(|gpu| gpu.name).collect() }
    })
}

fn canonical(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn cards_are_found_by_every_name_people_use() {
        for (name, expected) in [
            ("h100", "h100"),
            ("H100", "h100"),
            ("a100-40g", "a100-40g"),
            ("A100 80GB", "a100-80g"),
            ("NVIDIA H200", "h200"),
            ("rtx 4090", "rtx4090"),
        ] {
            assert_eq!(find(name).unwrap().name, expected);
        }
        assert!(find("h300").unwrap_err().to_string().contains("rtx4090"));
        assert!(find(DEFAULT_GPU).is_ok());
    }

    #[test]
    fn names_are_distinct_and_sizes_plausible() {
        for (i, gpu) in GPUS.iter().enumerate() {
            assert!((8..512).contains(&(gpu.memory_total_bytes / crate::units::GIB)), "{}", gpu.name);
            assert!(GPUS[..i].iter().all(|other| canonical(other.name) != canonical(gpu.name)), "{}", gpu.name);
        }
    }
}
