//! What a machine has, as data. `mserve` fills it from NVML and /proc; tests and `--gpu` fill it by hand.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// In NVML's order (PCI bus). Empty on a machine without a driver.
    pub gpus: Vec<GpuDevice>,
    pub host: Host,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuDevice {
    pub index: u32,
    pub uuid: String,
    /// `NVIDIA H200`
    pub name: String,
    pub memory_total_bytes: u64,
    pub memory_free_bytes: u64,
    pub compute_capability: Option<(u32, u32)>,
    /// Processes that hold memory on the card.
    pub processes: Vec<GpuProcess>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuProcess {
    pub pid: u32,
    pub used_bytes: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Cores this process may use (affinity and cgroup limits counted).
    pub cpus: u32,
    pub memory_total_bytes: u64,
    pub memory_available_bytes: u64,
}
