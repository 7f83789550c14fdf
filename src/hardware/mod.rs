//! What this machine has: GPUs through NVML, processors and memory through /proc. As data for the planner, and live
//! for the dashboard.

mod gpus;
mod host;
mod lease;
mod live;
mod pick;
mod visible;

pub use gpus::{NoGpus, card_holders, probe_gpus};
pub use host::probe_host;
pub use lease::{GpuLease, LeaseError};
pub use live::Sampler;
pub use pick::{PickError, Refusal, pick_gpus};
pub use visible::visible_gpus;

use mserve_planner::hardware::Hardware;

/// Everything the planner wants to know. A machine without a driver has no GPUs, which is no error;
/// [`probe_gpus`] says why there are none.
///
/// # Errors
/// When /proc cannot be read.
pub fn probe() -> anyhow::Result<Hardware> {
    Ok(Hardware { gpus: probe_gpus().unwrap_or_default(), host: probe_host()? })
}
