use mserve_planner::model::DType;
use mserve_planner::model::checkpoint::{HeaderError, IndexError};
use std::path::PathBuf;

/// Why a checkpoint could not be used. Every variant names the file, and the tensor where there is one.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} is not a regular file", path.display())]
    NotAFile { path: PathBuf },
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json", dir.display())]
    NoWeights { dir: PathBuf },
    #[error(
        "{} holds weights only as pickles ({file}), which can run code when loaded; convert them to safetensors \
         (https://huggingface.co/docs/safetensors) or download the safetensors revision of the model",
        dir.display()
    )]
    PickleOnly { dir: PathBuf, file: String },
    #[error("{}: {source}", path.display())]
    Header { path: PathBuf, source: HeaderError },
    #[error("{}: {source}", path.display())]
    Index { path: PathBuf, source: IndexError },
    #[error("{} is larger than {limit_bytes} bytes", path.display())]
    IndexTooLong { path: PathBuf, limit_bytes: u64 },
    #[error("{}: tensor {tensor} is also in {}", path.display(), other.display())]
    InTwoShards { path: PathBuf, other: PathBuf, tensor: String },
    #[error("{}: the index puts tensor {tensor} here, and it is not", path.display())]
    NotInShard { path: PathBuf, tensor: String },
    #[error("{}: {missing_count} tensors that the model needs are missing: {}{}",
        path.display(), first.join(", "), if *missing_count > first.len() { ", ..." } else { "" })]
    Missing { path: PathBuf, missing_count: usize, first: Vec<String> },
    #[error("{}: tensor {tensor} has shape {found:?}, config.json asks for {expected:?}", path.display())]
    Shape { path: PathBuf, tensor: String, expected: Vec<u64>, found: Vec<u64> },
    #[error("{}: tensor {tensor} is stored as {dtype:?}; weights must be F32, F16 or BF16", path.display())]
    DType { path: PathBuf, tensor: String, dtype: DType },
    #[error("{}: tensor {tensor} has {bytes} bytes, more than this machine can address", path.display())]
    TooLarge { path: PathBuf, tensor: String, bytes: u64 },
}
