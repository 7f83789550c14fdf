//! Weights from files to the card: several threads read pieces into pinned memory, narrow them to bf16 where they are
//! stored wider, and send them straight to where they stay.

use super::CudaError;
use super::device::Device;
use super::memory::{DeviceMemory, DevicePointer, Event, PinnedMemory};
use super::weights::WeightLayout;
use crate::weights::{HostTensor, StoredType, TensorLocation, TensorSource};
use cudarc::driver::sys;
use half::{bf16, f16};
use mserve_planner::model::{Program, WeightId};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Bytes of a file that are read at once. Pinning memory costs 0.35 s a GiB, so the pieces are small and reused.
const PIECE_BYTES: usize = 4 << 20;
/// One thread copies about 8 GB/s out of the page cache; the bus takes 55.
const MAX_THREADS: usize = 8;

/// A stretch of one weight.
struct Piece<'a> {
    from: From<'a>,
    to: DevicePointer,
}

enum From<'a> {
    /// `bytes` at `offset` of the weight's place in a file.
    File { location: TensorLocation<'a>, offset: u64, bytes: usize },
    /// A whole weight that has to be made or read by its source.
    Source(WeightId),
}

/// Reads every weight of `program` to its place in `memory`.
///
/// # Errors
/// The first that a thread met; what is on the card then is not whole.
pub fn upload(
    device: &Arc<Device>,
    program: &Program,
    source: &dyn TensorSource,
    layout: &WeightLayout,
    memory: &DeviceMemory,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<(), CudaError> {
    let total = source.check(program)?;
    let pieces = pieces(program, source, layout, memory)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(pieces.len().max(1));
    let (next, done, failed) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let error: Mutex<Option<CudaError>> = Mutex::new(None);
    let work = || {
        let result = Uploader::new(device).and_then(|mut uploader| {
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                if failed.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let bytes = uploader.send(piece, program, source)?;
                done.fetch_add(bytes, Ordering::Relaxed);
            }
            uploader.finish()
        });
        if let Err(e) = result {
            failed.store(true, Ordering::Relaxed);
            error.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(e);
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        while workers.iter().any(|w| !w.is_finished()) {
            progress(done.load(Ordering::Relaxed).min(total), total);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    });
    match error.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => {
            progress(total, total);
            Ok(())
        }
    }
}

fn pieces<'a>(
    program: &Program,
    source: &'a dyn TensorSource,
    layout: &WeightLayout,
    memory: &DeviceMemory,
) -> Result<Vec<Piece<'a>>, CudaError> {
    let mut pieces = Vec::new();
    for (id, weight) in program.weights.iter().enumerate() {
        let to = memory.pointer() + layout.offset(WeightId(id));
        let Some(location) = source.locate(weight, &program.name_prefixes)? else {
            pieces.push(Piece { from: From::Source(WeightId(id)), to });
            continue;
        };
        let element = location.stored.bytes() as u64;
        for (offset, bytes) in stretches(location.bytes) {
            let from = From::File { location, offset, bytes };
            pieces.push(Piece { from, to: to + offset / element * size_of::<bf16>() as u64 });
        }
    }
    Ok(pieces)
}

/// (offset, length) of pieces of at most [`PIECE_BYTES`] that cover `bytes`.
fn stretches(bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..bytes).step_by(PIECE_BYTES).map(move |at| (at, (bytes - at).min(PIECE_BYTES as u64) as usize))
}

/// One thread's stream and its two buffers, of which one is filled while the other is sent.
struct Uploader<'a> {
    device: &'a Arc<Device>,
    stream: sys::CUstream,
    buffers: [(PinnedMemory, Event); 2],
    turn: usize,
}

impl<'a> Uploader<'a> {
    fn new(device: &'a Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let memory = || PinnedMemory::new(device, PIECE_BYTES, "the loader's buffers");
        let event = || Event::new(device, false);
        let buffers = [(memory()?, event()?), (memory()?, event()?)];
        let stream = cudarc::driver::result::stream::create(cudarc::driver::result::stream::StreamKind::NonBlocking)
            .map_err(|e| CudaError::from_driver(&device.name, "cuStreamCreate", e.0))?;
        Ok(Self { device, stream, buffers, turn: 0 })
    }

    /// Returns the bytes of the source that it took.
    fn send(&mut self, piece: &Piece<'_>, program: &Program, source: &dyn TensorSource) -> Result<u64, CudaError> {
        match &piece.from {
            From::File { location, offset, bytes } => {
                self.send_bytes(piece.to, location.stored, *bytes, |buffer| {
                    let read = location.file.read_exact_at(buffer, location.offset + offset);
                    read.map_err(|source| CudaError::Io { path: location.path.to_owned(), source })
                })?;
                Ok(*bytes as u64)
            }
            From::Source(id) => {
                let HostTensor { stored, bytes, .. } = source.read(program.weight(*id), &program.name_prefixes)?;
                for (at, len) in stretches(bytes.len() as u64) {
                    let at = at as usize;
                    let to = piece.to + (at / stored.bytes() * size_of::<bf16>()) as u64;
                    self.send_bytes(to, stored, len, |buffer| {
                        buffer.copy_from_slice(&bytes[at..at + len]);
                        Ok(())
                    })?;
                }
                Ok(bytes.len() as u64)
            }
        }
    }

    fn send_bytes(
        &mut self,
        to: DevicePointer,
        stored: StoredType,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let (buffer, sent) = &mut self.buffers[self.turn % 2];
        self.turn += 1;
        // An event that was never recorded counts as passed.
        sent.wait()?;
        fill(&mut buffer.as_mut_slice()[..bytes])?;
        let narrowed = narrow(stored, &mut buffer.as_mut_slice()[..bytes]);
        // SAFETY: the destination is the weight's place in an allocation made for all of them (`WeightLayout`); the
        // buffer is written again only after `sent` has passed, and dropped after `finish` or `drop` has waited.
        unsafe { buffer.copy_to(to, narrowed, self.stream)? };
        sent.record(self.stream)
    }

    fn finish(self) -> Result<(), CudaError> {
        // SAFETY: the stream is live.
        let result = unsafe { sys::cuStreamSynchronize(self.stream) };
        self.device.check("cuStreamSynchronize", result)
    }
}

impl Drop for Uploader<'_> {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed only here. Waits first: the buffers are freed after this.
        unsafe {
            sys::cuStreamSynchronize(self.stream);
            let _ = cudarc::driver::result::stream::destroy(self.stream);
        }
    }
}

/// Turns stored elements into bf16, in place. Returns the bytes that are left.
fn narrow(stored: StoredType, bytes: &mut [u8]) -> usize {
    let (width, to_bf16): (usize, fn(&[u8]) -> bf16) = match stored {
        StoredType::BF16 => return bytes.len(),
        StoredType::F16 => (2, |b| bf16::from_f32(f16::from_le_bytes([b[0], b[1]]).to_f32())),
        StoredType::F32 => (4, |b| bf16::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
    };
    let count = bytes.len() / width;
    for i in 0..count {
        let narrowed = to_bf16(&bytes[i * width..(i + 1) * width]).to_le_bytes();
        bytes[i * 2..i * 2 + 2].copy_from_slice(&narrowed);
    }
    count * 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wider_elements_are_rounded_in_place() {
        let values = [1.0_f32, -2.5, 3.000_001_2, 1e30, 0.0];
        let want: Vec<u8> = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        let mut f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let len = narrow(StoredType::F32, &mut f32s);
        assert_eq!(f32s[..len], want);
        let mut f16s: Vec<u8> = values[..3].iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        let len = narrow(StoredType::F16, &mut f16s);
        assert_eq!(f16s[..len][..4], want[..4]);
        let mut stays = want.clone();
        assert_eq!((narrow(StoredType::BF16, &mut stays), &stays), (10, &want));
    }

    #[test]
    fn stretches_cover_a_tensor_once() {
        for bytes in [0, 1, PIECE_BYTES as u64, PIECE_BYTES as u64 * 2 + 6] {
            let mut at = 0;
            for (offset, len) in stretches(bytes) {
                assert_eq!(offset, at);
                assert!(len > 0 && len <= PIECE_BYTES);
                at += len as u64;
            }
            assert_eq!(at, bytes);
        }
    }
}
