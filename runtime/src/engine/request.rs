//! What the engine is asked and what it answers: token ids only. Text is the server's business.

use super::{SampledToken, SamplingParams};
use std::sync::Arc;

#[derive(Debug, Clone)]
pub struct GenerateRequest {
    pub request_id: String,
    pub prompt_token_ids: Vec<u32>,
    pub params: Arc<SamplingParams>,
    /// End-of-sequence tokens of the model.
    pub eos_token_ids: Arc<[u32]>,
    /// Which of the request's `n` outputs this is; moves the seed.
    pub choice_index: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    Token(SampledToken),
    /// The last event of a request that ran.
    Finished {
        reason: FinishReason,
        usage: Usage,
    },
    /// The last event of a request that could not be finished.
    Failed(RequestError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// End-of-sequence, or the stop token named here. That token was not sent as a `Token` event.
    Stop { stop_token_id: Option<u32> },
    /// `max_tokens` or the model's context is used up.
    Length,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub prompt_tokens: usize,
    /// Of these, found in the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated, the end-of-sequence or stop token among them.
    pub completion_tokens: usize,
}

/// Why a request was not taken in. Nothing was queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("this model's maximum context length is {max_model_len} tokens, and the prompt has {prompt_tokens}")]
    PromptTooLong { prompt_tokens: usize, max_model_len: usize },
    /// Even alone in the pool it would not fit.
    #[error("the prompt needs {needed_blocks} KV blocks and the pool has {total_blocks}")]
    PoolTooSmall { needed_blocks: usize, total_blocks: usize },
    #[error("token id {token_id} is outside the vocabulary of {vocab_size}")]
    TokenOutOfVocabulary { token_id: u32, vocab_size: usize },
    #[error("the request names {named} tokens by bias, stop or end; at most {most} can be")]
    TooManyNamedTokens { named: usize, most: usize },
    /// As many requests, or as many prompt tokens, as may wait. Worth another try soon.
    #[error("the queue is full: {queued} requests are waiting")]
    QueueFull { queued: usize },
    #[error("the engine has stopped: {why}")]
    Stopped { why: String },
}

/// Why a request that was taken in ended early.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("the device failed: {0}")]
    Device(String),
    #[error("the engine is shutting down")]
    ShuttingDown,
}
