//! Ops with their weights in place.

use super::kernels::attention::Scores;
use super::kernels::panel::PanelMatrix;
use super::kv_cache::KvShape;
use super::linear::Linear;
use crate::weights::HostTensor;
use mserve_planner::model::{Activation, BufferId, Mask, Norm, Pooling};
use std::sync::Arc;

/// One op of the program, ready to run.
#[derive(Debug)]
pub enum LoadedOp {
    Embed(Embed),
    Norm {
        x: BufferId,
        norm: Norm,
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        add: Option<BufferId>,
        out: BufferId,
    },
    /// Also the output head.
    Linear {
        x: BufferId,
        linear: Linear,
        add: Option<BufferId>,
        out: BufferId,
    },
    PrepareQkv {
        qkv: BufferId,
        prepare: PrepareQkv,
    },
    Attention {
        qkv: BufferId,
        attention: AttentionOp,
        out: BufferId,
    },
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
    GatherLast {
        x: BufferId,
        out: BufferId,
    },
    Pool {
        x: BufferId,
        pooling: Pooling,
        out: BufferId,
    },
    L2Normalize {
        x: BufferId,
        out: BufferId,
    },
    SoftCap {
        x: BufferId,
        cap: f32,
    },
}

#[derive(Debug)]
pub struct Embed {
    pub table: Table,
    pub scale: Option<f32>,
    pub positions: Option<HostTensor>,
    pub position_offset: usize,
    /// Row 0 of the token-type table: every token is of type 0.
    pub token_type: Option<Vec<f32>>,
    pub out: BufferId,
}

/// An embedding table: as stored, or the packed output head that shares its weights.
#[derive(Debug)]
pub enum Table {
    Stored(HostTensor),
    Packed(Arc<PanelMatrix>),
}

impl Table {
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Stored(tensor) => tensor.row_into(row, out),
            Self::Packed(matrix) => matrix.row_into(row, out),
        }
    }
}

/// Heads of packed rows `[q heads | k heads | v heads]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

impl Heads {
    /// Columns of a packed row.
    pub fn width(self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Column where the keys begin.
    pub fn key_column(self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Query heads that share one KV head.
    pub fn group(self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    pub fn kv_shape(self, block_size: usize) -> KvShape {
        KvShape { num_kv_heads: self.num_kv_heads, head_dim: self.head_dim, block_size }
    }
}

/// Norms and rope of q and k heads, then the write to the cache.
#[derive(Debug)]
pub struct PrepareQkv {
    pub heads: Heads,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub eps: f32,
    /// Index into the model's ropes.
    pub rope: Option<usize>,
    /// Index into the layer caches; `None` when nothing is kept.
    pub cache: Option<usize>,
}

#[derive(Debug)]
pub struct AttentionOp {
    pub heads: Heads,
    pub scores: Scores,
    pub mask: Mask,
    /// Index into the layer caches; `None` attends to the step's own rows.
    pub cache: Option<usize>,
}

impl LoadedOp {
    /// Bytes of weights that one step of one token reads.
    pub fn weight_bytes(&self) -> u64 {
        let floats = |v: &Vec<f32>| 4 * v.len() as u64;
        match self {
            Self::Norm { weight, bias, .. } => floats(weight) + bias.as_ref().map_or(0, floats),
            Self::Linear { linear, .. } => linear.matrix.bytes() + linear.bias.as_ref().map_or(0, floats),
            _ => 0,
        }
    }

    /// Bytes of lookup tables, of which a step reads a few rows. A table that an output head shares counts there.
    pub fn table_bytes(&self) -> u64 {
        match self {
            Self::Embed(embed) => {
                let stored = |t: &HostTensor| t.bytes.len() as u64;
                let table = match &embed.table {
                    Table::Stored(t) => stored(t),
                    Table::Packed(_) => 0,
                };
                table + embed.positions.as_ref().map_or(0, stored)
            }
            _ => 0,
        }
    }
}
