//! A model as a flat list of fused ops. The planner sums it, the loader walks it, each backend runs it.
//!
//! Sizes are symbolic: a step carries T tokens of S sequences. Widths below are of the whole model (TP 1); a weight's
//! [`Shard`] says how a rank cuts it.

use super::{Activation, AttentionSpec, DType, Norm, Storage};
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

/// A tensor of the checkpoint. Matrices are `[out, in]`, as PyTorch stores them. Experts are `[experts, out, in]`, and
/// a `*` in the name counts them where a checkpoint has one tensor for each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Weight {
    pub name: String,
    pub shape: Vec<u64>,
    pub dtype: DType,
    pub shard: Shard,
    /// How the checkpoint holds it. `Plain`: elements of `dtype`.
    pub storage: Storage,
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
    /// Output rows are groups (of B and C in Mamba): divided while there are enough, then replicated with their heads.
    Groups {
        groups: u64,
    },
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
    /// A part that is planned and that no backend executes yet.
    Planned(PlannedOp),
}

/// All of a mixer or FFN as one op: its weights, and what it holds while it runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedOp {
    pub feature: Feature,
    /// What of it makes it special, for messages: `gated attention output`.
    pub detail: String,
    pub layer: usize,
    pub x: BufferId,
    pub weights: Vec<WeightId>,
    /// Holds what the op keeps between its products.
    pub scratch: BufferId,
    pub add: Option<BufferId>,
    pub out: BufferId,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    Attention,
    LatentAttention,
    CompressedAttention,
    CrossAttention,
    StateMixer,
    Mlp,
    Experts,
    PerLayerInput,
    HyperConnections,
}

impl Feature {
    /// As an op is named in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "Attention",
            Self::LatentAttention => "LatentAttention",
            Self::CompressedAttention => "CompressedAttention",
            Self::CrossAttention => "CrossAttention",
            Self::StateMixer => "StateMixer",
            Self::Mlp => "Mlp",
            Self::Experts => "MoeExperts",
            Self::PerLayerInput => "PerLayerInput",
            Self::HyperConnections => "HyperConnections",
        }
    }
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
        self.weights.iter().fold(0, |sum, w| sum.saturating_add(w.elements()))
    }

    /// The first part that no backend executes; `None`: the whole program can run.
    pub fn first_planned(&self) -> Option<&PlannedOp> {
        self.ops.iter().find_map(|op| match op {
            Op::Planned(planned) => Some(planned),
            _ => None,
        })
    }
}
