//! Weight bytes of one rank, summed over the Program's tensors by their [`Shard`], or scaled to what the checkpoint's
//! own headers say.

use super::served_dtype;
use crate::model::checkpoint::TensorInfo;
use crate::model::{DType, ModelSpec, Op, Program, Quantization, Rows, Shard, Weight, WeightId};
use std::collections::HashSet;

/// Rows of an embedding table are padded to a multiple of this before they are divided (vLLM,
/// `vocab_parallel_embedding.py`).
const VOCAB_PADDING: u64 = 64;

/// Bytes of the weights on one rank.
pub fn rank_weight_bytes(program: &Program, spec: &ModelSpec, tensor_parallel_size: u64) -> u64 {
    let quantized = quantized_weights(program, spec);
    let bytes = |(i, weight): (usize, &Weight)| {
        let (rows, columns) = rank_shape(weight, tensor_parallel_size.max(1));
        if quantized.contains(&WeightId(i)) && weight.shape.len() == 2 {
            quantized_bytes(spec, rows, columns)
        } else {
            rows * columns * served_bytes(weight.dtype, spec)
        }
    };
    program.weights.iter().enumerate().map(bytes).sum()
}

/// One rank's part of one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RankWeight {
    pub elements: u64,
    pub bytes: u64,
}

/// One rank's part of a matrix that multiplies rows; an `lm_head` is never quantised.
pub(crate) fn rank_weight(program: &Program, spec: &ModelSpec, id: WeightId, tensor_parallel_size: u64) -> RankWeight {
    let weight = program.weight(id);
    let (rows, columns) = rank_shape(weight, tensor_parallel_size.max(1));
    let quantized = !matches!(weight.shard, Shard::Vocab | Shard::Replicated);
    let bytes = if quantized {
        quantized_bytes(spec, rows, columns)
    } else {
        rows * columns * served_bytes(weight.dtype, spec)
    };
    RankWeight { elements: rows * columns, bytes }
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

/// Matrices that quantisation applies to: those that multiply token rows. Embeddings, heads and norms are left as
/// they are by every supported method.
fn quantized_weights(program: &Program, spec: &ModelSpec) -> HashSet<WeightId> {
    if spec.quantization == Quantization::None {
        return HashSet::new();
    }
    let parts = program.ops.iter().filter_map(|op| match op {
        Op::Linear { x, weights, .. } if program.buffer(*x).rows == Rows::Tokens => Some(&weights.parts),
        _ => None,
    });
    parts.flatten().copied().collect()
}

fn quantized_bytes(spec: &ModelSpec, rows: u64, columns: u64) -> u64 {
    match spec.quantization {
        Quantization::None => rows * columns * served_dtype(spec).bytes(),
        // Packed integers, then a two-byte scale and a packed zero point for each group.
        Quantization::Grouped { bits, group_size } => {
            let groups = if group_size == 0 { 1 } else { columns.div_ceil(group_size) };
            (rows * columns * bits).div_ceil(8) + groups * rows * 2 + (groups * rows * bits).div_ceil(8)
        }
        // A float scale for each 128 x 128 block; per-tensor scales are fewer.
        Quantization::Fp8 { .. } => rows * columns + rows.div_ceil(128) * columns.div_ceil(128) * 4,
    }
}

/// Rows and columns (1 for vectors) of a rank's part.
fn rank_shape(weight: &Weight, tp: u64) -> (u64, u64) {
    let rows = weight.shape.first().copied().unwrap_or(1);
    let columns = weight.shape.iter().skip(1).product();
    match weight.shard {
        Shard::Replicated => (rows, columns),
        Shard::Column | Shard::FusedGateUp => (rows.div_ceil(tp), columns),
        Shard::Row => (rows, columns.div_ceil(tp)),
        Shard::KvHeads { heads } => (rows / heads * heads_of_rank(heads, tp), columns),
        Shard::FusedQkv { heads, kv_heads } => {
            let of_rank = heads.div_ceil(tp) + 2 * heads_of_rank(kv_heads, tp);
            (rows / (heads + 2 * kv_heads) * of_rank, columns)
        }
        Shard::Vocab if tp == 1 => (rows, columns),
        Shard::Vocab => (rows.next_multiple_of(VOCAB_PADDING).div_ceil(tp), columns),
    }
}

/// KV heads are divided while there are enough, then replicated.
fn heads_of_rank(kv_heads: u64, tp: u64) -> u64 {
    kv_heads.div_ceil(tp).max(1)
}
