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
        for &out in &io.writes {
            live = live.saturating_add(size(out));
        }
        peak = peak.max(live);
        let dying = io.reads.into_iter().chain(io.writes).filter(|b| last_use[b.0] == i);
        // A buffer may be read twice by one op.
        let mut freed: Vec<BufferId> = dying.collect();
        freed.sort_unstable();
        freed.dedup();
        live -= freed.into_iter().map(size).sum::<u64>().min(live);
    }
    peak
}

/// Index of the last op that touches each buffer.
fn last_uses(program: &Program) -> Vec<usize> {
    let mut last = vec![usize::MAX; program.buffers.len()];
    for (i, op) in program.ops.iter().enumerate() {
        let io = Io::of(op);
        for buffer in io.reads.into_iter().chain(io.writes) {
            last[buffer.0] = i;
        }
    }
    last
}

/// Buffers that an op reads, and the new ones that it writes.
#[derive(Debug)]
struct Io {
    reads: Vec<BufferId>,
    writes: Vec<BufferId>,
}

impl Io {
    fn of(op: &Op) -> Self {
        let (reads, writes) = match op {
            Op::Embed { out, .. } => (vec![], vec![*out]),
            Op::Norm { x, add, out, .. } | Op::Linear { x, add, out, .. } => {
                (add.iter().copied().chain([*x]).collect(), vec![*out])
            }
            Op::QkNormRopeKvWrite { qkv, .. } => (vec![*qkv], vec![]),
            Op::Attention { qkv, out, .. } => (vec![*qkv], vec![*out]),
            Op::GatedAct { gate_up: x, out, .. }
            | Op::Act { x, out, .. }
            | Op::GatherLast { x, out }
            | Op::Pool { x, out, .. }
            | Op::L2Normalize { x, out } => (vec![*x], vec![*out]),
            // Logits belong to the sampler.
            Op::LmHead { x, .. } => (vec![*x], vec![]),
            Op::SoftCap { .. } => (vec![], vec![]),
            Op::Planned(op) => (op.add.iter().copied().chain([op.x]).collect(), vec![op.scratch, op.out]),
        };
        Self { reads, writes }
    }
}
