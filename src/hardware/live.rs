//! Load of GPUs and processors, for the dashboard.

use super::gpus::open;
use super::host::probe_host;
use crate::status::{GpuStatus, HostStatus};
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

/// Keeps NVML open, and the processor counters of the last call: load is their growth between two calls.
#[derive(Debug)]
pub struct Sampler {
    nvml: Option<Nvml>,
    last_cpu: Option<CpuTimes>,
}

impl Sampler {
    pub fn new() -> Self {
        Self { nvml: open().ok(), last_cpu: read_cpu_times() }
    }

    /// Cards in NVML's order; one that does not answer is left out.
    pub fn gpus(&self) -> Vec<GpuStatus> {
        let Some(nvml) = &self.nvml else { return Vec::new() };
        let count = nvml.device_count().unwrap_or(0);
        (0..count).filter_map(|index| sample_gpu(index, &nvml.device_by_index(index).ok()?).ok()).collect()
    }

    pub fn host(&mut self) -> HostStatus {
        let now = read_cpu_times();
        let cpu_percent = self.last_cpu.zip(now).and_then(|(before, now)| before.busy_percent_until(now));
        self.last_cpu = now;
        let Ok(host) = probe_host() else { return HostStatus { cpu_percent, ..HostStatus::default() } };
        HostStatus {
            cpu_percent,
            cpus: host.cpus,
            memory_total_bytes: host.memory_total_bytes,
            memory_available_bytes: host.memory_available_bytes,
        }
    }
}

impl Default for Sampler {
    fn default() -> Self {
        Self::new()
    }
}

fn sample_gpu(index: u32, device: &Device<'_>) -> Result<GpuStatus, NvmlError> {
    let memory = device.memory_info()?;
    Ok(GpuStatus {
        index,
        uuid: device.uuid()?,
        name: device.name()?,
        memory_total_bytes: memory.total,
        // Without what the driver keeps for itself.
        memory_used_bytes: memory.used,
        utilization_percent: device.utilization_rates().ok().map(|rates| rates.gpu),
        temperature_c: device.temperature(TemperatureSensor::Gpu).ok(),
        power_w: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1000.0),
    })
}

/// Clock ticks since boot, over all processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct CpuTimes {
    busy: u64,
    total: u64,
}

impl CpuTimes {
    /// Of all processors together, 0..100; `None` when no time has passed.
    fn busy_percent_until(self, later: Self) -> Option<f64> {
        let total = later.total.checked_sub(self.total).filter(|ticks| *ticks > 0)?;
        Some(100.0 * later.busy.saturating_sub(self.busy) as f64 / total as f64)
    }
}

fn read_cpu_times() -> Option<CpuTimes> {
    parse_cpu_times(&std::fs::read_to_string("/proc/stat").ok()?)
}

/// The line `cpu user nice system idle iowait irq softirq steal ...`; guest times are part of user.
fn parse_cpu_times(stat: &str) -> Option<CpuTimes> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line.split_ascii_whitespace().take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
    let total: u64 = ticks.iter().sum();
    let idle = ticks.get(3)? + ticks.get(4)?;
    Some(CpuTimes { busy: total - idle, total })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn load_is_growth_of_busy_over_growth_of_all() {
        let before = parse_cpu_times("cpu  100 0 50 800 50 0 0 0 9 9\ncpu0 1 2 3\n").unwrap();
        assert_eq!(before, CpuTimes { busy: 150, total: 1000 });
        let later = parse_cpu_times("cpu  130 0 70 840 60 0 0 0 9 9\n").unwrap();
        assert_eq!(before.busy_percent_until(later), Some(50.0));
        assert_eq!(before.busy_percent_until(before), None);
        assert_eq!(parse_cpu_times("intr 1\n"), None);
    }
}
