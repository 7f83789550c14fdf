//! Writes a [`Program`]: appends ops, allocates buffers, names weights.

use super::{
    Activation, AttentionId, AttentionSpec, Buffer, BufferId, Forms, KvSource, LinearWeights, ModelSpec, NormKind, Op,
    PlannedOp, Pooling, Program, Role, Rows, Shard, Task, Weight, WeightId,
};

/// Appends ops and allocates buffers and weights; families are written against it.
#[derive(Debug)]
pub struct Builder<'a> {
    spec: &'a ModelSpec,
    forms: Forms<'a>,
    program: Program,
}

impl<'a> Builder<'a> {
    pub fn new(spec: &'a ModelSpec) -> Self {
        let program = Program {
            ops: Vec::new(),
            buffers: Vec::new(),
            weights: Vec::new(),
            attentions: Vec::new(),
            output: BufferId(0),
            name_prefixes: Vec::new(),
        };
        Self { spec, forms: Forms::new(&spec.quantization), program }
    }

    /// Checkpoints of this family may put one of these before tensor names.
    pub fn name_prefixes(&mut self, prefixes: &[&str]) {
        self.program.name_prefixes = prefixes.iter().map(|&p| p.to_owned()).collect();
    }

    /// A tensor that is never quantised.
    pub fn weight(&mut self, name: impl Into<String>, shape: &[u64], shard: Shard) -> WeightId {
        self.weight_as(Role::Never, name, shape, shard)
    }

    /// A tensor that quantisation treats as `role`.
    pub fn weight_as(&mut self, role: Role, name: impl Into<String>, shape: &[u64], shard: Shard) -> WeightId {
        let name = name.into();
        let module = name.strip_suffix(".weight").unwrap_or(&name);
        let storage = self.forms.of(module, role);
        let weight = Weight { name, shape: shape.to_vec(), dtype: self.spec.dtype, shard, storage };
        self.program.weights.push(weight);
        WeightId(self.program.weights.len() - 1)
    }

    /// A mixer or FFN that no backend executes: `[T, width]` out, `scratch` elements per token in between.
    pub fn planned(&mut self, op: PlannedOp) -> BufferId {
        let out = op.out;
        self.program.ops.push(Op::Planned(op));
        out
    }

    pub fn buffer(&mut self, rows: Rows, width: u64, sharded: bool) -> BufferId {
        self.program.buffers.push(Buffer { rows, width, sharded });
        BufferId(self.program.buffers.len() - 1)
    }

    /// Columns of a buffer.
    pub fn width(&self, id: BufferId) -> u64 {
        self.program.buffer(id).width
    }

    fn rows(&self, id: BufferId) -> Rows {
        self.program.buffer(id).rows
    }

    /// Token embedding only: rotary models. Returns the buffer and the table (an `lm_head` may share it).
    pub fn embed(&mut self, name: &str) -> (BufferId, WeightId) {
        let (vocab, hidden) = (self.spec.vocab_size, self.spec.hidden_size);
        let table = self.weight(format!("{name}.weight"), &[vocab, hidden], Shard::Vocab);
        let out = self.buffer(Rows::Tokens, hidden, false);
        let scale = self.spec.embedding_scale;
        self.program.ops.push(Op::Embed {
            table,
            scale,
            position_table: None,
            position_offset: 0,
            token_type_table: None,
            out,
        });
        (out, table)
    }

    /// Token, position and token-type tables summed (encoders).
    pub fn embed_with_tables(
        &mut self,
        table: WeightId,
        positions: WeightId,
        offset: u64,
        types: Option<WeightId>,
    ) -> BufferId {
        let out = self.buffer(Rows::Tokens, self.spec.hidden_size, false);
        self.program.ops.push(Op::Embed {
            table,
            scale: self.spec.embedding_scale,
            position_table: Some(positions),
            position_offset: offset,
            token_type_table: types,
            out,
        });
        out
    }

    /// The model's norm over x, named `{name}.weight` (and `.bias` for LayerNorm).
    pub fn norm(&mut self, x: BufferId, name: &str) -> BufferId {
        self.norm_then_add(x, name, None)
    }

    /// norm(x) + add: a norm after the block, with the residual added behind it (Gemma 2 and 3).
    pub fn norm_then_add(&mut self, x: BufferId, name: &str, add: Option<BufferId>) -> BufferId {
        let norm = self.spec.norm;
        let width = self.width(x);
        let weight = self.weight(format!("{name}.weight"), &[width], Shard::Replicated);
        let bias = match norm.kind {
            NormKind::Rms => None,
            NormKind::Layer => Some(self.weight(format!("{name}.bias"), &[width], Shard::Replicated)),
        };
        let out = self.buffer(self.rows(x), width, false);
        self.program.ops.push(Op::Norm { x, norm, weight, bias, add, out });
        out
    }

    /// x W^T for tensors that are already declared, stacked by rows.
    pub fn linear(&mut self, x: BufferId, weights: LinearWeights, add: Option<BufferId>) -> BufferId {
        let width = weights.parts.iter().map(|&w| self.program.weight(w).shape[0]).sum();
        let sharded =
            weights.parts.iter().any(|&w| !matches!(self.program.weight(w).shard, Shard::Row | Shard::Replicated));
        let out = self.buffer(self.rows(x), width, sharded);
        self.program.ops.push(Op::Linear { x, weights, add, out });
        out
    }

    /// Declares `{name}.weight` `[out, width of x]` (and `.bias`) and multiplies.
    pub fn project(
        &mut self,
        x: BufferId,
        name: &str,
        out: u64,
        shard: Shard,
        bias: bool,
        add: Option<BufferId>,
    ) -> BufferId {
        let weights = self.declare(x, &[(name, out, shard)], bias);
        self.linear(x, weights, add)
    }

    /// Declares several tensors that read the same input as one stacked product.
    pub fn declare(&mut self, x: BufferId, parts: &[(&str, u64, Shard)], bias: bool) -> LinearWeights {
        let width = self.width(x);
        let mut weights = LinearWeights { parts: Vec::new(), biases: Vec::new() };
        for &(name, out, shard) in parts {
            let role = if self.rows(x) == Rows::Tokens { Role::Linear } else { Role::Head };
            weights.parts.push(self.weight_as(role, format!("{name}.weight"), &[out, width], shard));
            if bias {
                let bias_shard = if shard == Shard::Row { Shard::Replicated } else { shard };
                weights.biases.push(self.weight(format!("{name}.bias"), &[out], bias_shard));
            }
        }
        weights
    }

    pub fn attention_spec(&mut self, attention: &AttentionSpec) -> AttentionId {
        self.program.attentions.push(attention.clone());
        AttentionId(self.program.attentions.len() - 1)
    }

    /// Where this model's attentions read K and V: generation keeps them, one-shot tasks do not.
    pub fn kv_source(&self) -> KvSource {
        match self.spec.task {
            Task::Generate => KvSource::Cache,
            Task::Embed { .. } | Task::Classify { .. } => KvSource::Step,
        }
    }

    /// Norms (if the spec has them), rope and KV write, in place on packed QKV rows. `names` are the q and k norms.
    pub fn rope_and_store_kv(&mut self, qkv: BufferId, attention: AttentionId, names: Option<(&str, &str)>) {
        let head_dim = self.program.attention(attention).head_dim;
        let mut declare = |name: &str| self.weight(format!("{name}.weight"), &[head_dim], Shard::Replicated);
        let (q_norm, k_norm) = match names {
            Some((q, k)) => (Some(declare(q)), Some(declare(k))),
            None => (None, None),
        };
        let (norm, store) = (self.spec.norm, self.kv_source());
        self.program.ops.push(Op::QkNormRopeKvWrite { qkv, attention, q_norm, k_norm, norm, store });
    }

    pub fn attention(&mut self, qkv: BufferId, attention: AttentionId) -> BufferId {
        let spec = self.program.attention(attention);
        let width = spec.num_heads * spec.head_dim;
        let out = self.buffer(Rows::Tokens, width, true);
        let source = self.kv_source();
        self.program.ops.push(Op::Attention { qkv, attention, source, out });
        out
    }

    pub fn gated_act(&mut self, gate_up: BufferId, activation: Activation) -> BufferId {
        let out = self.buffer(self.rows(gate_up), self.width(gate_up) / 2, true);
        self.program.ops.push(Op::GatedAct { gate_up, activation, out });
        out
    }

    pub fn act(&mut self, x: BufferId, activation: Activation) -> BufferId {
        let out = self.buffer(self.rows(x), self.width(x), self.program.buffer(x).sharded);
        self.program.ops.push(Op::Act { x, activation, out });
        out
    }

    pub fn gather_last(&mut self, x: BufferId) -> BufferId {
        let out = self.buffer(Rows::Sequences, self.width(x), false);
        self.program.ops.push(Op::GatherLast { x, out });
        out
    }

    pub fn pool(&mut self, x: BufferId, pooling: Pooling) -> BufferId {
        let out = self.buffer(Rows::Sequences, self.width(x), false);
        self.program.ops.push(Op::Pool { x, pooling, out });
        out
    }

    pub fn l2_normalize(&mut self, x: BufferId) -> BufferId {
        let out = self.buffer(self.rows(x), self.width(x), false);
        self.program.ops.push(Op::L2Normalize { x, out });
        out
    }

    /// Logits `[S, vocab]`; soft-capped when the spec says so.
    pub fn lm_head(&mut self, x: BufferId, weight: WeightId) -> BufferId {
        let out = self.buffer(self.rows(x), self.spec.vocab_size, false);
        self.program.ops.push(Op::LmHead { x, weight, out });
        if let Some(cap) = self.spec.final_logit_softcap {
            self.program.ops.push(Op::SoftCap { x: out, cap });
        }
        out
    }

    pub fn finish(mut self, output: BufferId) -> Program {
        self.program.output = output;
        self.program
    }
}
