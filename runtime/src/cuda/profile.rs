//! Where the time of a step goes: each kind of op timed by itself and by what the step takes without it.

use super::CudaError;
use super::backend::CudaBackend;
use super::executor::{Executor, PrefillChunks};
use super::graph::Graph;
use super::kernels;
use super::memory::Event;
use super::metadata::StepShape;
use super::plan::{DeviceOp, HeadSizes};
use crate::engine::StepBatch;
use mserve_planner::model::Rows;

/// One kind of op of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct OpTime {
    pub name: String,
    /// How many of them a step has.
    pub count: usize,
    /// Microseconds of one in a chain of its kind: its rate, overlapped with itself.
    pub chained_us: f64,
    /// Microseconds by which the step is shorter without one: what it really costs.
    pub removed_us: f64,
    /// Bytes that one must move at least.
    pub bytes: f64,
}

/// A step's kinds of ops and the whole, in microseconds.
#[derive(Debug, Clone, PartialEq)]
pub struct StepTimes {
    pub step_us: f64,
    pub ops: Vec<OpTime>,
}

const REPLAYS: usize = 7;

impl CudaBackend {
    /// Times the ops of `batch`, which must be the step that was run last. What the ops compute is of no use afterwards.
    ///
    /// # Errors
    /// The driver's.
    pub fn op_times(&mut self, batch: &StepBatch) -> Result<StepTimes, CudaError> {
        let (shape, chunks) = self.launched_shape(batch);
        let keys = keys_read(batch);
        let executor = self.executor_mut();
        let names: Vec<(String, f64)> = executor.op_names(&shape, keys);
        let step_us = executor.time(&shape, chunks, &|_| true)?;
        let mut ops: Vec<OpTime> = Vec::new();
        for (name, bytes) in &names {
            if let Some(known) = ops.iter_mut().find(|o| o.name == *name) {
                known.count += 1;
            } else {
                ops.push(OpTime { name: name.clone(), count: 1, chained_us: 0.0, removed_us: 0.0, bytes: *bytes });
            }
        }
        for op in &mut ops {
            let count = op.count as f64;
            op.chained_us = executor.time(&shape, chunks, &|at| names[at].0 == op.name)? / count;
            op.removed_us = (step_us - executor.time(&shape, chunks, &|at| names[at].0 != op.name)?) / count;
        }
        Ok(StepTimes { step_us, ops })
    }
}

impl Executor {
    /// Name and least bytes of each op, the choice of tokens last.
    fn op_names(&self, shape: &StepShape, keys: f64) -> Vec<(String, f64)> {
        let name = |op: &DeviceOp| {
            let (name, bytes) = name(op, shape, keys);
            let DeviceOp::Linear(linear) = op else { return (name, bytes) };
            let rows = if linear.rows == Rows::Tokens { shape.tokens } else { shape.outputs };
            (format!("{name} {}", self.linears.computed_by(&linear.shape(rows))), bytes)
        };
        let mut names: Vec<(String, f64)> = self.ops(shape).iter().map(name).collect();
        let vocab = self.surfaces.vocab_size;
        let seen = if self.head_chooses(shape) { 2 * kernels::head_parts(vocab) } else { vocab };
        names.push(("sample".to_owned(), shape.outputs as f64 * f64::from(seen) * 4.0));
        names
    }

    fn time(
        &mut self,
        shape: &StepShape,
        chunks: PrefillChunks,
        keep: &dyn Fn(usize) -> bool,
    ) -> Result<f64, CudaError> {
        let device = self.device.clone();
        let graph = Graph::capture(&device, || {
            // SAFETY: as for the step that ran last with this metadata.
            unsafe { self.run_where(shape, chunks, keep) }
        })?;
        let (begin, end) = (Event::new(&device, true)?, Event::new(&device, true)?);
        let mut times = Vec::with_capacity(REPLAYS);
        for _ in 0..REPLAYS {
            begin.record(device.stream())?;
            // SAFETY: the executor's memory outlives the wait below.
            unsafe { graph.launch()? };
            end.record(device.stream())?;
            end.wait()?;
            times.push(f64::from(begin.elapsed_ms(&end)?) * 1e3);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[REPLAYS / 2])
    }
}

/// Keys and values that each attention must read at least: of every sequence once.
fn keys_read(batch: &StepBatch) -> f64 {
    batch.sequences.iter().map(|s| s.context_len as f64).sum()
}

fn name(op: &DeviceOp, shape: &StepShape, keys: f64) -> (String, f64) {
    let rows_of = |rows: Rows| if rows == Rows::Tokens { shape.tokens } else { shape.outputs } as f64;
    let bytes_of = |rows: f64, width: u32, passes: f64| rows * f64::from(width) * 2.0 * passes;
    let width_bytes = |width: u32, passes: f64| bytes_of(shape.tokens as f64, width, passes);
    let all_heads = |h: &HeadSizes| (h.heads + 2 * h.kv_heads) * h.head_dim;
    match op {
        DeviceOp::Embed { width, .. } => ("embed".to_owned(), width_bytes(*width, 2.0)),
        DeviceOp::Norm { width, rows, .. } => ("norm".to_owned(), bytes_of(rows_of(*rows), *width, 2.0)),
        DeviceOp::Linear(l) => {
            let rows = rows_of(l.rows);
            let out = if l.f32_out { 2 * l.n } else { l.n };
            let bytes = f64::from(l.n) * f64::from(l.k) * 2.0 + bytes_of(rows, out, 1.0) + bytes_of(rows, l.k, 1.0);
            let after = if l.gate_up.is_some() { " gated" } else { "" };
            let after = if l.rotated.is_some() { " rotated" } else { after };
            (format!("linear {}x{}{after}", l.n, l.k), bytes)
        }
        DeviceOp::Fused(f) => {
            let (l, n) = (&f.linear, f.linear.n);
            let entry = kernels::FUSED[f.kernel].entry;
            let weight_rows = if entry.contains("gated") { 2 * n } else { n };
            let bytes = f64::from(weight_rows) * f64::from(l.k) * 2.0 + width_bytes(n, 1.0) + width_bytes(l.k, 1.0);
            (format!("{entry} {n}x{}", l.k), bytes)
        }
        DeviceOp::Chain(c) => {
            let sizes = c.sizes;
            let inner = f64::from(sizes.attention) + 3.0 * f64::from(sizes.inner);
            let qkv = c.next.map_or(0.0, |n| f64::from(n.n));
            let name = if c.next.is_some() { "chain_linear" } else { "chain_linear of the last layer" };
            (name.to_owned(), (inner + qkv) * f64::from(sizes.hidden) * 2.0)
        }
        DeviceOp::RopeKvWrite { heads, .. } => ("rope".to_owned(), width_bytes(all_heads(heads), 2.0)),
        DeviceOp::Attention { heads, .. } => {
            let kv = keys * f64::from(heads.kv_heads * heads.head_dim) * 4.0;
            ("attention".to_owned(), kv + width_bytes(heads.heads * heads.head_dim, 2.0))
        }
        DeviceOp::GatedAct { width, rows, .. } => ("gated act".to_owned(), bytes_of(rows_of(*rows), *width, 3.0)),
        DeviceOp::GatherLast { width, .. } => ("gather".to_owned(), bytes_of(rows_of(Rows::Sequences), *width, 2.0)),
    }
}
