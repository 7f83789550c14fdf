//! Weight bytes of one rank, summed over the Program's tensors by their [`Shard`], or scaled to what the checkpoint's
//! own headers say.

use super::served_dtype;
use crate::model::checkpoint::TensorInfo;
use crate::model::{DType, ModelSpec, Program, Shard, Storage, Weight};

/// Rows of an embedding table are padded to a multiple of this before they are divided (vLLM,
/// `vocab_parallel_embedding.py`).
const VOCAB_PADDING: u64 = 64;

/// Bytes of the weights on one rank.
pub fn rank_weight_bytes(program: &Program, spec: &ModelSpec, tensor_parallel_size: u64) -> u64 {
    let bytes = |weight: &Weight| rank_bytes(weight, spec, tensor_parallel_size);
    program.weights.iter().fold(0, |sum, weight| sum.saturating_add(bytes(weight)))
}

/// Bytes of one weight on one rank, as it lies in the card's memory.
pub fn rank_bytes(weight: &Weight, spec: &ModelSpec, tensor_parallel_size: u64) -> u64 {
    let shape = RankShape::of(weight, tensor_parallel_size.max(1));
    match weight.storage {
        Storage::Packed(packed) => packed.bytes(shape.rows, shape.columns).saturating_mul(shape.copies),
        Storage::Plain => shape.elements().saturating_mul(served_bytes(weight.dtype, spec)),
    }
}

/// Bytes that the tensors of a checkpoint take on the device: as stored, but float32 in the served type.
pub fn checkpoint_bytes<'a>(tensors: impl IntoIterator<Item = &'a TensorInfo>, spec: &ModelSpec) -> u64 {
    let on_device = |t: &TensorInfo| t.bytes() / t.dtype.bytes() * served_bytes(t.dtype, spec);
    tensors.into_iter().map(on_device).sum()
}

fn served_bytes(stored: DType, spec: &ModelSpec) -> u64 {
    match stored {
        DType::F32 | DType::F64 => served_dtype(spec).bytes(),
        other => other.bytes(),
    }
}

/// A rank's part of a weight: matrices of `rows` by `columns`, as many as there are experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankShape {
    pub copies: u64,
    pub rows: u64,
    pub columns: u64,
}

impl RankShape {
    pub fn of(weight: &Weight, tp: u64) -> Self {
        let (copies, rows, columns) = match weight.shape[..] {
            [] => (1, 1, 1),
            [rows] => (1, rows, 1),
            [rows, columns] => (1, rows, columns),
            [ref copies @ .., rows, columns] => {
                (copies.iter().fold(1, |p: u64, &n| p.saturating_mul(n)), rows, columns)
            }
        };
        let (rows, columns) = match weight.shard {
            Shard::Replicated => (rows, columns),
            Shard::Column | Shard::FusedGateUp => (rows.div_ceil(tp), columns),
            Shard::Row => (rows, columns.div_ceil(tp)),
            Shard::KvHeads { heads } | Shard::Groups { groups: heads } => {
                (rows / heads.max(1) * heads_of_rank(heads, tp), columns)
            }
            Shard::FusedQkv { heads, kv_heads } => {
                let of_rank = heads.div_ceil(tp) + 2 * heads_of_rank(kv_heads, tp);
                (rows / (heads + 2 * kv_heads).max(1) * of_rank, columns)
            }
            Shard::Vocab if tp == 1 => (rows, columns),
            Shard::Vocab => (rows.next_multiple_of(VOCAB_PADDING).div_ceil(tp), columns),
        };
        Self { copies, rows, columns }
    }

    pub fn elements(self) -> u64 {
        self.copies.saturating_mul(self.rows).saturating_mul(self.columns)
    }
}

/// KV heads are divided while there are enough, then replicated.
fn heads_of_rank(kv_heads: u64, tp: u64) -> u64 {
    kv_heads.div_ceil(tp).max(1)
}
