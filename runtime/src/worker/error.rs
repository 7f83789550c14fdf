use super::FailureKind;
use crate::cpu::LoadError;
use crate::cuda::CudaError;
use crate::engine::{BackendError, EngineStartError};
use crate::tokenizer::TokenizerError;
use crate::weights::WeightsError;
use mserve_planner::model::ConfigError;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why a worker ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("{address} cannot be listened on: {source}; port 0 picks a free one")]
    Bind { address: SocketAddr, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    ModelConfig { path: PathBuf, source: ConfigError },
    #[error("{}: {field}: {what}", path.display())]
    ModelFile { path: PathBuf, field: &'static str, what: String },
    #[error("{architecture} cannot be served as {asked}; {hint}")]
    WrongKind { architecture: String, asked: &'static str, hint: &'static str },
    #[error("{option} is {value:?}; {expected}")]
    Option { option: &'static str, value: String, expected: &'static str },
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Cuda(#[from] CudaError),
    #[error(
        "max_model_len {max_model_len} needs {needed_bytes} bytes of KV cache for a single request, and there are \
         {kv_cache_bytes}; at most {fits_tokens} tokens fit"
    )]
    ContextDoesNotFit { max_model_len: usize, needed_bytes: u64, kv_cache_bytes: u64, fits_tokens: u64 },
    #[error("the first step failed: {0}")]
    Warmup(#[from] BackendError),
    #[error(transparent)]
    Engine(#[from] EngineStartError),
    #[error("the engine has stopped: {why}")]
    EngineStopped { kind: FailureKind, why: String },
    #[error("{what}: {source}")]
    System { what: &'static str, source: std::io::Error },
    #[error("loading the model panicked")]
    LoadPanicked,
}

impl WorkerError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Bind { .. }
            | Self::ModelConfig { .. }
            | Self::ModelFile { .. }
            | Self::WrongKind { .. }
            | Self::Option { .. }
            | Self::Read { .. }
            | Self::Tokenizer(_) => FailureKind::Config,
            Self::Weights(error) => weights_kind(error),
            Self::Cuda(CudaError::Weights(error)) => weights_kind(error),
            Self::Cuda(error) => error.kind(),
            Self::Load(error) => match error {
                LoadError::Weights(error) => weights_kind(error),
                LoadError::Unsupported { .. } | LoadError::MaxModelLen { .. } | LoadError::Option { .. } => {
                    FailureKind::Config
                }
                LoadError::KvCacheTooSmall { .. } | LoadError::DoesNotFit { .. } => FailureKind::DoesNotFit,
                LoadError::Quantize { .. } | LoadError::Threads { .. } => FailureKind::Internal,
            },
            Self::ContextDoesNotFit { .. } => FailureKind::DoesNotFit,
            Self::Warmup(error) => error.kind,
            Self::EngineStopped { kind, .. } => *kind,
            Self::Engine(error) => match error {
                EngineStartError::Metrics(_) | EngineStartError::Thread(_) => FailureKind::Internal,
                _ => FailureKind::Config,
            },
            Self::System { .. } | Self::LoadPanicked => FailureKind::Internal,
        }
    }
}

/// Files that lie stay wrong; a read that failed may work next time.
fn weights_kind(error: &WeightsError) -> FailureKind {
    match error {
        WeightsError::Io { source, .. } if source.kind() != std::io::ErrorKind::NotFound => FailureKind::Internal,
        _ => FailureKind::Config,
    }
}
