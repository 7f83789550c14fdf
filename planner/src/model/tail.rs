//! Text is generated from the last row of each sequence. Behind the last op in which tokens see one another every row
//! goes its own way, so rows that no output is made of are left there: of the last layer, prompts pass attention alone.

use super::{Buffer, BufferId, Feature, Op, Program, Rows};

/// The program with its `GatherLast` moved forward: one for each buffer `[T, width]` that is used from there on, into a
/// copy `[S, width]`. Ops behind it work on S rows. Results stay the same.
pub fn gather_early(program: Program) -> Program {
    match Tail::of(&program) {
        Some(tail) => tail.gathered_before(program),
        None => program,
    }
}

/// Ops on all tokens that could do with the rows of outputs, and the gather behind them.
struct Tail {
    begin: usize,
    gather: usize,
    x: BufferId,
    out: BufferId,
}

impl Tail {
    fn of(program: &Program) -> Option<Self> {
        let begin = 1 + program.ops.iter().rposition(|op| !works_by_rows(op) && gathered(op).is_none())?;
        let mut gathers = (begin..).zip(&program.ops[begin..]).filter_map(|(at, op)| Some((at, gathered(op)?)));
        let (gather, (x, out)) = gathers.next()?;
        let later = program.ops[gather + 1..].iter().flat_map(Op::buffers);
        let only = gathers.next().is_none() && later.into_iter().all(|id| program.buffer(id).rows == Rows::Sequences);
        (only && begin < gather).then_some(Self { begin, gather, x, out })
    }

    fn gathered_before(&self, mut program: Program) -> Program {
        let mut tail = program.ops.split_off(self.begin);
        let behind = tail.split_off(self.gather - self.begin + 1);
        let mut names: Vec<BufferId> = (0..program.buffers.len()).map(BufferId).collect();
        self.fill(&mut program, &tail, &mut names);
        // What was gathered already has the rows that are wanted.
        tail.pop();
        names[self.out.0] = names[self.x.0];
        program.ops.extend(tail.iter().chain(&behind).map(|op| op.renamed(|id| names[id.0])));
        program.output = names[program.output.0];
        without(program, self.out)
    }

    /// Makes the buffers of `tail` have rows of sequences: those used before as copies under new `names`, gathered where
    /// their values are needed.
    fn fill(&self, program: &mut Program, tail: &[Op], names: &mut [BufferId]) {
        let mut before = vec![false; names.len()];
        program.ops.iter().flat_map(Op::buffers).for_each(|id| before[id.0] = true);
        for op in tail {
            for id in op.buffers().filter(|&id| id != self.out) {
                if !before[id.0] {
                    program.buffers[id.0].rows = Rows::Sequences;
                } else if names[id.0] == id {
                    let copy = BufferId(program.buffers.len());
                    program.buffers.push(Buffer { rows: Rows::Sequences, ..program.buffer(id) });
                    names[id.0] = copy;
                    if op.reads().any(|read| read == id) {
                        program.ops.push(Op::GatherLast { x: id, out: copy });
                    }
                }
            }
        }
    }
}

fn gathered(op: &Op) -> Option<(BufferId, BufferId)> {
    match op {
        Op::GatherLast { x, out } => Some((*x, *out)),
        _ => None,
    }
}

/// Whether a row of its result follows from the same rows of its operands alone. What is not known to is not.
fn works_by_rows(op: &Op) -> bool {
    match op {
        Op::Norm { .. }
        | Op::Linear { .. }
        | Op::GatedAct { .. }
        | Op::Act { .. }
        | Op::L2Normalize { .. }
        | Op::LmHead { .. }
        | Op::SoftCap { .. } => true,
        Op::Planned(op) => matches!(op.feature, Feature::Mlp | Feature::Experts),
        Op::Embed { .. }
        | Op::QkNormRopeKvWrite { .. }
        | Op::Attention { .. }
        | Op::GatherLast { .. }
        | Op::Pool { .. } => false,
    }
}

/// The program less a buffer that no op uses.
fn without(mut program: Program, unused: BufferId) -> Program {
    let name = |id: BufferId| BufferId(if id > unused { id.0 - 1 } else { id.0 });
    program.buffers.remove(unused.0);
    program.ops.iter_mut().for_each(|op| *op = op.renamed(name));
    program.output = name(program.output);
    program
}
