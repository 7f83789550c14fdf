//! Ops of decode steps put together: a product with the norm before it and with what is done to its result, one launch
//! instead of three; or all products between two attentions. The program stays as it is; steps with more rows, or with
//! prefill chunks, run its ops one by one.

use super::kernels::{After, ChainSizes, FusedShape, WIDE, WIDE_ROWS_MIN, chain_for, fused_for};
use super::plan::{ChainOp, DeviceOp, FusedLinear, GatedActivation, InputNorm, LinearOp, NextQkv, Plan, RotatedOutput};
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
/// The same of q, k and v and their rotation.
pub const ROTATED_ROWS: usize = WIDE_ROWS_MIN;

impl Plan {
    /// Makes the lists of decode steps. `program` is the one that this plan is of.
    pub fn fuse(&mut self, program: &Program, abilities: Abilities) {
        let (output, ungathered) = (program.output, without_gathers(program));
        let list = |&rows_max: &usize| {
            let fusion = Fusion { program: &ungathered, output, ops: &self.ungathered, rows: rows_max, abilities };
            DecodeOps { rows_max, ops: fusion.run() }
        };
        self.decode = ROW_CLASSES.iter().map(list).collect();
        self.prefill = Fusion { program: &program.ops, output, ops: &self.ops, rows: usize::MAX, abilities }.pairs();
    }
}

/// What a card can do beyond the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Abilities {
    pub clusters: bool,
    /// Blocks of a launch that fits the card run all at a time, so that they may wait for one another: nobody else's kernels
    /// run beside ours, and `chain_linear.cu` is there.
    pub chains: bool,
}

/// The program's ops in steps whose rows are outputs, in order. Gathers would copy all rows there: what works on the copy
/// works on the rows themselves. Nothing else needs them any more: a gather of rows that something does stays.
pub fn without_gathers(program: &Program) -> Vec<Op> {
    let mut names: Vec<BufferId> = (0..program.buffers.len()).map(BufferId).collect();
    let mut ops = Vec::with_capacity(program.ops.len());
    for (at, op) in program.ops.iter().enumerate() {
        match op {
            Op::GatherLast { x, out } if !program.ops[at + 1..].iter().flat_map(Op::buffers).any(|id| id == *x) => {
                names[out.0] = names[x.0];
            }
            op => ops.push(op.renamed(|id| names[id.0])),
        }
    }
    ops
}

struct Fusion<'a> {
    program: &'a [Op],
    /// What the program returns.
    output: BufferId,
    /// One for each of the program's.
    ops: &'a [DeviceOp],
    rows: usize,
    abilities: Abilities,
}

/// Ops that one launch replaces, and the launch.
type Replacement = (usize, DeviceOp);

impl Fusion<'_> {
    fn run(&self) -> Vec<DeviceOp> {
        self.with(|at| self.chain(at).or_else(|| self.replacement(at)).or_else(|| self.pair(at)))
    }

    /// All ops, products together with the gates and rotations behind them.
    fn pairs(&self) -> Vec<DeviceOp> {
        self.with(|at| self.pair(at))
    }

    /// All ops, some of them replaced.
    fn with(&self, replacement: impl Fn(usize) -> Option<Replacement>) -> Vec<DeviceOp> {
        let mut out = Vec::with_capacity(self.ops.len());
        let mut at = 0;
        while at < self.ops.len() {
            let (count, op) = replacement(at).unwrap_or((1, self.ops[at]));
            out.push(op);
            at += count;
        }
        out
    }

    /// The product at `at` and what follows, where one kernel may do both with this many rows.
    fn pair(&self, at: usize) -> Option<Replacement> {
        let gated = self.gated(at).filter(|_| self.rows >= GATED_ROWS);
        let op = gated.or_else(|| self.rotated(at).filter(|_| self.rows >= ROTATED_ROWS))?;
        Some((2, op))
    }

    /// The product at `at` and the rotation after it.
    fn rotated(&self, at: usize) -> Option<DeviceOp> {
        let DeviceOp::Linear(linear) = &self.ops[at] else { return None };
        let rotated = self.rotation(at, linear)?;
        let known = WIDE.iter().any(|w| w.rotates(rotated.heads.head_dim));
        known.then_some(DeviceOp::Linear(LinearOp { rotated: Some(rotated), ..*linear }))
    }

    /// What the rotation behind the product at `at` does, if all is as kernels that do both want it.
    fn rotation(&self, at: usize, linear: &LinearOp) -> Option<RotatedOutput> {
        let Op::Linear { out, .. } = &self.program[at] else { return None };
        let Some(DeviceOp::RopeKvWrite {
            heads, rope: Some(rope), q_norm: None, k_norm: None, layer, whole: true, ..
        }) = self.ops.get(at + 1)
        else {
            return None;
        };
        let bare = linear.residual.is_none() && !linear.f32_out;
        (bare && self.read_only_by(*out, &[at + 1, at + 2])).then_some(RotatedOutput {
            heads: *heads,
            rope: *rope,
            layer: *layer,
        })
    }

    /// The product at `at` and the gate after it.
    fn gated(&self, at: usize) -> Option<DeviceOp> {
        let DeviceOp::Linear(linear) = &self.ops[at] else { return None };
        let DeviceOp::GatedAct { activation: GatedActivation::Silu, out: to, .. } = self.ops.get(at + 1)? else {
            return None;
        };
        let Op::Linear { out, .. } = &self.program[at] else { return None };
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
        let adds = down.residual == Some(o.out) && down.out == o.out && o.bias.is_none() && down.bias.is_none();
        let alone = (1..=3).all(|i| self.output_of(at + i).is_some_and(|out| self.read_only_by(out, &[at + i + 1])));
        let DeviceOp::Linear(LinearOp { out: inner, .. }) = self.gated(at + 2)? else { return None };
        let next = self.next_qkv(at + 5, gate_up.k);
        let sizes = ChainSizes { hidden: o.n, attention: o.k, inner: down.k };
        let head_dim = next.map_or(0, |n| n.rotated.heads.head_dim);
        let fits = chain_for(u32::try_from(self.rows).ok()?, &sizes, head_dim);
        if !self.abilities.chains || !adds || !alone || !fits {
            return None;
        }
        let (mlp_norm, count) = (InputNorm { weight, eps }, if next.is_some() { 8 } else { 5 });
        let chain = ChainOp {
            x: o.x,
            residual: o.residual?,
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
        let &[DeviceOp::Norm { weight, add: None, eps, offset: 0.0, .. }, DeviceOp::Linear(qkv)] =
            self.ops.get(at..at + 2)?
        else {
            return None;
        };
        let rotated = self.rotation(at + 1, &qkv)?;
        let alone = self.read_only_by(self.output_of(at)?, &[at + 1]);
        let norm = InputNorm { weight, eps };
        let next = NextQkv { norm, weight: qkv.weight, bias: qkv.bias, out: qkv.out, n: qkv.n, rotated };
        (alone && qkv.out_stride == qkv.n && qkv.k == hidden).then_some(next)
    }

    /// The buffer that an op of a chain writes.
    fn output_of(&self, at: usize) -> Option<BufferId> {
        match self.program.get(at)? {
            Op::Norm { out, .. } | Op::Linear { out, .. } | Op::GatedAct { out, .. } => Some(*out),
            _ => None,
        }
    }

    fn replacement(&self, at: usize) -> Option<Replacement> {
        if let (Op::Norm { out, .. }, DeviceOp::Norm { x, weight, add: None, eps, offset: 0.0, .. }) =
            (&self.program[at], &self.ops[at])
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
        let fused = |linear: LinearOp, after| {
            let head_dim = linear.rotated.map_or(0, |r| r.heads.head_dim);
            let (n, k, rows) = (linear.n, linear.k, u32::try_from(self.rows).ok()?);
            let shape = FusedShape { after, rows, n, k, norm: norm.is_some(), head_dim };
            let (kernel, clusters) = fused_for(&shape, self.abilities.clusters)?;
            Some(DeviceOp::Fused(FusedLinear { linear, norm, kernel, clusters }))
        };
        let out = match &self.program[at] {
            Op::Linear { out, .. } | Op::LmHead { out, .. } => *out,
            _ => return None,
        };
        let bare = linear.residual.is_none() && !linear.f32_out;
        match self.ops.get(at + 1) {
            Some(DeviceOp::GatedAct { activation: GatedActivation::Silu, out: to, width, .. })
                if bare && linear.bias.is_none() && self.read_only_by(out, &[at + 1]) =>
            {
                let gated = LinearOp { out: *to, n: *width, out_stride: *width, ..*linear };
                Some((2, fused(gated, After::Gated)?))
            }
            _ => match self.rotation(at, linear) {
                rotated @ Some(_) => Some((2, fused(LinearOp { rotated, ..*linear }, After::Rotated)?)),
                None => Some((1, fused(*linear, After::Plain)?)),
            },
        }
    }

    /// Whether these ops and no others read the buffer.
    fn read_only_by(&self, buffer: BufferId, readers: &[usize]) -> bool {
        let readers_of = self.program.iter().enumerate().filter(|(_, op)| op.reads().any(|id| id == buffer));
        buffer != self.output && readers_of.map(|(at, _)| at).eq(readers.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cuda::arena::{ArenaPlan, StepRows};
    use crate::cuda::plan::{Bases, plan};
    use crate::cuda::testing::{llama_program, llama_program_of, llama_spec};
    use crate::cuda::weights::WeightLayout;
    use mserve_planner::model::families;
    use mserve_planner::model::{Activation, Rows};

    fn fused(layers: usize) -> Plan {
        fused_of(&llama_program(layers), false)
    }

    fn fused_of(program: &Program, chains: bool) -> Plan {
        let weights = WeightLayout::new(program).unwrap();
        let arena = ArenaPlan::new(program, StepRows { tokens: 32, sequences: 4 });
        let mut plan = plan(program, &weights, &arena, Bases { weights: 1 << 40, arena: 1 << 41 }).unwrap();
        plan.fuse(program, Abilities { clusters: true, chains });
        plan
    }

    fn kinds(ops: &[DeviceOp]) -> Vec<&'static str> {
        let kind = |op: &DeviceOp| match op {
            DeviceOp::Embed { .. } => "embed",
            DeviceOp::Norm { .. } => "norm",
            DeviceOp::Linear(l) if l.rotated.is_some() => "linear+rope",
            DeviceOp::Linear(_) => "linear",
            DeviceOp::RopeKvWrite { .. } => "rope",
            DeviceOp::Attention { .. } => "attention",
            DeviceOp::GatedAct { .. } => "act",
            DeviceOp::GatherLast { .. } => "gather",
            DeviceOp::Fused(f) if f.linear.rotated.is_some() => "qkv+rope",
            DeviceOp::Fused(f) if f.norm.is_some() && f.linear.f32_out => "norm+head",
            DeviceOp::Fused(f) if f.norm.is_some() => "norm+mlp",
            DeviceOp::Fused(_) => "product",
            DeviceOp::Chain(c) if c.next.is_some() => "chain",
            DeviceOp::Chain(_) => "last chain",
        };
        ops.iter().map(kind).collect()
    }

    #[test]
    fn a_layer_of_few_rows_is_five_launches() {
        let plan = fused(1);
        let few = kinds(&plan.decode[1].ops);
        assert_eq!(few, ["embed", "qkv+rope", "attention", "product", "norm+mlp", "product", "norm", "product"]);
        let many = kinds(&plan.decode.last().unwrap().ops);
        assert_eq!(many.len(), 11, "{many:?}");
        assert!(!many.contains(&"gather") && !many.contains(&"act"));
    }

    /// Two heads of 64, one of KV: heads that a chain turns.
    fn spec_with_heads_of_64() -> mserve_planner::model::ModelSpec {
        use mserve_planner::model::{AttentionSpec, Mixer};
        let mut spec = llama_spec(2);
        for layer in &mut spec.layers {
            let Mixer::Attention(attention) = &mut layer.mixer else { panic!("attention") };
            let mut rope = attention.rope.clone();
            rope.as_mut().unwrap().rotary_dim = 64;
            *attention = AttentionSpec { rope, ..AttentionSpec::grouped(2, 1, 64) };
        }
        spec
    }

    #[test]
    fn some_dozens_of_rows_of_a_small_model_take_two_launches_a_layer() {
        let program = families::program(&spec_with_heads_of_64());
        let plan = fused_of(&program, true);
        let lists: Vec<Vec<&str>> = plan.decode.iter().map(|d| kinds(&d.ops)).collect();
        let [.., thirty_two, sixty_four, _] = &lists[..] else { panic!("{lists:?}") };
        for list in [thirty_two, sixty_four] {
            assert_eq!(list[2..6], ["attention", "chain", "attention", "last chain"], "{list:?}");
        }
        let others = [&lists[0], &lists[1], &lists[2], &lists[5]];
        assert!(others.iter().all(|list| list.iter().all(|kind| !kind.contains("chain"))), "{others:?}");
        let without = fused_of(&program, false);
        assert!(without.decode.iter().all(|d| d.ops.iter().all(|op| !matches!(op, DeviceOp::Chain(_)))));
    }

    #[test]
    fn a_chain_writes_what_its_products_wrote_and_turns_heads_for_the_next_attention() {
        let plan = fused_of(&families::program(&spec_with_heads_of_64()), true);
        let chains: Vec<ChainOp> = plan.decode[4]
            .ops
            .iter()
            .filter_map(|op| match op {
                DeviceOp::Chain(chain) => Some(*chain),
                _ => None,
            })
            .collect();
        let next = chains[0].next.unwrap();
        assert_eq!((next.rotated.layer, next.n, chains[1].next), (1, 256, None));
        let products: Vec<LinearOp> = plan
            .ungathered
            .iter()
            .filter_map(|op| match op {
                DeviceOp::Linear(linear) => Some(*linear),
                _ => None,
            })
            .collect();
        let [_, o, gate_up, down, qkv, ..] = products[..] else { panic!("{products:?}") };
        let chain = chains[0];
        assert_eq!((chain.x, chain.o, chain.h, Some(chain.residual)), (o.x, o.weight, down.out, o.residual));
        assert_eq!((chain.gate_up, chain.inner, chain.down), (gate_up.weight, down.x, down.weight));
        assert_eq!((next.weight, next.out, chain.sizes.inner), (qkv.weight, qkv.out, 160));
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
    fn heads_of_64_rotate_where_many_rows_of_them_are_computed() {
        let plan = fused_of(&llama_program_of(2, 64), false);
        let together = |ops: &[DeviceOp]| kinds(ops).iter().filter(|k| **k == "linear+rope").count();
        let decode: Vec<usize> = plan.decode.iter().map(|list| together(&list.ops)).collect();
        assert_eq!((together(&plan.prefill), decode), (2, vec![0, 0, 0, 0, 0, 2]));
        let at = plan.ops.iter().position(|op| matches!(op, DeviceOp::RopeKvWrite { .. })).unwrap();
        let (DeviceOp::Linear(product), DeviceOp::RopeKvWrite { heads, rope: Some(rope), layer, .. }) =
            (plan.ops[at - 1], plan.ops[at])
        else {
            panic!("{:?}", plan.ops)
        };
        let DeviceOp::Linear(rotated) = plan.prefill[at - 1] else { panic!("{:?}", plan.prefill) };
        assert_eq!(rotated, LinearOp { rotated: Some(RotatedOutput { heads, rope, layer }), ..product });
        assert_eq!((rotated.shape(300).rotated, rotated.shape(300).alone()), (64, product.shape(300)));
        assert_eq!(plan.prefill[at], plan.ops[at + 1]);
    }

    #[test]
    fn with_chunks_the_last_layer_goes_on_with_the_rows_of_outputs() {
        let plan = fused(2);
        let last = kinds(&plan.prefill[plan.prefill.len() - 9..]);
        assert_eq!(
            last,
            ["attention", "gather", "gather", "linear", "norm", "linear", "linear", "norm", "linear"],
            "{:?}",
            plan.prefill
        );
        let rows = |op: &DeviceOp| match op {
            DeviceOp::Linear(LinearOp { rows, .. }) | DeviceOp::Norm { rows, .. } => Some(*rows),
            _ => None,
        };
        let rows: Vec<Rows> = plan.prefill.iter().filter_map(rows).collect();
        assert_eq!(rows, [[Rows::Tokens; 8].as_slice(), &[Rows::Sequences; 6]].concat());
    }

    #[test]
    fn without_chunks_the_last_layer_is_as_the_others() {
        let plan = fused(2);
        for list in &plan.decode {
            let kinds = kinds(&list.ops);
            let layer = (kinds.len() - 3) / 2;
            assert_eq!(kinds[1..=layer], kinds[1 + layer..=2 * layer], "{} rows", list.rows_max);
        }
        let [.., o, norm, _, down, _, _] = plan.decode.last().unwrap().ops[..] else { panic!() };
        let (DeviceOp::Linear(o), DeviceOp::Norm { x: normed, .. }, DeviceOp::Linear(down)) = (o, norm, down) else {
            panic!("{o:?} {norm:?} {down:?}")
        };
        let attention = plan.ops.iter().rfind(|op| matches!(op, DeviceOp::Attention { .. })).unwrap();
        let DeviceOp::Attention { out, .. } = attention else { panic!() };
        let residuals = plan.ops.iter().filter_map(|op| match op {
            DeviceOp::GatherLast { x, .. } => Some(*x),
            _ => None,
        });
        assert_eq!([o.x, o.residual.unwrap()].to_vec(), residuals.collect::<Vec<_>>());
        assert_eq!((o.x, o.out, down.residual), (*out, normed, Some(normed)));
    }

    #[test]
    fn rows_that_are_needed_beside_their_copy_are_gathered_in_every_step() {
        let mut program = llama_program(1);
        let whole = without_gathers(&program).len();
        assert_eq!(program.ops.len() - whole, 2);
        let at = program.ops.iter().position(|op| matches!(op, Op::GatherLast { .. })).unwrap();
        let Op::GatherLast { x, .. } = program.ops[at] else { panic!() };
        let again = program.buffers.len();
        program.buffers.push(program.buffer(x));
        program.ops.push(Op::Act { x, activation: Activation::Relu, out: BufferId(again) });
        assert_eq!(program.ops.len() - without_gathers(&program).len(), 1);
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
        let [.., DeviceOp::Fused(down), DeviceOp::Norm { x: normed, .. }, DeviceOp::Fused(head)] =
            plan.decode[0].ops[..]
        else {
            panic!("{:?}", plan.decode[0].ops)
        };
        assert_eq!((normed, head.linear.out), (down.linear.out, plan.logits));
    }
}
