//! A program with every address filled in: what the executor walks, step after step.

use super::CudaError;
use super::arena::{ArenaPlan, is_logits};
use super::fusion::{DecodeOps, without_gathers};
use super::gemm::GemmShape;
use super::kernels::ChainSizes;
use super::memory::DevicePointer;
use super::metadata::StepShape;
use super::weights::WeightLayout;
use mserve_planner::model::{
    Activation, AttentionId, BufferId, KvSource, LinearWeights, Mask, NormKind, Op, Program, Rows, WeightId,
};

/// Logits rows begin at multiples of this many elements: the sampler reads four at a time.
pub const LOGITS_ALIGNMENT: u64 = 8;

/// Where everything begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bases {
    pub weights: DevicePointer,
    pub arena: DevicePointer,
}

/// One kernel or product, or two, at fixed addresses. Row counts are those of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DeviceOp {
    Embed {
        table: DevicePointer,
        out: DevicePointer,
        width: u32,
        vocab: u32,
        scale: f32,
    },
    /// RMS norm of rows.
    Norm {
        rows: Rows,
        x: DevicePointer,
        weight: DevicePointer,
        add: Option<DevicePointer>,
        out: DevicePointer,
        width: u32,
        eps: f32,
        /// Added to the weight: 1 where it is stored as an offset from one.
        offset: f32,
    },
    Linear(LinearOp),
    RopeKvWrite {
        qkv: DevicePointer,
        heads: HeadSizes,
        /// Index of the cos/sin tables and how many dimensions rotate; `None` without rope.
        rope: Option<usize>,
        /// Whether all dimensions of a head rotate.
        whole: bool,
        q_norm: Option<DevicePointer>,
        k_norm: Option<DevicePointer>,
        eps: f32,
        offset: f32,
        /// Layer in the cache.
        layer: usize,
    },
    Attention {
        qkv: DevicePointer,
        out: DevicePointer,
        heads: HeadSizes,
        layer: usize,
        scale: f32,
        /// 0: none.
        softcap: f32,
        /// 0: the whole context.
        window: u32,
    },
    GatedAct {
        rows: Rows,
        gate_up: DevicePointer,
        out: DevicePointer,
        width: u32,
        activation: GatedActivation,
    },
    GatherLast {
        x: DevicePointer,
        out: DevicePointer,
        width: u32,
    },
    /// A product with what surrounds it, for few rows: see `fusion`.
    Fused(FusedLinear),
    /// All products between two attentions, for some dozens of rows.
    Chain(ChainOp),
}

/// One launch of `chain_linear.cu`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChainOp {
    /// The attention's result.
    pub x: DevicePointer,
    /// What the first sum is added to.
    pub residual: DevicePointer,
    /// Where both sums are written, one over the other; may be `residual`.
    pub h: DevicePointer,
    /// Where the gated product goes.
    pub inner: DevicePointer,
    pub sizes: ChainSizes,
    pub o: DevicePointer,
    pub gate_up: DevicePointer,
    pub down: DevicePointer,
    pub mlp_norm: InputNorm,
    /// Of the next layer, if there is one.
    pub next: Option<NextQkv>,
}

/// The product in front of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NextQkv {
    pub norm: InputNorm,
    pub weight: DevicePointer,
    pub bias: Option<DevicePointer>,
    pub out: DevicePointer,
    pub n: u32,
    pub rotated: RotatedOutput,
}

/// One launch of `fused_linear.cu`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FusedLinear {
    /// x is that of the norm; out and n are those of the gate.
    pub linear: LinearOp,
    pub norm: Option<InputNorm>,
    /// Index into [`super::kernels::FUSED`].
    pub kernel: usize,
    /// Blocks of a cluster.
    pub clusters: u32,
}

/// RMS norm of a product's input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InputNorm {
    pub weight: DevicePointer,
    pub eps: f32,
}

/// Where packed QKV goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RotatedOutput {
    pub heads: HeadSizes,
    /// Index of the cos/sin tables.
    pub rope: usize,
    pub layer: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearOp {
    pub rows: Rows,
    pub x: DevicePointer,
    pub weight: DevicePointer,
    pub bias: Option<DevicePointer>,
    pub residual: Option<DevicePointer>,
    pub out: DevicePointer,
    pub n: u32,
    pub k: u32,
    pub f32_out: bool,
    pub out_stride: u32,
    /// Where the product may go in between when `out` is to have silu of its first half, times the second.
    pub gate_up: Option<DevicePointer>,
    /// Where the heads of `out` go when they are q, k and v to be rotated.
    pub rotated: Option<RotatedOutput>,
}

impl LinearOp {
    pub const fn shape(&self, rows: usize) -> GemmShape {
        GemmShape {
            m: rows,
            n: self.n as usize,
            k: self.k as usize,
            bias: self.bias.is_some(),
            residual: self.residual.is_some(),
            f32_out: self.f32_out,
            gated: self.gate_up.is_some(),
            rotated: match self.rotated {
                Some(rotated) => rotated.heads.head_dim,
                None => 0,
            },
            out_stride: self.out_stride as usize,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HeadSizes {
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GatedActivation {
    Silu,
    Gelu,
    GeluTanh,
}

/// All ops of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// One for each of the program's.
    pub ops: Vec<DeviceOp>,
    /// Of steps whose rows are outputs, in order: one for each of [`without_gathers`].
    pub ungathered: Vec<DeviceOp>,
    /// Of steps with prefill chunks: a product and the gate or the rotation after it are one op.
    pub prefill: Vec<DeviceOp>,
    /// Shorter lists for decode steps, by rising rows.
    pub decode: Vec<DecodeOps>,
    /// Logits `[outputs, logits_stride]` f32.
    pub logits: DevicePointer,
    pub logits_stride: u32,
    /// Attentions of which each rope table is; indexes of [`DeviceOp::RopeKvWrite`].
    pub ropes: Vec<AttentionId>,
    /// Sizes of each layer's cache.
    pub layers: Vec<HeadSizes>,
}

impl Plan {
    /// The ops of a step of this shape.
    pub fn ops_for(&self, shape: &StepShape) -> &[DeviceOp] {
        let StepShape { tokens, decodes, sequences, outputs } = *shape;
        let pure_decode = [decodes, sequences, outputs] == [tokens; 3];
        let list = self.decode.iter().find(|d| pure_decode && tokens <= d.rows_max);
        list.map_or(&self.prefill, |d| &d.ops)
    }
}

/// Fills in the addresses.
///
/// # Errors
/// [`CudaError::Unsupported`] naming the op that this runtime has no kernel for.
pub fn plan(program: &Program, weights: &WeightLayout, arena: &ArenaPlan, bases: Bases) -> Result<Plan, CudaError> {
    let layers: Vec<AttentionId> = program.cached_attentions().collect();
    let mut planner = Planner { program, weights, arena, bases, layers, ropes: Vec::new() };
    let mut all = |ops: &[Op]| ops.iter().map(|op| planner.op(op)).collect::<Result<Vec<_>, _>>();
    let (ops, ungathered) = (all(&program.ops)?, all(&without_gathers(program))?);
    if !is_logits(program, program.output) {
        return Err(unsupported("Pool", "models that do not generate text"));
    }
    Ok(Plan {
        logits: planner.at(program.output),
        logits_stride: planner.stride(program.output),
        layers: planner.layers.iter().map(|&a| planner.heads(a)).collect(),
        ropes: planner.ropes,
        decode: Vec::new(),
        prefill: ops.clone(),
        ops,
        ungathered,
    })
}

fn unsupported(op: &'static str, what: impl Into<String>) -> CudaError {
    CudaError::Unsupported { op, what: what.into() }
}

struct Planner<'a> {
    program: &'a Program,
    weights: &'a WeightLayout,
    arena: &'a ArenaPlan,
    bases: Bases,
    layers: Vec<AttentionId>,
    ropes: Vec<AttentionId>,
}

impl Planner<'_> {
    fn op(&mut self, op: &Op) -> Result<DeviceOp, CudaError> {
        Ok(match op {
            Op::Embed { position_table: None, token_type_table: None, table, scale, out, .. } => DeviceOp::Embed {
                table: self.weight(*table),
                out: self.at(*out),
                width: self.width(*out),
                vocab: self.program.weight(*table).shape[0] as u32,
                scale: scale.map_or(1.0, |s| s as f32),
            },
            Op::Embed { .. } => return Err(unsupported("Embed", "learned positions")),
            Op::Norm { norm, .. } if norm.kind != NormKind::Rms => return Err(unsupported("Norm", "LayerNorm")),
            Op::Norm { x, norm, weight, add, out, .. } => DeviceOp::Norm {
                rows: self.program.buffer(*x).rows,
                x: self.at(*x),
                weight: self.weight(*weight),
                add: add.map(|a| self.at(a)),
                out: self.at(*out),
                width: self.width(*out),
                eps: norm.eps as f32,
                offset: if norm.unit_offset { 1.0 } else { 0.0 },
            },
            Op::Linear { x, weights, add, out } => DeviceOp::Linear(self.linear(*x, weights, *add, *out)),
            Op::LmHead { x, weight, out } => {
                let weights = LinearWeights { parts: vec![*weight], biases: Vec::new() };
                let linear = self.linear(*x, &weights, None, *out);
                DeviceOp::Linear(LinearOp { f32_out: true, out_stride: self.stride(*out), ..linear })
            }
            Op::QkNormRopeKvWrite { store: KvSource::Step, .. } | Op::Attention { source: KvSource::Step, .. } => {
                return Err(unsupported("Attention", "models that keep no KV cache"));
            }
            Op::QkNormRopeKvWrite { qkv, attention, q_norm, k_norm, norm, .. } => DeviceOp::RopeKvWrite {
                qkv: self.at(*qkv),
                heads: self.heads(*attention),
                rope: self.rope(*attention),
                whole: self.rotates_whole(*attention),
                q_norm: q_norm.map(|w| self.weight(w)),
                k_norm: k_norm.map(|w| self.weight(w)),
                eps: norm.eps as f32,
                offset: if norm.unit_offset { 1.0 } else { 0.0 },
                layer: self.layer(*attention),
            },
            Op::Attention { qkv, attention, out, .. } => self.attention(*qkv, *attention, *out)?,
            Op::GatedAct { gate_up, activation, out } => DeviceOp::GatedAct {
                rows: self.program.buffer(*gate_up).rows,
                gate_up: self.at(*gate_up),
                out: self.at(*out),
                width: self.width(*out),
                activation: match activation {
                    Activation::Silu => GatedActivation::Silu,
                    Activation::Gelu => GatedActivation::Gelu,
                    Activation::GeluTanh => GatedActivation::GeluTanh,
                    other => return Err(unsupported("GatedAct", format!("{other:?}"))),
                },
            },
            Op::GatherLast { x, out } => {
                DeviceOp::GatherLast { x: self.at(*x), out: self.at(*out), width: self.width(*out) }
            }
            Op::Act { activation, .. } => return Err(unsupported("Act", format!("{activation:?} without a gate"))),
            Op::Pool { pooling, .. } => return Err(unsupported("Pool", format!("{pooling:?} pooling"))),
            Op::L2Normalize { .. } => return Err(unsupported("L2Normalize", "normalised vectors")),
            Op::SoftCap { .. } => return Err(unsupported("SoftCap", "capped logits")),
            Op::Planned(op) => return Err(unsupported(op.feature.name(), op.detail.clone())),
        })
    }

    fn linear(&self, x: BufferId, weights: &LinearWeights, add: Option<BufferId>, out: BufferId) -> LinearOp {
        let n = self.width(out);
        LinearOp {
            rows: self.program.buffer(x).rows,
            x: self.at(x),
            weight: self.weight(weights.parts[0]),
            bias: weights.biases.first().map(|&b| self.weight(b)),
            residual: add.map(|a| self.at(a)),
            out: self.at(out),
            n,
            k: self.width(x),
            f32_out: false,
            out_stride: n,
            gate_up: None,
            rotated: None,
        }
    }

    fn attention(&self, qkv: BufferId, attention: AttentionId, out: BufferId) -> Result<DeviceOp, CudaError> {
        let spec = self.program.attention(attention);
        let window = match spec.mask {
            Mask::Causal => 0,
            Mask::Sliding { window } => window as u32,
            Mask::Bidirectional | Mask::BidirectionalSliding { .. } => {
                return Err(unsupported("Attention", "bidirectional attention"));
            }
            Mask::Chunked { .. } => return Err(unsupported("Attention", "chunked attention")),
        };
        Ok(DeviceOp::Attention {
            qkv: self.at(qkv),
            out: self.at(out),
            heads: self.heads(attention),
            layer: self.layer(attention),
            scale: spec.scale as f32,
            softcap: spec.softcap.map_or(0.0, |c| c as f32),
            window,
        })
    }

    /// Equal ropes share a table.
    fn rope(&mut self, attention: AttentionId) -> Option<usize> {
        let rope = self.program.attention(attention).rope.as_ref()?;
        let same = |&known: &AttentionId| self.program.attention(known).rope.as_ref() == Some(rope);
        Some(self.ropes.iter().position(same).unwrap_or_else(|| {
            self.ropes.push(attention);
            self.ropes.len() - 1
        }))
    }

    fn rotates_whole(&self, attention: AttentionId) -> bool {
        let spec = self.program.attention(attention);
        spec.rope.as_ref().is_some_and(|rope| rope.rotary_dim == spec.head_dim)
    }

    fn layer(&self, attention: AttentionId) -> usize {
        self.layers.iter().position(|&a| a == attention).unwrap_or_default()
    }

    fn heads(&self, attention: AttentionId) -> HeadSizes {
        let spec = self.program.attention(attention);
        let (heads, kv_heads) = (spec.num_heads as u32, spec.num_kv_heads as u32);
        HeadSizes { heads, kv_heads, head_dim: spec.head_dim as u32 }
    }

    fn weight(&self, id: WeightId) -> DevicePointer {
        self.bases.weights + self.weights.offset(id)
    }

    fn at(&self, id: BufferId) -> DevicePointer {
        self.bases.arena + self.arena.offset(id)
    }

    fn width(&self, id: BufferId) -> u32 {
        self.program.buffer(id).width as u32
    }

    fn stride(&self, id: BufferId) -> u32 {
        u64::from(self.width(id)).next_multiple_of(LOGITS_ALIGNMENT) as u32
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cuda::arena::StepRows;
    use crate::cuda::testing::{llama_program, llama_spec};
    use mserve_planner::model::{Pooling, Task, families};

    fn planned(program: &Program) -> Result<Plan, CudaError> {
        let weights = WeightLayout::new(program)?;
        let arena = ArenaPlan::new(program, StepRows { tokens: 32, sequences: 4 });
        plan(program, &weights, &arena, Bases { weights: 1 << 40, arena: 1 << 41 })
    }

    #[test]
    fn a_layer_is_nine_ops_and_its_products_have_the_models_sizes() {
        let plan = planned(&llama_program(2)).unwrap();
        assert_eq!(plan.ops.len(), 1 + 2 * 9 + 4);
        assert_eq!(plan.ungathered.len(), 1 + 2 * 9 + 2);
        let sizes: Vec<(u32, u32, bool)> = plan
            .ops
            .iter()
            .filter_map(|op| match op {
                DeviceOp::Linear(l) => Some((l.n, l.k, l.residual.is_some())),
                _ => None,
            })
            .collect();
        assert_eq!(sizes[..4], [(128, 64, false), (64, 64, true), (320, 64, false), (64, 160, true)]);
        assert_eq!(sizes.last(), Some(&(512, 64, false)));
        assert_eq!((plan.layers.len(), plan.ropes.len()), (2, 1));
    }

    #[test]
    fn the_tied_head_reads_the_embedding_table() {
        let plan = planned(&llama_program(1)).unwrap();
        let Some(DeviceOp::Embed { table, .. }) = plan.ops.first() else { panic!("embedding first") };
        let Some(DeviceOp::Linear(head)) = plan.ops.last() else { panic!("head last") };
        assert_eq!((head.weight, head.f32_out, head.out), (*table, true, plan.logits));
    }

    #[test]
    fn what_cannot_run_is_named() {
        let spec = llama_spec(1).with_task(Task::Embed { pooling: Pooling::Mean });
        let error = planned(&families::program(&spec)).unwrap_err();
        assert!(matches!(error, CudaError::Unsupported { .. }), "{error}");
        let mut capped = llama_spec(1);
        capped.final_logit_softcap = Some(30.0);
        let error = planned(&families::program(&capped)).unwrap_err();
        assert!(error.to_string().contains("op SoftCap"), "{error}");
    }
}
