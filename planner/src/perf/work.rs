//! What an op does on one rank, apart from how many rows a step has.

use crate::model::Rows;
use crate::model::work::Kernels;
use serde::{Deserialize, Serialize};

/// Kinds of ops that the roofline tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpKind {
    Products,
    Head,
    Experts,
    Attention,
    Recurrent,
    Elementwise,
    Exchange,
}

impl OpKind {
    pub const ALL: [Self; 7] = [
        Self::Products,
        Self::Head,
        Self::Experts,
        Self::Attention,
        Self::Recurrent,
        Self::Elementwise,
        Self::Exchange,
    ];

    pub fn label(self) -> &'static str {
        match self {
            Self::Products => "matrix products",
            Self::Head => "LM head",
            Self::Experts => "experts",
            Self::Attention => "attention",
            Self::Recurrent => "recurrent state",
            Self::Elementwise => "norms, activations, sampling",
            Self::Exchange => "all-reduce",
        }
    }
}

/// In what the multipliers work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rate {
    Half,
    Fp8,
    Fp4,
    /// Weights are widened to two bytes before they are multiplied.
    WeightOnly,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    /// Products of the step's rows with matrices that are read once.
    Product {
        kind: OpKind,
        rows: Rows,
        flops_per_row: f64,
        weight_bytes: f64,
        row_bytes: f64,
        rate: Rate,
        kernels: Kernels,
    },
    /// `top_k` of `experts` for each token. `flops_per_row` counts what a token passes, `weight_bytes` all of them,
    /// `always_bytes` the router and the experts that every token passes.
    Experts {
        rows: Rows,
        experts: f64,
        top_k: f64,
        always_bytes: f64,
        flops_per_row: f64,
        weight_bytes: f64,
        row_bytes: f64,
        rate: Rate,
        kernels: Kernels,
    },
    Attention(AttentionWork),
    /// A state of each sequence. `state_bytes` counts reading and writing it.
    Recurrent {
        state_bytes: f64,
        flops_per_row: f64,
        row_bytes: f64,
    },
    Elementwise {
        rows: Rows,
        row_bytes: f64,
    },
    /// The sum of all ranks' rows, to all ranks.
    Exchange {
        rows: Rows,
        row_bytes: f64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionWork {
    /// K and V (or what stands for them) of one token, on one rank.
    pub kv_bytes_per_token: f64,
    /// For each query token and each token that it sees.
    pub flops_per_pair: f64,
    /// The same while a prompt is read; MLA then works on whole keys and values.
    pub prefill_flops_per_pair: f64,
    /// Tokens that a query sees at most.
    pub reach: Option<f64>,
    /// Tokens that one entry of the cache stands for.
    pub tokens_per_entry: f64,
    /// Encoders see the whole text, decoders what came before.
    pub bidirectional: bool,
    pub row_bytes: f64,
}

impl Work {
    pub fn kind(&self) -> OpKind {
        match self {
            Self::Product { kind, .. } => *kind,
            Self::Experts { .. } => OpKind::Experts,
            Self::Attention(_) => OpKind::Attention,
            Self::Recurrent { .. } => OpKind::Recurrent,
            Self::Elementwise { .. } => OpKind::Elementwise,
            Self::Exchange { .. } => OpKind::Exchange,
        }
    }
}

/// Equal ops of a Program, counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Counted {
    pub work: Work,
    pub count: f64,
}
