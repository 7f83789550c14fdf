use crate::model::{DType, ModelSpec, Quantization};
use serde::{Deserialize, Serialize};

/// `--kv-cache-dtype`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    /// The type the model is served in; fp8 where the checkpoint carries scales for an fp8 cache, as in vLLM.
    #[default]
    Auto,
    Fp16,
    Bf16,
    Fp8,
}

impl KvCacheDtype {
    pub fn resolve(self, spec: &ModelSpec) -> DType {
        match (self, &spec.quantization) {
            (Self::Fp8, _) => DType::F8E4M3,
            (Self::Auto, Quantization::Stored(stored)) if stored.kv_cache_fp8 => DType::F8E4M3,
            (Self::Auto, _) => served_dtype(spec),
            (Self::Fp16, _) => DType::F16,
            (Self::Bf16, _) => DType::BF16,
        }
    }
}

/// What the weights and activations are on a GPU: float32 checkpoints are served in two bytes, as in vLLM
/// (`config/model.py`, `_resolve_auto_dtype`).
pub fn served_dtype(spec: &ModelSpec) -> DType {
    match spec.dtype {
        DType::F32 | DType::F64 => DType::BF16,
        other => other,
    }
}
