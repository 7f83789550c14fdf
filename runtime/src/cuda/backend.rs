mod idle;
mod sampling_rows;

use super::buckets::bucket_for;
use super::clock::Clock;
use super::device::Device;
use super::executor::{Executor, PrefillChunks};
use super::graph::Graph;
use super::kernels::{BLOCK_SIZE, SAMPLE_ROW_WORDS, prefill_tiles};
use super::load::{LoadedModel, check_model, load};
use super::memory::DeviceMemory;
use super::metadata::{self, MetadataLayout, StepShape};
use super::step_slots::{SLOTS, SlotSizes, StepSlot, WantedRow};
use super::token_state::TokenStateSlots;
use super::{CudaError, CudaOptions, GraphCapture, MemoryTerm};
use crate::backend::step_check::{self, StepLimits};
use crate::engine::FailureKind;
use crate::engine::{Backend, BackendError, BackendInfo, RowOutput, StepBatch};
use crate::weights::TensorSource;
use cudarc::driver::sys;
use mserve_planner::model::ModelSpec;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Where weights come from.
#[derive(Clone, Copy)]
pub enum WeightOrigin<'a> {
    Source(&'a dyn TensorSource),
    /// Made on the card, for measuring speed.
    Random {
        seed: u64,
    },
}

impl std::fmt::Debug for WeightOrigin<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Source(_)) { "Source" } else { "Random" })
    }
}

/// A model on one NVIDIA card.
///
/// Field order is drop order: graphs before the memory that they replay over.
#[derive(Debug)]
pub struct CudaBackend {
    graphs: HashMap<usize, Graph>,
    in_flight: VecDeque<InFlight>,
    slots: Vec<StepSlot>,
    next_slot: usize,
    /// Token ids on their way to a token-state slot, one list after another in the stream's order.
    lists: DeviceMemory,
    token_state: TokenStateSlots,
    model: LoadedModel,
    graph_capture: GraphCapture,
    /// Nothing is left of what idle times are used for.
    settled: bool,
    info: BackendInfo,
    /// Output rows of the step submitted last: their tokens are still on the card.
    previous_outputs: usize,
    last_block_tables: (usize, Vec<i32>),
    block_tables: Vec<i32>,
    /// Of the step that is being sent; kept for its memory.
    words: Vec<i32>,
    bias: Vec<(u32, f32)>,
    last_step_time: Option<Duration>,
}

#[derive(Debug)]
struct InFlight {
    slot: usize,
    wanted: Vec<WantedRow>,
}

/// How a step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Replay { bucket: usize },
    Launch,
}

impl CudaBackend {
    /// Opens a card and brings the model onto it. `progress` hears (bytes read, bytes in all).
    ///
    /// # Errors
    /// See [`CudaError`]; nothing stays allocated.
    pub fn load(
        spec: &ModelSpec,
        origin: &WeightOrigin<'_>,
        options: &CudaOptions,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<Self, CudaError> {
        check_model(spec)?;
        Self::load_on(&Arc::new(Device::open(options.ordinal)?), spec, origin, options, progress)
    }

    /// The same on a card that is open already.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_on(
        device: &Arc<Device>,
        spec: &ModelSpec,
        origin: &WeightOrigin<'_>,
        options: &CudaOptions,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<Self, CudaError> {
        let model = load(device, spec, origin, options, progress)?;
        let mut clock = Clock::start();
        let sizes = model.sizes.clone();
        let slot_sizes = SlotSizes {
            metadata_words: sizes.metadata_words(),
            table_words: sizes.max_num_seqs * sizes.max_blocks,
            list_words: 2 * sizes.max_model_len + sizes.bias_entries(),
            bias_entries: sizes.bias_entries(),
            max_num_seqs: sizes.max_num_seqs,
        };
        let slots = (0..SLOTS).map(|_| StepSlot::new(device, slot_sizes)).collect::<Result<Vec<_>, _>>()?;
        let info = BackendInfo {
            output_width: sizes.vocab_size,
            vocab_size: sizes.vocab_size,
            block_size: BLOCK_SIZE as usize,
            num_blocks: model.budget.num_blocks as usize,
            kv_cache_bytes: model.budget.kv_cache_bytes,
            max_model_len: sizes.max_model_len,
            device: device.name.clone(),
        };
        let mut backend = Self {
            graphs: HashMap::new(),
            in_flight: VecDeque::new(),
            slots,
            next_slot: 0,
            lists: DeviceMemory::new(device, slot_sizes.list_words as u64 * 4, "token lists")?,
            token_state: TokenStateSlots::new(sizes.max_num_seqs),
            graph_capture: options.graphs,
            settled: false,
            info,
            previous_outputs: 0,
            last_block_tables: (0, Vec::new()),
            block_tables: Vec::new(),
            words: Vec::new(),
            bias: Vec::new(),
            last_step_time: None,
            model,
        };
        clock.lap("buffers");
        if options.graphs == GraphCapture::AtStart {
            while backend.do_next()? {}
            clock.lap("graphs");
        }
        backend.model.timings.extend(clock.laps);
        Ok(backend)
    }

    /// Phases of the load, one after the other, in milliseconds.
    pub fn timings(&self) -> &[(&'static str, f64)] {
        &self.model.timings
    }

    /// Phases that went on beside the upload of the weights.
    pub fn timings_beside(&self) -> &[(&'static str, f64)] {
        &self.model.beside
    }

    /// What was planned for the card's memory, the cache last.
    pub fn planned_memory(&self) -> &[MemoryTerm] {
        &self.model.budget.terms
    }

    /// What is in use on the card now, by whomever.
    pub fn used_bytes(&self) -> Result<u64, CudaError> {
        let memory = self.model.executor.device.memory()?;
        Ok(memory.total_bytes - memory.free_bytes)
    }

    pub fn weight_bytes(&self) -> u64 {
        self.model.weight_bytes
    }

    /// (from an earlier start, measured now, of these by our own kernels, left to cuBLASLt's heuristic)
    pub fn tuned_products(&self) -> (usize, usize, usize, usize) {
        let t = self.model.tuner.report();
        (t.remembered, t.measured, t.own, t.left)
    }

    pub(super) const fn executor_mut(&mut self) -> &mut Executor {
        &mut self.model.executor
    }

    /// Puts a step into the device's stream and returns at once. Its results come from [`Self::oldest`], in order.
    /// A token id of `!row` stands for the token that the step before chose in its output row `row`.
    ///
    /// # Errors
    /// A step that breaks the limits is refused and nothing runs; any other error is fatal.
    fn enqueue(&mut self, batch: &StepBatch) -> Result<(), CudaError> {
        self.check(batch)?;
        self.model.executor.device.bind()?;
        let (shape, mut mode, prefill) = self.shape(batch);
        if let Mode::Replay { bucket } = mode
            && !self.graphs.contains_key(&bucket)
            && !self.capture(bucket)?
        {
            mode = Mode::Launch;
        }
        let slot = self.next_slot;
        let layout = MetadataLayout::new(&shape);
        self.slots[slot].begun.record(self.model.executor.device.stream())?;
        self.token_state.begin_step();
        let wanted = self.send_metadata(batch, &shape, &layout, slot)?;
        self.send_block_tables(batch, slot)?;
        match mode {
            Mode::Replay { bucket } => {
                if let Some(graph) = self.graphs.get(&bucket) {
                    // SAFETY: all memory lives as long as `self`, and metadata of this shape was sent before it.
                    unsafe { graph.launch()? };
                }
            }
            // SAFETY: as above; sizes were checked against those that the memory was made for.
            Mode::Launch => unsafe { self.model.executor.run(&shape, prefill)? },
        }
        let all = wanted.iter().any(|w| w.logprobs.is_some()).then_some(self.model.sizes.max_num_seqs);
        let (outputs, stream) = (self.model.executor.surfaces.outputs.token_ids, self.model.executor.device.stream());
        // SAFETY: the outputs are those of `max_num_seqs` rows; the slot is read in `oldest`, after `done`.
        unsafe { self.slots[slot].fetch(outputs, wanted.len(), all, stream)? };
        self.previous_outputs = wanted.len();
        self.in_flight.push_back(InFlight { slot, wanted });
        self.next_slot = (slot + 1) % SLOTS;
        Ok(())
    }

    /// Waits for the oldest step and returns its rows; nothing when none is under way.
    fn oldest(&mut self) -> Result<Vec<RowOutput>, CudaError> {
        let Some(oldest) = self.in_flight.pop_front() else { return Ok(Vec::new()) };
        let slot = &self.slots[oldest.slot];
        slot.done.wait()?;
        self.last_step_time = Some(Duration::from_secs_f32(slot.begun.elapsed_ms(&slot.done)?.max(0.0) * 1e-3));
        Ok(slot.results(&oldest.wanted, self.model.sizes.max_num_seqs))
    }

    /// Logits of the last step's output rows, `[rows, vocab_size]`. For checks: a step keeps them on the card, of many rows
    /// those that more is read of than the likeliest token.
    pub fn logits(&self, rows: usize) -> Result<Vec<Vec<f32>>, CudaError> {
        let plan = &self.model.executor.plan;
        let offset = plan.logits - self.model.memory.arena.pointer();
        let stride = plan.logits_stride as usize;
        let bytes = self.model.memory.arena.read(offset, rows * stride * 4)?;
        let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        Ok(values.chunks(stride).map(|row| row[..self.info.vocab_size].to_vec()).collect())
    }

    fn check(&self, batch: &StepBatch) -> Result<(), CudaError> {
        let sizes = &self.model.sizes;
        let refuse = |value: String| Err(CudaError::Option { option: "step", value, must: "one that fits".to_owned() });
        let (max_num_batched_tokens, previous_outputs) = (sizes.max_num_batched_tokens, self.previous_outputs);
        let limits = StepLimits { max_num_batched_tokens, cached: true, previous_outputs };
        if let Err(what) = step_check::check(batch, &self.info, limits) {
            return refuse(what);
        }
        if batch.sequences.len() > sizes.max_num_seqs {
            return refuse(format!("{} sequences, at most {} fit", batch.sequences.len(), sizes.max_num_seqs));
        }
        if batch.sequences.iter().any(|s| s.wants_output && s.sampling.is_none()) {
            return refuse("a sequence that wants a vector".to_owned());
        }
        if self.in_flight.len() >= SLOTS - 1 {
            return refuse(format!("the step would be number {} under way", self.in_flight.len() + 1));
        }
        Ok(())
    }

    fn shape(&self, batch: &StepBatch) -> (StepShape, Mode, PrefillChunks) {
        let sizes = &self.model.sizes;
        let bucket = bucket_for(&sizes.decode_buckets, batch.sequences.len());
        if let Some(bucket) = bucket
            && metadata::is_pure_decode(batch)
        {
            let graph = self.graph_capture != GraphCapture::Never;
            let mode = if graph { Mode::Replay { bucket } } else { Mode::Launch };
            return (decode_shape(bucket), mode, PrefillChunks::default());
        }
        let shape = metadata::eager_shape(batch, sizes.max_num_batched_tokens, &sizes.decode_buckets);
        let chunks = batch.sequences[shape.decodes..].iter().map(|s| s.query_len as u32);
        (shape, Mode::Launch, PrefillChunks { tiles: prefill_tiles(chunks) })
    }

    /// The shape that a step is launched with, and its prefill chunks.
    pub(super) fn launched_shape(&self, batch: &StepBatch) -> (StepShape, PrefillChunks) {
        let (shape, _, chunks) = self.shape(batch);
        (shape, chunks)
    }

    fn send_metadata(
        &mut self,
        batch: &StepBatch,
        shape: &StepShape,
        layout: &MetadataLayout,
        slot: usize,
    ) -> Result<Vec<WantedRow>, CudaError> {
        let mut words = std::mem::take(&mut self.words);
        words.clear();
        words.resize(layout.words, 0);
        metadata::pack(batch, shape, layout, &mut words);
        let mut wanted = Vec::with_capacity(shape.outputs);
        self.bias.clear();
        self.slots[slot].lists_used = 0;
        let samplings = batch.sequences.iter().filter(|s| s.wants_output).filter_map(|s| s.sampling.as_ref());
        for (row, sampling) in samplings.enumerate() {
            let at = layout.sample_rows + row * SAMPLE_ROW_WORDS;
            let sample_row = self.sample_row(sampling, slot)?;
            words[at..at + SAMPLE_ROW_WORDS].copy_from_slice(&sample_row.words());
            wanted.push(WantedRow { logprobs: sampling.params.logprobs });
        }
        self.send_bias(slot)?;
        let (stream, to) = (self.model.executor.device.stream(), self.model.executor.surfaces.metadata);
        let host = &mut self.slots[slot].words;
        copy_words(host.as_mut_slice(), &words);
        // SAFETY: the metadata range has room for the largest step's words. The slot's earlier copy has passed: a slot
        // comes round again only after its step was collected.
        unsafe { host.copy_to(to, words.len() * 4, stream)? };
        self.words = words;
        Ok(wanted)
    }

    /// Tables of the step's sequences, by rows, when they are not there already.
    fn send_block_tables(&mut self, batch: &StepBatch, slot: usize) -> Result<(), CudaError> {
        let width = metadata::pack_block_tables(batch, &mut self.block_tables);
        if width == 0 || (width, &self.block_tables) == (self.last_block_tables.0, &self.last_block_tables.1) {
            return Ok(());
        }
        let (device, surfaces) = (&self.model.executor.device, &self.model.executor.surfaces);
        let host = &mut self.slots[slot].block_tables;
        copy_words(host.as_mut_slice(), &self.block_tables);
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: host.as_slice().as_ptr().cast(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: width * 4,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: surfaces.block_tables,
            dstArray: std::ptr::null_mut(),
            dstPitch: surfaces.max_blocks as usize * 4,
            WidthInBytes: width * 4,
            Height: batch.sequences.len(),
        };
        // SAFETY: `check` holds: no more sequences than rows, no table longer than `max_blocks`; the slot's memory is not
        // written before its step was collected.
        let result = unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, device.stream()) };
        device.check("cuMemcpy2DAsync", result)?;
        std::mem::swap(&mut self.last_block_tables.1, &mut self.block_tables);
        self.last_block_tables.0 = width;
        Ok(())
    }
}

impl Backend for CudaBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn step(&mut self, batch: &StepBatch) -> Result<Vec<RowOutput>, BackendError> {
        if !self.in_flight.is_empty() {
            let what = format!("{} steps are under way: collect them first", self.in_flight.len());
            let device = self.info.device.clone();
            return Err(BackendError { device, what, fatal: false, kind: FailureKind::Internal });
        }
        let result = self.enqueue(batch).and_then(|()| self.oldest());
        result.map_err(|e| e.into_backend_error(&self.info.device))
    }

    fn max_steps_in_flight(&self) -> usize {
        SLOTS - 1
    }

    fn submit(&mut self, batch: &StepBatch) -> Result<(), BackendError> {
        self.enqueue(batch).map_err(|e| e.into_backend_error(&self.info.device))
    }

    fn collect(&mut self) -> Result<Vec<RowOutput>, BackendError> {
        self.oldest().map_err(|e| e.into_backend_error(&self.info.device))
    }

    fn counts_tokens(&self) -> bool {
        true
    }

    fn last_step_time(&self) -> Option<Duration> {
        self.last_step_time
    }

    fn idle(&mut self) -> Result<bool, BackendError> {
        if !self.in_flight.is_empty() {
            return Ok(false);
        }
        self.do_next().map_err(|e| e.into_backend_error(&self.info.device))
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // Copies under way end before the memory that they use goes. A lost context has none.
        drop(self.model.executor.device.synchronize());
    }
}

const fn decode_shape(bucket: usize) -> StepShape {
    StepShape { tokens: bucket, decodes: bucket, sequences: bucket, outputs: bucket }
}

fn copy_words(bytes: &mut [u8], words: &[i32]) {
    bytes.as_chunks_mut::<4>().0.iter_mut().zip(words).for_each(|(b, w)| *b = w.to_le_bytes());
}
