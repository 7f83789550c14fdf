//! How Hopper's copy engine sees a matrix: a KV cache (one description for keys and one for values of a layer, in device
//! memory), or an operand of a product.

use super::CudaError;
use super::device::Device;
use super::memory::DevicePointer;
use cudarc::driver::sys::{self, CUtensorMapDataType as Type, CUtensorMapFloatOOBfill as Fill};
use std::ffi::c_void;

/// Bytes of a map; kernels want them at multiples of it.
pub const TENSOR_MAP_BYTES: usize = 128;
/// Columns of what one copy brings: 128 bytes of each row, the span of the swizzle.
const BOX_COLUMNS: u32 = 64;

/// The map of a cache: `rows` rows of `head_dim` bf16 at `base`, a box for the tokens of a block. `head_dim` a multiple
/// of 64.
///
/// # Errors
/// As [`matrix_map`].
pub fn tensor_map(
    device: &Device,
    base: DevicePointer,
    rows: u64,
    head_dim: u32,
) -> Result<[u8; TENSOR_MAP_BYTES], CudaError> {
    matrix_map(device, base, [rows, u64::from(head_dim)], super::kernels::BLOCK_SIZE)
}

/// The map of a matrix of `[rows, columns]` bf16 at `base`: boxes of `box_rows` rows of 64, written with the 128-byte
/// swizzle, zeros beyond the edges. `columns` a multiple of 8. Cards from Hopper on; the driver needs no device memory
/// for it.
///
/// # Errors
/// What the driver refuses: a base that is not a multiple of 16, say.
pub fn matrix_map(
    device: &Device,
    base: DevicePointer,
    [rows, columns]: [u64; 2],
    box_rows: u32,
) -> Result<[u8; TENSOR_MAP_BYTES], CudaError> {
    device.bind()?;
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let (sizes, row_bytes, extent, steps) = ([columns, rows], [columns * 2], [BOX_COLUMNS, box_rows], [1_u32; 2]);
    // SAFETY: every pointer is to a live array as long as two dimensions need (one stride, the second), read before the
    // call returns; `map` is written; `base` is only recorded.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            base as *mut c_void,
            sizes.as_ptr(),
            row_bytes.as_ptr(),
            extent.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    device.check("cuTensorMapEncodeTiled", result)?;
    let mut bytes = [0; TENSOR_MAP_BYTES];
    bytes.as_chunks_mut::<8>().0.iter_mut().zip(map.opaque).for_each(|(to, word)| *to = word.to_le_bytes());
    Ok(bytes)
}
