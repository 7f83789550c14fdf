//! The device with every kernel loaded; buffers from and to host vectors; timing by graphs.

use half::bf16;
use mserve_runtime::cuda::compile::{self, KernelSource};
use mserve_runtime::cuda::device::Device;
use mserve_runtime::cuda::graph::Graph;
use mserve_runtime::cuda::kernels::{self, Geometry, HEAD_DIMS, Prefill, Products, WIDE};
use mserve_runtime::cuda::linear::ProductKernels;
use mserve_runtime::cuda::memory::{DeviceMemory, Event};
use mserve_runtime::cuda::module::{Arg, Kernel, Module};
use mserve_runtime::cuda::tensor_map::{TENSOR_MAP_BYTES, tensor_map};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

pub type Failure = Box<dyn std::error::Error>;
pub type Outcome = Result<(), Failure>;

const ROPE: &str = "qk_norm_rope_kv_write";

pub struct Card {
    pub device: Arc<Device>,
    entries: HashMap<(String, u32), Kernel>,
    started: String,
}

/// Most dynamic shared memory that launches of an entry may ask for here.
fn most_shared_bytes(entry: &str, device: &Device) -> u32 {
    match entry {
        _ if entry.starts_with("attn_decode_") => device.shared_memory_per_block_bytes,
        "attn_prefill" | "attn_prefill_wgmma" => 226 << 10,
        _ if entry.starts_with("wide_") || entry.starts_with("split_") || entry.starts_with("chain_") => 227 << 10,
        _ if entry.starts_with("fused_m") || entry.starts_with("tile_") => 128 << 10,
        _ => 0,
    }
}

impl Card {
    pub fn open() -> Result<Self, Failure> {
        let device = Arc::new(Device::open(0)?);
        let start = std::time::Instant::now();
        let head_dims: Vec<u32> = match std::env::var("KERNEL_HEAD_DIMS") {
            Ok(listed) => listed.split_whitespace().map(str::parse).collect::<Result<_, _>>()?,
            Err(_) => HEAD_DIMS.to_vec(),
        };
        let mut sources = kernels::sources(&head_dims, device.compute_capability);
        sources.iter_mut().for_each(variant);
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
                    let shared = most_shared_bytes(entry, &device);
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

    /// Those that compute products, for [`mserve_runtime::cuda::linear::Linears`].
    pub fn product_kernels(&self) -> Result<ProductKernels, Failure> {
        let kernel = |entry: &str| self.kernel(entry, 0).cloned();
        let hopper = self.device.compute_capability.0 == 9;
        Ok(ProductKernels {
            few_rows: Products::ALL.iter().map(|p| kernel(p.entry)).collect::<Result<_, _>>()?,
            many_rows: WIDE.iter().filter(|_| hopper).map(|w| kernel(w.entry)).collect::<Result<_, _>>()?,
            silu_mul: kernel("silu_mul")?,
            ropes: HEAD_DIMS.into_iter().filter_map(|d| Some((d, self.kernel(ROPE, d).ok()?.clone()))).collect(),
        })
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

/// To try changes without building anew: sources from the directory KERNEL_SOURCES in place of those built in, with
/// KERNEL_OPTIONS. `-DSPIN_LIMIT=100000000` there ends a kernel whose barrier is never reached instead of hanging the card,
/// but takes registers: wgmma kernels are then slower by a quarter.
fn variant(source: &mut KernelSource) {
    if let Ok(options) = std::env::var("KERNEL_OPTIONS") {
        source.options.extend(options.split_whitespace().map(str::to_owned));
    }
    let Ok(directory) = std::env::var("KERNEL_SOURCES") else { return };
    let marker = "#line 1 \"";
    let Some((before, after)) = source.text.split_once(marker) else { return };
    let Some((file, _)) = after.split_once('"') else { return };
    if let Ok(body) = std::fs::read_to_string(Path::new(&directory).join(file)) {
        source.text = format!("{before}{marker}{file}\"\n{body}");
    }
}

/// What a prefill kernel takes for the caches of keys and values, `bytes` each: them, or the maps of them.
pub struct Caches {
    args: [Arg; 2],
    _maps: Option<DeviceMemory>,
}

impl Caches {
    pub fn new(card: &Card, at: [u64; 2], bytes: usize, head_dim: usize, prefill: Prefill) -> Result<Self, Failure> {
        let raw = std::env::var_os("PREFILL_CACHES_RAW").is_some();
        if raw || !matches!(prefill, Prefill::WarpgroupProducts { .. }) {
            return Ok(Self { args: at.map(Arg::Pointer), _maps: None });
        }
        let memory = card.poisoned(2 * TENSOR_MAP_BYTES)?;
        for (base, place) in at.into_iter().zip([0, TENSOR_MAP_BYTES as u64]) {
            let map = tensor_map(&card.device, base, (bytes / 2 / head_dim) as u64, head_dim as u32)?;
            memory.write(place, &map)?;
        }
        let args = [memory.pointer(), memory.pointer() + TENSOR_MAP_BYTES as u64].map(Arg::Pointer);
        Ok(Self { args, _maps: Some(memory) })
    }

    /// `args` with these in place of the two after the first two.
    pub fn within(&self, mut args: Vec<Arg>) -> Vec<Arg> {
        args[2..4].copy_from_slice(&self.args);
        args
    }
}

/// What a variant of the warpgroup prefill needs beside its source: PREFILL_GEOMETRY="threads shared_bytes rows".
pub struct PrefillVariant {
    pub block: u32,
    pub shared_bytes: u32,
    pub rows: u32,
}

impl PrefillVariant {
    pub fn asked() -> Option<Self> {
        let words = std::env::var("PREFILL_GEOMETRY").ok()?;
        let mut words = words.split_whitespace().map_while(|w| w.parse().ok());
        Some(Self { block: words.next()?, shared_bytes: words.next()?, rows: words.next()? })
    }
}

/// The warpgroup kernel's tiles of rows, and its launch.
pub fn prefill_launch(prefill: Prefill, lens: &[u32], padding: u32, heads: u32, head_dim: u32) -> (u32, Geometry) {
    let variant = PrefillVariant::asked().filter(|_| matches!(prefill, Prefill::WarpgroupProducts { .. }));
    let Some(variant) = variant else {
        let tiles = kernels::prefill_tiles(lens.iter().copied()) + padding;
        return (tiles, prefill.geometry(tiles, heads, head_dim));
    };
    let tiles = lens.iter().map(|n| n.div_ceil(variant.rows)).sum::<u32>() + padding;
    let geometry = prefill.geometry(tiles, heads, head_dim);
    (tiles, Geometry { block: variant.block, shared_bytes: variant.shared_bytes, ..geometry })
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
