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
use std::fs::File;
use std::path::Path;

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

    /// Where the weight's bytes lie in a file, for backends that bring them to a device in pieces. `None` when there is
    /// no file: then [`Self::read`] is the way.
    ///
    /// # Errors
    /// When it is missing or has another shape.
    fn locate(&self, weight: &Weight, prefixes: &[String]) -> Result<Option<TensorLocation<'_>>, WeightsError> {
        let _ = (weight, prefixes);
        Ok(None)
    }
}

/// A tensor's place in a file: little endian, row-major.
#[derive(Debug, Clone, Copy)]
pub struct TensorLocation<'a> {
    pub file: &'a File,
    pub path: &'a Path,
    pub offset: u64,
    pub bytes: u64,
    pub stored: StoredType,
}
