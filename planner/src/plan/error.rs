use super::{Change, MAX_GPUS, Miss, PlanRequest, Unsupported};
use crate::gpus;
use crate::tensor_parallel::{self, Indivisible};
use crate::units::{format_bytes, format_count};
use serde::Serialize;

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    #[error("{argument} is {value}, expected {expected}")]
    OutOfRange { argument: &'static str, value: String, expected: String },
    #[error("tensor_parallel_size {} is not possible: {problem}; possible: {}", problem.tensor_parallel_size, join(legal))]
    IllegalTensorParallel { problem: Indivisible, legal: Vec<u64> },
    #[error(transparent)]
    DoesNotFit(Box<DoesNotFit>),
    /// It fits, and no legal size is fast enough.
    #[error("no option meets the targets: {0}")]
    MissesTarget(Miss),
    /// No kernel for it on this generation of cards.
    #[error("{0}")]
    Unsupported(Unsupported),
    #[error("the targets need {} x {card}; plans are made for at most {}", format_count(*needed), format_count(MAX_GPUS))]
    TooManyGpus { needed: u64, card: String },
    #[error("targets need the rates of the card, and {card} is not in the table")]
    UnknownSpeed { card: String },
}

/// No option holds one request of full length. Figures are of the option that comes closest.
#[derive(Debug, Clone, PartialEq, Serialize, thiserror::Error)]
#[error(
    "{model} does not fit {gpus} x {card}: at TP {tensor_parallel_size} a GPU needs {} ({} of weights, {} for one \
     request of {} tokens), and {} of its {} may be used",
    format_bytes(*needed_bytes), format_bytes(*weights_bytes), format_bytes(*kv_bytes), format_count(*max_model_len),
    format_bytes(*requested_bytes), format_bytes(*total_bytes)
)]
pub struct DoesNotFit {
    pub model: String,
    pub card: String,
    pub gpus: u64,
    pub tensor_parallel_size: u64,
    pub max_model_len: u64,
    pub needed_bytes: u64,
    pub weights_bytes: u64,
    pub kv_bytes: u64,
    pub requested_bytes: u64,
    pub total_bytes: u64,
    /// The smallest card of the table of which one holds it alone.
    pub smallest_card: Option<&'static str>,
    /// Each of these alone would make it fit; the mildest first. May be empty.
    pub changes: Vec<Change>,
}

fn join(sizes: &[u64]) -> String {
    sizes.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

/// Ranges of everything that a caller can choose.
pub(super) fn check(request: &PlanRequest<'_>) -> Result<(), PlanError> {
    let limits = &request.limits;
    let in_range = |argument, value: u64, min: u64, max: u64| {
        if (min..=max).contains(&value) {
            return Ok(());
        }
        Err(PlanError::OutOfRange { argument, value: value.to_string(), expected: format!("{min} to {max}") })
    };
    in_range("gpus", request.gpus, 1, MAX_GPUS)?;
    in_range("max_model_len", limits.max_model_len, 1, request.spec.max_position_embeddings)?;
    in_range("typical length", request.demand.shape.total_tokens(), 1, u64::MAX)?;
    in_range("max_num_seqs", limits.max_num_seqs, 1, 65_536)?;
    in_range("max_num_batched_tokens", limits.max_num_batched_tokens, 1, 1 << 27)?;
    in_range("block_size", limits.block_size_tokens, 1, 4096)?;
    in_range("GPU memory", request.card.memory_total_bytes, 1, 1 << 50)?;
    let targets = &request.demand.targets;
    let positive =
        [("ttft", targets.ttft_ms), ("tpot", targets.tpot_ms), ("target_request_rate", targets.request_rate)];
    for (argument, value) in positive {
        if let Some(value) = value.filter(|value| !(*value > 0.0 && value.is_finite())) {
            let expected = "a number above 0".to_owned();
            return Err(PlanError::OutOfRange { argument, value: value.to_string(), expected });
        }
    }
    if let Some(concurrency) = targets.concurrency {
        in_range("target_concurrency", concurrency, 1, 1 << 32)?;
    }
    if targets.any() && gpus::find(&request.card.name).is_err() {
        return Err(unknown_speed(request));
    }
    let ratio = limits.gpu_memory_utilization;
    if !(ratio > 0.0 && ratio <= 1.0) {
        let expected = "above 0, at most 1 (of the card's total memory)".to_owned();
        return Err(PlanError::OutOfRange { argument: "gpu_memory_utilization", value: ratio.to_string(), expected });
    }
    if let Some(size) = request.tensor_parallel_size {
        if !(1..=request.gpus).contains(&size) {
            let expected = format!("1 to {}, the number of GPUs", request.gpus);
            return Err(PlanError::OutOfRange { argument: "tensor_parallel_size", value: size.to_string(), expected });
        }
        if let Err(problem) = tensor_parallel::check(request.spec, size) {
            let legal = tensor_parallel::legal_sizes(request.spec, request.gpus);
            return Err(PlanError::IllegalTensorParallel { problem, legal });
        }
    }
    Ok(())
}

pub(super) fn unknown_speed(request: &PlanRequest<'_>) -> PlanError {
    PlanError::UnknownSpeed { card: request.card.name.clone() }
}
