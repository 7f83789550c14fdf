//! Activations in one allocation: each buffer of the program at a fixed address, shared by buffers that are never alive
//! together.

use super::plan::LOGITS_ALIGNMENT;
use mserve_planner::model::{BufferId, Op, Program, Rows};

/// Addresses are multiples of this: enough for every vector load and for cuBLASLt's fastest kernels.
pub const ALIGNMENT_BYTES: u64 = 256;
/// How many ops after its place in the program one may still read its operands: a launch that does the work of several
/// takes the place of the last.
const FUSED_REACH: usize = 2;
const BF16_BYTES: u64 = 2;
const F32_BYTES: u64 = 4;

/// Where each buffer lies, as an offset into the arena.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArenaPlan {
    offsets: Vec<u64>,
    pub bytes: u64,
}

/// Rows of a step: tokens, and those of sequences that want output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRows {
    pub tokens: usize,
    pub sequences: usize,
}

impl StepRows {
    pub const fn of(self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens,
            Rows::Sequences => self.sequences,
        }
    }
}

/// First and last op that touch a group of buffers at one address, and its size.
#[derive(Debug, Clone, Copy)]
struct Group {
    first: usize,
    last: usize,
    bytes: u64,
}

impl ArenaPlan {
    /// Largest buffers first, each at the lowest offset that is free while it lives. The sum of a residual is written
    /// over the residual when that is not needed any more.
    pub fn new(program: &Program, most: StepRows) -> Self {
        let group_of = groups(program);
        let lives = lives(program);
        let mut all: Vec<Option<Group>> = vec![None; program.buffers.len()];
        for (buffer, life) in lives.iter().enumerate() {
            let Some((first, last)) = life.map(|(first, last)| (first, last + FUSED_REACH)) else { continue };
            let bytes = buffer_bytes(program, BufferId(buffer), most).next_multiple_of(ALIGNMENT_BYTES);
            let group = &mut all[group_of[buffer]];
            *group = Some(match *group {
                None => Group { first, last, bytes },
                Some(g) => Group { first: g.first.min(first), last: g.last.max(last), bytes: g.bytes.max(bytes) },
            });
        }
        let placed = place(&all);
        let bytes = placed.iter().zip(&all).map(|(at, g)| at + g.map_or(0, |g| g.bytes)).max().unwrap_or(0);
        Self { offsets: group_of.iter().map(|&g| placed[g]).collect(), bytes }
    }

    pub fn offset(&self, buffer: BufferId) -> u64 {
        self.offsets[buffer.0]
    }
}

/// Bytes of a buffer at the largest step. Logits are f32, all else bf16.
pub fn buffer_bytes(program: &Program, id: BufferId, most: StepRows) -> u64 {
    let buffer = program.buffer(id);
    let row_bytes = match is_logits(program, id) {
        true => buffer.width.next_multiple_of(LOGITS_ALIGNMENT) * F32_BYTES,
        false => buffer.width * BF16_BYTES,
    };
    most.of(buffer.rows) as u64 * row_bytes
}

/// Whether a language-model head writes this buffer.
pub fn is_logits(program: &Program, id: BufferId) -> bool {
    program.ops.iter().any(|op| matches!(op, Op::LmHead { out, .. } if *out == id))
}

fn place(groups: &[Option<Group>]) -> Vec<u64> {
    let mut order: Vec<usize> = (0..groups.len()).filter(|&g| groups[g].is_some()).collect();
    order.sort_by_key(|&g| (std::cmp::Reverse(groups[g].map_or(0, |g| g.bytes)), g));
    let mut offsets = vec![0; groups.len()];
    let mut placed: Vec<(u64, Group)> = Vec::new();
    for index in order {
        let Some(group) = groups[index] else { continue };
        let overlaps = |other: &Group| group.first <= other.last && other.first <= group.last;
        let mut taken: Vec<(u64, u64)> =
            placed.iter().filter(|(_, g)| overlaps(g)).map(|(at, g)| (*at, at + g.bytes)).collect();
        taken.sort_unstable();
        let mut offset = 0;
        for (begin, end) in taken {
            if offset + group.bytes <= begin {
                break;
            }
            offset = offset.max(end);
        }
        offsets[index] = offset;
        placed.push((offset, group));
    }
    offsets
}

/// Which buffers share an address from birth: a sum that is written over its residual.
fn groups(program: &Program) -> Vec<usize> {
    let lives = lives(program);
    let mut group: Vec<usize> = (0..program.buffers.len()).collect();
    for (i, op) in program.ops.iter().enumerate() {
        if let Op::Linear { x, add: Some(add), out, .. } = op {
            let same = program.buffer(*add) == program.buffer(*out);
            if same && add != out && add != x && lives[add.0].is_some_and(|(_, last)| last == i) {
                group[out.0] = group[add.0];
            }
        }
    }
    group
}

/// First and last op that touch each buffer; the output is needed after all of them. Where rows are outputs, what reads
/// gathered rows reads those that they came from.
fn lives(program: &Program) -> Vec<Option<(usize, usize)>> {
    let mut lives: Vec<Option<(usize, usize)>> = vec![None; program.buffers.len()];
    for (i, op) in program.ops.iter().enumerate() {
        for buffer in op.buffers() {
            let life = lives[buffer.0].get_or_insert((i, i));
            life.1 = i;
        }
    }
    for op in program.ops.iter().rev() {
        if let Op::GatherLast { x, out } = op
            && let (Some(rows), Some(copy)) = (lives[x.0], lives[out.0])
        {
            lives[x.0] = Some((rows.0, rows.1.max(copy.1)));
        }
    }
    if let Some(life) = &mut lives[program.output.0] {
        life.1 = program.ops.len();
    }
    lives
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cuda::testing::llama_program;

    #[test]
    fn no_two_living_buffers_share_a_byte() {
        let program = llama_program(3);
        let most = StepRows { tokens: 96, sequences: 8 };
        let plan = ArenaPlan::new(&program, most);
        let (lives, groups) = (lives(&program), groups(&program));
        for a in 0..program.buffers.len() {
            for b in 0..a {
                let ((a0, a1), (b0, b1)) = (lives[a].unwrap(), lives[b].unwrap());
                if groups[a] == groups[b] || a1 < b0 || b1 < a0 {
                    continue;
                }
                let range = |i: usize| {
                    let at = plan.offset(BufferId(i));
                    at..at + buffer_bytes(&program, BufferId(i), most)
                };
                let (x, y) = (range(a), range(b));
                assert!(x.end <= y.start || y.end <= x.start, "buffers {a} and {b} overlap");
            }
        }
    }

    #[test]
    fn rows_that_were_gathered_stay_for_steps_that_do_not_gather() {
        let program = llama_program(2);
        let lives = lives(&program);
        let gathers = program.ops.iter().filter_map(|op| match op {
            Op::GatherLast { x, out } => Some((*x, *out)),
            _ => None,
        });
        for (x, out) in gathers {
            let (rows, copy) = (lives[x.0].unwrap(), lives[out.0].unwrap());
            assert!(rows.1 >= copy.1 && copy.1 > copy.0, "{rows:?} {copy:?}");
        }
    }

    #[test]
    fn layers_share_their_memory_and_the_residual_stays_in_place() {
        let most = StepRows { tokens: 64, sequences: 4 };
        let few = ArenaPlan::new(&llama_program(2), most);
        let many = ArenaPlan::new(&llama_program(20), most);
        assert_eq!(few.bytes, many.bytes, "the arena does not grow with layers");
        let program = llama_program(2);
        let residuals = program.ops.iter().filter_map(|op| match op {
            Op::Linear { add: Some(add), out, .. } => Some((*add, *out)),
            _ => None,
        });
        for (add, out) in residuals {
            assert_eq!(few.offset(add), few.offset(out));
        }
        assert!((0..program.buffers.len()).all(|b| few.offset(BufferId(b)).is_multiple_of(ALIGNMENT_BYTES)));
    }
}
