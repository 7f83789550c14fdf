//! vLLM's KV cache: one pool of equal blocks, groups of layers that take blocks each for themselves.
//!
//! Rules: `v1/core/kv_cache_planning.py` (groups, pages), `v1/kv_cache_interface.py` (blocks of a request),
//! `platforms/interface.py` (block size of hybrids), `v1/core/kv_cache_utils.py` (printed lines).

mod groups;
mod printed;

pub use groups::{Group, Groups, MambaBlocks, PoolOptions};
pub use printed::{PrintRule, Printed};
