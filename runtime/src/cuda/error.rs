use super::libraries::Missing;
use crate::engine::BackendError;
use crate::engine::FailureKind;
use crate::weights::WeightsError;
use cudarc::driver::sys::CUresult;
use mserve_planner::units::format_bytes;
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

/// A process with memory on a card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardHolder {
    pub pid: u32,
    /// Where this user may read it.
    pub name: Option<String>,
    pub used_bytes: Option<u64>,
}

/// Why a card could not be used, told apart as far as the remedies differ.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    #[error("no NVIDIA driver: {why}; or run on the CPU (--device cpu)")]
    NoDriver { why: String },
    #[error(
        "the NVIDIA driver is too old: it speaks CUDA {}, at least {} is needed; update the driver, or run on the CPU",
        version(*found),
        version(*needed)
    )]
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
        "the model does not fit {device}: {} are needed and gpu_memory_utilization leaves {} of {}; the largest part is \
         {}; {}",
        format_bytes(*needed_bytes),
        format_bytes(*budget_bytes),
        format_bytes(*total_bytes),
        largest(terms),
        change_that_fits(*needed_bytes, *total_bytes, *fits_tokens)
    )]
    CardTooSmall {
        device: String,
        needed_bytes: u64,
        budget_bytes: u64,
        total_bytes: u64,
        terms: Vec<MemoryTerm>,
        /// The longest max_model_len that would fit. None: not even weights and activations do.
        fits_tokens: Option<u64>,
    },
    /// Others hold what this process was promised.
    #[error(
        "{device} is full: {} are needed and {} of {} are free; {}; stop that{}",
        format_bytes(*needed_bytes),
        format_bytes(*free_bytes),
        format_bytes(*total_bytes),
        held_by(holders.as_deref()),
        fitting_utilization.map_or(String::new(), |share| format!(", or lower gpu_memory_utilization to {share:.2}"))
    )]
    CardFull {
        device: String,
        uuid: String,
        needed_bytes: u64,
        free_bytes: u64,
        total_bytes: u64,
        /// What gpu_memory_utilization would do. None: others hold too much for any.
        fitting_utilization: Option<f64>,
        /// None: nobody asked NVML.
        holders: Option<Vec<CardHolder>>,
    },
    #[error(
        "{device}: out of memory for {what}: {} asked, {} free; lower gpu_memory_utilization, or stop what else uses the card",
        format_bytes(*asked_bytes),
        format_bytes(*free_bytes)
    )]
    OutOfMemory { device: String, what: &'static str, asked_bytes: u64, free_bytes: u64 },
    /// As above, from a call that is no allocation of ours: a library's code, a graph.
    #[error(
        "{device}: out of memory in {call}; lower gpu_memory_utilization, or stop what else uses the card; a new process \
         starts afresh"
    )]
    OutOfMemoryInCall { device: String, call: &'static str },
    #[error(
        "kv_cache_bytes {kv_cache_bytes} holds no sequence of max_model_len {max_model_len}, which needs {needed_bytes}; \
         max_model_len {fits_tokens} would fit"
    )]
    CacheTooSmall { max_model_len: usize, needed_bytes: u64, kv_cache_bytes: u64, fits_tokens: u64 },
    #[error(
        "kernel {kernel} does not compile for {arch} (NVRTC {}): {}; another CUDA version may: pip install -U \
         nvidia-cuda-nvrtc",
        compiler.map_or("unknown".to_owned(), |(major, minor)| format!("{major}.{minor}")),
        excerpt(log)
    )]
    Compile { kernel: String, arch: String, compiler: Option<(i32, i32)>, log: String },
    #[error("kernel {kernel} of this build does not match its launch: {what}")]
    Launch { kernel: String, what: String },
    #[error("{device}: {call} failed: {code}")]
    Driver { device: String, call: &'static str, code: String },
    /// An illegal address, a failed assertion, a dead card.
    #[error(
        "{device}: {call} failed: {code}; the CUDA context is lost, only a new process can go on; should it come back, \
         look for Xid lines in dmesg and run mserve doctor"
    )]
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
            Self::NoDriver { .. } => FailureKind::NoDriver,
            Self::DriverTooOld { .. } => FailureKind::DriverTooOld,
            Self::LibraryMissing(_) => FailureKind::LibraryMissing,
            Self::Compile { .. } | Self::Launch { .. } => FailureKind::KernelFailure,
            Self::CardTooSmall { .. } => FailureKind::CardTooSmall,
            Self::CardFull { .. } => FailureKind::CardFull,
            Self::OutOfMemory { .. } | Self::OutOfMemoryInCall { .. } => FailureKind::DeviceOutOfMemory,
            Self::ContextLost { .. } => FailureKind::ContextLost,
            Self::Driver { .. } | Self::Blas { .. } => FailureKind::Device,
            Self::NoDevice { .. }
            | Self::CardTooOld { .. }
            | Self::Weights(_)
            | Self::Unsupported { .. }
            | Self::Option { .. } => FailureKind::Config,
            Self::CacheTooSmall { .. } => FailureKind::DoesNotFit,
            Self::Io { .. } | Self::Thread(_) => FailureKind::Internal,
        }
    }

    /// With who holds the card's memory, where that is what stands in the way. `ask` takes the card's UUID.
    #[must_use]
    pub fn naming_holders(self, ask: Option<fn(&str) -> Vec<CardHolder>>) -> Self {
        match (self, ask) {
            (
                Self::CardFull {
                    device,
                    uuid,
                    needed_bytes,
                    free_bytes,
                    total_bytes,
                    fitting_utilization,
                    holders: None,
                },
                Some(ask),
            ) => {
                let holders = Some(ask(&uuid));
                Self::CardFull { device, uuid, needed_bytes, free_bytes, total_bytes, fitting_utilization, holders }
            }
            (other, _) => other,
        }
    }

    /// Whether the device is unusable from here on.
    pub const fn is_fatal(&self) -> bool {
        !matches!(self, Self::Option { .. })
    }

    pub fn into_backend_error(self, device: &str) -> BackendError {
        // The line says the device by itself, mostly first.
        let text = self.to_string();
        let what = text.strip_prefix(&format!("{device}: ")).unwrap_or(&text).to_owned();
        BackendError { device: device.to_owned(), fatal: self.is_fatal(), what, kind: self.kind() }
    }

    /// A failed driver call, sorted by what can be done about it.
    pub fn from_driver(device: &str, call: &'static str, result: CUresult) -> Self {
        let (device, code) = (device.to_owned(), format!("{result:?}"));
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Self::OutOfMemoryInCall { device, call };
        }
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

fn largest(terms: &[MemoryTerm]) -> String {
    let largest = terms.iter().max_by_key(|term| term.bytes);
    largest.map_or_else(String::new, |term| format!("{} with {}", term.name, format_bytes(term.bytes)))
}

/// More than this of a card is never all there.
const MOST_UTILIZATION: f64 = 0.97;

fn change_that_fits(needed_bytes: u64, total_bytes: u64, fits_tokens: Option<u64>) -> String {
    let share = (needed_bytes as f64 / total_bytes as f64 * 100.0).ceil() / 100.0;
    let share = (share <= MOST_UTILIZATION).then(|| format!("gpu_memory_utilization {share:.2} would do"));
    let length = fits_tokens.map(|tokens| format!("max_model_len {tokens} would fit"));
    match (length, share) {
        (Some(length), Some(share)) => format!("{length}, or {share}"),
        (Some(change), None) | (None, Some(change)) => change,
        (None, None) => {
            let card_bytes = (needed_bytes as f64 / MOST_UTILIZATION) as u64;
            format!("it takes a card of {} or a smaller model", format_bytes(card_bytes))
        }
    }
}

fn held_by(holders: Option<&[CardHolder]>) -> String {
    let describe = |holder: &CardHolder| {
        let name = holder.name.as_ref().map_or(String::new(), |name| format!(" ({name})"));
        let bytes = holder.used_bytes.map_or("an unknown share".to_owned(), format_bytes);
        format!("pid {}{name} holds {bytes}", holder.pid)
    };
    match holders {
        None => "other processes hold the rest".to_owned(),
        Some([]) => "the driver does not say who holds the rest (a process of another container?)".to_owned(),
        Some(holders) => holders.iter().map(describe).collect::<Vec<_>>().join(", "),
    }
}

const EXCERPT_CHARS: usize = 400;

/// The log's first errors, on one line.
fn excerpt(log: &str) -> String {
    let errors: Vec<&str> = log.lines().map(str::trim).filter(|line| line.contains("error")).collect();
    let text =
        if errors.is_empty() { log.split_whitespace().collect::<Vec<_>>().join(" ") } else { errors.join(" | ") };
    match text.char_indices().nth(EXCERPT_CHARS) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Library;

    #[test]
    fn a_lost_context_is_told_from_a_refused_call() {
        let lost = CudaError::from_driver("H200", "cuStreamSynchronize", CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
        assert!(matches!(lost, CudaError::ContextLost { .. }) && lost.is_fatal());
        let refused = CudaError::from_driver("H200", "cuLaunchKernel", CUresult::CUDA_ERROR_INVALID_VALUE);
        assert!(matches!(refused, CudaError::Driver { .. }));
        assert_eq!(refused.to_string(), "H200: cuLaunchKernel failed: CUDA_ERROR_INVALID_VALUE");
    }

    #[test]
    fn every_cause_is_told_apart_in_one_line_with_a_remedy() {
        const GIB: u64 = 1 << 30;
        let device = || "NVIDIA H200".to_owned();
        let missing = Missing { library: Library::Nvrtc, looked_in: vec!["/a".into()], broken: vec![] };
        let small = |needed: u64, fits_tokens| CudaError::CardTooSmall {
            device: device(),
            needed_bytes: needed * GIB,
            budget_bytes: 20 * GIB,
            total_bytes: 24 * GIB,
            terms: vec![
                MemoryTerm { name: "weights", bytes: 15 * GIB },
                MemoryTerm { name: "activations", bytes: GIB },
            ],
            fits_tokens,
        };
        let full = |holders| CudaError::CardFull {
            device: device(),
            uuid: "GPU-1".into(),
            needed_bytes: 126 * GIB,
            free_bytes: 9 * GIB,
            total_bytes: 140 * GIB,
            fitting_utilization: Some(0.06),
            holders,
        };
        let holder = CardHolder { pid: 7, name: Some("python3".into()), used_bytes: Some(130 * GIB) };
        let log = "attn.cu(3): error: identifier \"x\" is undefined\n   y = x;\n       ^\n\n1 error detected";
        let compile = CudaError::Compile {
            kernel: "attn".into(),
            arch: "sm_90a".into(),
            compiler: Some((13, 0)),
            log: log.into(),
        };
        let driver = |code| CudaError::from_driver("NVIDIA H200", "cuGraphLaunch", code);
        let table = [
            (CudaError::NoDriver { why: "libcuda.so.1 was not found".into() }, FailureKind::NoDriver),
            (CudaError::DriverTooOld { found: 11_080, needed: 12_000 }, FailureKind::DriverTooOld),
            (CudaError::LibraryMissing(Box::new(missing)), FailureKind::LibraryMissing),
            (compile, FailureKind::KernelFailure),
            (small(21, Some(4096)), FailureKind::CardTooSmall),
            (small(30, None), FailureKind::CardTooSmall),
            (full(Some(vec![holder])), FailureKind::CardFull),
            (full(Some(vec![])), FailureKind::CardFull),
            (driver(CUresult::CUDA_ERROR_OUT_OF_MEMORY), FailureKind::DeviceOutOfMemory),
            (driver(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS), FailureKind::ContextLost),
        ];
        let lines: Vec<String> = table.iter().map(|(error, _)| error.to_string()).collect();
        for ((error, kind), line) in table.iter().zip(&lines) {
            assert_eq!(error.kind(), *kind, "{line}");
            assert!(!line.contains('\n'), "{line}");
        }
        insta::assert_snapshot!(lines.join("\n"), @r#"
        no NVIDIA driver: libcuda.so.1 was not found; or run on the CPU (--device cpu)
        the NVIDIA driver is too old: it speaks CUDA 11.8, at least 12.0 is needed; update the driver, or run on the CPU
        libnvrtc.so.13 was not found on the loader path nor in /a; pip install nvidia-cuda-nvrtc
        kernel attn does not compile for sm_90a (NVRTC 13.0): attn.cu(3): error: identifier "x" is undefined | 1 error detected; another CUDA version may: pip install -U nvidia-cuda-nvrtc
        the model does not fit NVIDIA H200: 21.00 GiB are needed and gpu_memory_utilization leaves 20.00 GiB of 24.00 GiB; the largest part is weights with 15.00 GiB; max_model_len 4096 would fit, or gpu_memory_utilization 0.88 would do
        the model does not fit NVIDIA H200: 30.00 GiB are needed and gpu_memory_utilization leaves 20.00 GiB of 24.00 GiB; the largest part is weights with 15.00 GiB; it takes a card of 30.93 GiB or a smaller model
        NVIDIA H200 is full: 126.00 GiB are needed and 9.00 GiB of 140.00 GiB are free; pid 7 (python3) holds 130.00 GiB; stop that, or lower gpu_memory_utilization to 0.06
        NVIDIA H200 is full: 126.00 GiB are needed and 9.00 GiB of 140.00 GiB are free; the driver does not say who holds the rest (a process of another container?); stop that, or lower gpu_memory_utilization to 0.06
        NVIDIA H200: out of memory in cuGraphLaunch; lower gpu_memory_utilization, or stop what else uses the card; a new process starts afresh
        NVIDIA H200: cuGraphLaunch failed: CUDA_ERROR_ILLEGAL_ADDRESS; the CUDA context is lost, only a new process can go on; should it come back, look for Xid lines in dmesg and run mserve doctor
        "#);
    }

    #[test]
    fn a_backend_error_names_the_device_once_and_keeps_the_cause() {
        let lost = CudaError::from_driver("H200", "cuGraphLaunch", CUresult::CUDA_ERROR_LAUNCH_FAILED);
        let error = lost.into_backend_error("H200");
        assert!(error.fatal && error.kind == FailureKind::ContextLost);
        assert_eq!(error.to_string().matches("H200").count(), 1, "{error}");
    }
}
