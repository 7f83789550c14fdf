use super::libraries::Missing;
use crate::engine::BackendError;
use crate::weights::WeightsError;
use crate::worker::FailureKind;
use cudarc::driver::sys::CUresult;
use std::path::PathBuf;

/// Compute capability 8.0 (Ampere): the first with bf16 matrix instructions and asynchronous copies.
pub const OLDEST_CAPABILITY: (i32, i32) = (8, 0);
/// CUDA 12.0: the first driver that takes cubins of a 12.x or 13.x compiler for every card from Ampere on.
pub const OLDEST_DRIVER: i32 = 12_000;

/// A named part of what a model needs on the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryTerm {
    pub name: &'static str,
    pub bytes: u64,
}

/// Why a card could not be used, told apart as far as the remedies differ.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    #[error("no NVIDIA driver: {why}. Install the driver, or run on the CPU")]
    NoDriver { why: String },
    #[error("the NVIDIA driver speaks CUDA {}, at least {} is needed: update the driver", version(*found), version(*needed))]
    DriverTooOld { found: i32, needed: i32 },
    #[error("there is no CUDA device {ordinal}: this process sees {count} (CUDA_VISIBLE_DEVICES may hide some)")]
    NoDevice { ordinal: usize, count: usize },
    #[error("{device} has compute capability {}.{}; {}.{} (Ampere) is the oldest that is supported", found.0, found.1, needed.0, needed.1)]
    CardTooOld { device: String, found: (i32, i32), needed: (i32, i32) },
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    LibraryMissing(#[from] Box<Missing>),
    #[error(
        "the model does not fit {device}: {needed_bytes} bytes are needed ({}) and gpu_memory_utilization leaves \
         {budget_bytes} of its {total_bytes}; lower max_model_len, or raise gpu_memory_utilization",
        list(terms)
    )]
    CardTooSmall { device: String, needed_bytes: u64, budget_bytes: u64, total_bytes: u64, terms: Vec<MemoryTerm> },
    /// Another process holds what this one was promised. The launcher knows which: it reads NVML.
    #[error(
        "{device} is in use: {needed_bytes} bytes are needed and {free_bytes} of {total_bytes} are free; stop what holds \
         the rest, or lower gpu_memory_utilization"
    )]
    CardFull { device: String, needed_bytes: u64, free_bytes: u64, total_bytes: u64 },
    #[error("{device}: out of memory for {what}: {asked_bytes} bytes asked, {free_bytes} free")]
    OutOfMemory { device: String, what: &'static str, asked_bytes: u64, free_bytes: u64 },
    #[error("kernel {kernel} does not compile for {arch}: {log}")]
    Compile { kernel: String, arch: String, log: String },
    #[error("{device}: {call} failed: {code}")]
    Driver { device: String, call: &'static str, code: String },
    /// The context is lost: an illegal address, a failed assertion, a dead card. Only a new process can go on.
    #[error("{device}: {call} failed: {code}; the CUDA context is lost")]
    ContextLost { device: String, call: &'static str, code: String },
    #[error("{device}: cuBLASLt {call} failed: {status} ({what})")]
    Blas { device: String, call: &'static str, status: String, what: String },
    #[error("the CUDA runtime cannot run {what} yet (op {op})")]
    Unsupported { op: &'static str, what: String },
    #[error("option {option} is {value}; it must be {must}")]
    Option { option: &'static str, value: String, must: String },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("starting a thread: {0}")]
    Thread(std::io::Error),
}

impl CudaError {
    /// What a supervisor should make of it.
    pub const fn kind(&self) -> FailureKind {
        match self {
            Self::NoDriver { .. }
            | Self::DriverTooOld { .. }
            | Self::NoDevice { .. }
            | Self::CardTooOld { .. }
            | Self::LibraryMissing(_)
            | Self::Weights(_)
            | Self::Unsupported { .. }
            | Self::Option { .. } => FailureKind::Config,
            Self::CardTooSmall { .. } | Self::CardFull { .. } => FailureKind::DoesNotFit,
            Self::OutOfMemory { .. } | Self::Driver { .. } | Self::ContextLost { .. } | Self::Blas { .. } => {
                FailureKind::Device
            }
            Self::Compile { .. } | Self::Io { .. } | Self::Thread(_) => FailureKind::Internal,
        }
    }

    /// Whether the device is unusable from here on.
    pub const fn is_fatal(&self) -> bool {
        !matches!(self, Self::Option { .. } | Self::OutOfMemory { .. })
    }

    pub fn into_backend_error(self, device: &str) -> BackendError {
        BackendError { device: device.to_owned(), fatal: self.is_fatal(), what: self.to_string() }
    }

    /// A failed driver call, sorted by what can be done about it.
    pub fn from_driver(device: &str, call: &'static str, result: CUresult) -> Self {
        let (device, code) = (device.to_owned(), format!("{result:?}"));
        if is_sticky(result) { Self::ContextLost { device, call, code } } else { Self::Driver { device, call, code } }
    }
}

/// Errors after which every later call in the process fails too ("sticky" in the driver's documentation).
fn is_sticky(result: CUresult) -> bool {
    use CUresult as R;
    matches!(
        result,
        R::CUDA_ERROR_ILLEGAL_ADDRESS
            | R::CUDA_ERROR_LAUNCH_FAILED
            | R::CUDA_ERROR_LAUNCH_TIMEOUT
            | R::CUDA_ERROR_ASSERT
            | R::CUDA_ERROR_HARDWARE_STACK_ERROR
            | R::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | R::CUDA_ERROR_MISALIGNED_ADDRESS
            | R::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | R::CUDA_ERROR_INVALID_PC
            | R::CUDA_ERROR_ECC_UNCORRECTABLE
            | R::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | R::CUDA_ERROR_DEVICE_UNAVAILABLE
            | R::CUDA_ERROR_UNKNOWN
    )
}

fn version(v: i32) -> String {
    format!("{}.{}", v / 1000, v % 1000 / 10)
}

fn list(terms: &[MemoryTerm]) -> String {
    terms.iter().map(|t| format!("{} {}", t.name, t.bytes)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_context_is_told_from_a_refused_call() {
        let lost = CudaError::from_driver("H200", "cuStreamSynchronize", CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
        assert!(matches!(lost, CudaError::ContextLost { .. }) && lost.is_fatal());
        let refused = CudaError::from_driver("H200", "cuLaunchKernel", CUresult::CUDA_ERROR_INVALID_VALUE);
        assert!(matches!(refused, CudaError::Driver { .. }));
        assert_eq!(refused.to_string(), "H200: cuLaunchKernel failed: CUDA_ERROR_INVALID_VALUE");
    }

    #[test]
    fn every_cause_has_its_exit_code() {
        assert_eq!(CudaError::NoDriver { why: String::new() }.kind().exit_code(), 2);
        let full = CudaError::CardFull { device: "d".into(), needed_bytes: 2, free_bytes: 1, total_bytes: 4 };
        assert_eq!(full.kind().exit_code(), 3);
        let old = CudaError::DriverTooOld { found: 11_080, needed: 12_000 };
        assert_eq!(old.to_string(), "the NVIDIA driver speaks CUDA 11.8, at least 12.0 is needed: update the driver");
    }
}
