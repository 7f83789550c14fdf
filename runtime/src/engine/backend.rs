//! The narrow waist: all that the engine and a device know of each other.

use super::FailureKind;
use super::SamplingParams;
use std::sync::Arc;
use std::time::Duration;

/// What a backend tells the engine about itself, fixed after loading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendInfo {
    /// Logits per row for generation; vector width for embedding; labels for classification.
    pub output_width: usize,
    pub vocab_size: usize,
    /// Tokens per KV block. Slots are `block * block_size + offset`.
    pub block_size: usize,
    /// KV blocks of the pool. 0 for models that keep no cache.
    pub num_blocks: usize,
    /// Bytes of the KV pool, for the plan-against-actual line.
    pub kv_cache_bytes: u64,
    /// Longest sequence (prompt and output) that the model accepts.
    pub max_model_len: usize,
    /// Where it runs, for people: `cpu (2 threads)`, `NVIDIA H200`.
    pub device: String,
}

/// One step: T tokens of S sequences, decode rows (one token) first, then prefill chunks (more than one).
#[derive(Debug, Clone, Default)]
pub struct StepBatch {
    /// `[T]` An id of `!row` (all bits of `row` turned over) stands for the token that output row `row` of the step before
    /// got, which the host may not know yet. Only for backends with more than one step under way.
    pub token_ids: Vec<u32>,
    /// `[T]` position of each token in its sequence.
    pub positions: Vec<u32>,
    /// `[T]` where each token's K and V go. Empty for models without a cache.
    pub slot_mapping: Vec<u32>,
    pub sequences: Vec<StepSequence>,
    /// Block tables of all sequences, end to end; a sequence names its range.
    pub block_tables: Vec<u32>,
}

#[derive(Debug, Clone)]
pub struct StepSequence {
    /// First of this sequence's rows in the step.
    pub query_start: usize,
    /// Its tokens in this step: 1 for decode, the chunk length for prefill.
    pub query_len: usize,
    /// Its tokens in the cache once this step has written: earlier ones plus `query_len`.
    pub context_len: usize,
    /// Range of [`StepBatch::block_tables`].
    pub block_table: std::ops::Range<usize>,
    /// Set when the step should return something for this sequence: false for a prefill chunk that is not the last.
    pub wants_output: bool,
    /// How to pick the next token. `None` for embedding and classification: the row itself is returned.
    pub sampling: Option<RowSampling>,
}

/// All that choosing one token needs, so that a device may do it without asking back.
#[derive(Debug, Clone)]
pub struct RowSampling {
    pub params: Arc<SamplingParams>,
    /// Seed of this sequence; with `step` it makes the random number, whatever else runs beside it.
    pub seed: u64,
    /// Tokens generated so far.
    pub step: u64,
    /// Prompt tokens, for the repetition penalty. Empty when no penalty is asked for. One allocation a sequence, which
    /// lives as long as the sequence: a device that keeps something of a sequence knows it by this address.
    pub prompt_token_ids: Arc<[u32]>,
    /// Tokens generated so far, for the penalties. Empty when no penalty is asked for; see [`Backend::counts_tokens`].
    pub output_token_ids: Vec<u32>,
    /// Tokens that must not be chosen now (end-of-sequence before `min_tokens`).
    pub forbidden_token_ids: Vec<u32>,
}

/// What came out for one sequence that wanted output, in the order of the step's sequences.
#[derive(Debug, Clone)]
pub enum RowOutput {
    Token(SampledToken),
    /// An embedding or class scores.
    Vector(Vec<f32>),
}

#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    pub token_id: u32,
    /// Of the chosen token, from the distribution before temperature and truncation; when logprobs were asked for.
    pub logprob: Option<TokenLogprob>,
    /// The most likely tokens, best first; as many as `logprobs` asked for.
    pub top_logprobs: Vec<TokenLogprob>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    pub token_id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Place in the order of likelihood, from 1.
    pub rank: u32,
}

/// A device that runs steps. Called from one thread only, the engine's.
pub trait Backend: Send {
    fn info(&self) -> &BackendInfo;

    /// Run one step and return one [`RowOutput`] per sequence with `wants_output`, in order.
    ///
    /// # Errors
    /// A failed step fails the requests in it. After a `fatal` error the engine stops and the process ends.
    fn step(&mut self, batch: &StepBatch) -> Result<Vec<RowOutput>, BackendError>;

    /// Steps that may be under way at once. 1: a step is over when [`Self::step`] returns, and that is the only way.
    /// More: the next step can be submitted before the tokens of this one are known, see [`StepBatch::token_ids`].
    fn max_steps_in_flight(&self) -> usize {
        1
    }

    /// Enqueue one step and return at once.
    ///
    /// # Errors
    /// As [`Self::step`]; also when [`Self::max_steps_in_flight`] are under way. Nothing was enqueued then.
    fn submit(&mut self, batch: &StepBatch) -> Result<(), BackendError> {
        let _ = batch;
        Err(self.runs_one_by_one())
    }

    /// Wait for the oldest step that was submitted and return its rows, as [`Self::step`] would.
    ///
    /// # Errors
    /// As [`Self::step`].
    fn collect(&mut self) -> Result<Vec<RowOutput>, BackendError> {
        Err(self.runs_one_by_one())
    }

    /// Whether it keeps count of the tokens that it chooses. Then a row with penalties need not wait for the token before
    /// it: [`RowSampling::output_token_ids`] is set where all of them are known (when a sequence starts, or comes back
    /// after preemption) and empty otherwise.
    fn counts_tokens(&self) -> bool {
        false
    }

    /// Time that the device took for the step that [`Self::collect`] returned last; `None` from one that does not measure.
    fn last_step_time(&self) -> Option<Duration> {
        None
    }

    /// Do a few milliseconds of work that can wait. Called while no step is under way and no request waits; true: there
    /// is more of it.
    ///
    /// # Errors
    /// A fatal one ends the engine; after any other it is not called again.
    fn idle(&mut self) -> Result<bool, BackendError> {
        Ok(false)
    }

    #[doc(hidden)]
    fn runs_one_by_one(&self) -> BackendError {
        let what = "this backend runs one step at a time".to_owned();
        BackendError { device: self.info().device.clone(), what, fatal: false, kind: FailureKind::Internal }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{device}: {what}{}", if *.fatal { " (the device cannot go on; the worker ends)" } else { "" })]
pub struct BackendError {
    pub device: String,
    pub what: String,
    /// The device is unusable from here on.
    pub fatal: bool,
    /// What it means for the process when it is fatal.
    pub kind: FailureKind,
}
