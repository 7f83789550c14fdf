//! The KV cache as blocks per request and cache group.
//!
//! Rules: vLLM's `v1/core/kv_cache_planning.py` (groups) and `SlidingWindowSpec.max_admission_blocks_per_request`
//! (blocks). Layers that look at everything and layers that look back over a window are groups of their own; one pool
//! of equal blocks serves all groups, and a request takes blocks from each.

use crate::model::{DType, Mask, Program};
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

/// Layers of one kind, on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvGroup {
    #[serde(flatten)]
    pub kind: KvGroupKind,
    pub layers: u64,
    /// K and V of one token in one layer, on one rank.
    pub bytes_per_token_per_layer: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum KvGroupKind {
    Full,
    Sliding { window_tokens: u64 },
}

impl KvGroup {
    /// K and V of one token in all layers of the group, on one rank.
    pub fn bytes_per_token(&self) -> u64 {
        self.layers * self.bytes_per_token_per_layer
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
}

impl KvLayout {
    /// `tensor_parallel_size` and `block_size_tokens` of 0 count as 1.
    pub fn new(
        program: &Program,
        tensor_parallel_size: u64,
        dtype: DType,
        block_size_tokens: u64,
        sliding: SlidingLayers,
    ) -> Self {
        let tensor_parallel_size = tensor_parallel_size.max(1);
        let mut groups: Vec<KvGroup> = Vec::new();
        for id in program.cached_attentions() {
            let a = program.attention(id);
            // Every rank needs at least one whole head: fewer heads than ranks are replicated.
            let heads = (a.num_kv_heads / tensor_parallel_size).max(1);
            let bytes_per_token_per_layer = 2 * heads * a.head_dim * dtype.bytes();
            let kind = match (a.mask, sliding) {
                (Mask::Sliding { window }, SlidingLayers::KeepWindow) => KvGroupKind::Sliding { window_tokens: window },
                _ => KvGroupKind::Full,
            };
            match groups.iter_mut().find(|g| g.kind == kind && g.bytes_per_token_per_layer == bytes_per_token_per_layer)
            {
                Some(group) => group.layers += 1,
                None => groups.push(KvGroup { kind, layers: 1, bytes_per_token_per_layer }),
            }
        }
        Self { groups, dtype, tensor_parallel_size, block_size_tokens: block_size_tokens.max(1) }
    }

    /// True for models that keep no cache.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// All layers of one token while every window still holds it, on one rank.
    pub fn bytes_per_token(&self) -> u64 {
        self.groups.iter().map(KvGroup::bytes_per_token).sum()
    }

    /// Layers that share one block. With two kinds of layers the smaller number, so that little is padded; the larger
    /// when they are close.
    fn layers_per_block(&self) -> u64 {
        let smallest = self.groups.iter().map(|g| g.layers).min().unwrap_or(0);
        let largest = self.groups.iter().map(|g| g.layers).max().unwrap_or(0);
        if 2 * largest < 3 * smallest { largest } else { smallest }
    }

    /// Bytes of one block on one rank. 0 without a cache.
    pub fn block_bytes(&self) -> u64 {
        let page = self.groups.iter().map(|g| g.bytes_per_token_per_layer).max().unwrap_or(0);
        self.block_size_tokens * self.layers_per_block() * page
    }

    /// Blocks of a pool of `pool_bytes` on one rank. 0 without a cache.
    pub fn num_blocks(&self, pool_bytes: u64) -> u64 {
        pool_bytes.checked_div(self.block_bytes()).unwrap_or(0)
    }

    /// Blocks that one request of `tokens` may hold at once. A sliding layer holds its window and the tokens of the
    /// step, and one block more because a window rarely begins on a block's border.
    pub fn blocks_per_request(&self, tokens: u64, max_num_batched_tokens: u64) -> u64 {
        let per_block = self.layers_per_block().max(1);
        let blocks = |tokens: u64| tokens.div_ceil(self.block_size_tokens);
        let of_group = |group: &KvGroup| match group.kind {
            KvGroupKind::Full => blocks(tokens),
            KvGroupKind::Sliding { window_tokens } => {
                blocks((window_tokens - 1).saturating_add(max_num_batched_tokens).min(tokens)) + 1
            }
        };
        self.groups.iter().map(|group| group.layers.div_ceil(per_block) * of_group(group)).sum()
    }

    /// Requests of `tokens` that a pool holds at once; infinite without a cache.
    pub fn concurrency(&self, num_blocks: u64, tokens: u64, max_num_batched_tokens: u64) -> f64 {
        match self.blocks_per_request(tokens, max_num_batched_tokens) {
            0 => f64::INFINITY,
            per_request => num_blocks as f64 / per_request as f64,
        }
    }
}
