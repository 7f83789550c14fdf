//! The KV cache as blocks per request and cache group: never one number of bytes per token.
//!
//! Layers that look at everything, layers that look back over a window, latents, indexers and recurrent states are
//! groups of their own; one pool of equal blocks serves all of them, and a request takes blocks from each.

use super::{CacheKind, Groups, KvFormat, PoolOptions, layer_caches};
use crate::model::{DType, ModelSpec};
use serde::{Deserialize, Serialize};

/// What happens to tokens that have left a sliding layer's window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlidingLayers {
    /// Their blocks go back to the pool.
    #[default]
    KeepWindow,
    /// They stay: sliding layers cost what full layers cost.
    KeepAll,
}

/// Caches of one kind and size, on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvGroup {
    #[serde(flatten)]
    pub kind: CacheKind,
    pub layers: u64,
    /// Of one layer, on one rank: a token, a compressed state, or for `State` a sequence.
    pub bytes_per_entry_per_layer: u64,
}

impl KvGroup {
    /// What one token adds in all layers of the group while every window still holds it; 0 for states. Compressed
    /// entries count their share.
    pub fn bytes_per_token(&self) -> u64 {
        let all = self.layers * self.bytes_per_entry_per_layer;
        match self.kind {
            CacheKind::State => 0,
            CacheKind::Compressed { tokens_per_entry } => all.div_ceil(tokens_per_entry.max(1)),
            _ => all,
        }
    }

    /// What a sequence takes whatever its length.
    pub fn bytes_per_sequence(&self) -> u64 {
        match self.kind {
            CacheKind::State => self.layers * self.bytes_per_entry_per_layer,
            _ => 0,
        }
    }
}

/// The cache of a model on one rank of `tensor_parallel_size`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvLayout {
    /// Empty for models that keep no cache.
    pub groups: Vec<KvGroup>,
    pub dtype: DType,
    pub tensor_parallel_size: u64,
    pub block_size_tokens: u64,
    /// How layers share blocks.
    pub pool: Groups,
}

impl KvLayout {
    /// `tensor_parallel_size` and `block_size_tokens` of 0 count as 1.
    pub fn new(
        spec: &ModelSpec,
        tensor_parallel_size: u64,
        dtype: DType,
        block_size_tokens: u64,
        sliding: SlidingLayers,
    ) -> Self {
        let (tensor_parallel_size, block_size_tokens) = (tensor_parallel_size.max(1), block_size_tokens.max(1));
        let whole = sliding == SlidingLayers::KeepAll;
        let mut groups: Vec<KvGroup> = Vec::new();
        for cache in layer_caches(spec, tensor_parallel_size, KvFormat::from(dtype)).into_iter().flatten() {
            let kind = match cache.kind {
                CacheKind::Sliding { .. } | CacheKind::Chunked { .. } if whole => CacheKind::Full,
                kind => kind,
            };
            let bytes_per_entry_per_layer = cache.bytes_per_entry;
            let same = |g: &&mut KvGroup| g.kind == kind && g.bytes_per_entry_per_layer == bytes_per_entry_per_layer;
            match groups.iter_mut().find(same) {
                Some(group) => group.layers += 1,
                None => groups.push(KvGroup { kind, layers: 1, bytes_per_entry_per_layer }),
            }
        }
        let options = PoolOptions {
            block_size_tokens,
            hybrid_manager: !whole,
            ..PoolOptions::new(tensor_parallel_size, KvFormat::from(dtype))
        };
        let pool = Groups::new(spec, options);
        // Hybrids enlarge it.
        let block_size_tokens = pool.groups.first().map_or(block_size_tokens, |group| group.block_size_tokens);
        Self { groups, dtype, tensor_parallel_size, block_size_tokens, pool }
    }

    /// True for models that keep no cache.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// All layers of one token while every window still holds it, on one rank. Recurrent states are not in it.
    pub fn bytes_per_token(&self) -> u64 {
        self.groups.iter().map(KvGroup::bytes_per_token).sum()
    }

    /// Recurrent states of one sequence, on one rank.
    pub fn bytes_per_sequence(&self) -> u64 {
        self.groups.iter().map(KvGroup::bytes_per_sequence).sum()
    }

    /// Bytes of one block on one rank. 0 without a cache.
    pub fn block_bytes(&self) -> u64 {
        self.pool.bytes_per_block
    }

    /// Blocks of a pool of `pool_bytes` on one rank. 0 without a cache.
    pub fn num_blocks(&self, pool_bytes: u64) -> u64 {
        self.pool.num_blocks(pool_bytes)
    }

    /// Blocks that one request of `tokens` may hold at once.
    pub fn blocks_per_request(&self, tokens: u64, max_num_batched_tokens: u64) -> u64 {
        self.pool.blocks_in_steps_of(tokens, max_num_batched_tokens)
    }

    /// Requests of `tokens` that a pool holds at once; infinite without a cache.
    pub fn concurrency(&self, num_blocks: u64, tokens: u64, max_num_batched_tokens: u64) -> f64 {
        match self.blocks_per_request(tokens, max_num_batched_tokens) {
            0 => f64::INFINITY,
            per_request => num_blocks as f64 / per_request as f64,
        }
    }
}
