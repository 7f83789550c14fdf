//! Matrix products through cuBLASLt: out `[m, n]` = x `[m, k]` W `[n, k]`^T (+ bias `[n]`) (+ residual `[m, n]`), bf16 in,
//! bf16 or f32 out, f32 accumulation.
//!
//! Descriptors and algorithm of each shape are made once: cuBLASLt's heuristic costs a tenth of a millisecond, and its
//! first choice is not always the fastest.

use super::CudaError;
use super::device::Device;
use super::memory::{DeviceMemory, DevicePointer};
use cudarc::cublaslt::{result as lt, sys};
use std::ffi::c_void;
use std::sync::Arc;

/// What cuBLASLt may use beside its operands. Its split-k kernels want more for larger outputs; NVIDIA advises 32 MiB
/// on Hopper.
pub const WORKSPACE_BYTES: u64 = 32 << 20;

/// One kind of product. Rows `m` are padded rows: few distinct values.
/// Gated: out `[m, n / 2]` = silu of the first half of the product, times the second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GemmShape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub bias: bool,
    pub residual: bool,
    pub f32_out: bool,
    pub gated: bool,
    /// Elements of a head where columns are packed q, k and v: q is rotated, k rotated and v go to the cache, see
    /// [`Rotation`]. 0: they are not.
    pub rotated: u32,
    /// Elements from one row of `out` to the next: at least `n`.
    pub out_stride: usize,
}

impl GemmShape {
    /// The product alone: without gate or rotation.
    #[must_use]
    pub const fn alone(&self) -> Self {
        Self { gated: false, rotated: 0, ..*self }
    }
}

/// Addresses of one product.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GemmOperands {
    pub x: DevicePointer,
    pub weight: DevicePointer,
    pub bias: Option<DevicePointer>,
    /// May be `out` itself.
    pub residual: Option<DevicePointer>,
    pub out: DevicePointer,
    /// `[m, n]`, for gated products: may be overwritten.
    pub gate_up: Option<DevicePointer>,
    /// Of heads, `[m]`: how tokens are chosen, [`super::kernels::SampleRow`]. Without it nobody reads the logits.
    pub sample_rows: Option<DevicePointer>,
    /// Of rotated products.
    pub rotation: Option<Rotation>,
}

/// Where packed q, k and v go, and by how much they turn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rotation {
    /// `[m]` i32: rows of the tables, and places in the cache; a negative one is none.
    pub positions: DevicePointer,
    pub slots: DevicePointer,
    /// `[positions, head_dim / 2]` f32
    pub cos: DevicePointer,
    pub sin: DevicePointer,
    /// The layer's cache.
    pub keys: DevicePointer,
    pub values: DevicePointer,
    pub heads: u32,
    pub kv_heads: u32,
}

/// cuBLASLt's description of how to compute a product; opaque, valid for one version of the library and one card.
pub type Algorithm = [u64; 8];

#[derive(Debug)]
pub struct Blas {
    device: Arc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: DeviceMemory,
    pub version: usize,
}

// SAFETY: handle and descriptors are plain heap objects of the library, used by one thread at a time: whoever owns it.
unsafe impl Send for Blas {}

impl Blas {
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let handle = lt::create_handle().map_err(|e| blas_error(device, "cublasLtCreate", &e, String::new()))?;
        let workspace = DeviceMemory::new(device, WORKSPACE_BYTES, "cuBLASLt's workspace")?;
        // SAFETY: takes nothing, returns a number; the library was opened before.
        let version = unsafe { sys::cublasLtGetVersion() };
        Ok(Self { device: device.clone(), handle, workspace, version })
    }

    /// Puts one product into the device's stream.
    ///
    /// # Safety
    /// `plan` must have been made for `shape`. The operands must be device memory of the sizes that `shape` says, bf16
    /// (f32 for `out` where it says so), alive until the stream has passed it.
    pub unsafe fn run(&self, plan: &mut BlasPlan, shape: &GemmShape, operands: &GemmOperands) -> Result<(), CudaError> {
        let (alpha, beta) = (1_f32, if operands.residual.is_some() { 1_f32 } else { 0_f32 });
        debug_assert_eq!((shape.bias, shape.residual), (operands.bias.is_some(), operands.residual.is_some()));
        if let Some(bias) = operands.bias {
            plan.description.set_bias(bias).map_err(|e| self.device.blas("set bias", &e, shape))?;
        }
        let d = &plan.description;
        let c = operands.residual.unwrap_or(operands.out);
        // SAFETY: descriptors and algorithm belong together and are live; the algorithm needs no more workspace than
        // there is (checked when the plan was made), which one stream uses for one product at a time; the caller vouches for
        // the operands. alpha and beta are read before the call returns (host pointer mode).
        let result = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                d.desc,
                (&raw const alpha).cast(),
                operands.weight as *const c_void,
                d.a,
                operands.x as *const c_void,
                d.b,
                (&raw const beta).cast(),
                c as *const c_void,
                d.d,
                operands.out as *mut c_void,
                d.d,
                &raw const plan.algorithm,
                self.workspace.pointer() as *mut c_void,
                WORKSPACE_BYTES as usize,
                self.device.stream().cast(),
            )
        };
        result.result().map_err(|e| self.device.blas("cublasLtMatmul", &e, shape))
    }

    /// Up to `want` algorithms for a shape, the heuristic's favourite first. At least one.
    pub fn candidates(&self, shape: &GemmShape, want: usize) -> Result<Vec<Algorithm>, CudaError> {
        let description = Description::new(shape).map_err(|e| self.device.blas("describe", &e, shape))?;
        let fail = |e: &lt::CublasError| self.device.blas("cublasLtMatmulAlgoGetHeuristic", e, shape);
        let preference = Preference::new(WORKSPACE_BYTES).map_err(|e| fail(&e))?;
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = Vec::with_capacity(want);
        let mut count = 0;
        // SAFETY: all descriptors are live; the vector has room for `want` results, and `count` of them are written.
        let result = unsafe {
            let (d, to) = (&description, found.as_mut_ptr());
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                d.desc,
                d.a,
                d.b,
                d.d,
                d.d,
                preference.0,
                want as i32,
                to,
                &raw mut count,
            )
        };
        result.result().map_err(|e| fail(&e))?;
        // SAFETY: the library has written that many.
        unsafe { found.set_len(count.clamp(0, want as i32) as usize) };
        let usable = |r: &&sys::cublasLtMatmulHeuristicResult_t| r.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        let algorithms: Vec<Algorithm> = found.iter().filter(usable).map(|r| r.algo.data).collect();
        if algorithms.is_empty() {
            return Err(fail(&lt::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)));
        }
        Ok(algorithms)
    }

    /// `algorithm` made ready for products of this shape.
    ///
    /// # Errors
    /// When the library does not take it (it was kept by another version, say).
    pub fn plan(&self, shape: &GemmShape, algorithm: Algorithm) -> Result<BlasPlan, CudaError> {
        let description = Description::new(shape).map_err(|e| self.device.blas("describe", &e, shape))?;
        let algorithm = sys::cublasLtMatmulAlgo_t { data: algorithm };
        // SAFETY: plain data, all fields of which may be zero.
        let mut checked: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: descriptors are live; reads the algorithm, writes the result.
        let result = unsafe {
            let d = &description;
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                d.desc,
                d.a,
                d.b,
                d.d,
                d.d,
                &raw const algorithm,
                &raw mut checked,
            )
        };
        let fits = match checked.workspaceSize as u64 <= WORKSPACE_BYTES {
            true => result.result(),
            false => Err(lt::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)),
        };
        fits.map_err(|e| self.device.blas("cublasLtMatmulAlgoCheck", &e, shape))?;
        Ok(BlasPlan { description, algorithm })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created in `new`, destroyed only here.
            let _ = unsafe { lt::destroy_handle(self.handle) };
        }
    }
}

impl Device {
    fn blas(&self, call: &'static str, error: &lt::CublasError, shape: &GemmShape) -> CudaError {
        blas_error(self, call, error, format!("{shape:?}"))
    }
}

fn blas_error(device: &Device, call: &'static str, error: &lt::CublasError, what: String) -> CudaError {
    CudaError::Blas { device: device.name.clone(), call, status: error.to_string(), what }
}

/// One shape's descriptors and the algorithm that computes it.
#[derive(Debug)]
pub struct BlasPlan {
    description: Description,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: plain heap objects of the library, used by one thread at a time: whoever owns it.
unsafe impl Send for BlasPlan {}

/// The library's descriptors of a shape. It counts in columns: out^T `[n, m]` = W x^T.
#[derive(Debug)]
struct Description {
    desc: sys::cublasLtMatmulDesc_t,
    /// Weights.
    a: sys::cublasLtMatrixLayout_t,
    /// Activations.
    b: sys::cublasLtMatrixLayout_t,
    /// Result and residual.
    d: sys::cublasLtMatrixLayout_t,
}

impl Description {
    fn new(shape: &GemmShape) -> Result<Self, lt::CublasError> {
        let (m, n, k) = (shape.m as u64, shape.n as u64, shape.k as u64);
        let bf16 = sys::cudaDataType_t::CUDA_R_16BF;
        let out = if shape.f32_out { sys::cudaDataType_t::CUDA_R_32F } else { bf16 };
        let none = std::ptr::null_mut();
        let mut made = Self { desc: std::ptr::null_mut(), a: none, b: none, d: none };
        made.desc =
            lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)?;
        made.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &1_i32.to_ne_bytes())?;
        if shape.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32;
            made.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue.to_ne_bytes())?;
        }
        made.a = lt::create_matrix_layout(bf16, k, n, k as i64)?;
        made.b = lt::create_matrix_layout(bf16, k, m, k as i64)?;
        made.d = lt::create_matrix_layout(out, n, m, shape.out_stride as i64)?;
        Ok(made)
    }

    fn set(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &[u8]) -> Result<(), lt::CublasError> {
        // SAFETY: the descriptor is live; the library copies `value`, whose length it is told.
        unsafe { lt::set_matmul_desc_attribute(self.desc, attribute, value.as_ptr().cast(), value.len()) }
    }

    fn set_bias(&self, bias: DevicePointer) -> Result<(), lt::CublasError> {
        self.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.to_ne_bytes())
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: each was made in `new` (or is null and skipped) and is destroyed only here.
        unsafe {
            for layout in [self.a, self.b, self.d].into_iter().filter(|l| !l.is_null()) {
                let _ = lt::destroy_matrix_layout(layout);
            }
            if !self.desc.is_null() {
                let _ = lt::destroy_matmul_desc(self.desc);
            }
        }
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(workspace_bytes: u64) -> Result<Self, lt::CublasError> {
        let made = Self(lt::create_matmul_pref()?);
        let most = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the preference is live; eight bytes are read from a live integer.
        unsafe { lt::set_matmul_pref_attribute(made.0, most, (&raw const workspace_bytes).cast(), 8)? };
        Ok(made)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed only here.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}
