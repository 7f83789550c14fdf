//! The activation arena: buffers of a step that are alive at the same time.

use super::served_dtype;
use crate::model::{BufferId, ModelSpec, Op, Program, Rows};

/// Bytes of the largest set of buffers that are alive together on one rank, in a step of `tokens` tokens and
/// `sequences` sequences. Logits are left out: they are part of the sampler's term.
pub fn activation_bytes(
    program: &Program,
    spec: &ModelSpec,
    tensor_parallel_size: u64,
    tokens: u64,
    sequences: u64,
) -> u64 {
    let size = |id: BufferId| {
        let buffer = program.buffer(id);
        let rows = match buffer.rows {
            Rows::Tokens => tokens,
            Rows::Sequences => sequences,
        };
        let width = if buffer.sharded { buffer.width.div_ceil(tensor_parallel_size.max(1)) } else { buffer.width };
        rows.saturating_mul(width).saturating_mul(served_dtype(spec).bytes())
    };
    let last_use = last_uses(program);
    let (mut live, mut peak) = (0_u64, 0_u64);
    for (i, op) in program.ops.iter().enumerate() {
        let io = Io::of(op);
        for out in io.writes() {
            live = live.saturating_add(size(out));
        }
        peak = peak.max(live);
        for buffer in io.distinct().filter(|b| last_use[b.0] == i) {
            live = live.saturating_sub(size(buffer));
        }
    }
    peak
}

/// Index of the last op that touches each buffer.
fn last_uses(program: &Program) -> Vec<usize> {
    let mut last = vec![usize::MAX; program.buffers.len()];
    for (i, op) in program.ops.iter().enumerate() {
        for buffer in Io::of(op).all() {
            last[buffer.0] = i;
        }
    }
    last
}

/// Buffers that an op reads, and the new ones that it writes.
#[derive(Debug)]
struct Io {
    reads: [Option<BufferId>; 2],
    writes: [Option<BufferId>; 2],
}

impl Io {
    fn of(op: &Op) -> Self {
        let (reads, writes) = match op {
            Op::Embed { out, .. } => ([None; 2], [Some(*out), None]),
            Op::Norm { x, add, out, .. } | Op::Linear { x, add, out, .. } => ([Some(*x), *add], [Some(*out), None]),
            Op::QkNormRopeKvWrite { qkv, .. } => ([Some(*qkv), None], [None; 2]),
            Op::Attention { qkv, out, .. } => ([Some(*qkv), None], [Some(*out), None]),
            Op::GatedAct { gate_up: x, out, .. }
            | Op::Act { x, out, .. }
            | Op::GatherLast { x, out }
            | Op::Pool { x, out, .. }
            | Op::L2Normalize { x, out } => ([Some(*x), None], [Some(*out), None]),
            // Logits belong to the sampler.
            Op::LmHead { x, .. } => ([Some(*x), None], [None; 2]),
            Op::SoftCap { .. } => ([None; 2], [None; 2]),
            Op::Planned(op) => ([Some(op.x), op.add], [Some(op.scratch), Some(op.out)]),
        };
        Self { reads, writes }
    }

    fn writes(&self) -> impl Iterator<Item = BufferId> {
        self.writes.into_iter().flatten()
    }

    fn all(&self) -> impl Iterator<Item = BufferId> {
        self.reads.into_iter().chain(self.writes).flatten()
    }

    /// A buffer may be read twice by one op.
    fn distinct(&self) -> impl Iterator<Item = BufferId> {
        let [first, second] = self.reads;
        let reads = [first, second.filter(|_| second != first)];
        reads.into_iter().chain(self.writes).flatten()
    }
}
