//! One card's memory, term by term.

use super::{KvLayout, activation_bytes, rank_weight_bytes};
use crate::model::{ModelSpec, Program, Task};
use crate::units::MIB;
use serde::{Deserialize, Serialize};

/// A CUDA context with kernels and cuBLASLt loaded: 523 MiB, free memory of an H200 before and after.
const CONTEXT_BYTES: u64 = 523 * MIB;
/// NCCL buffers and peer workspaces of a rank: vLLM 0.11 on H100 logs 0.54 GiB outside PyTorch at TP 2, 0.13 at TP 1.
const COLLECTIVES_BYTES: u64 = 420 * MIB;
/// Captured decode graphs: vLLM 0.11 logs 0.10 GiB for Qwen3-0.6B on H100.
const GRAPHS_BYTES: u64 = 102 * MIB;
/// Logits and the scratch of top-k/top-p for each sequence and vocabulary entry: PyTorch's sampler as vLLM 0.11 to
/// 0.16 log it (Llama 4.76 GiB, Qwen3 5.6, gpt-oss 7.4 at 1,024 sequences: all 38.5 bytes). Not divided by TP.
const SAMPLER_BYTES_PER_LOGIT: f64 = 38.5;

/// What the engine is started with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EngineLimits {
    /// Of the card's total memory, 0..=1.
    pub gpu_memory_utilization: f64,
    /// Longest sequence, prompt and output.
    pub max_model_len: u64,
    pub max_num_seqs: u64,
    pub max_num_batched_tokens: u64,
    pub block_size_tokens: u64,
}

/// vLLM's default ratio for years, and the one people know.
pub const DEFAULT_GPU_MEMORY_UTILIZATION: f64 = 0.9;
/// vLLM's default on cards below 70 GiB.
pub const DEFAULT_MAX_NUM_SEQS: u64 = 256;
/// What the bundled engine takes on a card: 64 rows for each of the 132 multiprocessors of an H100 or H200. Its tiles
/// then fill the card without a rest; 8,192 rows leave 3 % of it idle.
pub const DEFAULT_MAX_NUM_BATCHED_TOKENS: u64 = 132 * 64;
pub const DEFAULT_BLOCK_SIZE_TOKENS: u64 = 16;

impl EngineLimits {
    /// Defaults for a model: its whole context. Models that do not generate take a text in one step, so a step is at
    /// least as long as a text.
    pub fn for_model(spec: &ModelSpec) -> Self {
        let max_model_len = spec.max_position_embeddings;
        Self {
            gpu_memory_utilization: DEFAULT_GPU_MEMORY_UTILIZATION,
            max_model_len,
            max_num_seqs: DEFAULT_MAX_NUM_SEQS,
            max_num_batched_tokens: Self::batched_tokens(spec, max_model_len),
            block_size_tokens: DEFAULT_BLOCK_SIZE_TOKENS,
        }
    }

    /// The same with another context length.
    #[must_use]
    pub fn with_max_model_len(self, spec: &ModelSpec, max_model_len: u64) -> Self {
        Self { max_model_len, max_num_batched_tokens: Self::batched_tokens(spec, max_model_len), ..self }
    }

    fn batched_tokens(spec: &ModelSpec, max_model_len: u64) -> u64 {
        match spec.task {
            Task::Generate => DEFAULT_MAX_NUM_BATCHED_TOKENS,
            Task::Embed { .. } | Task::Classify { .. } => DEFAULT_MAX_NUM_BATCHED_TOKENS.max(max_model_len),
        }
    }
}

/// What one card's memory is used for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// The card.
    pub total_bytes: u64,
    /// `gpu_memory_utilization` of the total: all that the engine may take.
    pub requested_bytes: u64,
    /// Everything but the KV pool.
    pub terms: Vec<Term>,
    /// What is left for K and V. 0 when the terms alone do not fit.
    pub kv_pool_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    pub name: TermKind,
    pub bytes: u64,
    pub source: Source,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TermKind {
    Weights,
    Activations,
    /// Logits and what choosing tokens from them needs.
    Sampler,
    CudaContext,
    CudaGraphs,
    Collectives,
    /// All of the above but weights together, as a boot log has them.
    Overhead,
}

impl TermKind {
    pub fn label(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Activations => "activations",
            Self::Sampler => "sampler",
            Self::CudaContext => "CUDA context",
            Self::CudaGraphs => "CUDA graphs",
            Self::Collectives => "collectives",
            Self::Overhead => "activations, context, graphs",
        }
    }
}

/// Where a figure comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Summed over the model's Program.
    Computed,
    /// Read from the checkpoint's headers.
    Checkpoint,
    /// Measured on one card, taken for all.
    Measured,
    /// From a boot log of this model and card.
    Calibrated,
    /// Taken over from another engine's logs.
    Assumed,
}

/// How many bytes the weights take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightSource {
    /// From the Program's shapes.
    Program,
    /// On-device bytes of the whole checkpoint, from its headers ([`super::checkpoint_bytes`]); ranks in the
    /// Program's proportion.
    Checkpoint { bytes: u64 },
}

impl Budget {
    /// The budget of one rank, on a card of `total_bytes`.
    pub fn new(
        program: &Program,
        spec: &ModelSpec,
        weights: WeightSource,
        tensor_parallel_size: u64,
        total_bytes: u64,
        limits: &EngineLimits,
    ) -> Self {
        Self::of_own_terms(total_bytes, limits, own_terms(program, spec, weights, tensor_parallel_size, limits))
    }

    /// The same of what [`own_terms`] has said.
    pub(crate) fn of_own_terms(total_bytes: u64, limits: &EngineLimits, terms: Vec<Term>) -> Self {
        let requested_bytes = (total_bytes as f64 * limits.gpu_memory_utilization).ceil() as u64;
        Self::of_terms(total_bytes, requested_bytes, terms)
    }

    /// What terms leave of `requested_bytes` is the pool.
    pub(crate) fn of_terms(total_bytes: u64, requested_bytes: u64, terms: Vec<Term>) -> Self {
        let taken = sum(&terms);
        Self { total_bytes, requested_bytes, terms, kv_pool_bytes: requested_bytes.saturating_sub(taken) }
    }

    /// Everything but the KV pool.
    pub fn without_kv_bytes(&self) -> u64 {
        sum(&self.terms)
    }

    pub fn term(&self, name: TermKind) -> u64 {
        self.terms.iter().filter(|t| t.name == name).map(|t| t.bytes).sum()
    }

    /// What the engine must be given to serve one request of `max_model_len`.
    pub fn needed_bytes(&self, layout: &KvLayout, limits: &EngineLimits) -> u64 {
        let blocks = layout.blocks_per_request(limits.max_model_len, limits.max_num_batched_tokens);
        self.without_kv_bytes().saturating_add(blocks.saturating_mul(layout.block_bytes()))
    }
}

/// What the bundled runtime takes on one rank beside the KV pool, whatever the card.
pub(crate) fn own_terms(
    program: &Program,
    spec: &ModelSpec,
    weights: WeightSource,
    tensor_parallel_size: u64,
    limits: &EngineLimits,
) -> Vec<Term> {
    let mut terms = vec![weights_term(program, spec, weights, tensor_parallel_size)];
    let mut push = |name, bytes, source| terms.push(Term { name, bytes, source });
    let (tokens, sequences) = (limits.max_num_batched_tokens, limits.max_num_seqs);
    let activations = activation_bytes(program, spec, tensor_parallel_size, tokens, sequences);
    push(TermKind::Activations, activations, Source::Computed);
    push(TermKind::CudaContext, CONTEXT_BYTES, Source::Measured);
    push(TermKind::CudaGraphs, GRAPHS_BYTES, Source::Assumed);
    if spec.task == Task::Generate {
        let sampler = SAMPLER_BYTES_PER_LOGIT * sequences as f64 * spec.vocab_size as f64;
        push(TermKind::Sampler, sampler as u64, Source::Assumed);
    }
    if tensor_parallel_size > 1 {
        push(TermKind::Collectives, COLLECTIVES_BYTES, Source::Assumed);
    }
    terms
}

fn sum(terms: &[Term]) -> u64 {
    terms.iter().fold(0, |sum, term| sum.saturating_add(term.bytes))
}

pub(crate) fn weights_term(program: &Program, spec: &ModelSpec, weights: WeightSource, tp: u64) -> Term {
    let of_rank = rank_weight_bytes(program, spec, tp);
    let (bytes, source) = match weights {
        WeightSource::Program => (of_rank, Source::Computed),
        WeightSource::Checkpoint { bytes } => {
            let share = of_rank as f64 / rank_weight_bytes(program, spec, 1).max(1) as f64;
            ((bytes as f64 * share) as u64, Source::Checkpoint)
        }
    };
    Term { name: TermKind::Weights, bytes, source }
}

/// The field guide's formula: whole requests of `tokens` tokens in a pool, at one figure per token.
pub fn requests_that_fit(kv_pool_bytes: u64, bytes_per_token: u64, tokens: u64) -> u64 {
    kv_pool_bytes.checked_div(bytes_per_token.saturating_mul(tokens)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GIB;

    #[test]
    fn the_field_guides_example_is_22_requests() {
        // LLaMA-2-13B as the guide takes it: an 80 GB card at 0.9, 28 GB of weights, 1 MiB a token, 2,048 tokens.
        let pool = (80 * GIB) * 9 / 10 - 28 * GIB;
        assert_eq!(pool, 44 * GIB);
        assert_eq!(requests_that_fit(pool, MIB, 2048), 22);
        assert_eq!(requests_that_fit(pool, 0, 2048), 0);
    }
}
