//! One card: its context, the stream that all work of a replica goes through, and what it is.

use super::CudaError;
use super::clock::Clock;
use super::error::{OLDEST_CAPABILITY, OLDEST_DRIVER};
use super::fusion::Abilities;
use super::kernels::Decode;
use super::libraries;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use cudarc::driver::{CudaContext, DriverError};
use std::sync::Arc;

/// A card that is ready to be used from this thread.
#[derive(Debug)]
pub struct Device {
    context: Arc<CudaContext>,
    stream: StreamHandle,
    pub name: String,
    /// (major, minor): (9, 0) is Hopper.
    pub compute_capability: (i32, i32),
    pub multiprocessors: u32,
    /// Most dynamic shared memory that a block may ask for.
    pub shared_memory_per_block_bytes: u32,
    pub total_bytes: u64,
    /// Whether kernels of other processes may run beside ours (MPS).
    pub is_shared: bool,
    /// CUDA version of the driver, 13000 for 13.0.
    pub driver_version: i32,
    /// `GPU-...` as `nvidia-smi -L` prints it.
    pub uuid: String,
    /// Where the time of opening it went, in milliseconds.
    pub opening: Vec<(&'static str, f64)>,
}

#[derive(Debug)]
struct StreamHandle(sys::CUstream);

// SAFETY: a stream handle is an opaque pointer that the driver allows to be used from any thread whose current context
// is the stream's own; `Device::bind` sees to that before a thread uses it.
unsafe impl Send for StreamHandle {}
// SAFETY: as above; the driver's calls on streams are thread-safe.
unsafe impl Sync for StreamHandle {}

/// Multiprocessors of a Hopper card that is not a part of one.
const WHOLE_CARD: u32 = 100;

/// Free and total bytes of a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    pub free_bytes: u64,
    pub total_bytes: u64,
}

impl Device {
    /// Opens the libraries, then device `ordinal` of those that CUDA_VISIBLE_DEVICES shows.
    ///
    /// # Errors
    /// See [`CudaError`]: no driver, driver too old, no such device, card too old, library missing.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        let mut clock = Clock::start();
        libraries::open_driver()?;
        // Relocating cuBLASLt takes as long as making the context, which does not need it.
        let others = std::thread::Builder::new().name("libraries".to_owned()).spawn(libraries::open_others);
        let others = others.map_err(CudaError::Thread)?;
        let (driver_version, count) = start_driver()?;
        clock.lap("driver");
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).map_err(from("device", "cuDevicePrimaryCtxRetain"))?;
        let mut device = Self::describe(context, driver_version)?;
        clock.lap("context");
        let panicked = || CudaError::Thread(std::io::Error::other("opening the libraries panicked"));
        others.join().unwrap_or_else(|_| Err(panicked()))?;
        clock.lap("libraries");
        device.opening = clock.laps;
        Ok(device)
    }

    fn describe(context: Arc<CudaContext>, driver_version: i32) -> Result<Self, CudaError> {
        let name = context.name().map_err(from("device", "cuDeviceGetName"))?;
        // SAFETY: every allocation, copy and launch of this backend goes through its one stream or is followed by a
        // synchronisation, so nothing relies on cudarc's events; with them captured launches would be refused.
        unsafe { context.disable_event_tracking() };
        let attribute = |a| context.attribute(a).map_err(from(&name, "cuDeviceGetAttribute"));
        let compute_capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if compute_capability < OLDEST_CAPABILITY {
            return Err(CudaError::CardTooOld { device: name, found: compute_capability, needed: OLDEST_CAPABILITY });
        }
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        // Drivers that do not know the question have no answer.
        let is_shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MPS_ENABLED).is_ok_and(|enabled| enabled != 0);
        let total = context.total_mem().map_err(from(&name, "cuDeviceTotalMem"))?;
        let stream = cudarc::driver::result::stream::create(cudarc::driver::result::stream::StreamKind::NonBlocking)
            .map_err(from(&name, "cuStreamCreate"))?;
        let uuid = uuid(context.ordinal())?;
        Ok(Self {
            stream: StreamHandle(stream),
            uuid,
            opening: Vec::new(),
            compute_capability,
            multiprocessors,
            shared_memory_per_block_bytes: shared,
            total_bytes: total as u64,
            is_shared,
            driver_version,
            name,
            context,
        })
    }

    /// Architecture name for NVRTC: the card's own, with the instructions that only it has from Hopper on.
    pub fn arch(&self) -> String {
        arch(self.compute_capability)
    }

    /// What launches may rely on here.
    pub const fn abilities(&self) -> Abilities {
        let (major, _) = self.compute_capability;
        let whole = self.multiprocessors >= WHOLE_CARD && !self.is_shared;
        Abilities { clusters: major >= 9, chains: major == 9 && whole }
    }

    /// The decode attention's launches for heads of this dimension.
    pub const fn decode_attention(&self, head_dim: u32) -> Decode {
        Decode {
            head_dim,
            compute_capability: self.compute_capability,
            multiprocessors: self.multiprocessors,
            shared_memory_per_block_bytes: self.shared_memory_per_block_bytes,
        }
    }

    /// Makes the context current on the calling thread.
    pub fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(from(&self.name, "cuCtxSetCurrent"))
    }

    pub fn stream(&self) -> sys::CUstream {
        self.stream.0
    }

    pub fn memory(&self) -> Result<MemoryInfo, CudaError> {
        let (free, total) = self.context.mem_get_info().map_err(from(&self.name, "cuMemGetInfo"))?;
        Ok(MemoryInfo { free_bytes: free as u64, total_bytes: total as u64 })
    }

    /// Waits for all work of the stream.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream lives as long as `self`.
        let result = unsafe { sys::cuStreamSynchronize(self.stream.0) };
        self.check("cuStreamSynchronize", result)
    }

    pub fn check(&self, call: &'static str, result: CUresult) -> Result<(), CudaError> {
        check(&self.name, call, result)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.bind().is_ok() {
            // SAFETY: created in `describe` and destroyed only here; the driver finishes its work first. An error
            // means that the context is lost, and the stream with it.
            let _ = unsafe { cudarc::driver::result::stream::destroy(self.stream.0) };
        }
    }
}

/// Starts the driver: its CUDA version, and how many cards CUDA_VISIBLE_DEVICES shows.
fn start_driver() -> Result<(i32, usize), CudaError> {
    libraries::open_driver()?;
    cudarc::driver::result::init().map_err(|error| not_started(error.0))?;
    let mut driver_version = 0;
    // SAFETY: writes one integer through a pointer to a live one.
    let result = unsafe { sys::cuDriverGetVersion(&raw mut driver_version) };
    check("driver", "cuDriverGetVersion", result)?;
    if driver_version < OLDEST_DRIVER {
        return Err(CudaError::DriverTooOld { found: driver_version, needed: OLDEST_DRIVER });
    }
    let count = CudaContext::device_count().map_err(from("driver", "cuDeviceGetCount"))? as usize;
    Ok((driver_version, count))
}

fn not_started(code: CUresult) -> CudaError {
    let hint = match code {
        CUresult::CUDA_ERROR_NO_DEVICE => return CudaError::NoDevice { ordinal: 0, count: 0 },
        CUresult::CUDA_ERROR_STUB_LIBRARY => "a toolkit's stub stands in its place: take `stubs` off LD_LIBRARY_PATH",
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the kernel module and libcuda are of different versions: restart the machine, or the container"
        }
        _ => "install the NVIDIA driver anew, or look at what nvidia-smi says",
    };
    CudaError::NoDriver { why: format!("cuInit: {code:?}, {hint}") }
}

/// The card with this UUID (`GPU-...`, or its beginning) among those that CUDA_VISIBLE_DEVICES shows.
///
/// # Errors
/// As [`Device::open`]; [`CudaError::Option`] lists the UUIDs that there are.
pub fn ordinal_of(asked: &str) -> Result<usize, CudaError> {
    let (_, count) = start_driver()?;
    let known = (0..count).map(uuid).collect::<Result<Vec<_>, _>>()?;
    match_uuid(asked, &known).ok_or_else(|| CudaError::Option {
        option: "device",
        value: asked.to_owned(),
        must: format!("one of {} (CUDA_VISIBLE_DEVICES may hide some)", known.join(", ")),
    })
}

fn uuid(ordinal: usize) -> Result<String, CudaError> {
    use cudarc::driver::result::device;
    let handle = device::get(i32::try_from(ordinal).unwrap_or(i32::MAX)).map_err(from("driver", "cuDeviceGet"))?;
    let bytes = device::get_uuid(handle).map_err(from("driver", "cuDeviceGetUuid"))?.bytes;
    Ok(format_uuid(bytes.map(|b| b as u8)))
}

/// The hexadecimal part as `nvidia-smi -L` prints it.
fn format_uuid(bytes: [u8; 16]) -> String {
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// The only one that begins so.
fn match_uuid(asked: &str, known: &[String]) -> Option<usize> {
    let digits = |uuid: &str| uuid.split_once('-').map_or("", |(_, digits)| digits).to_ascii_lowercase();
    let asked = digits(asked);
    let mut found = known.iter().enumerate().filter(|(_, uuid)| !asked.is_empty() && digits(uuid).starts_with(&asked));
    match (found.next(), found.next()) {
        (Some((ordinal, _)), None) => Some(ordinal),
        _ => None,
    }
}

fn check(device: &str, call: &'static str, result: CUresult) -> Result<(), CudaError> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        result => Err(CudaError::from_driver(device, call, result)),
    }
}

fn from(device: &str, call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |error| CudaError::from_driver(device, call, error.0)
}

/// `sm_90a` for (9, 0): from Hopper on the card's own instructions need the `a` target.
pub fn arch((major, minor): (i32, i32)) -> String {
    let suffix = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::{arch, format_uuid, match_uuid, not_started};
    use crate::engine::FailureKind;
    use cudarc::driver::sys::CUresult;

    #[test]
    fn a_driver_that_does_not_start_is_told_from_one_without_cards() {
        assert_eq!(not_started(CUresult::CUDA_ERROR_NO_DEVICE).kind(), FailureKind::Config);
        let stub = not_started(CUresult::CUDA_ERROR_STUB_LIBRARY);
        assert!(stub.kind() == FailureKind::NoDriver && stub.to_string().contains("LD_LIBRARY_PATH"), "{stub}");
    }

    #[test]
    fn a_card_is_found_by_the_beginning_of_its_uuid() {
        let known = [format_uuid([0xab; 16]), format_uuid([0xac; 16])];
        assert_eq!(known[0], "GPU-abababab-abab-abab-abab-abababababab");
        assert_eq!(match_uuid("GPU-ACac", &known), Some(1));
        assert_eq!(match_uuid("GPU-a", &known), None, "two begin so");
        assert_eq!(match_uuid("GPU-", &known), None);
    }

    #[test]
    fn architectures_have_the_names_that_nvrtc_knows() {
        let names = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)].map(arch);
        assert_eq!(names, ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"]);
    }
}
