//! Which tensor-parallel sizes a model can be cut into.

use crate::model::{ModelSpec, Quantization};
use serde::{Deserialize, Serialize};

/// Why a size is not legal: a dimension that does not divide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{dimension} {value} does not divide into {tensor_parallel_size} ranks")]
pub struct Indivisible {
    pub dimension: String,
    pub value: u64,
    pub tensor_parallel_size: u64,
}

/// Check one size. Query heads and the MLP must divide; KV heads must divide, or be divided by the ranks and then
/// replicated; each rank's part of a quantised row must hold whole groups. The vocabulary is padded instead.
///
/// # Errors
/// [`Indivisible`], naming the first dimension that does not.
pub fn check(spec: &ModelSpec, tensor_parallel_size: u64) -> Result<(), Indivisible> {
    let tp = tensor_parallel_size.max(1);
    let problem =
        |dimension: &str, value: u64| Err(Indivisible { dimension: dimension.to_owned(), value, tensor_parallel_size });
    for layer in &spec.layers {
        let a = &layer.attention;
        if !a.num_heads.is_multiple_of(tp) {
            return problem("num_attention_heads", a.num_heads);
        }
        if !a.num_kv_heads.is_multiple_of(tp) && !tp.is_multiple_of(a.num_kv_heads) {
            return problem("num_key_value_heads", a.num_kv_heads);
        }
        let intermediate = layer.mlp.intermediate_size;
        if !intermediate.is_multiple_of(tp) {
            return problem("intermediate_size", intermediate);
        }
        if let Quantization::Grouped { group_size, .. } = spec.quantization
            && tp > 1
            && group_size > 0
            && !(intermediate / tp).is_multiple_of(group_size)
        {
            return problem("intermediate_size in quantisation groups", intermediate / group_size);
        }
    }
    Ok(())
}

/// Legal sizes up to `max`, ascending. Always holds 1.
pub fn legal_sizes(spec: &ModelSpec, max: u64) -> Vec<u64> {
    (1..=max.max(1)).filter(|&tp| check(spec, tp).is_ok()).collect()
}
