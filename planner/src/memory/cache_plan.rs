//! The KV pool of the bundled engine: one table of equal blocks for all layers, sliding ones kept whole.

use super::kv::{KvLayout, SlidingLayers};
use crate::model::{DType, ModelSpec};
use serde::{Deserialize, Serialize};

/// A pool of KV blocks for one replica without tensor parallelism.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachePlan {
    pub block_size_tokens: u64,
    /// 0 for models that keep no cache, or when not one block fits.
    pub num_blocks: u64,
    pub bytes_per_token: u64,
    /// What the blocks take: at most what was given.
    pub kv_cache_bytes: u64,
}

impl CachePlan {
    /// Tokens that the pool holds.
    pub fn tokens(&self) -> u64 {
        self.num_blocks * self.block_size_tokens
    }

    /// Requests of `tokens` tokens (prompt and output) that the pool holds at once.
    pub fn max_concurrency_at(&self, tokens: u64) -> f64 {
        if self.bytes_per_token == 0 {
            return f64::INFINITY;
        }
        self.num_blocks as f64 / tokens.max(1).div_ceil(self.block_size_tokens) as f64
    }
}

/// K and V of one token in all layers. 0 for models that keep no cache.
pub fn kv_bytes_per_token(spec: &ModelSpec, dtype: DType) -> u64 {
    KvLayout::new(spec, 1, dtype, 1, SlidingLayers::KeepAll).bytes_per_token()
}

/// Divide `kv_bytes` into blocks of `block_size_tokens`.
pub fn cache_plan(spec: &ModelSpec, kv_bytes: u64, block_size_tokens: u64, dtype: DType) -> CachePlan {
    let block_size_tokens = block_size_tokens.max(1);
    let bytes_per_token = kv_bytes_per_token(spec, dtype);
    let block_bytes = bytes_per_token * block_size_tokens;
    let num_blocks = kv_bytes.checked_div(block_bytes).unwrap_or(0);
    CachePlan { block_size_tokens, num_blocks, bytes_per_token, kv_cache_bytes: num_blocks * block_bytes }
}
