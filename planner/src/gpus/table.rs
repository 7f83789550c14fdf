//! The rows. Memory is what the driver reports as the total (`nvidia-smi`, ECC as shipped); everything else is the
//! data sheet's, dense (without sparsity), at boost clocks. GeForce and workstation rates are those with 32-bit
//! accumulation, which is what inference kernels use.

use super::{GpuModel, Link, Rates};
use crate::units::MIB;

/// Dense rates in tenths of a TFLOP/s (TOP/s for integers); 0: the tensor cores have no such mode.
const fn rates(half: u64, fp8: u64, int8: u64, fp4: u64) -> Rates {
    const UNIT: u64 = 100_000_000_000;
    const fn some(tenths: u64) -> Option<u64> {
        if tenths == 0 { None } else { Some(tenths * UNIT) }
    }
    Rates {
        half_flops_per_s: half * UNIT,
        fp8_flops_per_s: some(fp8),
        int8_ops_per_s: some(int8),
        fp4_flops_per_s: some(fp4),
    }
}

/// NVLink in GB/s as data sheets give it (both directions together; 0: none), and the PCIe generation of 16 lanes.
const fn link(nvlink_gb_per_s: u64, pcie_generation: u32) -> Link {
    const GB: u64 = 1_000_000_000;
    let nvlink = if nvlink_gb_per_s == 0 { None } else { Some(nvlink_gb_per_s / 2 * GB) };
    let pcie = match pcie_generation {
        3 => 16,
        4 => 32,
        _ => 64,
    };
    Link { nvlink_bytes_per_s: nvlink, pcie_bytes_per_s: pcie * GB }
}

/// Name for `--gpu`, the driver's name, and memory in MiB with bandwidth in GB/s.
const fn card(name: &'static str, full_name: &'static str, memory: (u64, u64), source: &'static str) -> GpuModel {
    GpuModel {
        name,
        full_name,
        memory_total_bytes: memory.0 * MIB,
        memory_bandwidth_bytes_per_s: memory.1 * 1_000_000_000,
        rates: rates(0, 0, 0, 0),
        link: link(0, 3),
        compute_capability: (0, 0),
        power_w: 0,
        source,
        common: false,
    }
}

impl GpuModel {
    const fn cc(self, major: u32, minor: u32) -> Self {
        Self { compute_capability: (major, minor), ..self }
    }

    const fn rates(self, rates: Rates) -> Self {
        Self { rates, ..self }
    }

    const fn link(self, link: Link, power_w: u32) -> Self {
        Self { link, power_w, ..self }
    }

    const fn common(self) -> Self {
        Self { common: true, ..self }
    }
}

/// Smallest memory first, so that the first card that holds a model is the least that does.
#[rustfmt::skip]
pub const GPUS: &[GpuModel] = &[
    card("t4", "Tesla T4", (15_360, 320), "nvidia-smi; NVIDIA T4 data sheet")
        .cc(7, 5).rates(rates(650, 0, 1_300, 0)).link(link(0, 3), 70).common(),
    card("rtx5080", "NVIDIA GeForce RTX 5080", (16_303, 960), "nvidia-smi; NVIDIA RTX Blackwell architecture paper")
        .cc(12, 0).rates(rates(1_126, 2_251, 4_502, 9_004)).link(link(0, 5), 360),
    card("rtx4080", "NVIDIA GeForce RTX 4080", (16_376, 717), "nvidia-smi; NVIDIA Ada architecture paper")
        .cc(8, 9).rates(rates(975, 1_949, 3_899, 0)).link(link(0, 4), 320),
    card("a10", "NVIDIA A10", (23_028, 600), "nvidia-smi; NVIDIA A10 data sheet")
        .cc(8, 6).rates(rates(1_250, 0, 2_500, 0)).link(link(0, 4), 150).common(),
    card("l4", "NVIDIA L4", (23_034, 300), "nvidia-smi; NVIDIA L4 data sheet")
        .cc(8, 9).rates(rates(1_210, 2_425, 2_425, 0)).link(link(0, 4), 72).common(),
    card("a5000", "NVIDIA RTX A5000", (24_564, 768), "nvidia-smi, ECC off; RTX A5000 data sheet")
        .cc(8, 6).rates(rates(1_111, 0, 2_222, 0)).link(link(112, 4), 230),
    card("rtx4090", "NVIDIA GeForce RTX 4090", (24_564, 1_008), "nvidia-smi; NVIDIA Ada architecture paper")
        .cc(8, 9).rates(rates(1_652, 3_303, 6_606, 0)).link(link(0, 4), 450).common(),
    card("rtx3090", "NVIDIA GeForce RTX 3090", (24_576, 936), "nvidia-smi; NVIDIA GA102 architecture paper")
        .cc(8, 6).rates(rates(710, 0, 2_840, 0)).link(link(112, 4), 350).common(),
    card("a30", "NVIDIA A30", (24_576, 933), "nvidia-smi; NVIDIA A30 data sheet")
        .cc(8, 0).rates(rates(1_650, 0, 3_300, 0)).link(link(200, 4), 165),
    card("rtx5090", "NVIDIA GeForce RTX 5090", (32_607, 1_792), "nvidia-smi; NVIDIA RTX Blackwell architecture paper")
        .cc(12, 0).rates(rates(2_095, 4_190, 8_380, 16_760)).link(link(0, 5), 575).common(),
    card("v100-32g", "Tesla V100-SXM2-32GB", (32_768, 900), "nvidia-smi; NVIDIA V100 data sheet")
        .cc(7, 0).rates(rates(1_250, 0, 0, 0)).link(link(300, 3), 300),
    card("a100-40g", "NVIDIA A100-SXM4-40GB", (40_960, 1_555), "nvidia-smi; NVIDIA A100 data sheet")
        .cc(8, 0).rates(rates(3_120, 0, 6_240, 0)).link(link(600, 4), 400).common(),
    card("a40", "NVIDIA A40", (46_068, 696), "nvidia-smi; NVIDIA A40 data sheet")
        .cc(8, 6).rates(rates(1_497, 0, 2_993, 0)).link(link(112, 4), 300),
    card("l20", "NVIDIA L20", (46_068, 864), "nvidia-smi; NVIDIA L20 specifications")
        .cc(8, 9).rates(rates(1_195, 2_390, 2_390, 0)).link(link(0, 4), 275),
    card("l40", "NVIDIA L40", (46_068, 864), "nvidia-smi; NVIDIA L40 data sheet")
        .cc(8, 9).rates(rates(1_810, 3_620, 3_620, 0)).link(link(0, 4), 300),
    card("l40s", "NVIDIA L40S", (46_068, 864), "nvidia-smi; NVIDIA L40S data sheet")
        .cc(8, 9).rates(rates(3_620, 7_330, 7_330, 0)).link(link(0, 4), 350).common(),
    card("a6000", "NVIDIA RTX A6000", (49_140, 768), "nvidia-smi, ECC off; RTX A6000 data sheet")
        .cc(8, 6).rates(rates(1_548, 0, 3_097, 0)).link(link(112, 4), 300).common(),
    card("rtx6000-ada", "NVIDIA RTX 6000 Ada Generation", (49_140, 960), "nvidia-smi, ECC off; RTX 6000 Ada data sheet")
        .cc(8, 9).rates(rates(3_642, 7_285, 7_285, 0)).link(link(0, 4), 300),
    card("h100", "NVIDIA H100 80GB HBM3", (81_559, 3_350), "nvidia-smi; NVIDIA H100 data sheet, SXM")
        .cc(9, 0).rates(rates(9_894, 19_789, 19_789, 0)).link(link(900, 5), 700).common(),
    card("h100-pcie", "NVIDIA H100 PCIe", (81_559, 2_039), "nvidia-smi; NVIDIA H100 PCIe product brief")
        .cc(9, 0).rates(rates(7_560, 15_130, 15_130, 0)).link(link(600, 5), 350),
    card("h800", "NVIDIA H800", (81_559, 3_350), "nvidia-smi; H800 specifications, SXM")
        .cc(9, 0).rates(rates(9_894, 19_789, 19_789, 0)).link(link(400, 5), 700),
    card("a100-80g", "NVIDIA A100-SXM4-80GB", (81_920, 2_039), "nvidia-smi; NVIDIA A100 data sheet")
        .cc(8, 0).rates(rates(3_120, 0, 6_240, 0)).link(link(600, 4), 400).common(),
    card("a100-80g-pcie", "NVIDIA A100 80GB PCIe", (81_920, 1_935), "nvidia-smi; NVIDIA A100 data sheet, PCIe")
        .cc(8, 0).rates(rates(3_120, 0, 6_240, 0)).link(link(600, 4), 300),
    card("a800", "NVIDIA A800-SXM4-80GB", (81_920, 2_039), "nvidia-smi; A800 specifications")
        .cc(8, 0).rates(rates(3_120, 0, 6_240, 0)).link(link(400, 4), 400),
    card("h100-nvl", "NVIDIA H100 NVL", (95_830, 3_938), "nvidia-smi; NVIDIA H100 data sheet, NVL")
        .cc(9, 0).rates(rates(8_355, 16_710, 16_710, 0)).link(link(600, 5), 400),
    card("h20", "NVIDIA H20", (97_871, 4_000), "nvidia-smi; NVIDIA H20 specifications")
        .cc(9, 0).rates(rates(1_480, 2_960, 2_960, 0)).link(link(900, 5), 400).common(),
    card("gh200", "NVIDIA GH200 480GB", (97_871, 4_000), "nvidia-smi; NVIDIA GH200 data sheet, 96 GB HBM3")
        .cc(9, 0).rates(rates(9_894, 19_789, 19_789, 0)).link(link(900, 5), 900),
    card("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (97_887, 1_792),
         "nvidia-smi, ECC off; NVIDIA RTX PRO 6000 Blackwell data sheet")
        .cc(12, 0).rates(rates(5_038, 10_076, 10_076, 20_152)).link(link(0, 5), 600),
    card("h200", "NVIDIA H200", (143_771, 4_800), "nvidia-smi; NVIDIA H200 data sheet, SXM")
        .cc(9, 0).rates(rates(9_894, 19_789, 19_789, 0)).link(link(900, 5), 700).common(),
    card("h200-nvl", "NVIDIA H200 NVL", (143_771, 4_800), "nvidia-smi; NVIDIA H200 data sheet, NVL")
        .cc(9, 0).rates(rates(8_355, 16_710, 16_710, 0)).link(link(900, 5), 600),
    card("b200", "NVIDIA B200", (183_359, 8_000), "nvidia-smi; NVIDIA DGX B200 data sheet")
        .cc(10, 0).rates(rates(22_500, 45_000, 45_000, 90_000)).link(link(1_800, 5), 1_000).common(),
    card("b300", "NVIDIA B300 SXM6 AC", (275_040, 8_000), "nvidia-smi; NVIDIA HGX B300 data sheet")
        .cc(10, 3).rates(rates(22_500, 45_000, 0, 135_000)).link(link(1_800, 5), 1_100),
];
