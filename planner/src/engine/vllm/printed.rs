use super::Groups;
use crate::engine::Version;
use crate::units::{GIB, format_count};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How "GPU KV cache size" is counted (`v1/core/kv_cache_utils.py`, `get_kv_cache_capacity`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrintRule {
    /// Blocks over groups times the block size: too little by 3 to 7 times for hybrids.
    PoolTokens,
    /// Concurrency at `max_model_len` times that length: not a property of the pool.
    ConcurrencyTimesLength,
}

impl PrintRule {
    /// Changed after 0.19.
    pub fn of(version: Version) -> Self {
        if version < Version::new(0, 20, 0) { Self::PoolTokens } else { Self::ConcurrencyTimesLength }
    }
}

/// What an engine prints of its pool when it starts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Printed {
    pub available_bytes: u64,
    pub num_blocks: u64,
    pub tokens: u64,
    pub max_model_len: u64,
    pub concurrency: f64,
}

impl Printed {
    pub fn new(groups: &Groups, available_bytes: u64, max_model_len: u64, rule: PrintRule) -> Self {
        let num_blocks = groups.num_blocks(available_bytes);
        Self::of_blocks(groups, num_blocks, max_model_len, rule, available_bytes)
    }

    pub fn of_blocks(
        groups: &Groups,
        num_blocks: u64,
        max_model_len: u64,
        rule: PrintRule,
        available_bytes: u64,
    ) -> Self {
        let per_request = groups.blocks_per_request(max_model_len);
        let concurrency = if per_request == 0 { 0.0 } else { num_blocks as f64 / per_request as f64 };
        let dcp = groups.options.decode_context_parallel_size.max(1);
        let tokens = match (rule, groups.groups.len() as u64) {
            (PrintRule::PoolTokens, kinds) => {
                let block = groups.groups.iter().map(|g| g.block_size_tokens).min().unwrap_or(0);
                num_blocks.checked_div(kinds).unwrap_or(0) * block * dcp
            }
            (PrintRule::ConcurrencyTimesLength, _) => (concurrency * max_model_len as f64) as u64,
        };
        Self { available_bytes, num_blocks, tokens, max_model_len, concurrency }
    }
}

impl fmt::Display for Printed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Available KV cache memory: {:.2} GiB", self.available_bytes as f64 / GIB as f64)?;
        writeln!(f, "GPU KV cache size: {} tokens", format_count(self.tokens))?;
        let length = format_count(self.max_model_len);
        write!(f, "Maximum concurrency for {length} tokens per request: {:.2}x", self.concurrency)
    }
}
