use crate::weights::WeightsError;

/// Why a model could not be loaded on the CPU.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The model can be planned but not run here.
    #[error("the CPU runtime cannot run {what} yet (op {op})")]
    Unsupported { op: &'static str, what: String },
    #[error("max_model_len {asked} is beyond the {limit} positions that the model has")]
    MaxModelLen { asked: usize, limit: usize },
    #[error("option {option} is {value}; it must be at least {least}")]
    Option { option: &'static str, value: u64, least: u64 },
    #[error(
        "the KV cache needs at least {needed_bytes} bytes (one block of {block_size} tokens) and was given {given_bytes}"
    )]
    KvCacheTooSmall { needed_bytes: u64, given_bytes: u64, block_size: usize },
    #[error(
        "weights ({weight_bytes} bytes), KV cache ({kv_cache_bytes}) and activations ({activation_bytes}) do not fit \
         the {free_bytes} bytes of memory that are free"
    )]
    DoesNotFit { weight_bytes: u64, kv_cache_bytes: u64, activation_bytes: u64, free_bytes: u64 },
    #[error("quantising {tensor}: {source}")]
    Quantize { tensor: String, source: candle_core::Error },
    #[error("starting {threads} threads: {source}")]
    Threads { threads: usize, source: rayon::ThreadPoolBuildError },
}
