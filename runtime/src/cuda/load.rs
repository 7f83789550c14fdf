//! From a model's spec to a backend that is ready for its first step.

use super::arena::{ALIGNMENT_BYTES, ArenaPlan, StepRows};
use super::buckets::decode_buckets;
use super::budget::{Demand, KvBudget, kv_budget};
use super::clock::Clock;
use super::device::Device;
use super::error::MemoryTerm;
use super::executor::{AttentionScratch, ChainSurfaces, Executor, RopeTable, RowPlaces, Surfaces};
use super::gemm::WORKSPACE_BYTES;
use super::gemm_tuning::Tuner;
use super::kernels::{BLOCK_SIZE, ChainSizes, HEAD_DIMS, Prefill, bests};
use super::memory::{DeviceMemory, DevicePointer};
use super::metadata::{MetadataLayout, StepShape};
use super::plan::{Bases, HeadSizes, Plan, plan};
use super::prepare::{Prepared, prepare};
use super::step_slots::{device_output_bytes, output_surfaces};
use super::tensor_map::{TENSOR_MAP_BYTES, tensor_map};
use super::weights::WeightLayout;
use super::{CudaError, CudaOptions, WeightOrigin, random_weights, upload};
use crate::backend::rope::Rope;
use crate::engine::MAX_NAMED_TOKENS;
use mserve_planner::model::{ModelSpec, Program, Quantization, families};
use rayon::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Everything on the card that a model needs, and the executor over it.
#[derive(Debug)]
pub struct LoadedModel {
    pub executor: Executor,
    /// Freed after the executor; the addresses in it point here.
    pub memory: ModelMemory,
    pub sizes: Sizes,
    pub budget: KvBudget,
    pub weight_bytes: u64,
    /// Phases of the load one after the other, in milliseconds.
    pub timings: Vec<(&'static str, f64)>,
    /// Of these beside the weights.
    pub beside: Vec<(&'static str, f64)>,
    pub tuner: Tuner,
}

#[derive(Debug)]
pub struct ModelMemory {
    weights: DeviceMemory,
    pub arena: DeviceMemory,
    kv_cache: DeviceMemory,
    /// Metadata, block tables, outputs, bias lists, token state, scratch and rope tables.
    pub surfaces: DeviceMemory,
}

/// Largest step, in all its measures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    pub max_model_len: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub max_blocks: usize,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub decode_buckets: Vec<usize>,
}

impl Sizes {
    /// `lowered`: a length that fits where the model's own does not.
    fn new(spec: &ModelSpec, options: &CudaOptions, lowered: Option<usize>) -> Result<Self, CudaError> {
        let limit = spec.max_position_embeddings as usize;
        let max_model_len = options.max_model_len.or(lowered).unwrap_or(limit);
        let bad = |option, value: String, must: String| Err(CudaError::Option { option, value, must });
        if max_model_len == 0 || max_model_len > limit {
            return bad("max_model_len", max_model_len.to_string(), format!("1 to {limit}, the model's positions"));
        }
        if options.max_num_seqs == 0 || options.max_num_seqs > 4096 {
            return bad("max_num_seqs", options.max_num_seqs.to_string(), "1 to 4096".to_owned());
        }
        if options.max_num_batched_tokens < options.max_num_seqs || options.max_num_batched_tokens > 1 << 17 {
            let value = options.max_num_batched_tokens.to_string();
            return bad("max_num_batched_tokens", value, format!("max_num_seqs ({}) to 131072", options.max_num_seqs));
        }
        if !(0.01..=1.0).contains(&options.gpu_memory_utilization) {
            let value = options.gpu_memory_utilization.to_string();
            return bad("gpu_memory_utilization", value, "0.01 to 1".to_owned());
        }
        Ok(Self {
            max_model_len,
            max_num_seqs: options.max_num_seqs,
            max_num_batched_tokens: options.max_num_batched_tokens,
            max_blocks: max_model_len.div_ceil(BLOCK_SIZE as usize),
            vocab_size: spec.vocab_size as usize,
            hidden_size: spec.hidden_size as usize,
            decode_buckets: decode_buckets(options.max_num_seqs),
        })
    }

    /// Biases of the step with the most: no request names more tokens.
    pub const fn bias_entries(&self) -> usize {
        self.max_num_seqs * MAX_NAMED_TOKENS
    }

    /// Powers of two first, the smallest of all in front.
    pub fn commonest_buckets(&self) -> Vec<usize> {
        let mut buckets = self.decode_buckets.clone();
        buckets.sort_by_key(|b| (!b.is_power_of_two(), *b));
        buckets
    }

    /// The step with the most metadata.
    fn largest_step(&self) -> StepShape {
        let s = self.max_num_seqs;
        StepShape { tokens: self.max_num_batched_tokens, decodes: s, sequences: s, outputs: s }
    }

    /// Words of the largest step's metadata.
    pub fn metadata_words(&self) -> usize {
        MetadataLayout::new(&self.largest_step()).words
    }
}

/// Ranges of the allocation for everything that is small.
#[derive(Debug, Default)]
struct Ranges {
    bytes: u64,
}

impl Ranges {
    fn take(&mut self, bytes: u64) -> u64 {
        let at = self.bytes;
        self.bytes += bytes.next_multiple_of(ALIGNMENT_BYTES);
        at
    }
}

/// Offsets into [`ModelMemory::surfaces`].
struct SurfaceOffsets {
    metadata: u64,
    block_tables: u64,
    outputs: u64,
    bias_tokens: u64,
    bias_values: u64,
    token_state: u64,
    token_state_stride: usize,
    bests: u64,
    chain: [u64; 3],
    partial: u64,
    statistic: u64,
    ropes: Vec<(u64, u64, u32)>,
    cache_maps: u64,
    /// Of as many rows as the largest step has.
    no_positions: u64,
    no_slots: u64,
    bytes: u64,
}

impl SurfaceOffsets {
    fn new(device: &Device, sizes: &Sizes, layers: &[HeadSizes], rotary: &[u32]) -> Self {
        let mut ranges = Ranges::default();
        let scratch = AttentionScratch::new(
            |head_dim| device.decode_attention(head_dim),
            layers,
            sizes.max_num_seqs,
            sizes.max_model_len as u32,
        );
        let token_state_stride = sizes.vocab_size.next_multiple_of(2);
        let (normed_bytes, squares_bytes) = ChainSizes::scratch_bytes(sizes.hidden_size as u64);
        Self {
            metadata: ranges.take(sizes.metadata_words() as u64 * 4),
            block_tables: ranges.take((sizes.max_num_seqs * sizes.max_blocks) as u64 * 4),
            outputs: ranges.take(device_output_bytes(sizes.max_num_seqs)),
            bias_tokens: ranges.take(sizes.bias_entries() as u64 * 4),
            bias_values: ranges.take(sizes.bias_entries() as u64 * 4),
            token_state: ranges.take((sizes.max_num_seqs * token_state_stride) as u64 * 2),
            token_state_stride,
            bests: ranges.take(bests(sizes.max_num_seqs, sizes.vocab_size as u32) as u64 * 8),
            chain: [normed_bytes, squares_bytes, 8].map(|bytes| ranges.take(bytes)),
            partial: ranges.take(scratch.partial * 4),
            statistic: ranges.take(scratch.statistic * 4),
            ropes: rotary
                .iter()
                .map(|&rotary| {
                    let bytes = sizes.max_model_len as u64 * u64::from(rotary / 2) * 4;
                    (ranges.take(bytes), ranges.take(bytes), rotary)
                })
                .collect(),
            cache_maps: ranges.take((layers.len() * 2 * TENSOR_MAP_BYTES) as u64),
            no_positions: ranges.take(sizes.max_num_batched_tokens as u64 * 4),
            no_slots: ranges.take(sizes.max_num_batched_tokens as u64 * 4),
            bytes: ranges.bytes,
        }
    }

    /// Of a layer's keys and of its values.
    fn cache_maps(&self, base: DevicePointer, layer: u64) -> (DevicePointer, DevicePointer) {
        let at = base + self.cache_maps + layer * 2 * TENSOR_MAP_BYTES as u64;
        (at, at + TENSOR_MAP_BYTES as u64)
    }

    fn surfaces(&self, base: DevicePointer, sizes: &Sizes, layers: Vec<(DevicePointer, DevicePointer)>) -> Surfaces {
        let ropes = self.ropes.iter().map(|&(cos, sin, rotary)| RopeTable { cos: base + cos, sin: base + sin, rotary });
        Surfaces {
            metadata: base + self.metadata,
            block_tables: base + self.block_tables,
            max_blocks: sizes.max_blocks as u32,
            outputs: output_surfaces(base + self.outputs, sizes.max_num_seqs),
            bias_tokens: base + self.bias_tokens,
            bias_values: base + self.bias_values,
            token_state: base + self.token_state,
            token_state_stride: self.token_state_stride as u32,
            vocab_size: sizes.vocab_size as u32,
            bests: base + self.bests,
            chain: ChainSurfaces {
                normed: base + self.chain[0],
                squares: base + self.chain[1],
                count: base + self.chain[2],
            },
            partial: base + self.partial,
            statistic: base + self.statistic,
            max_model_len: sizes.max_model_len as u32,
            ropes: ropes.collect(),
            cache_maps: (0..layers.len() as u64).map(|layer| self.cache_maps(base, layer)).collect(),
            layers,
            no_places: RowPlaces { positions: base + self.no_positions, slots: base + self.no_slots },
        }
    }
}

/// Writes the maps of each layer's keys and values where the card's prefill kernel reads maps.
fn write_cache_maps(
    device: &Device,
    plan: &Plan,
    surfaces: &Surfaces,
    num_blocks: u64,
    memory: &DeviceMemory,
) -> Result<(), CudaError> {
    for (layer, heads) in plan.layers.iter().enumerate() {
        let prefill = Prefill::new(heads.head_dim, device.compute_capability, device.multiprocessors);
        if !prefill.takes_maps() {
            continue;
        }
        let rows = num_blocks * u64::from(heads.kv_heads * BLOCK_SIZE);
        let ((keys, values), (key_map, value_map)) = (surfaces.layers[layer], surfaces.cache_maps[layer]);
        for (cache, map) in [(keys, key_map), (values, value_map)] {
            memory.write(map - memory.pointer(), &tensor_map(device, cache, rows, heads.head_dim)?)?;
        }
    }
    Ok(())
}

/// Whether this backend has a kernel for everything that the model does. Touches no card.
///
/// # Errors
/// [`CudaError::Unsupported`] naming the first op without one.
pub fn check_model(spec: &ModelSpec) -> Result<(), CudaError> {
    if let Quantization::Stored(stored) = &spec.quantization {
        let what = format!("{} weights", stored.method);
        return Err(CudaError::Unsupported { op: "Linear", what });
    }
    let program = families::program(spec);
    if let Some(op) = program.first_planned() {
        return Err(CudaError::Unsupported { op: op.feature.name(), what: op.detail.clone() });
    }
    let layout = WeightLayout::new(&program)?;
    let arena = ArenaPlan::new(&program, StepRows { tokens: 1, sequences: 1 });
    let plan = plan(&program, &layout, &arena, Bases { weights: 0, arena: 0 })?;
    match plan.layers.iter().find(|layer| !HEAD_DIMS.contains(&layer.head_dim)) {
        Some(layer) => Err(CudaError::Unsupported { op: "Attention", what: format!("head_dim {}", layer.head_dim) }),
        None => Ok(()),
    }
}

/// How a model is laid out on a card, decided before anything but the context takes memory of it.
struct Layout {
    sizes: Sizes,
    weights: WeightLayout,
    arena: ArenaPlan,
    offsets: SurfaceOffsets,
    budget: KvBudget,
}

impl Layout {
    fn new(
        device: &Device,
        program: &Program,
        spec: &ModelSpec,
        options: &CudaOptions,
        lowered: Option<usize>,
    ) -> Result<Self, CudaError> {
        let sizes = Sizes::new(spec, options, lowered)?;
        let weights = WeightLayout::new(program)?;
        let rows = StepRows { tokens: sizes.max_num_batched_tokens, sequences: sizes.max_num_seqs };
        let arena = ArenaPlan::new(program, rows);
        // At address 0: what cannot run is said before anything is allocated.
        let draft = plan(program, &weights, &arena, Bases { weights: 0, arena: 0 })?;
        let offsets = SurfaceOffsets::new(device, &sizes, &draft.layers, &rotary_dims(program, &draft));
        let fixed =
            [("weights", weights.bytes), ("activations", arena.bytes), ("step metadata and tables", offsets.bytes)];
        let budget = budget(device, options, &sizes, &draft, fixed)?;
        Ok(Self { sizes, weights, arena, offsets, budget })
    }

    /// As asked, or with as long a context as fits where nobody asked for one and the model's own does not.
    fn fitting(device: &Device, program: &Program, spec: &ModelSpec, options: &CudaOptions) -> Result<Self, CudaError> {
        let refused = match Self::new(device, program, spec, options, None) {
            Err(refused) if options.max_model_len.is_none() => refused,
            other => return other,
        };
        let fits = match &refused {
            CudaError::CardTooSmall { fits_tokens: Some(fits), .. } => *fits,
            CudaError::CacheTooSmall { fits_tokens: fits @ 1.., .. } => *fits,
            _ => return Err(refused),
        };
        let layout = Self::new(device, program, spec, options, Some(fits as usize))?;
        let (from, to) = (spec.max_position_embeddings, layout.sizes.max_model_len);
        tracing::warn!(from, to, "max_model_len is lowered to what fits the card; give one to have it kept or refused");
        Ok(layout)
    }
}

/// Loads a model onto a card.
///
/// # Errors
/// See [`CudaError`]; nothing stays allocated.
pub fn load(
    device: &Arc<Device>,
    spec: &ModelSpec,
    origin: &WeightOrigin<'_>,
    options: &CudaOptions,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<LoadedModel, CudaError> {
    check_model(spec)?;
    device.bind()?;
    let program = families::program(spec);
    let mut clock = Clock::start();
    let layout = Layout::fitting(device, &program, spec, options)?;
    let memory = ModelMemory::new(device, &layout)?;
    let bases = Bases { weights: memory.weights.pointer(), arena: memory.arena.pointer() };
    let mut plan = plan(&program, &layout.weights, &layout.arena, bases)?;
    plan.fuse(&program, device.abilities());
    if let WeightOrigin::Random { seed } = origin {
        random_weights::fill(device, &program, &layout.weights, &memory.weights, *seed)?;
    }
    clock.lap("memory");
    let uploaded = AtomicBool::new(false);
    let layers = cache_layers(&plan.layers, memory.kv_cache.pointer(), layout.budget.num_blocks);
    let surfaces = layout.offsets.surfaces(memory.surfaces.pointer(), &layout.sizes, layers);
    let (prepared, ropes) = std::thread::scope(|scope| {
        // SAFETY: weights, arena and surfaces were allocated above for steps of these sizes; none runs yet, so nobody minds
        // what measurements write over activations. The uploads have streams of their own.
        let prepared = scope.spawn(|| unsafe { prepare(device, &plan, &surfaces, &layout.sizes, options, &uploaded) });
        let ropes = scope.spawn(|| rope_tables(&program, &plan, &layout.sizes));
        let sent = match origin {
            WeightOrigin::Source(source) => {
                upload::upload(device, &program, *source, &layout.weights, &memory.weights, progress)
            }
            WeightOrigin::Random { .. } => Ok(()),
        };
        clock.lap("weights");
        uploaded.store(true, Ordering::Relaxed);
        let panicked = |_| CudaError::Thread(std::io::Error::other("preparing the kernels panicked"));
        let (prepared, ropes) = (prepared.join().map_err(panicked), ropes.join().map_err(panicked));
        sent.and(Ok((prepared??, ropes?)))
    })?;
    let Prepared { kernels, linears, tuner, clock: beside } = prepared;
    for (table, &(cos_at, sin_at, _)) in ropes.iter().zip(&layout.offsets.ropes) {
        memory.surfaces.write(cos_at, &table.cos)?;
        memory.surfaces.write(sin_at, &table.sin)?;
    }
    clock.lap("kernels and tables");
    let Layout { sizes, budget, .. } = layout;
    write_cache_maps(device, &plan, &surfaces, budget.num_blocks, &memory.surfaces)?;
    let executor = Executor { device: device.clone(), plan, kernels, linears, surfaces };
    Ok(LoadedModel {
        executor,
        memory,
        sizes,
        budget,
        weight_bytes: program.parameters() * 2,
        timings: device.opening.iter().copied().chain(clock.laps).collect(),
        beside: beside.laps,
        tuner,
    })
}

impl ModelMemory {
    /// Cache and surfaces zeroed, all but the slots that are none, in stream order.
    fn new(device: &Arc<Device>, layout: &Layout) -> Result<Self, CudaError> {
        let made = Self {
            weights: DeviceMemory::new(device, layout.weights.bytes, "weights")?,
            arena: DeviceMemory::new(device, layout.arena.bytes, "activations")?,
            kv_cache: DeviceMemory::new(device, layout.budget.kv_cache_bytes, "the KV cache")?,
            surfaces: DeviceMemory::new(device, layout.offsets.bytes, "step metadata and tables")?,
        };
        made.kv_cache.fill(0)?;
        made.surfaces.fill(0)?;
        made.surfaces.fill_part(layout.offsets.no_slots, layout.sizes.max_num_batched_tokens * 4, 0xff)?;
        Ok(made)
    }
}

fn budget(
    device: &Device,
    options: &CudaOptions,
    sizes: &Sizes,
    plan: &Plan,
    fixed: [(&'static str, u64); 3],
) -> Result<KvBudget, CudaError> {
    let mut terms: Vec<MemoryTerm> = fixed.map(|(name, bytes)| MemoryTerm { name, bytes }).into();
    terms.push(MemoryTerm { name: "workspace", bytes: WORKSPACE_BYTES });
    let block_bytes: u64 = plan.layers.iter().map(block_bytes).map(|b| 2 * b).sum();
    let least_blocks = sizes.max_blocks as u64;
    let most_blocks = options.kv_cache_bytes.map(|b| b.checked_div(block_bytes).unwrap_or(0));
    if let (Some(kv_cache_bytes), Some(blocks)) = (options.kv_cache_bytes, most_blocks)
        && blocks < least_blocks
        && block_bytes > 0
    {
        return Err(CudaError::CacheTooSmall {
            max_model_len: sizes.max_model_len,
            needed_bytes: least_blocks * block_bytes,
            kv_cache_bytes,
            fits_tokens: blocks * u64::from(BLOCK_SIZE),
        });
    }
    kv_budget(&Demand {
        device: device.name.clone(),
        uuid: device.uuid.clone(),
        total_bytes: device.total_bytes,
        free_bytes: device.memory()?.free_bytes,
        gpu_memory_utilization: options.gpu_memory_utilization,
        fixed: terms,
        block_bytes,
        block_size: u64::from(BLOCK_SIZE),
        least_blocks,
        most_blocks,
    })
}

/// Bytes of one block of keys (or of values) of one layer.
fn block_bytes(heads: &HeadSizes) -> u64 {
    u64::from(heads.kv_heads) * u64::from(BLOCK_SIZE) * u64::from(heads.head_dim) * 2
}

fn cache_layers(layers: &[HeadSizes], base: DevicePointer, num_blocks: u64) -> Vec<(DevicePointer, DevicePointer)> {
    let mut at = base;
    let mut next = |bytes: u64| {
        let here = at;
        at += bytes;
        here
    };
    layers.iter().map(|l| (next(block_bytes(l) * num_blocks), next(block_bytes(l) * num_blocks))).collect()
}

fn rotary_dims(program: &Program, plan: &Plan) -> Vec<u32> {
    let rotary = |&id| program.attention(id).rope.as_ref().map_or(0, |r| r.rotary_dim as u32);
    plan.ropes.iter().map(rotary).collect()
}

/// One rope's angles as the device keeps them: `[max_model_len, rotary / 2]` f32.
struct RopeBytes {
    cos: Vec<u8>,
    sin: Vec<u8>,
}

fn rope_tables(program: &Program, plan: &Plan, sizes: &Sizes) -> Vec<RopeBytes> {
    let table = |&attention| {
        let Some(spec) = &program.attention(attention).rope else {
            return RopeBytes { cos: Vec::new(), sin: Vec::new() };
        };
        let rope = Rope::new(spec, sizes.max_model_len);
        let pairs = rope.row_len() / 2;
        let zeros = || vec![0_u8; sizes.max_model_len * pairs * 4];
        let (mut cos, mut sin) = (zeros(), zeros());
        let rows = cos.par_chunks_mut(pairs * 4).zip(sin.par_chunks_mut(pairs * 4)).enumerate();
        rows.for_each_init(
            || vec![0.0_f32; 2 * pairs],
            |row, (position, (cos, sin))| {
                rope.fill_row(position as u32, row);
                for (bytes, values) in [(cos, &row[..pairs]), (sin, &row[pairs..])] {
                    bytes.chunks_exact_mut(4).zip(values).for_each(|(b, v)| b.copy_from_slice(&v.to_le_bytes()));
                }
            },
        );
        RopeBytes { cos, sin }
    };
    plan.ropes.iter().map(table).collect()
}
