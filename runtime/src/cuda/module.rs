//! Compiled kernels on the card, and how one is launched.

use super::CudaError;
use super::cubin::parameter_sizes;
use super::device::Device;
use super::tensor_map::TENSOR_MAP_BYTES;
use cudarc::driver::sys::{self, CUfunction_attribute, CUlaunchAttributeID, CUresult};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::Arc;

/// The entry points of one cubin.
#[derive(Debug)]
pub struct Module {
    device: Arc<Device>,
    module: sys::CUmodule,
    /// Sizes of each entry's parameters, read from the machine code.
    parameters: BTreeMap<String, Vec<usize>>,
}

// SAFETY: an opaque handle that the driver lets any thread use while the context is current.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    pub fn load(device: &Arc<Device>, cubin: &[u8]) -> Result<Arc<Self>, CudaError> {
        device.bind()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a cubin that NVRTC made, whole by its checksum; the driver copies what it needs.
        let result = unsafe { sys::cuModuleLoadData(&raw mut module, cubin.as_ptr().cast()) };
        device.check("cuModuleLoadData", result)?;
        Ok(Arc::new(Self { device: device.clone(), module, parameters: parameter_sizes(cubin) }))
    }

    /// The kernel called `name`, ready for blocks with `shared_bytes` of dynamic shared memory.
    pub fn kernel(self: &Arc<Self>, name: &str, shared_bytes: u32) -> Result<Kernel, CudaError> {
        let entry = CString::new(name).map_err(|_| self.unknown(name))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: writes a handle through a pointer to a live one; the module is loaded.
        let result = unsafe { sys::cuModuleGetFunction(&raw mut function, self.module, entry.as_ptr()) };
        if result == CUresult::CUDA_ERROR_NOT_FOUND {
            return Err(self.unknown(name));
        }
        self.device.check("cuModuleGetFunction", result)?;
        if self.device.driver_version >= 12_040 {
            // Otherwise the driver loads it at its first launch, which a capture may not wait for.
            // SAFETY: the function is live.
            let result = unsafe { sys::cuFuncLoad(function) };
            self.device.check("cuFuncLoad", result)?;
        }
        if shared_bytes > 0 {
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is live.
            let result = unsafe { sys::cuFuncSetAttribute(function, most, shared_bytes as i32) };
            self.device.check("cuFuncSetAttribute", result)?;
        }
        let parameters = self.parameters.get(name).cloned();
        Ok(Kernel { module: self.clone(), function, name: name.to_owned(), parameters })
    }

    fn unknown(&self, name: &str) -> CudaError {
        CudaError::Launch { kernel: name.to_owned(), what: "the compiled module has no such entry".to_owned() }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: loaded in `load`, unloaded only here, when no kernel of it is left. The stream is idle or the
            // driver waits for it.
            unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}

/// One entry point.
#[derive(Debug, Clone)]
pub struct Kernel {
    module: Arc<Module>,
    function: sys::CUfunction,
    name: String,
    /// Sizes of the parameters; `None` where the machine code does not say.
    parameters: Option<Vec<usize>>,
}

// SAFETY: an opaque handle into a module that lives as long as the kernel; any thread may use it.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// Blocks, threads and shared memory of one launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    pub grid: [u32; 3],
    pub block: u32,
    pub shared_bytes: u32,
    /// May begin while the kernel before it ends (programmatic dependent launch, Hopper on): only for kernels that wait
    /// with `griddepcontrol.wait` before they read what others wrote.
    pub overlap: bool,
    /// Blocks along y that run together and share their memory (Hopper on); 1: none. Divides the grid's y.
    pub cluster: u32,
}

/// One argument, of the size that the kernel's parameter has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    Pointer(u64),
    Int(i32),
    Float(f32),
    Long(u64),
    /// By value, as a `__grid_constant__` parameter.
    Map([u8; TENSOR_MAP_BYTES]),
}

impl Arg {
    const fn bytes(self) -> usize {
        match self {
            Self::Pointer(_) | Self::Long(_) => 8,
            Self::Int(_) | Self::Float(_) => 4,
            Self::Map(_) => TENSOR_MAP_BYTES,
        }
    }

    /// What is no larger than eight bytes. Little endian: a four-byte parameter is read from the low half.
    const fn cell(self) -> u64 {
        match self {
            Self::Pointer(v) | Self::Long(v) => v,
            Self::Int(v) => v as u32 as u64,
            Self::Float(v) => v.to_bits() as u64,
            Self::Map(_) => 0,
        }
    }
}

const MAX_ARGS: usize = 40;
/// Percent of the most shared memory that kernels beside L1 ask for; one that needs more gets it. Of 8 to 100 the fastest on
/// an H200.
const BESIDE_L1_PERCENT: i32 = 20;
/// Shared memory of all blocks of a multiprocessor that kernels which run [`Kernel::beside_l1`] may have.
pub const BESIDE_L1_BYTES: u32 = 132 << 10;

impl Kernel {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Asks for a division of a multiprocessor's memory that leaves much of it to L1. Kernels behind one another should want
    /// the same: otherwise the second cannot begin before the first has left. On an H200 a decode step of one sequence took
    /// 4.35 ms where nobody asked, 4.46 with all of it for shared memory and 4.05 so; of the 0.5B model 0.57, 0.58 and 0.49.
    pub fn beside_l1(self) -> Result<Self, CudaError> {
        let division = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        // SAFETY: the function is live.
        let result = unsafe { sys::cuFuncSetAttribute(self.function, division, BESIDE_L1_PERCENT) };
        self.module.device.check("cuFuncSetAttribute", result)?;
        Ok(self)
    }

    /// Clusters of `geometry`'s blocks that the whole card holds at a time.
    pub fn clusters_resident(&self, geometry: &Geometry) -> Result<u32, CudaError> {
        let device = &self.module.device;
        let mut attributes = [cluster_attribute(geometry.cluster)];
        let config = launch_config(geometry, device.stream(), &mut attributes);
        let mut clusters = 0;
        // SAFETY: config and attribute live until the call returns; the function is live; one number is written.
        let result = unsafe { sys::cuOccupancyMaxActiveClusters(&raw mut clusters, self.function, &raw const config) };
        device.check("cuOccupancyMaxActiveClusters", result)?;
        Ok(clusters as u32)
    }

    /// Puts one launch into the device's stream.
    ///
    /// # Errors
    /// When the arguments do not match the kernel's parameters, or the driver refuses.
    ///
    /// # Safety
    /// Every pointer among `args` must be to device memory as large as the kernel reads or writes for this geometry,
    /// alive until the stream has passed the launch (for a captured launch: every replay).
    pub unsafe fn launch(&self, geometry: &Geometry, args: &[Arg]) -> Result<(), CudaError> {
        self.check(args)?;
        let mut cells = [0_u64; MAX_ARGS];
        let mut pointers = [std::ptr::null_mut(); MAX_ARGS];
        for ((cell, pointer), arg) in cells.iter_mut().zip(&mut pointers).zip(args) {
            *cell = arg.cell();
            *pointer = match arg {
                Arg::Map(map) => std::ptr::from_ref(map).cast_mut().cast(),
                _ => std::ptr::from_mut(cell).cast(),
            };
        }
        let device = &self.module.device;
        // SAFETY: an attribute is plain data; zero is the value of every field not set here.
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        if geometry.overlap && device.compute_capability >= (9, 0) {
            attributes[count].id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        if geometry.cluster > 1 {
            attributes[count] = cluster_attribute(geometry.cluster);
            count += 1;
        }
        let config = launch_config(geometry, device.stream(), &mut attributes[..count]);
        // SAFETY: config, attributes, cells and maps live until the call returns, which is when the driver has copied them;
        // number and sizes of the arguments were checked; the caller vouches for what the pointers point to.
        let result = unsafe {
            sys::cuLaunchKernelEx(&raw const config, self.function, pointers.as_mut_ptr(), std::ptr::null_mut())
        };
        match result {
            CUresult::CUDA_SUCCESS => Ok(()),
            failed => Err(CudaError::from_driver(
                &format!("{} (kernel {})", device.name, self.name),
                "cuLaunchKernelEx",
                failed,
            )),
        }
    }

    fn check(&self, args: &[Arg]) -> Result<(), CudaError> {
        let given: Vec<usize> = args.iter().map(|a| a.bytes()).collect();
        let known = self.parameters.as_ref().is_none_or(|p| *p == given);
        if known && args.len() <= MAX_ARGS {
            return Ok(());
        }
        let what = format!("its parameters have sizes {:?}, the launch gives {given:?}", self.parameters);
        Err(CudaError::Launch { kernel: self.name.clone(), what })
    }
}

fn cluster_attribute(blocks: u32) -> sys::CUlaunchAttribute {
    // SAFETY: an attribute is plain data; zero is the value of every field not set here.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: 1, y: blocks, z: 1 };
    attribute
}

/// `attributes` must live as long as what is returned is used.
fn launch_config(
    geometry: &Geometry,
    stream: sys::CUstream,
    attributes: &mut [sys::CUlaunchAttribute],
) -> sys::CUlaunchConfig {
    sys::CUlaunchConfig {
        gridDimX: geometry.grid[0],
        gridDimY: geometry.grid[1],
        gridDimZ: geometry.grid[2],
        blockDimX: geometry.block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: geometry.shared_bytes,
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    }
}
