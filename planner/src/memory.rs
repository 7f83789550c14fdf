//! Where a card's memory goes: weights, KV cache, activations, and what the runtime itself takes.
//!
//! Every term has a name and says where it comes from. KV is never one number per token: see [`kv`].

mod activations;
mod block_groups;
mod budget;
mod cache_plan;
mod dtypes;
pub mod kv;
mod layer_cache;
mod weights;

pub use activations::activation_bytes;
pub use block_groups::{Group, Groups, MambaBlocks, PoolOptions};
pub use budget::{
    Budget, DEFAULT_GPU_MEMORY_UTILIZATION, DEFAULT_MAX_NUM_BATCHED_TOKENS, EngineLimits, Source, Term, TermKind,
    WeightSource, requests_that_fit,
};
pub(crate) use budget::{own_terms, weights_term};
pub use cache_plan::{CachePlan, cache_plan, kv_bytes_per_token};
pub use dtypes::{KvCacheDtype, served_dtype};
pub use kv::{KvGroup, KvLayout, SlidingLayers};
pub use layer_cache::{CacheKind, KvFormat, LayerCache, layer_caches};
pub use weights::{RankShape, checkpoint_bytes, rank_bytes, rank_weight_bytes};
