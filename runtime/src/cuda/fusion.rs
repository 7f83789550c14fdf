//! Ops of decode steps put together: a product with the norm before it and with what is done to its result, one launch
//! instead of three; or all products between two attentions. The program stays as it is; steps with more rows, or with prefill chunks, run its ops one by one.

use super::kernels::{After, ChainSizes, FusedShape, chain_for, fused_for};
use super::memory::DevicePointer;
use super::plan::{
    ChainOp, DeviceOp, FusedLinear, GatedActivation, InputNorm, LinearOp, NextQkv, Plan, RotatedOutput,
};
use mserve_planner::model::{BufferId, Op, Program};

/// The ops of decode steps of up to so many rows, one token a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodeOps {
    pub rows_max: usize,
    pub ops: Vec<DeviceOp>,
}

/// Rows up to which the choice of kernels stays the same.
const ROW_CLASSES: [usize; 6] = [1, 8, 16, 32, 64, usize::MAX];

/// From here on the product of gate and up may be computed together with the gate, whichever way is measured to be faster.
pub const GATED_ROWS: usize = 32;

impl Plan {
    /// Makes the lists of decode steps. `program` is the one that this plan is of.
    pub fn fuse(&mut self, program: &Program, abilities: Abilities) {
        let list = |&rows_max: &usize| DecodeOps {
            rows_max,
            ops: Fusion { program, ops: &self.ops, rows: rows_max, abilities }.run(),
        };
        self.decode = ROW_CLASSES.iter().map(list).collect();
        self.prefill = Fusion { program, ops: &self.ops, rows: usize::MAX, abilities }.gates();
    }
}

/// What a card can do beyond the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Abilities {
    pub clusters: bool,
    /// All blocks of a launch run at a time, and `chain_linear.cu` is there.
    pub chains: bool,
}

struct Fusion<'a> {
    program: &'a Program,
    /// One for each of the program's.
    ops: &'a [DeviceOp],
    rows: usize,
    abilities: Abilities,
}

/// Ops that one launch replaces, and the launch.
type Replacement = (usize, DeviceOp);

impl Fusion<'_> {
    fn run(&self) -> Vec<DeviceOp> {
        let mut out = Vec::with_capacity(self.ops.len());
        let mut at = 0;
        // Rows are outputs, in order: gathering would copy them. What reads the copy reads the rows themselves.
        let mut gathered: Option<DevicePointer> = None;
        while at < self.ops.len() {
            if let (Op::GatherLast { out: copy, .. }, DeviceOp::GatherLast { x, .. }) =
                (&self.program.ops[at], &self.ops[at])
                && self.read_only_by(*copy, &[at + 1])
                && matches!(self.ops.get(at + 1), Some(DeviceOp::Norm { add: None, .. } | DeviceOp::Linear(_)))
            {
                gathered = Some(*x);
                at += 1;
                continue;
            }
            let gated = || self.gated(at).filter(|_| self.rows >= GATED_ROWS).map(|op| (2, op));
            let (count, mut op) = self.chain(at).or_else(|| self.replacement(at)).or_else(gated).unwrap_or((1, self.ops[at]));
            if let Some(from) = gathered.take() {
                match &mut op {
                    DeviceOp::Norm { x, .. } => *x = from,
                    DeviceOp::Linear(linear) | DeviceOp::Fused(FusedLinear { linear, .. }) => linear.x = from,
                    _ => {}
                }
            }
            out.push(op);
            at += count;
        }
        out
    }

    /// All ops, products together with the gates behind them.
    fn gates(&self) -> Vec<DeviceOp> {
        let mut out = Vec::with_capacity(self.ops.len());
        let mut at = 0;
        while at < self.ops.len() {
            let gated = self.gated(at);
            at += if gated.is_some() { 2 } else { 1 };
            out.push(gated.unwrap_or_else(|| self.ops[at - 1]));
        }
        out
    }

    /// The product at `at` and the gate after it.
    fn gated(&self, at: usize) -> Option<DeviceOp> {
        let DeviceOp::Linear(linear) = &self.ops[at] else { return None };
        let DeviceOp::GatedAct { activation: GatedActivation::Silu, out: to, .. } = self.ops.get(at + 1)? else {
            return None;
        };
        let Op::Linear { out, .. } = &self.program.ops[at] else { return None };
        let bare = linear.residual.is_none() && linear.bias.is_none() && !linear.f32_out;
        (bare && self.read_only_by(*out, &[at + 1])).then_some(DeviceOp::Linear(LinearOp {
            out: *to,
            gate_up: Some(linear.out),
            ..*linear
        }))
    }

    /// What lies between the attention before `at` and the next.
    fn chain(&self, at: usize) -> Option<Replacement> {
        let &[
            DeviceOp::Linear(o),
            DeviceOp::Norm { weight, add: None, eps, offset: 0.0, .. },
            DeviceOp::Linear(gate_up),
            DeviceOp::GatedAct { activation: GatedActivation::Silu, .. },
            DeviceOp::Linear(down),
        ] = self.ops.get(at..at + 5)?
        else {
            return None;
        };
        let adds = |linear: &LinearOp| linear.residual == Some(o.out) && linear.out == o.out && linear.bias.is_none();
        let alone = (1..=3).all(|i| self.output_of(at + i).is_some_and(|out| self.read_only_by(out, &[at + i + 1])));
        let DeviceOp::Linear(LinearOp { out: inner, .. }) = self.gated(at + 2)? else { return None };
        let next = self.next_qkv(at + 5, gate_up.k);
        let sizes = ChainSizes { hidden: o.n, attention: o.k, inner: down.k };
        let head_dim = next.map_or(0, |n| n.rotated.heads.head_dim);
        let fits = chain_for(u32::try_from(self.rows).ok()?, &sizes, head_dim);
        if !self.abilities.chains || !adds(&o) || !adds(&down) || !alone || !fits {
            return None;
        }
        let (mlp_norm, count) = (InputNorm { weight, eps }, if next.is_some() { 8 } else { 5 });
        let chain = ChainOp {
            x: o.x,
            h: o.out,
            inner,
            sizes,
            o: o.weight,
            gate_up: gate_up.weight,
            down: down.weight,
            mlp_norm,
            next,
        };
        Some((count, DeviceOp::Chain(chain)))
    }

    /// Norm, product and rotation in front of an attention.
    fn next_qkv(&self, at: usize, hidden: u32) -> Option<NextQkv> {
        let &[
            DeviceOp::Norm { weight, add: None, eps, offset: 0.0, .. },
            DeviceOp::Linear(qkv),
            DeviceOp::RopeKvWrite { heads, rope: Some(rope), q_norm: None, k_norm: None, layer, whole: true, .. },
        ] = self.ops.get(at..at + 3)?
        else {
            return None;
        };
        let alone = self.read_only_by(self.output_of(at)?, &[at + 1])
            && self.read_only_by(self.output_of(at + 1)?, &[at + 2, at + 3]);
        let bare = qkv.residual.is_none() && qkv.out_stride == qkv.n && qkv.k == hidden;
        let rotated = RotatedOutput { heads, rope, layer };
        let norm = InputNorm { weight, eps };
        let next = NextQkv { norm, weight: qkv.weight, bias: qkv.bias, out: qkv.out, n: qkv.n, rotated };
        (alone && bare).then_some(next)
    }

    /// The buffer that an op of a chain writes.
    fn output_of(&self, at: usize) -> Option<BufferId> {
        match self.program.ops.get(at)? {
            Op::Norm { out, .. } | Op::Linear { out, .. } | Op::GatedAct { out, .. } => Some(*out),
            _ => None,
        }
    }

    fn replacement(&self, at: usize) -> Option<Replacement> {
        if let (Op::Norm { out, .. }, DeviceOp::Norm { x, weight, add: None, eps, offset: 0.0, .. }) =
            (&self.program.ops[at], &self.ops[at])
        {
            let DeviceOp::Linear(linear) = self.ops.get(at + 1)? else { return None };
            if !self.read_only_by(*out, &[at + 1]) {
                return None;
            }
            let norm = InputNorm { weight: *weight, eps: *eps };
            let (count, op) = self.product(at + 1, &LinearOp { x: *x, ..*linear }, Some(norm))?;
            return Some((count + 1, op));
        }
        let DeviceOp::Linear(linear) = &self.ops[at] else { return None };
        self.product(at, linear, None)
    }

    /// The product at `at` with what follows, or by itself.
    fn product(&self, at: usize, linear: &LinearOp, norm: Option<InputNorm>) -> Option<Replacement> {
        if linear.out_stride != linear.n {
            return None;
        }
        let fused = |linear: LinearOp, after, rotated: Option<RotatedOutput>| {
            let head_dim = rotated.map_or(0, |r| r.heads.head_dim);
            let (n, k, rows) = (linear.n, linear.k, u32::try_from(self.rows).ok()?);
            let shape = FusedShape { after, rows, n, k, norm: norm.is_some(), head_dim };
            let (kernel, clusters) = fused_for(&shape, self.abilities.clusters)?;
            Some(DeviceOp::Fused(FusedLinear { linear, norm, rotated, kernel, clusters }))
        };
        let out = match &self.program.ops[at] {
            Op::Linear { out, .. } | Op::LmHead { out, .. } => *out,
            _ => return None,
        };
        let bare = linear.residual.is_none() && !linear.f32_out;
        match self.ops.get(at + 1) {
            Some(DeviceOp::GatedAct { activation: GatedActivation::Silu, out: to, width, .. })
                if bare && linear.bias.is_none() && self.read_only_by(out, &[at + 1]) =>
            {
                let gated = LinearOp { out: *to, n: *width, out_stride: *width, ..*linear };
                Some((2, fused(gated, After::Gated, None)?))
            }
            Some(DeviceOp::RopeKvWrite {
                heads,
                rope: Some(rope),
                q_norm: None,
                k_norm: None,
                layer,
                whole: true,
                ..
            }) if bare && self.read_only_by(out, &[at + 1, at + 2]) => {
                let rotated = RotatedOutput { heads: *heads, rope: *rope, layer: *layer };
                Some((2, fused(*linear, After::Rotated, Some(rotated))?))
            }
            _ => Some((1, fused(*linear, After::Plain, None)?)),
        }
    }

    /// Whether these ops and no others read the buffer.
    fn read_only_by(&self, buffer: BufferId, readers: &[usize]) -> bool {
        let reads = |op: &Op| match op {
            Op::Norm { x, add, .. } | Op::Linear { x, add, .. } => *x == buffer || *add == Some(buffer),
            Op::QkNormRopeKvWrite { qkv, .. } | Op::Attention { qkv, .. } => *qkv == buffer,
            Op::GatedAct { gate_up, .. } => *gate_up == buffer,
            Op::GatherLast { x, .. }
            | Op::LmHead { x, .. }
            | Op::Act { x, .. }
            | Op::Pool { x, .. }
            | Op::L2Normalize { x, .. }
            | Op::SoftCap { x, .. } => *x == buffer,
            Op::Embed { .. } => false,
            Op::Planned(op) => op.x == buffer || op.add == Some(buffer),
        };
        let found = self.program.ops.iter().enumerate().filter(|(_, op)| reads(op)).map(|(at, _)| at);
        buffer != self.program.output && found.eq(readers.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cuda::arena::{ArenaPlan, StepRows};
    use crate::cuda::plan::{Bases, plan};
    use crate::cuda::testing::llama_program;
    use crate::cuda::weights::WeightLayout;

    fn fused(layers: usize) -> Plan {
        let program = llama_program(layers);
        let weights = WeightLayout::new(&program).unwrap();
        let arena = ArenaPlan::new(&program, StepRows { tokens: 32, sequences: 4 });
        let mut plan = plan(&program, &weights, &arena, Bases { weights: 1 << 40, arena: 1 << 41 }).unwrap();
        plan.fuse(&program, Abilities { clusters: true, chains: false });
        plan
    }

    fn kinds(ops: &[DeviceOp]) -> Vec<&'static str> {
        let kind = |op: &DeviceOp| match op {
            DeviceOp::Embed { .. } => "embed",
            DeviceOp::Norm { .. } => "norm",
            DeviceOp::Linear(_) => "linear",
            DeviceOp::RopeKvWrite { .. } => "rope",
            DeviceOp::Attention { .. } => "attention",
            DeviceOp::GatedAct { .. } => "act",
            DeviceOp::GatherLast { .. } => "gather",
            DeviceOp::Fused(f) if f.rotated.is_some() => "qkv+rope",
            DeviceOp::Fused(f) if f.norm.is_some() && f.linear.f32_out => "norm+head",
            DeviceOp::Fused(f) if f.norm.is_some() => "norm+mlp",
            DeviceOp::Fused(_) => "product",
        };
        ops.iter().map(kind).collect()
    }

    #[test]
    fn a_layer_of_few_rows_is_five_launches() {
        let plan = fused(1);
        let few = kinds(&plan.decode[1].ops);
        assert_eq!(few, ["embed", "qkv+rope", "attention", "product", "norm+mlp", "product", "norm", "product"]);
        let many = kinds(&plan.decode.last().unwrap().ops);
        assert_eq!(many.len(), plan.ops.len() - 2, "{many:?}");
        assert!(!many.contains(&"gather") && !many.contains(&"act"));
    }

    #[test]
    fn with_chunks_only_the_gate_is_part_of_its_product() {
        let plan = fused(2);
        assert_eq!(plan.prefill.len(), plan.ops.len() - 2);
        let at = plan.ops.iter().position(|op| matches!(op, DeviceOp::GatedAct { .. })).unwrap();
        let (DeviceOp::Linear(product), DeviceOp::GatedAct { out, .. }) = (plan.ops[at - 1], plan.ops[at]) else {
            panic!("{:?}", plan.ops)
        };
        let DeviceOp::Linear(gated) = plan.prefill[at - 1] else { panic!("{:?}", plan.prefill) };
        assert_eq!(gated, LinearOp { out, gate_up: Some(product.out), ..product });
        assert_eq!(plan.prefill[at], plan.ops[at + 1]);
    }

    #[test]
    fn a_fused_op_reads_what_the_first_read_and_writes_what_the_last_wrote() {
        let plan = fused(2);
        let fused: Vec<FusedLinear> = plan.decode[0]
            .ops
            .iter()
            .filter_map(|op| match op {
                DeviceOp::Fused(f) => Some(*f),
                _ => None,
            })
            .collect();
        let DeviceOp::Norm { x, weight, .. } = plan.ops[1] else { panic!("norm first") };
        assert_eq!((fused[0].linear.x, fused[0].norm.unwrap().weight), (x, weight));
        let DeviceOp::GatherLast { x, .. } = plan.ops[plan.ops.len() - 3] else { panic!("{:?}", plan.ops) };
        let [.., DeviceOp::Norm { x: normed, .. }, DeviceOp::Fused(head)] = plan.decode[0].ops[..] else {
            panic!("{:?}", plan.decode[0].ops)
        };
        assert_eq!((normed, head.linear.out), (x, plan.logits));
    }
}
