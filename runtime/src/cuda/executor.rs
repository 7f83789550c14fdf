//! Walks the plan and launches: the one path of every step, replayed or not.

mod chained;
mod rotation;

pub use rotation::RowPlaces;

use super::CudaError;
use super::device::Device;
use super::gemm::GemmOperands;
use super::kernel_set::KernelSet;
use super::kernels::{self, Decode};
use super::linear::Linears;
use super::memory::DevicePointer;
use super::metadata::{MetadataLayout, StepShape};
use super::module::Arg;
use super::plan::{DeviceOp, FusedLinear, GatedActivation, HeadSizes, InputNorm, LinearOp, Plan};
use mserve_planner::model::Rows;
use std::sync::Arc;

/// Where the kernels find what changes from step to step, and what lives beside activations and weights.
#[derive(Debug, Clone, Default)]
pub struct Surfaces {
    /// Packed step metadata, see [`MetadataLayout`].
    pub metadata: DevicePointer,
    /// `[max_num_seqs, max_blocks]`
    pub block_tables: DevicePointer,
    pub max_blocks: u32,
    /// Tokens chosen by the step before, `[max_num_seqs]`: the first array of `outputs`.
    pub outputs: OutputSurfaces,
    /// Lists of biased tokens and their values.
    pub bias_tokens: DevicePointer,
    pub bias_values: DevicePointer,
    /// `[max_num_seqs, token_state_stride]` u16
    pub token_state: DevicePointer,
    pub token_state_stride: u32,
    pub vocab_size: u32,
    /// Scratch of the choice of tokens, [`kernels::bests`] u64.
    pub bests: DevicePointer,
    pub chain: ChainSurfaces,
    /// Scratch of the decode attention.
    pub partial: DevicePointer,
    pub statistic: DevicePointer,
    /// Longest sequence: bounds how far a context is split.
    pub max_model_len: u32,
    /// Cosine and sine tables of each rope.
    pub ropes: Vec<RopeTable>,
    /// How the copy engine sees each layer's keys and values; filled in where the prefill kernel wants it.
    pub cache_maps: Vec<(DevicePointer, DevicePointer)>,
    /// Keys and values of each layer.
    pub layers: Vec<(DevicePointer, DevicePointer)>,
    /// Of rows of no step, as many as the largest has: position 0, no slot.
    pub no_places: RowPlaces,
}

/// Scratch of `chain_linear.cu`, and the count of its blocks, which begins at zero.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChainSurfaces {
    pub normed: DevicePointer,
    pub squares: DevicePointer,
    pub count: DevicePointer,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct OutputSurfaces {
    pub token_ids: DevicePointer,
    pub logprobs: DevicePointer,
    pub ranks: DevicePointer,
    pub top_ids: DevicePointer,
    pub top_logprobs: DevicePointer,
    pub top_max: u32,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct RopeTable {
    pub cos: DevicePointer,
    pub sin: DevicePointer,
    /// Dimensions that rotate.
    pub rotary: u32,
}

/// The prefill chunks of a step: sequences after the decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrefillChunks {
    /// Blocks of the kernel's grid along the rows. 0: no chunks.
    pub tiles: u32,
}

#[derive(Debug)]
pub struct Executor {
    pub device: Arc<Device>,
    pub plan: Plan,
    pub kernels: KernelSet,
    pub linears: Linears,
    pub surfaces: Surfaces,
}

/// One step's addresses and sizes.
struct Step<'a> {
    shape: &'a StepShape,
    prefill: PrefillChunks,
    token_ids: DevicePointer,
    positions: DevicePointer,
    slot_mapping: DevicePointer,
    query_start: DevicePointer,
    context_len: DevicePointer,
    output_rows: DevicePointer,
    sample_rows: DevicePointer,
}

impl Step<'_> {
    const fn rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.shape.tokens,
            Rows::Sequences => self.shape.outputs,
        }
    }

    const fn places(&self) -> RowPlaces {
        RowPlaces { positions: self.positions, slots: self.slot_mapping }
    }
}

impl Executor {
    /// Launches every op of a step of this shape, then the choice of tokens.
    ///
    /// # Safety
    /// All addresses of plan and surfaces must be device memory as large as the largest step needs, which `shape` does
    /// not exceed, alive until the stream has passed (for a captured run: every replay). The metadata on the device must
    /// be of this shape when the launches run: its block numbers, slots and positions are followed.
    pub unsafe fn run(&mut self, shape: &StepShape, prefill: PrefillChunks) -> Result<(), CudaError> {
        // SAFETY: passed on from the caller.
        unsafe { self.run_where(shape, prefill, &|_| true) }
    }

    /// As [`Self::run`], for the ops of [`Self::ops`] whose index `keep` wants; the choice of tokens follows the last.
    ///
    /// # Safety
    /// As [`Self::run`].
    pub unsafe fn run_where(
        &mut self,
        shape: &StepShape,
        prefill: PrefillChunks,
        keep: &dyn Fn(usize) -> bool,
    ) -> Result<(), CudaError> {
        let layout = MetadataLayout::new(shape);
        let word = |at: usize| self.surfaces.metadata + 4 * at as u64;
        let step = Step {
            shape,
            prefill,
            token_ids: word(layout.token_ids),
            positions: word(layout.positions),
            slot_mapping: word(layout.slot_mapping),
            query_start: word(layout.query_start),
            context_len: word(layout.context_len),
            output_rows: word(layout.output_rows),
            sample_rows: word(layout.sample_rows),
        };
        let count = self.ops(shape).len();
        for at in (0..count).filter(|&at| keep(at)) {
            let op = self.ops(shape)[at];
            // SAFETY: passed on from the caller.
            unsafe { self.op(&op, &step)? };
        }
        if !keep(count) {
            return Ok(());
        }
        // SAFETY: as above.
        unsafe { self.sample(&step) }
    }

    /// The ops of a step of this shape: with few rows, and a token a sequence, some are one.
    pub fn ops(&self, shape: &StepShape) -> &[DeviceOp] {
        self.plan.ops_for(shape)
    }

    unsafe fn op(&mut self, op: &DeviceOp, step: &Step<'_>) -> Result<(), CudaError> {
        // SAFETY: passed on from the caller, as in each call below.
        unsafe {
            match op {
                DeviceOp::Linear(linear) => self.linear(linear, step),
                DeviceOp::Fused(fused) => self.fused(fused, step),
                DeviceOp::Chain(chain) => self.chain(chain, step),
                DeviceOp::Embed { table, out, width, vocab, scale } => {
                    let args = [
                        Arg::Pointer(step.token_ids),
                        Arg::Pointer(self.surfaces.outputs.token_ids),
                        Arg::Pointer(*table),
                        Arg::Pointer(*out),
                        Arg::Int(*width as i32),
                        Arg::Int(*vocab as i32),
                        Arg::Float(*scale),
                    ];
                    self.kernels.embed.launch(&kernels::embed(step.shape.tokens as u32, *width), &args)
                }
                op @ DeviceOp::Norm { .. } => self.norm(op, step),
                op @ DeviceOp::RopeKvWrite { .. } => self.rope(op, step),
                op @ DeviceOp::Attention { .. } => self.attention(op, step),
                DeviceOp::GatedAct { rows, gate_up, out, width, activation } => {
                    let kernel = match activation {
                        GatedActivation::Silu => &self.kernels.silu_mul,
                        GatedActivation::Gelu => &self.kernels.gelu_mul,
                        GatedActivation::GeluTanh => &self.kernels.gelu_tanh_mul,
                    };
                    let args = [Arg::Pointer(*gate_up), Arg::Pointer(*out), Arg::Int(*width as i32)];
                    kernel.launch(&kernels::gated_act(step.rows(*rows) as u32, *width), &args)
                }
                DeviceOp::GatherLast { x, out, width } => {
                    let args =
                        [Arg::Pointer(*x), Arg::Pointer(step.output_rows), Arg::Pointer(*out), Arg::Int(*width as i32)];
                    self.kernels.gather_rows.launch(&kernels::gather(step.shape.outputs as u32, *width), &args)
                }
            }
        }
    }

    unsafe fn linear(&mut self, op: &LinearOp, step: &Step<'_>) -> Result<(), CudaError> {
        let operands = self.surfaces.operands(op, step.places());
        let operands = GemmOperands { sample_rows: Some(step.sample_rows), ..operands };
        // SAFETY: passed on from the caller: the operands are buffers of the plan, at least as large as the step.
        unsafe { self.linears.run(&op.shape(step.rows(op.rows)), &operands) }
    }

    unsafe fn fused(&self, op: &FusedLinear, step: &Step<'_>) -> Result<(), CudaError> {
        let (kernel, linear) = (&kernels::FUSED[op.kernel], &op.linear);
        let none = InputNorm { weight: 0, eps: 0.0 };
        let norm = op.norm.unwrap_or(none);
        let rows = step.rows(linear.rows) as u32;
        let rotation = linear.rotated.map(|r| self.surfaces.rotation(&r, step.places())).unwrap_or_default();
        let head_dim = linear.rotated.map_or(0, |r| r.heads.head_dim);
        let mut args = vec![
            Arg::Pointer(linear.weight),
            Arg::Pointer(linear.x),
            Arg::Pointer(norm.weight),
            Arg::Pointer(linear.bias.unwrap_or(0)),
            Arg::Pointer(linear.residual.unwrap_or(0)),
            Arg::Pointer(linear.out),
            Arg::Int(rows as i32),
            Arg::Int(linear.n as i32),
            Arg::Int(linear.k as i32),
            Arg::Float(norm.eps),
            Arg::Int(i32::from(linear.f32_out)),
        ];
        args.extend(rotation.places());
        args.extend([rotation.heads, rotation.kv_heads, head_dim].map(|size| Arg::Int(size as i32)));
        // SAFETY: passed on from the caller: the operands are buffers of the plan, at least as large as the step; the
        // kernel takes this shape (`kernels::fused_for`).
        unsafe { self.kernels.fused[op.kernel].launch(&kernel.geometry(rows, linear.n, op.clusters), &args) }
    }

    unsafe fn norm(&self, op: &DeviceOp, step: &Step<'_>) -> Result<(), CudaError> {
        let DeviceOp::Norm { rows, x, weight, add, out, width, eps, offset } = op else { return Ok(()) };
        let rows = step.rows(*rows);
        let Some(geometry) = kernels::rms_norm(rows as u32, *width) else {
            return Err(CudaError::Unsupported { op: "Norm", what: format!("rows of {width}") });
        };
        let mut args = vec![Arg::Pointer(*x), Arg::Pointer(*weight)];
        args.extend(add.map(Arg::Pointer));
        args.extend([Arg::Pointer(*out), Arg::Int(rows as i32), Arg::Int(*width as i32)]);
        args.extend([Arg::Float(*eps), Arg::Float(*offset)]);
        let kernel = if add.is_some() { &self.kernels.rms_norm_add } else { &self.kernels.rms_norm };
        // SAFETY: passed on from the caller.
        unsafe { kernel.launch(&geometry, &args) }
    }

    unsafe fn rope(&self, op: &DeviceOp, step: &Step<'_>) -> Result<(), CudaError> {
        let DeviceOp::RopeKvWrite { qkv, heads, rope, q_norm, k_norm, eps, offset, layer, .. } = op else {
            return Ok(());
        };
        let Some(attention) = self.kernels.by_head_dim.get(&heads.head_dim) else { return Err(no_kernels(heads)) };
        let none = RopeTable { cos: 0, sin: 0, rotary: 0 };
        let table = rope.map_or(none, |r| self.surfaces.ropes[r]);
        let (keys, values) = self.surfaces.layers[*layer];
        let tokens = step.shape.tokens as u32;
        let args = [
            Arg::Pointer(*qkv),
            Arg::Pointer(step.positions),
            Arg::Pointer(step.slot_mapping),
            Arg::Pointer(table.cos),
            Arg::Pointer(table.sin),
            Arg::Pointer(q_norm.unwrap_or(0)),
            Arg::Pointer(k_norm.unwrap_or(0)),
            Arg::Pointer(keys),
            Arg::Pointer(values),
            Arg::Int(tokens as i32),
            Arg::Int(heads.heads as i32),
            Arg::Int(heads.kv_heads as i32),
            Arg::Int(table.rotary as i32),
            Arg::Float(*eps),
            Arg::Float(*offset),
        ];
        // SAFETY: passed on from the caller.
        unsafe { attention.rope.launch(&kernels::rope(tokens, heads.heads, heads.kv_heads), &args) }
    }

    unsafe fn attention(&self, op: &DeviceOp, step: &Step<'_>) -> Result<(), CudaError> {
        let DeviceOp::Attention { qkv, out, heads, layer, scale, softcap, window } = op else { return Ok(()) };
        let Some(attention) = self.kernels.by_head_dim.get(&heads.head_dim) else { return Err(no_kernels(heads)) };
        let (keys, values) = self.surfaces.layers[*layer];
        let q_stride = ((heads.heads + 2 * heads.kv_heads) * heads.head_dim) as i32;
        let (max_blocks, decodes) = (self.surfaces.max_blocks as i32, step.shape.decodes as u32);
        let tail = [Arg::Float(*scale), Arg::Float(*softcap), Arg::Int(*window as i32)];
        if decodes > 0 {
            let decode = &attention.decode_shape;
            let launch = decode.launch(decodes, heads.heads, heads.kv_heads, self.surfaces.max_model_len);
            let kernels = if launch.beside_l1 { &attention.decode_few } else { &attention.decode };
            let Some(kernel) = kernels.get(&launch.warps) else { return Err(no_kernels(heads)) };
            let mut args = vec![
                Arg::Pointer(*qkv),
                Arg::Int(q_stride),
                Arg::Pointer(keys),
                Arg::Pointer(values),
                Arg::Pointer(self.surfaces.block_tables),
                Arg::Pointer(step.context_len),
                Arg::Pointer(*out),
                Arg::Pointer(self.surfaces.partial),
                Arg::Pointer(self.surfaces.statistic),
                Arg::Int(max_blocks),
                Arg::Int(heads.heads as i32),
                Arg::Int(heads.kv_heads as i32),
            ];
            args.extend(tail);
            let geometry = decode.geometry(decodes, heads.heads, heads.kv_heads, launch);
            // SAFETY: passed on from the caller; `partial` and `statistic` have room for the clusters of every such launch.
            unsafe { kernel.launch(&geometry, &args)? };
        }
        if step.prefill.tiles > 0 {
            let caches = match attention.prefill_shape.takes_maps() {
                true => self.surfaces.cache_maps[*layer],
                false => (keys, values),
            };
            let mut args = vec![
                Arg::Pointer(*qkv),
                Arg::Int(q_stride),
                Arg::Pointer(caches.0),
                Arg::Pointer(caches.1),
                Arg::Pointer(step.query_start),
                Arg::Pointer(step.context_len),
                Arg::Pointer(self.surfaces.block_tables),
                Arg::Pointer(*out),
                Arg::Int(max_blocks),
                Arg::Int(decodes as i32),
                Arg::Int(step.shape.sequences as i32),
                Arg::Int(heads.kv_heads as i32),
            ];
            args.extend(tail);
            args.extend([Arg::Int(heads.heads as i32), Arg::Int(step.prefill.tiles as i32)]);
            let geometry = attention.prefill_shape.geometry(step.prefill.tiles, heads.heads, heads.head_dim);
            // SAFETY: as above.
            unsafe { attention.prefill.launch(&geometry, &args)? };
        }
        Ok(())
    }

    unsafe fn sample(&self, step: &Step<'_>) -> Result<(), CudaError> {
        let (s, out) = (&self.surfaces, &self.surfaces.outputs);
        let rows = step.shape.outputs as u32;
        let chosen = self.head_chooses(step.shape);
        let parts = if chosen { kernels::head_parts(s.vocab_size) } else { kernels::sample_parts(rows) };
        let scan = [
            Arg::Pointer(self.plan.logits),
            Arg::Pointer(step.sample_rows),
            Arg::Pointer(s.token_state),
            Arg::Pointer(s.bias_tokens),
            Arg::Pointer(s.bias_values),
            Arg::Pointer(s.bests),
            Arg::Int(s.vocab_size as i32),
            Arg::Int(self.plan.logits_stride as i32),
            Arg::Int(s.token_state_stride as i32),
        ];
        if !chosen {
            // SAFETY: passed on from the caller; `bests` has room for the parts of all rows.
            unsafe { self.kernels.sample_scan.launch(&kernels::sample_scan(rows), &scan)? };
        }
        let args = [
            Arg::Pointer(self.plan.logits),
            Arg::Pointer(step.sample_rows),
            Arg::Pointer(s.token_state),
            Arg::Pointer(s.bias_tokens),
            Arg::Pointer(s.bias_values),
            Arg::Pointer(out.token_ids),
            Arg::Pointer(out.logprobs),
            Arg::Pointer(out.ranks),
            Arg::Pointer(out.top_ids),
            Arg::Pointer(out.top_logprobs),
            Arg::Pointer(s.bests),
            Arg::Int(s.vocab_size as i32),
            Arg::Int(self.plan.logits_stride as i32),
            Arg::Int(s.token_state_stride as i32),
            Arg::Int(out.top_max as i32),
            Arg::Int(parts as i32),
            Arg::Int(i32::from(chosen)),
        ];
        // SAFETY: passed on from the caller.
        unsafe { self.kernels.sample.launch(&kernels::sample(rows), &args) }
    }

    /// Whether the head of a step of this shape has found the likeliest tokens itself.
    pub fn head_chooses(&self, shape: &StepShape) -> bool {
        let Some(DeviceOp::Linear(head)) = self.ops(shape).last() else { return false };
        head.f32_out && self.linears.chooses(&head.shape(shape.outputs))
    }

    /// Starts a token-state slot from scratch. The lists are (address, count) on the device.
    ///
    /// # Safety
    /// As [`Self::run`]; the lists must be there until the stream has passed.
    pub unsafe fn reset_token_state(&self, slot: u32, lists: [(DevicePointer, usize); 3]) -> Result<(), CudaError> {
        let s = &self.surfaces;
        let state = s.token_state + u64::from(slot) * u64::from(s.token_state_stride) * 2;
        let mut args = vec![Arg::Pointer(state), Arg::Int(s.vocab_size as i32), Arg::Int(s.token_state_stride as i32)];
        for (list, count) in lists {
            args.extend([Arg::Pointer(list), Arg::Int(count as i32)]);
        }
        // SAFETY: passed on from the caller.
        unsafe { self.kernels.token_state_reset.launch(&kernels::token_state_reset(), &args) }
    }
}

const fn operands(op: &LinearOp) -> GemmOperands {
    let LinearOp { x, weight, bias, residual, out, gate_up, .. } = *op;
    GemmOperands { x, weight, bias, residual, out, gate_up, sample_rows: None, rotation: None }
}

fn no_kernels(heads: &HeadSizes) -> CudaError {
    CudaError::Unsupported { op: "Attention", what: format!("head_dim {}", heads.head_dim) }
}

/// Elements of the decode attention's scratch arrays over all batch sizes: for launches with several clusters to a context.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AttentionScratch {
    pub partial: u64,
    pub statistic: u64,
}

impl AttentionScratch {
    /// `decode`: the attention of a head dimension.
    pub fn new(decode: impl Fn(u32) -> Decode, layers: &[HeadSizes], max_num_seqs: usize, max_model_len: u32) -> Self {
        let mut kinds = layers.to_vec();
        kinds.dedup();
        let mut most = Self::default();
        for heads in kinds {
            let decode = decode(heads.head_dim);
            for sequences in 1..=max_num_seqs as u32 {
                let launch = decode.launch(sequences, heads.heads, heads.kv_heads, max_model_len);
                if launch.shares.clusters > 1 {
                    let rows = u64::from(sequences) * u64::from(heads.heads) * u64::from(launch.shares.clusters);
                    most.partial = most.partial.max(rows * u64::from(heads.head_dim));
                    most.statistic = most.statistic.max(rows * 2);
                }
            }
        }
        most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_for_several_clusters_only() {
        let decode = |head_dim| Decode {
            head_dim,
            compute_capability: (9, 0),
            multiprocessors: 132,
            shared_memory_per_block_bytes: 227 << 10,
        };
        let layers = [HeadSizes { heads: 32, kv_heads: 8, head_dim: 128 }; 32];
        // A cluster at a time for contexts that one is enough for; two of 4 sequences, at most, of long ones.
        assert_eq!(AttentionScratch::new(decode, &layers, 256, 512), AttentionScratch::default());
        let long = AttentionScratch::new(decode, &layers, 256, 131_072);
        assert_eq!((long.partial, long.statistic), (4 * 32 * 2 * 128, 4 * 32 * 2 * 2));
        assert_eq!(AttentionScratch::new(decode, &layers, 1, 131_072).statistic, 32 * 3 * 2);
    }
}
