//! From a model's spec to a backend that is ready for its first step.

use super::arena::{ALIGNMENT_BYTES, ArenaPlan, StepRows};
use super::buckets::decode_buckets;
use super::budget::{Demand, KvBudget, kv_budget};
use super::cubin_cache::DiskCache;
use super::device::Device;
use super::error::MemoryTerm;
use super::executor::{AttentionScratch, Executor, RopeTable, Surfaces, operands};
use super::gemm::{GemmOperands, GemmShape, WORKSPACE_BYTES};
use super::gemm_tuning::{Trial, TuningLimits, TuningReport, tune};
use super::kernel_set::{Cubins, KernelSet};
use super::kernels::{BLOCK_SIZE, HEAD_DIMS, SCAN_BLOCKS, sources};
use super::linear::Linears;
use super::memory::{DeviceMemory, DevicePointer};
use super::metadata::{MetadataLayout, StepShape};
use super::plan::{Bases, DeviceOp, HeadSizes, Plan, plan};
use super::step_slots::{device_output_bytes, output_surfaces};
use super::weights::WeightLayout;
use super::{CudaError, CudaOptions, WeightOrigin, random_weights, upload};
use crate::backend::rope::Rope;
use crate::engine::MAX_NAMED_TOKENS;
use mserve_planner::model::{ModelSpec, Program, Quantization, families};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

/// Products are measured at these rows too, as far as steps may be that large.
const LARGE_ROWS: [usize; 5] = [512, 1024, 2048, 4096, 8192];
/// Operands of one product that a measurement goes over.
const TRIAL_LAYERS: usize = 12;

/// Everything on the card that a model needs, and the executor over it.
#[derive(Debug)]
pub struct LoadedModel {
    pub executor: Executor,
    /// Freed after the executor; the addresses in it point here.
    pub memory: ModelMemory,
    pub sizes: Sizes,
    pub budget: KvBudget,
    pub weight_bytes: u64,
    pub timings: Vec<(&'static str, f64)>,
    pub tuning: TuningReport,
}

#[derive(Debug)]
pub struct ModelMemory {
    /// Held for the addresses in the plan.
    _weights: DeviceMemory,
    pub arena: DeviceMemory,
    /// As well.
    _kv_cache: DeviceMemory,
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
    pub decode_buckets: Vec<usize>,
}

impl Sizes {
    fn new(spec: &ModelSpec, options: &CudaOptions) -> Result<Self, CudaError> {
        let limit = spec.max_position_embeddings as usize;
        let max_model_len = options.max_model_len.unwrap_or(limit);
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
            decode_buckets: decode_buckets(options.max_num_seqs),
        })
    }

    /// Biases of the step with the most: no request names more tokens.
    pub const fn bias_entries(&self) -> usize {
        self.max_num_seqs * MAX_NAMED_TOKENS
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
    partial: u64,
    statistic: u64,
    ropes: Vec<(u64, u64, u32)>,
    bytes: u64,
}

impl SurfaceOffsets {
    fn new(sizes: &Sizes, layers: &[HeadSizes], rotary: &[u32]) -> Self {
        let mut ranges = Ranges::default();
        let scratch = AttentionScratch::new(layers, sizes.max_num_seqs, sizes.max_model_len as u32);
        let token_state_stride = sizes.vocab_size.next_multiple_of(2);
        Self {
            metadata: ranges.take(sizes.metadata_words() as u64 * 4),
            block_tables: ranges.take((sizes.max_num_seqs * sizes.max_blocks) as u64 * 4),
            outputs: ranges.take(device_output_bytes(sizes.max_num_seqs)),
            bias_tokens: ranges.take(sizes.bias_entries() as u64 * 4),
            bias_values: ranges.take(sizes.bias_entries() as u64 * 4),
            token_state: ranges.take((sizes.max_num_seqs * token_state_stride) as u64 * 2),
            token_state_stride,
            bests: ranges.take(sizes.max_num_seqs.max(SCAN_BLOCKS as usize) as u64 * 8),
            partial: ranges.take(scratch.partial * 4),
            statistic: ranges.take(scratch.statistic * 4),
            ropes: rotary
                .iter()
                .map(|&rotary| {
                    let bytes = sizes.max_model_len as u64 * u64::from(rotary / 2) * 4;
                    (ranges.take(bytes), ranges.take(bytes), rotary)
                })
                .collect(),
            bytes: ranges.bytes,
        }
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
            partial: base + self.partial,
            statistic: base + self.statistic,
            max_model_len: sizes.max_model_len as u32,
            ropes: ropes.collect(),
            layers,
        }
    }
}

/// Times the phases of a load.
struct Clock {
    last: Instant,
    timings: Vec<(&'static str, f64)>,
}

impl Clock {
    fn lap(&mut self, name: &'static str) {
        self.timings.push((name, self.last.elapsed().as_secs_f64() * 1e3));
        self.last = Instant::now();
    }
}

/// Whether this backend has a kernel for everything that the model does. Touches no card.
///
/// # Errors
/// [`CudaError::Unsupported`] naming the first op without one.
pub fn check_model(spec: &ModelSpec) -> Result<(), CudaError> {
    if spec.quantization != Quantization::None {
        let what = format!("{:?} weights", spec.quantization);
        return Err(CudaError::Unsupported { op: "Linear", what });
    }
    let program = families::program(spec);
    let layout = WeightLayout::new(&program)?;
    let arena = ArenaPlan::new(&program, StepRows { tokens: 1, sequences: 1 });
    let plan = plan(&program, &layout, &arena, Bases { weights: 0, arena: 0 })?;
    match plan.layers.iter().find(|layer| !HEAD_DIMS.contains(&layer.head_dim)) {
        Some(layer) => Err(CudaError::Unsupported { op: "Attention", what: format!("head_dim {}", layer.head_dim) }),
        None => Ok(()),
    }
}

/// Loads a model onto a card.
///
/// # Errors
/// See [`CudaError`]; nothing stays allocated.
pub fn load(
    spec: &ModelSpec,
    origin: &WeightOrigin<'_>,
    options: &CudaOptions,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<LoadedModel, CudaError> {
    check_model(spec)?;
    let sizes = Sizes::new(spec, options)?;
    let program = families::program(spec);
    let layout = WeightLayout::new(&program)?;
    let rows = StepRows { tokens: sizes.max_num_batched_tokens, sequences: sizes.max_num_seqs };
    let arena_plan = ArenaPlan::new(&program, rows);
    // Planned at address 0 first: what cannot run is said before a card is touched.
    let draft = plan(&program, &layout, &arena_plan, Bases { weights: 0, arena: 0 })?;
    let mut clock = Clock { last: Instant::now(), timings: Vec::new() };

    let device = Arc::new(Device::open(options.ordinal)?);
    let before = device.memory()?;
    clock.lap("device");
    let rotary: Vec<u32> = rotary_dims(&program, &draft);
    let offsets = SurfaceOffsets::new(&sizes, &draft.layers, &rotary);
    let budget = budget(
        &device,
        before.free_bytes,
        options,
        &sizes,
        &draft,
        [("weights", layout.bytes), ("activations", arena_plan.bytes), ("step metadata and tables", offsets.bytes)],
    )?;
    let cubin_cache = options.cache_dir.as_ref().map(|d| DiskCache::at(d.join("cubin")));
    let weights = DeviceMemory::new(&device, layout.bytes, "weights")?;
    let cubins = std::thread::scope(|scope| {
        let cubins = scope.spawn(|| Cubins::build(&device, &draft.layers, cubin_cache.as_ref()));
        match origin {
            WeightOrigin::Source(source) => upload::upload(&device, &program, *source, &layout, &weights, progress)?,
            WeightOrigin::Random { seed } => random_weights::fill(&device, &program, &layout, &weights, *seed)?,
        }
        cubins.join().unwrap_or_else(|_| Err(CudaError::Thread(std::io::Error::other("the compiling thread panicked"))))
    })?;
    clock.lap("weights and kernels");

    let arena = DeviceMemory::new(&device, arena_plan.bytes, "activations")?;
    let kv_cache = DeviceMemory::new(&device, budget.kv_cache_bytes, "the KV cache")?;
    kv_cache.fill(0)?;
    let surfaces_memory = DeviceMemory::new(&device, offsets.bytes, "step metadata and tables")?;
    surfaces_memory.fill(0)?;
    let bases = Bases { weights: weights.pointer(), arena: arena.pointer() };
    let mut plan = plan(&program, &layout, &arena_plan, bases)?;
    plan.fuse(&program, device.compute_capability >= (9, 0));
    write_rope_tables(&program, &plan, &sizes, &offsets, &surfaces_memory)?;
    let layers = cache_layers(&plan.layers, kv_cache.pointer(), budget.num_blocks);
    let surfaces = offsets.surfaces(surfaces_memory.pointer(), &sizes, layers);
    let kernels = KernelSet::load(&device, &cubins)?;
    clock.lap("memory, tables, modules");
    let linears = Linears::new(&device, kernels.products.clone())?;
    clock.lap("cuBLASLt");
    let mut executor = Executor { device: device.clone(), plan, kernels, linears, surfaces };
    let gemm_cache = options.cache_dir.as_ref().map(|d| DiskCache::at(d.join("gemm")));
    let limits = TuningLimits {
        cache: gemm_cache.as_ref(),
        kernels_version: kernels_version(device.compute_capability),
        budget: options.tuning_budget,
    };
    let trials = trials(&executor.plan, &sizes);
    // SAFETY: the operands are weights and arena of this model, allocated above for rows up to those tried; no step
    // runs yet, so nobody minds what is written over activations.
    let tuning = unsafe { tune(&device, &mut executor.linears, &trials, &limits)? };
    clock.lap("matrix products");
    Ok(LoadedModel {
        executor,
        memory: ModelMemory { _weights: weights, arena, _kv_cache: kv_cache, surfaces: surfaces_memory },
        sizes,
        budget,
        weight_bytes: program.parameters() * 2,
        timings: clock.timings,
        tuning,
    })
}

fn budget(
    device: &Device,
    free_bytes: u64,
    options: &CudaOptions,
    sizes: &Sizes,
    plan: &Plan,
    fixed: [(&'static str, u64); 3],
) -> Result<KvBudget, CudaError> {
    let mut terms: Vec<MemoryTerm> = fixed.map(|(name, bytes)| MemoryTerm { name, bytes }).into();
    terms.push(MemoryTerm { name: "workspace", bytes: WORKSPACE_BYTES });
    let block_bytes: u64 = plan.layers.iter().map(block_bytes).map(|b| 2 * b).sum();
    kv_budget(&Demand {
        device: device.name.clone(),
        total_bytes: device.total_bytes,
        free_bytes,
        gpu_memory_utilization: options.gpu_memory_utilization,
        fixed: terms,
        block_bytes,
        least_blocks: sizes.max_blocks as u64,
        most_blocks: options.kv_cache_bytes.map(|b| b.checked_div(block_bytes).unwrap_or(0)),
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

fn write_rope_tables(
    program: &Program,
    plan: &Plan,
    sizes: &Sizes,
    offsets: &SurfaceOffsets,
    memory: &DeviceMemory,
) -> Result<(), CudaError> {
    for (&attention, &(cos_at, sin_at, _)) in plan.ropes.iter().zip(&offsets.ropes) {
        let Some(spec) = &program.attention(attention).rope else { continue };
        let rope = Rope::new(spec, sizes.max_model_len);
        let pairs = rope.row_len() / 2;
        let (mut cos, mut sin) =
            (vec![0_u8; sizes.max_model_len * pairs * 4], vec![0_u8; sizes.max_model_len * pairs * 4]);
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
        memory.write(cos_at, &cos)?;
        memory.write(sin_at, &sin)?;
    }
    Ok(())
}

/// Every product at every number of rows that decode steps have, and at some of prefill's; the commonest first.
fn trials(plan: &Plan, sizes: &Sizes) -> Vec<Trial> {
    let mut buckets = sizes.decode_buckets.clone();
    buckets.sort_by_key(|b| (!b.is_power_of_two(), *b));
    let large = LARGE_ROWS.iter().filter(|&&r| r > sizes.max_num_seqs && r <= sizes.max_num_batched_tokens);
    let mut trials = Vec::new();
    for (rows, is_decode) in buckets.iter().map(|&b| (b, true)).chain(large.map(|&r| (r, false))) {
        let mut products: BTreeMap<GemmShape, Vec<GemmOperands>> = BTreeMap::new();
        for op in &plan.ops {
            // Heads have rows only for sequences: never as many as prefill has tokens.
            if let DeviceOp::Linear(linear) = op
                && (is_decode || !linear.f32_out)
            {
                products.entry(linear.shape(rows)).or_default().push(operands(linear));
            }
        }
        for (shape, mut operands) in products {
            operands.truncate(TRIAL_LAYERS);
            trials.push(Trial { shape, operands });
        }
    }
    trials
}

/// A number that changes when the kernels that products are measured against do.
fn kernels_version(compute_capability: (i32, i32)) -> u64 {
    sources(&[], compute_capability).iter().filter(|s| s.name == "gemv").map(|s| xxh3_64(s.text.as_bytes())).sum()
}
