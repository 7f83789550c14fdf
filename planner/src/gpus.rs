//! Common cards, for planning without one in the machine.
//!
//! The rows and where each figure comes from: [`table`].

mod table;

pub use table::GPUS;

use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct GpuModel {
    /// What `--gpu` takes.
    pub name: &'static str,
    /// As the driver names it.
    pub full_name: &'static str,
    pub memory_total_bytes: u64,
    pub memory_bandwidth_bytes_per_s: u64,
    pub rates: Rates,
    pub link: Link,
    pub compute_capability: (u32, u32),
    /// Board power (TDP).
    pub power_w: u32,
    /// Where the figures come from.
    pub source: &'static str,
    /// Has a row of its own when a plan is made without a card.
    pub common: bool,
}

/// Dense tensor-core rates (no sparsity). `None`: no such mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Rates {
    /// fp16, and bf16 from compute capability 8.0 on.
    pub half_flops_per_s: u64,
    pub fp8_flops_per_s: Option<u64>,
    pub int8_ops_per_s: Option<u64>,
    pub fp4_flops_per_s: Option<u64>,
}

/// How cards of a box reach each other, in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Link {
    /// All NVLinks of a card together.
    pub nvlink_bytes_per_s: Option<u64>,
    /// 16 lanes.
    pub pcie_bytes_per_s: u64,
}

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
        "h200sxm" | "h200141gb" => "h200",
        "rtxpro6000blackwell" => "rtxpro6000",
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
    fn names_are_distinct_and_figures_plausible() {
        assert!(GPUS.len() >= 25);
        assert!(GPUS.is_sorted_by_key(|gpu| gpu.memory_total_bytes), "the least card comes first");
        for (i, gpu) in GPUS.iter().enumerate() {
            let name = gpu.name;
            assert!((8..512).contains(&(gpu.memory_total_bytes / crate::units::GIB)), "{name}");
            assert!(GPUS[..i].iter().all(|other| canonical(other.name) != canonical(name)), "{name}");
            // No card since Volta has fewer than 30 or more than 500 operations a byte.
            let balance = gpu.rates.half_flops_per_s / gpu.memory_bandwidth_bytes_per_s;
            assert!((30..500).contains(&balance), "{name}: {balance}");
            assert!((30..2000).contains(&gpu.power_w) && !gpu.source.is_empty(), "{name}");
            let (major, minor) = gpu.compute_capability;
            assert_eq!(gpu.rates.fp8_flops_per_s.is_some(), (major, minor) >= (8, 9), "{name}");
            assert_eq!(gpu.rates.fp4_flops_per_s.is_some(), major >= 10, "{name}");
            assert!(
                gpu.rates.fp8_flops_per_s.is_none_or(|fp8| fp8 >= 2 * gpu.rates.half_flops_per_s - 1_000_000_000_000)
            );
        }
    }
}
