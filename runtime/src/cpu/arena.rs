//! Memory for activations: buffers of the program placed in as few slots as their lifetimes allow.

use mserve_planner::model::{BufferId, Op, Program, Rows};

/// Slots shared by buffers that are never alive together. Reused from step to step.
#[derive(Debug)]
pub struct Arena {
    slots: Vec<Slot>,
    /// Slot of each buffer.
    placement: Vec<usize>,
    widths: Vec<usize>,
    tokens: usize,
    sequences: usize,
}

#[derive(Debug)]
struct Slot {
    values: Vec<f32>,
    rows: Rows,
    /// Width of the widest buffer placed here.
    width: usize,
}

impl Arena {
    /// Places the buffers of `program` and takes memory for steps of `max_tokens`. Rows per sequence are few and may
    /// be as wide as the vocabulary: their slots grow to the largest step seen.
    pub fn new(program: &Program, max_tokens: usize) -> Self {
        let mut arena = Self {
            slots: Vec::new(),
            placement: vec![usize::MAX; program.buffers.len()],
            widths: program.buffers.iter().map(|b| b.width as usize).collect(),
            tokens: 0,
            sequences: 0,
        };
        let last_use = last_uses(program);
        let mut free: Vec<usize> = Vec::new();
        for (i, op) in program.ops.iter().enumerate() {
            let (reads, write) = operands(op);
            if arena.placement[write.0] == usize::MAX {
                arena.place(program, write, &mut free);
            }
            let mut ended: Vec<BufferId> = reads.into_iter().chain([write]).filter(|b| last_use[b.0] == i).collect();
            ended.sort();
            ended.dedup();
            free.extend(ended.iter().map(|b| arena.placement[b.0]));
        }
        for slot in arena.slots.iter_mut().filter(|s| s.rows == Rows::Tokens) {
            slot.values = vec![0.0; max_tokens * slot.width];
        }
        arena
    }

    fn place(&mut self, program: &Program, id: BufferId, free: &mut Vec<usize>) {
        let buffer = program.buffer(id);
        let width = buffer.width as usize;
        let fitting = (0..free.len()).filter(|&f| self.slots[free[f]].rows == buffer.rows);
        let closest = fitting.min_by_key(|&f| self.slots[free[f]].width.abs_diff(width));
        let slot = match closest {
            Some(f) => free.swap_remove(f),
            None => {
                self.slots.push(Slot { values: Vec::new(), rows: buffer.rows, width: 0 });
                self.slots.len() - 1
            }
        };
        self.slots[slot].width = self.slots[slot].width.max(width);
        self.placement[id.0] = slot;
    }

    /// Sizes of the step to come.
    pub fn begin(&mut self, tokens: usize, sequences: usize) {
        (self.tokens, self.sequences) = (tokens, sequences);
        for slot in &mut self.slots {
            let rows = if slot.rows == Rows::Tokens { tokens } else { sequences };
            if slot.values.len() < rows * slot.width {
                slot.values.resize(rows * slot.width, 0.0);
            }
        }
    }

    pub fn width(&self, id: BufferId) -> usize {
        self.widths[id.0]
    }

    fn len(&self, id: BufferId) -> usize {
        let rows = if self.slots[self.placement[id.0]].rows == Rows::Tokens { self.tokens } else { self.sequences };
        rows * self.widths[id.0]
    }

    /// The buffer's rows of this step, end to end.
    pub fn get(&self, id: BufferId) -> &[f32] {
        &self.slots[self.placement[id.0]].values[..self.len(id)]
    }

    pub fn get_mut(&mut self, id: BufferId) -> &mut [f32] {
        let len = self.len(id);
        &mut self.slots[self.placement[id.0]].values[..len]
    }

    /// Runs `op` with buffer `id` to write and the rest of the arena to read.
    pub fn write<R>(&mut self, id: BufferId, op: impl FnOnce(&Self, &mut [f32]) -> R) -> R {
        let (slot, len) = (self.placement[id.0], self.len(id));
        let mut values = std::mem::take(&mut self.slots[slot].values);
        let result = op(self, &mut values[..len]);
        self.slots[slot].values = values;
        result
    }

    pub fn bytes(&self) -> u64 {
        self.slots.iter().map(|s| s.values.len() as u64 * 4).sum()
    }

    #[cfg(test)]
    pub fn poison(&mut self) {
        for slot in &mut self.slots {
            slot.values.fill(f32::NAN);
        }
    }
}

/// Index of the last op that touches each buffer; the output is needed after all of them.
fn last_uses(program: &Program) -> Vec<usize> {
    let mut last = vec![0; program.buffers.len()];
    for (i, op) in program.ops.iter().enumerate() {
        let (reads, write) = operands(op);
        for buffer in reads.into_iter().chain([write]) {
            last[buffer.0] = i;
        }
    }
    last[program.output.0] = usize::MAX;
    last
}

/// What an op reads, and the one buffer that it writes (which it may read too).
fn operands(op: &Op) -> (Vec<BufferId>, BufferId) {
    match op {
        Op::Embed { out, .. } => (Vec::new(), *out),
        Op::Norm { x, add, out, .. } | Op::Linear { x, add, out, .. } => {
            (add.iter().copied().chain([*x]).collect(), *out)
        }
        Op::QkNormRopeKvWrite { qkv, .. } => (Vec::new(), *qkv),
        Op::Attention { qkv, out, .. } => (vec![*qkv], *out),
        Op::GatedAct { gate_up, out, .. } => (vec![*gate_up], *out),
        Op::Act { x, out, .. }
        | Op::GatherLast { x, out }
        | Op::Pool { x, out, .. }
        | Op::L2Normalize { x, out }
        | Op::LmHead { x, out, .. } => (vec![*x], *out),
        Op::SoftCap { x, .. } => (Vec::new(), *x),
        Op::Planned(op) => (vec![op.x], op.out),
    }
}
