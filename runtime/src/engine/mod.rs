//! Continuous batching over any [`Backend`]: the loop is schedule, run, postprocess.

mod backend;
mod request;
mod sampling_params;
mod stats;

pub use backend::{
    Backend, BackendError, BackendInfo, RowOutput, RowSampling, SampledToken, StepBatch, StepSequence, TokenLogprob,
};
pub use request::{AdmissionError, FinishReason, GenerateRequest, RequestError, TokenEvent, Usage};
pub use sampling_params::SamplingParams;
pub use stats::EngineLoad;
