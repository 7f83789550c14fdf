//! The engine's limits and why a start may be refused.

use super::BackendInfo;

/// Limits of one engine. Names and meanings are vLLM's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Name under which the model is served: the `model_name` label of the metrics.
    pub model_name: String,
    /// Sequences that may be in one step.
    pub max_num_seqs: usize,
    /// Tokens that may be in one step; prompts beyond it are computed in chunks.
    pub max_num_batched_tokens: usize,
    /// Longest sequence (prompt and output), in tokens.
    pub max_model_len: usize,
    /// Requests that may wait beyond the `max_num_seqs` that may run.
    pub max_num_queued_reqs: usize,
    pub enable_prefix_caching: bool,
}

/// Upper bound of every limit that sizes memory: far above sense, far below trouble.
const MAX_REQUESTS: usize = 1 << 16;

impl EngineConfig {
    /// Requests that may be in the engine at once, running or waiting.
    pub fn max_in_flight_reqs(&self) -> usize {
        self.max_num_seqs + self.max_num_queued_reqs
    }

    /// Prompt tokens that may wait for their first step: a quarter of the context for every request that may be in the
    /// engine, since few prompts are longer. A single prompt is always let in.
    pub fn max_queued_tokens(&self) -> usize {
        self.max_in_flight_reqs().saturating_mul(self.max_model_len) / 4
    }

    /// # Errors
    /// The first limit that is out of range or does not agree with the backend.
    pub fn validate(&self, info: &BackendInfo) -> Result<(), EngineStartError> {
        at_least_one("max_num_seqs", self.max_num_seqs)?;
        at_least_one("max_num_batched_tokens", self.max_num_batched_tokens)?;
        at_least_one("max_model_len", self.max_model_len)?;
        at_most("max_num_seqs", self.max_num_seqs, MAX_REQUESTS)?;
        at_most("max_num_queued_reqs", self.max_num_queued_reqs, MAX_REQUESTS)?;
        at_most("max_model_len", self.max_model_len, info.max_model_len)?;
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(EngineStartError::BudgetBelowSeqs {
                max_num_batched_tokens: self.max_num_batched_tokens,
                max_num_seqs: self.max_num_seqs,
            });
        }
        if info.num_blocks > 0 && info.block_size == 0 {
            return Err(EngineStartError::BlockSizeZero { device: info.device.clone() });
        }
        Ok(())
    }
}

fn at_least_one(field: &'static str, value: usize) -> Result<(), EngineStartError> {
    if value == 0 { Err(EngineStartError::Zero { field }) } else { Ok(()) }
}

fn at_most(field: &'static str, value: usize, most: usize) -> Result<(), EngineStartError> {
    if value > most { Err(EngineStartError::TooLarge { field, value, most }) } else { Ok(()) }
}

#[derive(Debug, thiserror::Error)]
pub enum EngineStartError {
    #[error("{field} is 0; it must be at least 1")]
    Zero { field: &'static str },
    #[error("{field} is {value}; it can be at most {most}")]
    TooLarge { field: &'static str, value: usize, most: usize },
    /// Every running sequence needs one token a step.
    #[error(
        "max_num_batched_tokens is {max_num_batched_tokens}, below max_num_seqs ({max_num_seqs}): a step of decodes would not fit"
    )]
    BudgetBelowSeqs { max_num_batched_tokens: usize, max_num_seqs: usize },
    #[error("{device} has KV blocks of 0 tokens")]
    BlockSizeZero { device: String },
    #[error("the metrics could not be set up: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("the engine's thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn info() -> BackendInfo {
        BackendInfo {
            output_width: 8,
            vocab_size: 8,
            block_size: 16,
            num_blocks: 4,
            kv_cache_bytes: 0,
            max_model_len: 64,
            device: "test".to_owned(),
        }
    }

    fn config() -> EngineConfig {
        EngineConfig {
            model_name: "m".to_owned(),
            max_num_seqs: 4,
            max_num_batched_tokens: 16,
            max_model_len: 64,
            max_num_queued_reqs: 0,
            enable_prefix_caching: true,
        }
    }

    #[test]
    fn limits_that_disagree_are_named() {
        assert!(config().validate(&info()).is_ok());
        let cases = [
            (EngineConfig { max_num_seqs: 0, ..config() }, "max_num_seqs is 0"),
            (EngineConfig { max_num_batched_tokens: 0, ..config() }, "max_num_batched_tokens is 0"),
            (EngineConfig { max_num_batched_tokens: 3, ..config() }, "below max_num_seqs (4)"),
            (EngineConfig { max_model_len: 65, ..config() }, "max_model_len is 65; it can be at most 64"),
            (EngineConfig { max_num_queued_reqs: usize::MAX, ..config() }, "max_num_queued_reqs is"),
        ];
        for (config, expected) in cases {
            let message = config.validate(&info()).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        let bad_blocks = BackendInfo { block_size: 0, ..info() };
        assert!(config().validate(&bad_blocks).unwrap_err().to_string().contains("blocks of 0"));
    }
}
