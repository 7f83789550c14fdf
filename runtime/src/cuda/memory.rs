//! Memory on the card and pinned memory of the host, each freed by its owner.

use super::CudaError;
use super::device::Device;
use cudarc::driver::sys::{self, CUresult};
use std::ops::Range;
use std::sync::Arc;

/// An address on the card. Arithmetic on it is plain; what lies there is known to whoever placed it.
pub type DevicePointer = u64;

/// One allocation on the card, for the life of its owner.
#[derive(Debug)]
pub struct DeviceMemory {
    device: Arc<Device>,
    pointer: DevicePointer,
    bytes: u64,
}

impl DeviceMemory {
    /// Takes at least one byte. Contents are not defined.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] with `what` it was for.
    pub fn new(device: &Arc<Device>, bytes: u64, what: &'static str) -> Result<Self, CudaError> {
        device.bind()?;
        let mut pointer = 0;
        // SAFETY: writes an address through a pointer to a live integer; the context is current.
        let result = unsafe { sys::cuMemAlloc_v2(&raw mut pointer, bytes.max(1) as usize) };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let free_bytes = device.memory()?.free_bytes;
            return Err(CudaError::OutOfMemory { device: device.name.clone(), what, asked_bytes: bytes, free_bytes });
        }
        device.check("cuMemAlloc", result)?;
        Ok(Self { device: device.clone(), pointer, bytes })
    }

    pub fn pointer(&self) -> DevicePointer {
        self.pointer
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sets every byte, in stream order.
    pub fn fill(&self, byte: u8) -> Result<(), CudaError> {
        self.fill_part(0, self.bytes as usize, byte)
    }

    /// Sets these bytes, in stream order.
    ///
    /// # Panics
    /// When the range does not lie within.
    pub fn fill_part(&self, offset: u64, bytes: usize, byte: u8) -> Result<(), CudaError> {
        assert!(offset + bytes as u64 <= self.bytes, "a fill past the end of device memory");
        // SAFETY: the range lies within this allocation, as just checked; the stream is the device's own.
        let result = unsafe { sys::cuMemsetD8Async(self.pointer + offset, byte, bytes, self.device.stream()) };
        self.device.check("cuMemsetD8Async", result)
    }

    /// Copies from the host and waits. For tables at start, not for steps.
    ///
    /// # Panics
    /// When the data does not fit behind `offset`.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), CudaError> {
        assert!(offset + data.len() as u64 <= self.bytes, "a write past the end of device memory");
        // SAFETY: the source is a live slice and the destination lies within this allocation, as just checked; the
        // synchronisation keeps the slice alive until it has been read.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(self.pointer + offset, data.as_ptr().cast(), data.len(), self.device.stream())
        };
        self.device.check("cuMemcpyHtoD", result)?;
        self.device.synchronize()
    }

    /// Copies to the host and waits.
    ///
    /// # Panics
    /// When the range does not lie within.
    pub fn read(&self, offset: u64, bytes: usize) -> Result<Vec<u8>, CudaError> {
        assert!(offset + bytes as u64 <= self.bytes, "a read past the end of device memory");
        let mut data = vec![0; bytes];
        // SAFETY: source within this allocation, destination a live vector of that length; synchronised before use.
        let result = unsafe {
            sys::cuMemcpyDtoHAsync_v2(data.as_mut_ptr().cast(), self.pointer + offset, bytes, self.device.stream())
        };
        self.device.check("cuMemcpyDtoH", result)?;
        self.device.synchronize()?;
        Ok(data)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `new`, freed only here. cuMemFree waits for work that uses it. An error means that
            // the context is lost, and the memory with it.
            unsafe { sys::cuMemFree_v2(self.pointer) };
        }
    }
}

/// Host memory that the card can read and write without the host's help. Not write-combined: the host reads it too.
#[derive(Debug)]
pub struct PinnedMemory {
    device: Arc<Device>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory with one owner; the driver lets any thread use and free it.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// Zeroed.
    pub fn new(device: &Arc<Device>, bytes: usize, what: &'static str) -> Result<Self, CudaError> {
        device.bind()?;
        let mut pointer = std::ptr::null_mut();
        // SAFETY: writes an address through a pointer to a live one; the context is current. Flags 0: portable enough,
        // cached by the host.
        let result = unsafe { sys::cuMemHostAlloc(&raw mut pointer, bytes.max(1), 0) };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (device, asked_bytes) = (device.name.clone(), bytes as u64);
            return Err(CudaError::OutOfMemory { device, what, asked_bytes, free_bytes: 0 });
        }
        device.check("cuMemHostAlloc", result)?;
        let pointer: *mut u8 = pointer.cast();
        // SAFETY: just allocated with at least this length.
        unsafe { std::ptr::write_bytes(pointer, 0, bytes) };
        Ok(Self { device: device.clone(), pointer, bytes })
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated and zeroed with this length; a copy by the card into it is waited for before it is read
        // (see the callers), so nobody writes while the slice lives.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only slice.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }

    /// Starts a copy of the first `bytes` to the card on `stream`.
    ///
    /// # Safety
    /// `to` must have room for them, and `self` must be neither written nor dropped until the stream has passed the copy.
    pub unsafe fn copy_to(&self, to: DevicePointer, bytes: usize, stream: sys::CUstream) -> Result<(), CudaError> {
        // SAFETY: passed on from the caller.
        unsafe { self.copy_part_to(0..bytes, to, stream) }
    }

    /// As [`Self::copy_to`], of the bytes of `part`.
    ///
    /// # Safety
    /// `to` must have room for them, and they must be neither written nor dropped until the stream has passed the copy.
    pub unsafe fn copy_part_to(
        &self,
        part: Range<usize>,
        to: DevicePointer,
        stream: sys::CUstream,
    ) -> Result<(), CudaError> {
        let source = &self.as_slice()[part];
        // SAFETY: the caller vouches for the destination and for the life of the source.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(to, source.as_ptr().cast(), source.len(), stream) };
        self.device.check("cuMemcpyHtoDAsync", result)
    }

    /// Starts a copy of `bytes` at `from` into this memory.
    ///
    /// # Safety
    /// `from` must hold them, and `self` must be neither read nor dropped until the stream has passed the copy.
    pub unsafe fn copy_from(
        &mut self,
        from: DevicePointer,
        bytes: usize,
        stream: sys::CUstream,
    ) -> Result<(), CudaError> {
        assert!(bytes <= self.bytes, "a copy past the end of pinned memory");
        // SAFETY: the caller vouches for the source and that nobody looks until it is done.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(self.pointer.cast(), from, bytes, stream) };
        self.device.check("cuMemcpyDtoHAsync", result)
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `new`, freed only here; callers of the copies keep it alive until they are done.
            unsafe { sys::cuMemFreeHost(self.pointer.cast()) };
        }
    }
}

/// A point in a stream that the host can wait for. Streams given to it are live: handles come from their owners.
#[derive(Debug)]
pub struct Event {
    device: Arc<Device>,
    event: sys::CUevent,
}

// SAFETY: an opaque handle; the driver's calls on events are thread-safe.
unsafe impl Send for Event {}

impl Event {
    /// With `timing`, [`Self::elapsed_ms`] works on it.
    pub fn new(device: &Arc<Device>, timing: bool) -> Result<Self, CudaError> {
        device.bind()?;
        let flags = match timing {
            true => sys::CUevent_flags::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        let event = cudarc::driver::result::event::create(flags)
            .map_err(|e| CudaError::from_driver(&device.name, "cuEventCreate", e.0))?;
        Ok(Self { device: device.clone(), event })
    }

    #[expect(clippy::not_unsafe_ptr_arg_deref, reason = "an opaque handle, never dereferenced on the host")]
    pub fn record(&self, stream: sys::CUstream) -> Result<(), CudaError> {
        // SAFETY: both handles are live and of the same context.
        let result = unsafe { sys::cuEventRecord(self.event, stream) };
        self.device.check("cuEventRecord", result)
    }

    /// Waits by asking again and again: a step is over in milliseconds, and sleeping costs tens of microseconds.
    pub fn wait(&self) -> Result<(), CudaError> {
        while !self.is_done()? {
            std::hint::spin_loop();
        }
        Ok(())
    }

    pub fn is_done(&self) -> Result<bool, CudaError> {
        // SAFETY: the handle is live.
        match unsafe { sys::cuEventQuery(self.event) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => self.device.check("cuEventQuery", result).map(|()| true),
        }
    }

    /// Milliseconds from `self` to `end`, both recorded with timing and passed.
    pub fn elapsed_ms(&self, end: &Self) -> Result<f32, CudaError> {
        // SAFETY: both handles are live.
        unsafe { cudarc::driver::result::event::elapsed(self.event, end.event) }
            .map_err(|e| CudaError::from_driver(&self.device.name, "cuEventElapsedTime", e.0))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created in `new`, destroyed only here.
            let _ = unsafe { cudarc::driver::result::event::destroy(self.event) };
        }
    }
}
