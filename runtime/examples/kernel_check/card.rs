//! The device with every kernel loaded; buffers from and to host vectors; timing by graphs.

use half::bf16;
use mserve_runtime::cuda::compile;
use mserve_runtime::cuda::device::Device;
use mserve_runtime::cuda::graph::Graph;
use mserve_runtime::cuda::kernels::{self, Geometry};
use mserve_runtime::cuda::memory::{DeviceMemory, Event};
use mserve_runtime::cuda::module::{Arg, Kernel, Module};
use std::collections::HashMap;
use std::sync::Arc;

pub type Failure = Box<dyn std::error::Error>;
pub type Outcome = Result<(), Failure>;

pub struct Card {
    pub device: Arc<Device>,
    entries: HashMap<(String, u32), Kernel>,
    started: String,
}

/// Most dynamic shared memory that any launch here asks for.
const SHARED_BYTES: u32 = 200 << 10;

impl Card {
    pub fn open() -> Result<Self, Failure> {
        let device = Arc::new(Device::open(0)?);
        let start = std::time::Instant::now();
        let sources = kernels::sources(&kernels::HEAD_DIMS, device.compute_capability);
        let cubins = compile::compile_all(&sources, &device.arch(), None, 16)?;
        let started = format!("{} compilations in {:.2} s", sources.len(), start.elapsed().as_secs_f64());
        let mut entries = HashMap::new();
        for (source, cubin) in sources.iter().zip(&cubins) {
            let module = Module::load(&device, cubin)?;
            for file in &kernels::FILES {
                let head_dim = source.name.strip_prefix(file.name).map(|rest| rest.trim_start_matches('_'));
                let Some(head_dim) = head_dim.and_then(|d| if d.is_empty() { Some(0) } else { d.parse().ok() }) else {
                    continue;
                };
                for entry in file.entries {
                    let large =
                        entry.starts_with("attn_prefill") || entry.starts_with("fused_m") || entry.starts_with("tile_");
                    let shared = if large { SHARED_BYTES } else { 0 };
                    entries.insert(((*entry).to_owned(), head_dim), module.kernel(entry, shared)?);
                }
            }
        }
        Ok(Self { device, entries, started })
    }

    pub fn describe(&self) -> String {
        format!("{}, {} multiprocessors; {}", self.device.name, self.device.multiprocessors, self.started)
    }

    /// `head_dim` 0 for kernels that do not depend on it.
    pub fn kernel(&self, entry: &str, head_dim: u32) -> Result<&Kernel, Failure> {
        self.entries.get(&(entry.to_owned(), head_dim)).ok_or_else(|| format!("no kernel {entry} {head_dim}").into())
    }

    pub fn run(&self, entry: &str, head_dim: u32, geometry: Geometry, args: &[Arg]) -> Outcome {
        launch(self.kernel(entry, head_dim)?, geometry, args)
    }

    /// `bytes` of 0xff: NaN in every float format, so that an element nobody wrote shows.
    pub fn poisoned(&self, bytes: usize) -> Result<DeviceMemory, Failure> {
        let memory = DeviceMemory::new(&self.device, bytes.max(16) as u64, "kernel check")?;
        memory.fill(0xff)?;
        Ok(memory)
    }

    pub fn upload<T: Words>(&self, values: &[T]) -> Result<DeviceMemory, Failure> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.bytes()).collect();
        let memory = self.poisoned(bytes.len())?;
        memory.write(0, &bytes)?;
        Ok(memory)
    }

    /// Uninitialised memory filled with random bf16 in (-1, 1) by copies of one block; for timing.
    pub fn random(&self, bytes: usize) -> Result<DeviceMemory, Failure> {
        const BLOCK: usize = 32 << 20;
        let memory = DeviceMemory::new(&self.device, bytes as u64, "kernel check")?;
        let mut random = super::numbers::Random::new(bytes as u64);
        let block: Vec<u8> = random.bf16s(BLOCK.min(bytes) / 2, 1.0).iter().flat_map(|v| v.bytes()).collect();
        for at in (0..bytes).step_by(BLOCK) {
            memory.write(at as u64, &block[..BLOCK.min(bytes - at) / 2 * 2])?;
        }
        Ok(memory)
    }

    pub fn bf16s(&self, memory: &DeviceMemory, count: usize) -> Result<Vec<f64>, Failure> {
        let bytes = memory.read(0, count * 2)?;
        Ok(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect())
    }

    pub fn floats(&self, memory: &DeviceMemory, count: usize) -> Result<Vec<f64>, Failure> {
        let bytes = memory.read(0, count * 4)?;
        Ok(bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect())
    }

    pub fn ints(&self, memory: &DeviceMemory, count: usize) -> Result<Vec<i32>, Failure> {
        let bytes = memory.read(0, count * 4)?;
        Ok(bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// Microseconds per round: `rounds` rounds of `launches` captured as one graph, the best of several replays.
    pub fn time(&self, rounds: usize, mut launches: impl FnMut(usize) -> Outcome) -> Result<f64, Failure> {
        let mut failed = None;
        let graph = Graph::capture(&self.device, || {
            failed = (0..rounds).find_map(|round| launches(round).err());
            Ok(())
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let (begin, end) = (Event::new(&self.device, true)?, Event::new(&self.device, true)?);
        let mut best = f64::MAX;
        for replay in 0..5 {
            begin.record(self.device.stream())?;
            // SAFETY: callers keep every buffer until this returns, and it waits below.
            unsafe { graph.launch()? };
            end.record(self.device.stream())?;
            end.wait()?;
            if replay > 0 {
                best = best.min(f64::from(begin.elapsed_ms(&end)?) * 1e3 / rounds as f64);
            }
        }
        Ok(best)
    }
}

pub fn launch(kernel: &Kernel, geometry: Geometry, args: &[Arg]) -> Outcome {
    // SAFETY: each caller builds buffers of the sizes that the kernel's own description names, and keeps them until it
    // has read results or the timing has ended, both of which wait for the stream.
    unsafe { kernel.launch(&geometry, args) }?;
    Ok(())
}

pub fn pointer(memory: &DeviceMemory) -> Arg {
    Arg::Pointer(memory.pointer())
}

pub fn pointer_at(memory: &DeviceMemory, bytes: usize) -> Arg {
    Arg::Pointer(memory.pointer() + bytes as u64)
}

pub const NULL: Arg = Arg::Pointer(0);

pub fn int(value: usize) -> Arg {
    Arg::Int(value as i32)
}

/// Plain data in the card's byte order.
pub trait Words {
    fn bytes(&self) -> Vec<u8>;
}

impl Words for bf16 {
    fn bytes(&self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
}

impl Words for f32 {
    fn bytes(&self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
}

impl Words for i32 {
    fn bytes(&self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
}
