//! When nothing fits: how far off the closest option is, and what would do.

use super::accounting::budget;
use super::{Card, DoesNotFit, MAX_GPUS, PlanOption, PlanRequest, Rejected, RejectedReason, Subject, search};
use crate::gpus::{GPUS, GpuModel};
use crate::memory::{EngineLimits, KvCacheDtype, TermKind, WeightSource, rank_weight_bytes};
use crate::tensor_parallel;
use serde::Serialize;
use std::fmt;

/// One change that makes the model fit.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    KvCacheFp8,
    MaxModelLen(u64),
    GpuMemoryUtilization(f64),
    TensorParallelSize(u64),
    Gpus(u64),
    /// The smallest card of the table that does.
    Gpu(&'static str),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KvCacheFp8 => f.write_str("--kv-cache-dtype fp8"),
            Self::MaxModelLen(tokens) => write!(f, "--max-model-len {tokens}"),
            Self::GpuMemoryUtilization(ratio) => write!(f, "--gpu-memory-utilization {ratio}"),
            Self::TensorParallelSize(size) => write!(f, "--tp {size}"),
            Self::Gpus(gpus) => write!(f, "--gpus {gpus}"),
            Self::Gpu(name) => write!(f, "--gpu {name}"),
        }
    }
}

/// A context shorter than this is no help.
const SHORTEST_USEFUL_CONTEXT_TOKENS: u64 = 256;

pub(super) fn does_not_fit(request: &PlanRequest<'_>, subject: &Subject) -> DoesNotFit {
    let closest = closest(request, subject);
    let trial = Trial::new(request, subject);
    let limits = &request.limits;
    let budget = budget(request, subject, closest);
    let needed_bytes = budget.needed_bytes(&subject.layout(request, closest), limits);
    DoesNotFit {
        model: request.model_name.to_owned(),
        card: request.card.name.clone(),
        gpus: request.gpus,
        tensor_parallel_size: closest,
        max_model_len: limits.max_model_len,
        needed_bytes,
        weights_bytes: budget.term(TermKind::Weights),
        kv_bytes: needed_bytes - budget.without_kv_bytes(),
        requested_bytes: budget.requested_bytes,
        total_bytes: budget.total_bytes,
        smallest_card: smallest_card(request, &trial),
        changes: changes(request, &trial),
    }
}

/// The legal size with the least to hold on a card.
fn closest(request: &PlanRequest<'_>, subject: &Subject) -> u64 {
    let needed = |tp: u64| match PlanOption::new(request, subject, tp) {
        Err(RejectedReason::TooLittleMemory { needed_bytes, .. }) => needed_bytes,
        _ => u64::MAX,
    };
    let legal = request.sizes().into_iter().filter(|&tp| tensor_parallel::check(request.spec, tp).is_ok());
    legal.min_by_key(|&tp| needed(tp)).unwrap_or(1)
}

fn changes(request: &PlanRequest<'_>, trial: &Trial<'_>) -> Vec<Change> {
    let candidates = [
        fp8(request),
        longest_context(request, trial.subject),
        higher_ratio(request),
        other_size(request, trial.subject),
        more_gpus(request, trial),
        bigger_card(request, trial),
    ];
    let fits = |candidate: Option<(Change, PlanRequest<'_>)>| {
        let (change, request) = candidate?;
        trial.fits(&request).then_some(change)
    };
    candidates.into_iter().filter_map(fits).collect()
}

/// What is tried with other cards, and what it weighs.
struct Trial<'a> {
    subject: &'a Subject,
    weights_bytes: u64,
}

impl<'a> Trial<'a> {
    fn new(request: &PlanRequest<'_>, subject: &'a Subject) -> Self {
        let weights_bytes = match request.weights {
            WeightSource::Program => rank_weight_bytes(&subject.program, request.spec, 1),
            WeightSource::Checkpoint { bytes } => bytes,
        };
        Self { subject, weights_bytes }
    }

    fn fits(&self, request: &PlanRequest<'_>) -> bool {
        // Ranks share the weights at best: what cannot hold its share of them is not worth a search.
        let ranks = request.tensor_parallel_size.unwrap_or(request.gpus).max(1);
        self.weights_bytes / ranks <= request.card.memory_total_bytes && !search(request, self.subject).0.is_empty()
    }
}

fn fp8<'a>(request: &PlanRequest<'a>) -> Option<(Change, PlanRequest<'a>)> {
    Some((Change::KvCacheFp8, PlanRequest { kv_cache_dtype: KvCacheDtype::Fp8, ..request.clone() }))
}

fn longest_context<'a>(request: &PlanRequest<'a>, subject: &Subject) -> Option<(Change, PlanRequest<'a>)> {
    let (_, rejected) = search(request, subject);
    let max_model_len = Rejected::longest(&rejected);
    if max_model_len < SHORTEST_USEFUL_CONTEXT_TOKENS {
        return None;
    }
    let limits = EngineLimits { max_model_len, ..request.limits };
    Some((Change::MaxModelLen(max_model_len), PlanRequest { limits, ..request.clone() }))
}

fn higher_ratio<'a>(request: &PlanRequest<'a>) -> Option<(Change, PlanRequest<'a>)> {
    const HIGH: f64 = 0.95;
    let limits = EngineLimits { gpu_memory_utilization: HIGH, ..request.limits };
    (request.limits.gpu_memory_utilization < HIGH)
        .then(|| (Change::GpuMemoryUtilization(HIGH), PlanRequest { limits, ..request.clone() }))
}

/// When a size was asked for: the smallest other one that does.
fn other_size<'a>(request: &PlanRequest<'a>, subject: &Subject) -> Option<(Change, PlanRequest<'a>)> {
    request.tensor_parallel_size?;
    let all = PlanRequest { tensor_parallel_size: None, ..request.clone() };
    let size = search(&all, subject).0.iter().map(|o| o.tensor_parallel_size).min()?;
    Some((Change::TensorParallelSize(size), all))
}

/// The next power of two of cards that does.
fn more_gpus<'a>(request: &PlanRequest<'a>, trial: &Trial<'_>) -> Option<(Change, PlanRequest<'a>)> {
    let counts = (0..=MAX_GPUS.ilog2()).map(|n| 1 << n).filter(|&n| n > request.gpus);
    let with = |gpus| PlanRequest { gpus, tensor_parallel_size: None, ..request.clone() };
    let gpus = counts.take_while(|&n| n <= 64).find(|&n| trial.fits(&with(n)))?;
    Some((Change::Gpus(gpus), with(gpus)))
}

fn smallest_card(request: &PlanRequest<'_>, trial: &Trial<'_>) -> Option<&'static str> {
    let on = |card: Card| PlanRequest { card, gpus: 1, tensor_parallel_size: None, ..request.clone() };
    GPUS.iter().find(|gpu| trial.fits(&on(Card::from(*gpu)))).map(|gpu| gpu.full_name)
}

/// Name of the smallest card of which as many do.
pub(super) fn bigger_or_newer_card(request: &PlanRequest<'_>, subject: &Subject) -> Option<&'static str> {
    let trial = Trial::new(request, subject);
    let with = |gpu: &GpuModel| PlanRequest { card: Card::from(gpu), ..request.clone() };
    GPUS.iter().find(|gpu| trial.fits(&with(gpu))).map(|gpu| gpu.name)
}

fn bigger_card<'a>(request: &PlanRequest<'a>, trial: &Trial<'_>) -> Option<(Change, PlanRequest<'a>)> {
    let with = |card: Card| PlanRequest { card, ..request.clone() };
    let bigger = GPUS.iter().filter(|gpu| gpu.memory_total_bytes > request.card.memory_total_bytes);
    let gpu = bigger.into_iter().find(|gpu| trial.fits(&with(Card::from(*gpu))))?;
    Some((Change::Gpu(gpu.name), with(Card::from(gpu))))
}
