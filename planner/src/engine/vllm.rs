//! vLLM's KV cache: one pool of equal blocks, groups of layers that take blocks each for themselves.
//!
//! Groups and blocks are [`crate::memory::Groups`]; here is what is printed of them.

mod printed;

pub use crate::memory::{Group, Groups, MambaBlocks, PoolOptions};
pub use printed::{PrintRule, Printed};
