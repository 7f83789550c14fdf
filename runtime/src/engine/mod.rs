//! Continuous batching over any [`Backend`]: the loop is schedule, run, postprocess; with a backend that takes
//! steps ahead of time the next step is planned and under way before the tokens of this one are known (`pipeline`).
//!
//! [`EngineHandle`] (any thread) checks and queues; the engine's thread owns the rest: `core` asks `scheduler` (integers
//! only, over `block_manager`) what runs next, `batch` writes it down for the backend, and the outcome goes back to the
//! requests as [`TokenEvent`]s.

mod active_request;
mod backend;
mod batch;
mod block_manager;
mod config;
mod core;
mod failure;
mod handle;
mod metrics;
mod pipeline;
mod request;
mod sampler;
mod sampling_params;
mod scheduler;
mod sequence;
mod shared;
mod stats;
mod token_stream;
mod window;

pub use backend::{
    Backend, BackendError, BackendInfo, RowOutput, RowSampling, SampledToken, StepBatch, StepSequence, TokenLogprob,
};
pub use config::{EngineConfig, EngineStartError};
pub use failure::FailureKind;
pub use handle::{Engine, EngineHandle, Shutdown};
pub use request::{AdmissionError, FinishReason, GenerateRequest, RequestError, TokenEvent, Usage};
pub use sampler::sample;
pub use sampling_params::{MAX_NAMED_TOKENS, SamplingParams};
pub use stats::{EngineLoad, StepTotals};
pub use token_stream::TokenStream;
