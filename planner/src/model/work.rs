//! What each op of a model costs, for a roofline: weights read, multiplications per token, cache read per token of
//! context. Everything is of one rank; a step's figures follow from its tokens, sequences and context lengths.

mod kernels;

pub use kernels::Kernels;

use super::{
    BufferId, Ffn, LinearWeights, Mixer, ModelSpec, MoeSpec, Op, PlannedOp, Program, Rows, StateSpec, Storage, Weight,
    WeightId,
};
use crate::memory::{CacheKind, KvFormat, LayerCache, RankShape, layer_caches, rank_bytes};
use serde::Serialize;
use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkKind {
    /// A row of a table for each token.
    Embedding,
    /// Matrix products around attention or state.
    Projection,
    /// Scores and values over the context.
    Attention,
    /// Update of a recurrent state.
    State,
    FeedForward,
    Experts,
    /// Norms and other small things, bound by memory.
    Elementwise,
    /// Once for each sequence that asks for output.
    Head,
}

/// One op, on one rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OpWork {
    pub kind: WorkKind,
    pub layer: Option<usize>,
    /// `Sequences`: the op runs on one row per sequence.
    pub rows: Rows,
    /// Of all its weights, scales included. Matrix products read all of them once a step, experts those that are hit.
    pub weight_bytes: u64,
    /// Form of the matrices: which arithmetic rate applies.
    pub storage: Storage,
    /// Floating point operations (2 a multiplication) per row, besides those over the context.
    pub flops_per_row: u64,
    /// Elements of activations read and written per row.
    pub activation_elements_per_row: u64,
    pub experts: Option<ExpertsWork>,
    pub context: Option<ContextWork>,
    /// State read and written for each sequence of a decode step.
    pub state_bytes_per_sequence: u64,
    /// Launches; none for what runs within others.
    pub kernels: Kernels,
    /// An all-reduce of so many elements per row follows (row-parallel products).
    pub all_reduce_elements_per_row: u64,
}

/// Experts share `weight_bytes` evenly, apart from those that every token passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ExpertsWork {
    pub num_experts: u64,
    pub top_k: u64,
    /// Router, shared experts and dense parts: read by every step.
    pub always_bytes: u64,
}

impl ExpertsWork {
    /// Bytes that a step of `tokens` reads, when each token picks its experts evenly and by itself.
    pub fn bytes_read(&self, weight_bytes: u64, tokens: u64) -> f64 {
        let routed = weight_bytes.saturating_sub(self.always_bytes) as f64;
        let missed = (1.0 - self.top_k as f64 / self.num_experts.max(1) as f64).max(0.0);
        let hit = 1.0 - missed.powf(tokens as f64);
        self.always_bytes as f64 + routed * hit
    }
}

/// Attention's part that grows with the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ContextWork {
    /// Cache read by a decode step for each token of context that is seen.
    pub bytes_per_context_token: u64,
    /// Operations for each pair of query and context token.
    pub flops_per_context_token: u64,
    /// Tokens seen at most: a window, or what an indexer picks. `None`: all.
    pub reach_tokens: Option<u64>,
    /// Tokens of context that stand for one cached entry (DeepSeek-V4).
    pub tokens_per_entry: u64,
}

impl ContextWork {
    /// Entries of the cache that one query looks at, with `context` tokens before it.
    pub fn entries(&self, context: u64) -> u64 {
        let entries = context / self.tokens_per_entry.max(1);
        self.reach_tokens.map_or(entries, |reach| entries.min(reach))
    }
}

/// All ops of a model, in order.
pub fn work(program: &Program, spec: &ModelSpec, tensor_parallel_size: u64, format: KvFormat) -> Vec<OpWork> {
    let tp = tensor_parallel_size.max(1);
    let costs = Costs { program, spec, tp, caches: layer_caches(spec, tp, format) };
    program.ops.iter().flat_map(|op| costs.op(op)).collect()
}

/// Parameters that take part in one token: all but the experts it does not pass. Lookups in tables count whole, as
/// published figures have it.
pub fn active_parameters(program: &Program, spec: &ModelSpec) -> u64 {
    let experts: BTreeMap<usize, &MoeSpec> = spec
        .layers
        .iter()
        .enumerate()
        .filter_map(|(i, layer)| match &layer.ffn {
            Ffn::Experts(moe) => Some((i, moe)),
            _ => None,
        })
        .collect();
    let mut idle = 0_u64;
    for op in &program.ops {
        let Op::Planned(op) = op else { continue };
        let Some(moe) = experts.get(&op.layer) else { continue };
        for weight in op.weights.iter().map(|&id| program.weight(id)).filter(|w| of_experts(w)) {
            let each = weight.elements() / moe.num_experts.max(1);
            idle = idle.saturating_add(each.saturating_mul(moe.num_experts.saturating_sub(moe.top_k)));
        }
    }
    program.parameters().saturating_sub(idle)
}

/// Matrices of all experts, and their biases.
fn of_experts(weight: &Weight) -> bool {
    weight.shape.len() == 3 || weight.shape.len() == 2 && weight.name.ends_with(".bias")
}

struct Costs<'a> {
    program: &'a Program,
    spec: &'a ModelSpec,
    tp: u64,
    caches: Vec<Vec<LayerCache>>,
}

impl Costs<'_> {
    fn op(&self, op: &Op) -> Vec<OpWork> {
        match op {
            Op::Embed { table, out, .. } => {
                let row = self.width(*out);
                let bytes = rank_bytes(self.program.weight(*table), self.spec, self.tp);
                vec![OpWork { weight_bytes: bytes, activation_elements_per_row: row, ..empty(WorkKind::Embedding) }]
            }
            Op::Norm { x, out, .. } => vec![self.elementwise(&[*x, *out])],
            Op::GatedAct { gate_up: x, out, .. }
            | Op::Act { x, out, .. }
            | Op::Pool { x, out, .. }
            | Op::L2Normalize { x, out } => vec![self.elementwise(&[*x, *out])],
            // Reads what it writes.
            Op::GatherLast { out, .. } => vec![self.elementwise(&[*out, *out])],
            Op::QkNormRopeKvWrite { qkv, .. } => vec![self.elementwise(&[*qkv, *qkv])],
            Op::SoftCap { x, .. } => vec![self.elementwise(&[*x, *x])],
            Op::Linear { x, weights, out, .. } => vec![self.linear(*x, weights, *out)],
            Op::LmHead { x, weight, out } => {
                let head = self.products([*weight].iter());
                let activation_elements_per_row = self.width(*x) + self.width(*out);
                vec![OpWork { kind: WorkKind::Head, rows: Rows::Sequences, activation_elements_per_row, ..head }]
            }
            Op::Attention { attention, qkv, out, .. } => {
                let a = self.program.attention(*attention);
                let layer = self.layer_of(attention.0);
                let context = layer.and_then(|l| self.context(l)).unwrap_or(ContextWork {
                    bytes_per_context_token: 0,
                    flops_per_context_token: self.heads(a.num_heads) * 2 * (a.head_dim + a.value_head_dim),
                    reach_tokens: a.mask.reach(),
                    tokens_per_entry: 1,
                });
                let activation_elements_per_row = self.width(*qkv) + self.width(*out);
                let attention = empty(WorkKind::Attention);
                vec![OpWork { layer, context: Some(context), activation_elements_per_row, ..attention }]
            }
            Op::Planned(op) => self.planned(op),
        }
    }

    /// Programs that run have one attention a layer, in order.
    fn layer_of(&self, attention: usize) -> Option<usize> {
        (attention < self.spec.layers.len()).then_some(attention)
    }

    fn width(&self, id: BufferId) -> u64 {
        let buffer = self.program.buffer(id);
        if buffer.sharded { buffer.width.div_ceil(self.tp) } else { buffer.width }
    }

    fn heads(&self, heads: u64) -> u64 {
        heads.div_ceil(self.tp)
    }

    fn elementwise(&self, buffers: &[BufferId]) -> OpWork {
        let activation_elements_per_row = buffers.iter().map(|&b| self.width(b)).sum();
        let rows = buffers.first().map_or(Rows::Tokens, |&b| self.program.buffer(b).rows);
        OpWork { rows, activation_elements_per_row, ..empty(WorkKind::Elementwise) }
    }

    /// Of matrices (and their vectors) that every row passes.
    fn products<'a>(&self, weights: impl Iterator<Item = &'a WeightId>) -> OpWork {
        let mut work = OpWork { kernels: Kernels::ONE_PRODUCT, ..empty(WorkKind::Projection) };
        for weight in weights.map(|&id| self.program.weight(id)) {
            work.weight_bytes = work.weight_bytes.saturating_add(rank_bytes(weight, self.spec, self.tp));
            if is_matrix(weight) && !weight.name.ends_with(".bias") {
                work.flops_per_row = work.flops_per_row.saturating_add(2 * RankShape::of(weight, self.tp).elements());
                work.storage = weight.storage;
            }
        }
        work
    }

    fn linear(&self, x: BufferId, weights: &LinearWeights, out: BufferId) -> OpWork {
        let work = self.products(weights.parts.iter().chain(&weights.biases));
        let first = weights.parts.first().map(|&id| self.program.weight(id));
        let name = first.map_or("", |w| w.name.as_str());
        let kind = if name.contains("mlp") || name.contains("intermediate") || name.contains("layer.output") {
            WorkKind::FeedForward
        } else {
            WorkKind::Projection
        };
        OpWork {
            kind,
            rows: self.program.buffer(x).rows,
            activation_elements_per_row: self.width(x) + self.width(out),
            all_reduce_elements_per_row: self.reduced(weights.parts.iter()),
            ..work
        }
    }

    /// Elements of the sum over ranks behind row-parallel products.
    fn reduced<'a>(&self, mut weights: impl Iterator<Item = &'a WeightId>) -> u64 {
        let row = weights.find(|&&id| self.program.weight(id).shard == super::Shard::Row);
        row.filter(|_| self.tp > 1).map_or(0, |_| self.spec.hidden_size)
    }

    fn planned(&self, op: &PlannedOp) -> Vec<OpWork> {
        let layer = &self.spec.layers[op.layer];
        let at = |work: OpWork| OpWork {
            layer: Some(op.layer),
            rows: self.program.buffer(op.x).rows,
            activation_elements_per_row: self.width(op.x) + self.width(op.scratch) + self.width(op.out),
            kernels: Kernels::of(op.feature, layer),
            all_reduce_elements_per_row: self.reduced(op.weights.iter()),
            ..work
        };
        use super::Feature as F;
        match (op.feature, &layer.ffn) {
            (F::Experts, Ffn::Experts(moe)) => vec![at(self.experts(op, moe))],
            (F::Mlp, _) => vec![at(OpWork { kind: WorkKind::FeedForward, ..self.products(op.weights.iter()) })],
            (F::PerLayerInput | F::HyperConnections | F::Experts, _) => vec![at(self.products(op.weights.iter()))],
            _ => {
                let mut all = vec![at(self.products(op.weights.iter()))];
                if let Some(context) = self.context(op.layer) {
                    let layer = Some(op.layer);
                    all.push(OpWork { layer, context: Some(context), ..empty(WorkKind::Attention) });
                }
                if let Some(state) = layer.state() {
                    all.push(self.state(op.layer, state));
                }
                all
            }
        }
    }

    fn experts(&self, op: &PlannedOp, moe: &MoeSpec) -> OpWork {
        let routed = |id: &&WeightId| of_experts(self.program.weight(**id));
        let always = self.products(op.weights.iter().filter(|id| !routed(id)));
        let experts = self.products(op.weights.iter().filter(routed));
        let share = |total: u64| total / moe.num_experts.max(1) * moe.top_k;
        OpWork {
            kind: WorkKind::Experts,
            weight_bytes: always.weight_bytes.saturating_add(experts.weight_bytes),
            flops_per_row: always.flops_per_row.saturating_add(share(experts.flops_per_row)),
            storage: experts.storage,
            experts: Some(ExpertsWork {
                num_experts: moe.num_experts,
                top_k: moe.top_k,
                always_bytes: always.weight_bytes,
            }),
            ..always
        }
    }

    fn context(&self, layer: usize) -> Option<ContextWork> {
        let mixer = &self.spec.layers[layer].mixer;
        let (heads, dims, reach_tokens, tokens_per_entry) = match mixer {
            Mixer::Attention(a) | Mixer::Parallel { attention: a, .. } => {
                let picked = a.indexer.map(|i| i.topk);
                (a.num_heads, a.head_dim + a.value_head_dim, picked.or(a.mask.reach()), 1)
            }
            // Absorbed form: scores over latent and rope, values over the latent.
            Mixer::Latent(a) => (a.num_heads, a.latent_dim() + a.kv_lora_rank, a.indexer.map(|i| i.topk), 1),
            Mixer::Compressed(a) => {
                let reach = a.indexer.map(|i| i.topk).or((a.tokens_per_state == 0).then_some(a.window));
                (a.num_heads, 2 * a.head_dim, reach, a.tokens_per_state.max(1))
            }
            Mixer::Cross(_) | Mixer::State(_) | Mixer::None => return None,
        };
        let bytes = |cache: &LayerCache| match cache.kind {
            CacheKind::State => 0,
            _ => cache.bytes_per_entry,
        };
        // A layer that reads another's cache reads as much as that one keeps.
        let source = match mixer {
            Mixer::Attention(a) => match a.kv {
                super::KvOrigin::SharedWith { layer } => layer as usize,
                _ => layer,
            },
            _ => layer,
        };
        let caches = self.caches.get(source).map_or(&[][..], Vec::as_slice);
        let bytes_per_context_token = caches.iter().map(bytes).max().unwrap_or(0);
        let flops_per_context_token = self.heads(heads) * 2 * dims;
        Some(ContextWork { bytes_per_context_token, flops_per_context_token, reach_tokens, tokens_per_entry })
    }

    fn state(&self, layer: usize, state: &StateSpec) -> OpWork {
        let caches = self.caches.get(layer).map_or(&[][..], Vec::as_slice);
        let bytes: u64 = caches.iter().filter(|c| c.kind == CacheKind::State).map(|c| c.bytes_per_entry).sum();
        OpWork {
            layer: Some(layer),
            // Decay, outer product and read-out of every element.
            flops_per_row: 6 * state.state_elements().div_ceil(self.tp),
            state_bytes_per_sequence: 2 * bytes,
            ..empty(WorkKind::State)
        }
    }
}

fn is_matrix(weight: &Weight) -> bool {
    weight.shape.len() >= 2
}

fn empty(kind: WorkKind) -> OpWork {
    OpWork {
        kind,
        layer: None,
        rows: Rows::Tokens,
        weight_bytes: 0,
        storage: Storage::Plain,
        flops_per_row: 0,
        activation_elements_per_row: 0,
        experts: None,
        context: None,
        state_bytes_per_sequence: 0,
        kernels: Kernels::default(),
        all_reduce_elements_per_row: 0,
    }
}
