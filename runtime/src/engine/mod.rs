//! Continuous batching over any [`Backend`]: the loop is schedule, run, postprocess.

mod backend;
mod sampling_params;
mod stats;

pub use backend::{
    Backend, BackendError, BackendInfo, RowOutput, RowSampling, SampledToken, StepBatch, StepSequence, TokenLogprob,
};
pub use sampling_params::SamplingParams;
pub use stats::EngineLoad;
