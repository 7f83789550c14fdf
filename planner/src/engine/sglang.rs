//! SGLang's pools: tokens, not blocks (`mem_cache/kv_cache_configurator.py`, `model_executor/pool_configurator.py`).

use super::vllm::Printed;
use crate::memory::{CacheKind, KvFormat, layer_caches};
use crate::model::ModelSpec;
use crate::units::{GIB, MIB};
use serde::Serialize;

/// Bytes of one token in all layers, on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Cell {
    pub full_bytes: u64,
    /// Of layers with a window: a pool of their own.
    pub window_bytes: u64,
    /// Of one sequence's recurrent states: a pool of slots.
    pub state_bytes: u64,
}

/// Slots of the window pool for each of the full pool (`swa_full_tokens_ratio`).
const WINDOW_RATIO: f64 = 0.8;
/// Recurrent states' part of what is left: theirs to the full pool's (`mamba_full_memory_ratio`).
const STATE_TO_FULL: f64 = 0.9;

impl Cell {
    pub fn new(spec: &ModelSpec, tensor_parallel_size: u64, kv: KvFormat) -> Self {
        let mut cell = Self { full_bytes: 0, window_bytes: 0, state_bytes: 0 };
        for cache in layer_caches(spec, tensor_parallel_size, kv).into_iter().flatten() {
            match cache.kind {
                CacheKind::Sliding { .. } => cell.window_bytes += cache.bytes_per_entry,
                CacheKind::State => cell.state_bytes += cache.bytes_per_entry,
                CacheKind::Compressed { tokens_per_entry } => {
                    cell.full_bytes += cache.bytes_per_entry.div_ceil(tokens_per_entry.max(1));
                }
                CacheKind::Full | CacheKind::Chunked { .. } | CacheKind::Indexer => {
                    cell.full_bytes += cache.bytes_per_entry;
                }
            }
        }
        cell
    }

    /// `max_total_num_tokens` of a pool.
    pub fn tokens(&self, kv_bytes: u64) -> u64 {
        let of_token = self.full_bytes as f64 + WINDOW_RATIO * self.window_bytes as f64;
        if of_token == 0.0 {
            return 0;
        }
        let share = if self.state_bytes > 0 { 1.0 / (1.0 + STATE_TO_FULL) } else { 1.0 };
        (kv_bytes as f64 * share / of_token) as u64
    }

    /// Bytes that `tokens` take, where there is one pool.
    pub fn bytes(&self, tokens: u64) -> u64 {
        tokens.saturating_mul(self.full_bytes)
    }
}

/// The lines of a start (`mem_cache/memory_pool.py`, `managers/scheduler.py`). GB are GiB there.
pub(super) fn lines(printed: &Printed, keys_and_values: bool) -> String {
    let gib = |bytes: u64| bytes as f64 / GIB as f64;
    let sizes = match keys_and_values {
        true => {
            let half = gib(printed.available_bytes / 2);
            format!("K size: {half:.2} GB, V size: {half:.2} GB")
        }
        false => format!("KV size: {:.2} GB", gib(printed.available_bytes)),
    };
    format!(
        "KV Cache is allocated. #tokens: {tokens}, {sizes}\nmax_total_num_tokens={tokens}, context_len={}",
        printed.max_model_len,
        tokens = printed.tokens
    )
}

/// The default of `--mem-fraction-static` (`arg_groups/memory_hook.py`): what activations and graphs are left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StaticFraction {
    pub memory_total_bytes: u64,
    pub tensor_parallel_size: u64,
    pub chunked_prefill_tokens: u64,
}

impl StaticFraction {
    pub fn default_fraction(&self) -> f64 {
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        // Captured batch sizes grow with the card.
        let graph_batch = match self.memory_total_bytes / GIB {
            0..20 => 8.0,
            20..60 => 32.0,
            60..90 => 256.0,
            _ => 512.0,
        };
        let parallel = self.tensor_parallel_size as f64 / 8.0 * 1024.0;
        let reserve = 512.0 + 1.5 * self.chunked_prefill_tokens as f64 + 2.0 * graph_batch + parallel;
        let total = mib(self.memory_total_bytes);
        ((total - reserve) / total.max(1.0)).clamp(0.1, 0.95)
    }
}
