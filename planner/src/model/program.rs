//! A model as a flat list of fused ops. The planner sums it, the loader walks it, each backend runs it.
//!
//! Sizes are symbolic: a step carries T tokens of S sequences. Widths below are of the whole model (TP 1); a weight's
//! [`Shard`] says how a rank cuts it.

use super::{Activation, AttentionSpec, DType, ModelSpec, Norm, Task};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct BufferId(pub usize);
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct WeightId(pub usize);
/// Index into [`Program::attentions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct AttentionId(pub usize);

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Program {
    pub ops: Vec<Op>,
    pub buffers: Vec<Buffer>,
    pub weights: Vec<Weight>,
    pub attentions: Vec<AttentionSpec>,
    /// What a step returns: logits `[S, vocab]`, vectors `[S, hidden]` or scores `[S, labels]`.
    pub output: BufferId,
    /// Prefixes that checkpoints of this family put before (or leave off) the tensor names used here.
    pub name_prefixes: Vec<String>,
}

/// An activation: `[rows, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Buffer {
    pub rows: Rows,
    pub width: u64,
    /// A rank holds width / TP of it (the output of a column-parallel linear).
    pub sharded: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// One row per token of the step.
    Tokens,
    /// One row per sequence that asked for output.
    Sequences,
}

/// A tensor of the checkpoint. Matrices are `[out, in]`, as PyTorch stores them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Weight {
    pub name: String,
    pub shape: Vec<u64>,
    pub dtype: DType,
    pub shard: Shard,
}

impl Weight {
    /// Elements of the whole tensor. Saturates: the spec's ranges keep real models far below.
    pub fn elements(&self) -> u64 {
        self.shape.iter().fold(1, |product, &n| product.saturating_mul(n))
    }
}

/// How tensor-parallel ranks cut a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "shard")]
pub enum Shard {
    Replicated,
    /// Output rows divided between ranks.
    Column,
    /// Input columns divided; the partial sums are reduced.
    Row,
    /// Output rows are whole KV heads: divided while there are enough, replicated when KV heads < TP.
    KvHeads {
        heads: u64,
    },
    /// One tensor holding q, k and v rows (Phi-3): q divides by TP, k and v as `KvHeads`.
    FusedQkv {
        heads: u64,
        kv_heads: u64,
    },
    /// One tensor holding gate rows, then up rows (Phi-3): each half divides by TP.
    FusedGateUp,
    /// Rows are vocabulary entries, padded to a multiple of 64 and of TP.
    Vocab,
}

/// One matrix product, out = x W^T (+ bias), whose W is one or more checkpoint tensors stacked by rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LinearWeights {
    pub parts: Vec<WeightId>,
    /// Empty, or one bias for each part.
    pub biases: Vec<WeightId>,
}

/// Where an attention reads K and V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KvSource {
    /// The paged cache: this step's K and V were written there first.
    Cache,
    /// The step's own packed QKV rows: whole texts, nothing kept (embedding and classification).
    Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The first token's vector.
    Cls,
    Mean,
    LastToken,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "op")]
pub enum Op {
    /// `out[t] = table[token[t]] * scale + position_table[position[t] + position_offset] + token_type_table[0]`
    Embed {
        table: WeightId,
        scale: Option<f64>,
        position_table: Option<WeightId>,
        position_offset: u64,
        token_type_table: Option<WeightId>,
        out: BufferId,
    },
    /// out = norm(x) * weight + bias, plus `add` when given.
    Norm {
        x: BufferId,
        norm: Norm,
        weight: WeightId,
        bias: Option<WeightId>,
        add: Option<BufferId>,
        out: BufferId,
    },
    /// out = x W^T + bias, plus `add` when given. `out` may be `add` itself.
    Linear {
        x: BufferId,
        weights: LinearWeights,
        add: Option<BufferId>,
        out: BufferId,
    },
    /// In place on packed rows [q heads | k heads | v heads]: normalise q and k heads, rotate them, and when
    /// `store` is `Cache` write K and V at the step's slot mapping.
    QkNormRopeKvWrite {
        qkv: BufferId,
        attention: AttentionId,
        q_norm: Option<WeightId>,
        k_norm: Option<WeightId>,
        norm: Norm,
        store: KvSource,
    },
    /// `out[t] = softmax(mask(q k^T * scale)) v`, q from the packed rows, K and V from `source`.
    Attention {
        qkv: BufferId,
        attention: AttentionId,
        source: KvSource,
        out: BufferId,
    },
    /// Rows are [gate | up]: out = activation(gate) * up.
    GatedAct {
        gate_up: BufferId,
        activation: Activation,
        out: BufferId,
    },
    Act {
        x: BufferId,
        activation: Activation,
        out: BufferId,
    },
    /// Rows of the last token of each sequence that asks for output.
    GatherLast {
        x: BufferId,
        out: BufferId,
    },
    /// One vector per sequence out of all its tokens.
    Pool {
        x: BufferId,
        pooling: Pooling,
        out: BufferId,
    },
    /// Divide each row by its Euclidean norm.
    L2Normalize {
        x: BufferId,
        out: BufferId,
    },
    /// logits = x W^T, W often the embedding table.
    LmHead {
        x: BufferId,
        weight: WeightId,
        out: BufferId,
    },
    /// x = cap * tanh(x / cap), in place on logits.
    SoftCap {
        x: BufferId,
        cap: f64,
    },
}

impl Program {
    pub fn buffer(&self, id: BufferId) -> Buffer {
        self.buffers[id.0]
    }

    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.0]
    }

    pub fn attention(&self, id: AttentionId) -> &AttentionSpec {
        &self.attentions[id.0]
    }

    /// The attentions that keep K and V in the paged cache, in layer order. A layer's place in this list is its
    /// index in the cache.
    pub fn cached_attentions(&self) -> impl Iterator<Item = AttentionId> + '_ {
        self.ops.iter().filter_map(|op| match op {
            Op::Attention { attention, source: KvSource::Cache, .. } => Some(*attention),
            _ => None,
        })
    }

    /// Parameters of the model: elements of every distinct checkpoint tensor.
    pub fn parameters(&self) -> u64 {
        self.weights.iter().map(Weight::elements).sum()
    }
}

/// Appends ops and allocates buffers and weights; families are written against it.
#[derive(Debug)]
pub struct Builder<'a> {
    spec: &'a ModelSpec,
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
        Self { spec, program }
    }

    /// Checkpoints of this family may put one of these before tensor names.
    pub fn name_prefixes(&mut self, prefixes: &[&str]) {
        self.program.name_prefixes = prefixes.iter().map(|&p| p.to_owned()).collect();
    }

    pub fn weight(&mut self, name: impl Into<String>, shape: &[u64], shard: Shard) -> WeightId {
        let weight = Weight { name: name.into(), shape: shape.to_vec(), dtype: self.spec.dtype, shard };
        self.program.weights.push(weight);
        WeightId(self.program.weights.len() - 1)
    }

    fn buffer(&mut self, rows: Rows, width: u64, sharded: bool) -> BufferId {
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
            super::NormKind::Rms => None,
            super::NormKind::Layer => Some(self.weight(format!("{name}.bias"), &[width], Shard::Replicated)),
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
            weights.parts.push(self.weight(format!("{name}.weight"), &[out, width], shard));
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
