//! One way to serve the model: a TP size, as many replicas as fit the cards, and what that holds.

use super::accounting::budget;
use super::speed::{OptionSpeed, Timed};
use super::{Miss, PlanRequest, Subject, Targets};
use crate::memory::{Budget, KvLayout};
use crate::tensor_parallel::Indivisible;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanOption {
    pub tensor_parallel_size: u64,
    pub replicas: u64,
    pub gpus_used: u64,
    pub gpus_idle: u64,
    /// Of every card that is used.
    pub per_gpu: Budget,
    /// The cache on one rank.
    pub kv: KvLayout,
    /// Blocks of one replica. 0 without a cache.
    pub num_blocks: u64,
    /// Tokens of one replica's pool, as vLLM prints it: concurrency at `max_model_len` times that length.
    pub kv_cache_tokens: u64,
    /// Requests of `max_model_len`.
    pub full: Concurrency,
    /// Requests of `typical_len_tokens`.
    pub typical: Concurrency,
    /// `None`: the card's rates are not known.
    pub speed: Option<OptionSpeed>,
}

/// How many requests of one length run at once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Concurrency {
    pub tokens: u64,
    /// What one replica's KV pool holds, in fractions of a request. `None`: no cache, so KV sets no limit.
    pub kv_per_replica: Option<f64>,
    /// Whole requests of one replica: what its KV pool holds, or a step when there is none; at most `max_num_seqs`.
    pub requests_per_replica: u64,
    pub requests_total: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rejected {
    pub tensor_parallel_size: u64,
    #[serde(flatten)]
    pub reason: RejectedReason,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "reason")]
pub enum RejectedReason {
    #[error(transparent)]
    Indivisible(Indivisible),
    /// One request of `max_model_len` does not fit.
    #[error("needs {} a GPU, {} may be used", crate::units::format_bytes(*needed_bytes), crate::units::format_bytes(*requested_bytes))]
    TooLittleMemory {
        needed_bytes: u64,
        requested_bytes: u64,
        /// The longest sequence that would fit; 0 when the weights alone do not.
        max_model_len_that_fits: u64,
    },
    #[error("{0}")]
    MissesTarget(Miss),
}

impl Rejected {
    /// The target that the best of these misses.
    pub(super) fn nearest_miss(rejected: &[Self]) -> Option<Miss> {
        let misses = rejected.iter().filter_map(|r| match &r.reason {
            RejectedReason::MissesTarget(miss) => Some(*miss),
            _ => None,
        });
        let distance = |miss: &Miss| (miss.reached / miss.asked).ln().abs();
        misses.min_by(|a, b| distance(a).total_cmp(&distance(b)))
    }

    /// The longest sequence that would fit one of these; 0 when the weights alone never do.
    pub(super) fn longest(rejected: &[Self]) -> u64 {
        let lengths = rejected.iter().map(|r| match r.reason {
            RejectedReason::TooLittleMemory { max_model_len_that_fits, .. } => max_model_len_that_fits,
            RejectedReason::Indivisible(_) | RejectedReason::MissesTarget(_) => 0,
        });
        lengths.max().unwrap_or(0)
    }
}

impl PlanOption {
    /// For a size that divides the model, of at most `request.gpus`.
    pub(super) fn new(
        request: &PlanRequest<'_>,
        subject: &Subject,
        tensor_parallel_size: u64,
    ) -> Result<Self, RejectedReason> {
        let limits = &request.limits;
        let per_gpu = budget(request, subject, tensor_parallel_size);
        let kv = subject.layout(request, tensor_parallel_size);
        let num_blocks = kv.num_blocks(per_gpu.kv_pool_bytes);
        let needed_bytes = per_gpu.needed_bytes(&kv, limits);
        if needed_bytes > per_gpu.requested_bytes {
            return Err(RejectedReason::TooLittleMemory {
                needed_bytes,
                requested_bytes: per_gpu.requested_bytes,
                max_model_len_that_fits: longest(&kv, num_blocks, limits.max_num_batched_tokens, limits.max_model_len),
            });
        }
        let replicas = request.gpus / tensor_parallel_size;
        let at = |tokens| {
            let kv_per_replica =
                (!kv.is_empty()).then(|| kv.concurrency(num_blocks, tokens, limits.max_num_batched_tokens));
            // Without a cache a request lives for one step: what a step holds.
            let held = kv_per_replica.map_or(limits.max_num_batched_tokens / tokens, |c| c as u64);
            let requests_per_replica = held.min(limits.max_num_seqs);
            let requests_total = requests_per_replica * replicas;
            Concurrency { tokens, kv_per_replica, requests_per_replica, requests_total }
        };
        let full = at(limits.max_model_len);
        let kv_cache_tokens = full.kv_per_replica.map_or(0, |c| (c * limits.max_model_len as f64) as u64);
        let typical = at(request.typical_len());
        let timed = Timed::new(request, &subject.program, tensor_parallel_size);
        let speed = timed.map(|timed| timed.speed(&typical, replicas, limits.max_num_seqs)).transpose();
        Ok(Self {
            speed: speed.map_err(RejectedReason::MissesTarget)?,
            tensor_parallel_size,
            replicas,
            gpus_used: replicas * tensor_parallel_size,
            gpus_idle: request.gpus - replicas * tensor_parallel_size,
            per_gpu,
            num_blocks,
            kv_cache_tokens,
            full,
            typical,
            kv,
        })
    }
}

impl PlanOption {
    /// More requests a second first, then more at once. Where a total is asked for, fewer cards for it come before.
    pub(super) fn by_rate(a: &Self, b: &Self, targets: &Targets) -> std::cmp::Ordering {
        let key = |o: &Self| o.speed.as_ref().map_or((u64::MAX, 0.0), |s| (s.gpus_needed, s.requests_per_s));
        let ((a_gpus, a_rate), (b_gpus, b_rate)) = (key(a), key(b));
        let total = targets.request_rate.is_some() || targets.concurrency.is_some();
        let by_gpus = if total { a_gpus.cmp(&b_gpus) } else { std::cmp::Ordering::Equal };
        by_gpus
            .then(b_rate.total_cmp(&a_rate))
            .then(b.typical.requests_total.cmp(&a.typical.requests_total))
            .then(a.tensor_parallel_size.cmp(&b.tensor_parallel_size))
    }
}

/// The longest sequence that `num_blocks` hold, below `limit`.
fn longest(kv: &KvLayout, num_blocks: u64, max_num_batched_tokens: u64, limit: u64) -> u64 {
    if kv.is_empty() {
        return 0;
    }
    let fits = |tokens: u64| kv.blocks_per_request(tokens, max_num_batched_tokens) <= num_blocks;
    // Blocks never fall as the length grows: halve the interval between a length that fits and one that does not.
    let (mut fitting, mut too_long) = (0, limit);
    while too_long - fitting > 1 {
        let middle = fitting + (too_long - fitting) / 2;
        if fits(middle) { fitting = middle } else { too_long = middle }
    }
    // Whole blocks read better and waste nothing.
    fitting / kv.block_size_tokens * kv.block_size_tokens
}
