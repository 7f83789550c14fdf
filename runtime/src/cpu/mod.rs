//! The CPU backend: interprets a [`Program`](mserve_planner::model::Program) on the host's cores.
//!
//! Loading turns each op of the program into a [`LoadedOp`](loaded::LoadedOp) that holds its weights, packed for the
//! kernels. A step walks the list once. Activations live in an arena that is placed when the model is loaded; weights
//! and KV are read where they lie and never copied in a step.

mod arena;
mod attention;
mod backend;
mod bandwidth;
mod error;
pub(crate) mod host_memory;
mod interpret;
pub mod kernels;
mod kv_cache;
mod linear;
mod load;
mod loaded;
mod options;
mod quantized;
#[cfg(test)]
mod tests;

pub use backend::CpuBackend;
pub use bandwidth::read_bandwidth;
pub use error::LoadError;
pub use options::{CpuOptions, WeightFormat};
