use super::arena::Arena;
use super::host_memory;
use super::interpret::StepState;
use super::kv_cache::{KvShape, LayerCache};
use super::load::{LoadedModel, Loader, heads};
use super::loaded::LoadedOp;
use super::{CpuOptions, LoadError};
use crate::backend::step_check::{self, StepLimits};
use crate::engine::{Backend, BackendError, BackendInfo, RowOutput, StepBatch, StepSequence, sample};
use crate::weights::TensorSource;
use crate::worker::FailureKind;
use mserve_planner::model::{BufferId, ModelSpec, Positions, Program, Quantization, families};
use pulp::Arch;
use rayon::ThreadPool;
use rayon::prelude::*;

/// A model on the host's cores.
#[derive(Debug)]
pub struct CpuBackend {
    info: BackendInfo,
    limits: StepLimits,
    model: LoadedModel,
    state: StepState,
    output: BufferId,
    pool: ThreadPool,
}

impl CpuBackend {
    /// Reads all weights and takes memory for cache and activations. `progress` hears (bytes read, bytes in all).
    ///
    /// # Errors
    /// See [`LoadError`]; nothing stays allocated.
    pub fn load(
        spec: &ModelSpec,
        source: &dyn TensorSource,
        options: &CpuOptions,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<Self, LoadError> {
        check_options(options)?;
        if let Quantization::Stored(stored) = &spec.quantization {
            let what = format!("{} weights", stored.method);
            return Err(LoadError::Unsupported { op: "Linear", what });
        }
        let program = families::program(spec);
        if let Some(op) = program.first_planned() {
            return Err(LoadError::Unsupported { op: op.feature.name(), what: op.detail.clone() });
        }
        let max_model_len = max_model_len(spec, &program, options)?;
        let arch = Arch::new();
        let threads = options.threads;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .map_err(|source| LoadError::Threads { threads, source })?;
        let loader = Loader::new(&program, source, options.weights, max_model_len, progress)?;
        let shapes: Vec<KvShape> =
            program.cached_attentions().map(|id| heads(&program, id).kv_shape(options.block_size)).collect();
        let block_bytes: u64 = shapes.iter().map(|s| s.block_bytes()).sum();
        let num_blocks = num_blocks(block_bytes, options)?;
        let arena = Arena::new(&program, options.max_num_batched_tokens);
        check_memory(loader.weight_bytes(), block_bytes * num_blocks as u64, arena.bytes())?;
        let model = pool.install(|| loader.load())?;
        let caches: Vec<LayerCache> = shapes.iter().map(|&s| LayerCache::new(s, num_blocks)).collect();
        let info = BackendInfo {
            output_width: program.buffer(program.output).width as usize,
            vocab_size: spec.vocab_size as usize,
            block_size: options.block_size,
            num_blocks,
            kv_cache_bytes: block_bytes * num_blocks as u64,
            max_model_len,
            device: format!("cpu ({threads} thread{})", if threads == 1 { "" } else { "s" }),
        };
        let limits = StepLimits {
            max_num_batched_tokens: options.max_num_batched_tokens,
            cached: !caches.is_empty(),
            previous_outputs: 0,
        };
        let state = StepState {
            arch,
            arena,
            caches,
            linear: Default::default(),
            attention: Default::default(),
            step_blocks: Default::default(),
            rope_tables: Vec::new(),
        };
        Ok(Self { info, limits, model, state, output: program.output, pool })
    }

    /// Runs one step and returns its output rows, `[sequences that want output, output_width]`, unsampled.
    ///
    /// # Errors
    /// When the batch is not valid for this backend.
    pub fn forward_rows(&mut self, batch: &StepBatch) -> Result<&[f32], BackendError> {
        step_check::check(batch, &self.info, self.limits).map_err(|what| self.error(what))?;
        let (state, model) = (&mut self.state, &self.model);
        let result = self.pool.install(|| state.run(model, batch));
        match result {
            Ok(()) => Ok(self.state.arena.get(self.output)),
            Err(error) => Err(self.error(error.to_string())),
        }
    }

    /// Bytes of weights held, lookup tables included.
    pub fn weight_bytes(&self) -> u64 {
        self.step_weight_bytes() + self.model.ops.iter().map(LoadedOp::table_bytes).sum::<u64>()
    }

    /// Bytes of weights that every step reads from front to back.
    pub fn step_weight_bytes(&self) -> u64 {
        self.model.ops.iter().map(LoadedOp::weight_bytes).sum()
    }

    /// Bytes of keys and values of one token, all layers.
    pub fn kv_bytes_per_token(&self) -> u64 {
        let block_bytes: u64 = self.state.caches.iter().map(|c| c.shape().block_bytes()).sum();
        block_bytes / self.info.block_size as u64
    }

    /// Bytes of the activation arena.
    pub fn activation_bytes(&self) -> u64 {
        self.state.arena.bytes()
    }

    /// Overwrites activations and cache, so that a test sees an op that reads what it should not.
    #[cfg(test)]
    pub(super) fn poison(&mut self) {
        self.state.arena.poison();
        self.state.caches.iter_mut().for_each(LayerCache::poison);
    }

    fn error(&self, what: String) -> BackendError {
        BackendError { device: self.info.device.clone(), what, fatal: false, kind: FailureKind::Internal }
    }
}

impl Backend for CpuBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn step(&mut self, batch: &StepBatch) -> Result<Vec<RowOutput>, BackendError> {
        self.forward_rows(batch)?;
        let (width, output) = (self.info.output_width, self.output);
        let rows = self.state.arena.get_mut(output);
        let sequences: Vec<_> = batch.sequences.iter().filter(|s| s.wants_output).collect();
        let row_output = |(row, sequence): (&mut [f32], &StepSequence)| match &sequence.sampling {
            Some(sampling) => RowOutput::Token(sample(row, sampling)),
            None => RowOutput::Vector(row.to_vec()),
        };
        Ok(self.pool.install(|| rows.par_chunks_exact_mut(width).zip(sequences).map(row_output).collect()))
    }
}

fn check_options(options: &CpuOptions) -> Result<(), LoadError> {
    let at_least_one = [
        ("threads", options.threads),
        ("block_size", options.block_size),
        ("max_num_batched_tokens", options.max_num_batched_tokens),
        ("max_model_len", options.max_model_len.unwrap_or(1)),
    ];
    match at_least_one.into_iter().find(|(_, value)| *value == 0) {
        Some((option, _)) => Err(LoadError::Option { option, value: 0, least: 1 }),
        None => Ok(()),
    }
}

/// Longest sequence. Texts of models without a cache must fit one step.
fn max_model_len(spec: &ModelSpec, program: &Program, options: &CpuOptions) -> Result<usize, LoadError> {
    let positions = match spec.positions {
        Positions::Rope => spec.max_position_embeddings,
        Positions::Learned { rows, offset, .. } => spec.max_position_embeddings.min(rows.saturating_sub(offset)),
    };
    let limit = usize::try_from(positions).unwrap_or(usize::MAX);
    let asked = options.max_model_len.unwrap_or(limit);
    if asked > limit {
        return Err(LoadError::MaxModelLen { asked, limit });
    }
    match program.cached_attentions().next() {
        Some(_) => Ok(asked),
        None => Ok(asked.min(options.max_num_batched_tokens)),
    }
}

/// Refuses before anything is read what the kernel would end the process for later.
fn check_memory(weight_bytes: u64, kv_cache_bytes: u64, activation_bytes: u64) -> Result<(), LoadError> {
    let needed_bytes = weight_bytes.saturating_add(kv_cache_bytes).saturating_add(activation_bytes);
    match host_memory::free_bytes() {
        Some(free_bytes) if needed_bytes > free_bytes => {
            Err(LoadError::DoesNotFit { weight_bytes, kv_cache_bytes, activation_bytes, free_bytes })
        }
        _ => Ok(()),
    }
}

fn num_blocks(block_bytes: u64, options: &CpuOptions) -> Result<usize, LoadError> {
    if block_bytes == 0 {
        return Ok(0);
    }
    match options.kv_cache_bytes / block_bytes {
        0 => Err(LoadError::KvCacheTooSmall {
            needed_bytes: block_bytes,
            given_bytes: options.kv_cache_bytes,
            block_size: options.block_size,
        }),
        // Slots are 32-bit numbers.
        blocks => Ok(usize::try_from(blocks).unwrap_or(usize::MAX).min(u32::MAX as usize / options.block_size)),
    }
}
