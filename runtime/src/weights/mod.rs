//! Tensors of a checkpoint on disk, read into owned memory.
//!
//! Files are read with positioned reads, never mapped: a file that is truncated while it is being served must give an
//! error, not a signal that ends the process.

mod checkpoint;
mod error;
mod host_tensor;
mod names;
mod random;

pub use checkpoint::Checkpoint;
pub use error::WeightsError;
pub use host_tensor::{HostTensor, StoredType};
pub use random::RandomWeights;

use mserve_planner::model::{Program, Weight};

/// Where a backend gets a model's tensors from.
pub trait TensorSource: Sync {
    /// Checks that every weight of `program` is there with the right shape, before anything is allocated.
    /// Returns the bytes that reading them all will take.
    ///
    /// # Errors
    /// All that is missing, or the first tensor that does not fit.
    fn check(&self, program: &Program) -> Result<u64, WeightsError>;

    /// Reads one weight, whole. `prefixes` are those of [`Program::name_prefixes`].
    ///
    /// # Errors
    /// When it is missing, has another shape, or cannot be read.
    fn read(&self, weight: &Weight, prefixes: &[String]) -> Result<HostTensor, WeightsError>;
}
