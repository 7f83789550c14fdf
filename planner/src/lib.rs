//! The planning half of mserve: one description of a model, and everything that can be computed from it.
//!
//! Pure by rule: no IO, no clock, no threads, no device. What a caller reads from disk or from NVML comes in as
//! data and leaves as data, so every figure here can be tested with a table.

pub mod engine;
pub mod explain;
pub mod gpus;
pub mod hardware;
pub mod memory;
pub mod model;
pub mod perf;
pub mod plan;
pub mod split;
pub mod tensor_parallel;
pub mod units;
