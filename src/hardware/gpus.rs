use mserve_planner::hardware::{GpuDevice, GpuProcess};
use mserve_runtime::cuda::CardHolder;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml};
use std::collections::BTreeMap;
use std::ffi::OsStr;

/// Why a machine counts as one without GPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoGpus {
    #[error("no NVIDIA driver (libnvidia-ml.so.1 is not in the loader path)")]
    NoLibrary,
    #[error("the NVIDIA driver does not answer: {0}")]
    Driver(String),
    #[error("the NVIDIA driver reports no card")]
    NoCard,
    #[error("no card that CUDA_VISIBLE_DEVICES shows")]
    Hidden,
}

/// All cards in NVML's order. A card that does not answer is left out, with a warning.
///
/// # Errors
/// [`NoGpus`] when there is none.
pub fn probe_gpus() -> Result<Vec<GpuDevice>, NoGpus> {
    let nvml = open()?;
    let count = nvml.device_count().map_err(|error| NoGpus::Driver(error.to_string()))?;
    let gpus: Vec<GpuDevice> = (0..count)
        .filter_map(|index| {
            let read = nvml.device_by_index(index).and_then(|device| read(index, &device));
            read.inspect_err(|error| tracing::warn!(index, %error, "this GPU does not answer and is left out")).ok()
        })
        .collect();
    if gpus.is_empty() { Err(NoGpus::NoCard) } else { Ok(gpus) }
}

/// The driver installs `.so.1`; the plain name belongs to development packages and to tests.
pub(super) fn open() -> Result<Nvml, NoGpus> {
    let with = |name: &str| Nvml::builder().lib_path(OsStr::new(name)).init();
    with("libnvidia-ml.so.1").or_else(|_| with("libnvidia-ml.so")).map_err(|error| match error {
        NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound => NoGpus::NoLibrary,
        other => NoGpus::Driver(other.to_string()),
    })
}

fn read(index: u32, device: &Device<'_>) -> Result<GpuDevice, NvmlError> {
    let memory = device.memory_info()?;
    let capability = device.cuda_compute_capability().ok();
    let number = |part: i32| u32::try_from(part).ok();
    Ok(GpuDevice {
        index,
        uuid: device.uuid()?,
        name: device.name()?,
        memory_total_bytes: memory.total,
        memory_free_bytes: memory.free,
        compute_capability: capability.and_then(|c| Some((number(c.major)?, number(c.minor)?))),
        processes: processes(device),
    })
}

/// Other processes with memory on the card with this UUID, the largest first. Empty when the driver does not tell.
pub fn card_holders(uuid: &str) -> Vec<CardHolder> {
    let processes = open().ok().and_then(|nvml| nvml.device_by_uuid(uuid).ok().map(|device| processes(&device)));
    let name = |pid| Some(std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned());
    let others = processes.unwrap_or_default().into_iter().filter(|process| process.pid != std::process::id());
    let mut holders: Vec<CardHolder> =
        others.map(|p| CardHolder { pid: p.pid, name: name(p.pid), used_bytes: p.used_bytes }).collect();
    holders.sort_by_key(|holder| std::cmp::Reverse(holder.used_bytes));
    holders
}

/// Compute and graphics processes, each once. Empty when the driver does not tell (containers, some MIG set-ups).
fn processes(device: &Device<'_>) -> Vec<GpuProcess> {
    let mut by_pid: BTreeMap<u32, Option<u64>> = BTreeMap::new();
    let lists = [device.running_compute_processes(), device.running_graphics_processes()];
    for ProcessInfo { pid, used_gpu_memory, .. } in lists.into_iter().flatten().flatten() {
        let used = match used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        };
        let known = by_pid.entry(pid).or_default();
        *known = (*known).max(used);
    }
    by_pid.into_iter().map(|(pid, used_bytes)| GpuProcess { pid, used_bytes }).collect()
}
