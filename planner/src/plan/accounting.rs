//! Memory as the engine of the request accounts for it: the bundled runtime's own budget, or vLLM's or SGLang's.

use super::{PlanRequest, Subject};
use crate::engine::budget::Origin;
use crate::engine::vllm::PoolOptions;
use crate::engine::{self, Calibration, EngineBudget, EngineSettings, Version};
use crate::memory::{Budget, SlidingLayers, Source, Term, TermKind, weights_term};
use crate::model::Program;
use crate::perf::Engine;

/// What is known of another engine beside its name.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Accounting {
    /// `None`: the newest that is known.
    pub version: Option<Version>,
    /// The ratio in the limits is a default, which the engine replaces by its own.
    pub default_fraction: bool,
    /// So are the sequences of a step, and its tokens.
    pub default_max_num_seqs: bool,
    pub default_max_num_batched_tokens: bool,
    /// From a boot log, and the TP size that it was written at.
    pub calibration: Option<(u64, Calibration)>,
}

/// The engine's own account of one card at a TP size. `None` for the bundled runtime.
pub fn engine_budget(request: &PlanRequest<'_>, program: &Program, tensor_parallel_size: u64) -> Option<EngineBudget> {
    let settings = settings(request, tensor_parallel_size)?;
    let calibration = request.accounting.calibration.filter(|(tp, _)| *tp == tensor_parallel_size);
    Some(EngineBudget::new(program, request.spec, &settings, calibration.map(|(_, c)| c).as_ref()))
}

fn settings(request: &PlanRequest<'_>, tensor_parallel_size: u64) -> Option<EngineSettings> {
    let engine = match request.demand.engine {
        Engine::Mserve => return None,
        Engine::Vllm => engine::Engine::Vllm,
        Engine::Sglang => engine::Engine::Sglang,
    };
    let limits = &request.limits;
    let pool = PoolOptions {
        block_size_tokens: limits.block_size_tokens,
        hybrid_manager: request.sliding == SlidingLayers::KeepWindow,
        ..PoolOptions::new(tensor_parallel_size, request.kv_cache_dtype.resolve(request.spec))
    };
    let settings = EngineSettings::new(engine, request.card.memory_total_bytes, limits.max_model_len, pool);
    let accounting = &request.accounting;
    Some(EngineSettings {
        version: accounting.version.unwrap_or(settings.version),
        fraction: (!accounting.default_fraction).then_some(limits.gpu_memory_utilization),
        max_num_seqs: (!accounting.default_max_num_seqs).then_some(limits.max_num_seqs),
        max_num_batched_tokens: (!accounting.default_max_num_batched_tokens).then_some(limits.max_num_batched_tokens),
        a100: request.card.name.contains("A100"),
        ..settings
    })
}

/// One card's memory at a TP size.
pub(super) fn budget(request: &PlanRequest<'_>, subject: &Subject, tensor_parallel_size: u64) -> Budget {
    let total = request.card.memory_total_bytes;
    let Some(theirs) = engine_budget(request, &subject.program, tensor_parallel_size) else {
        return Budget::of_own_terms(total, &request.limits, subject.terms(request, tensor_parallel_size));
    };
    let term = |name: &str| match name {
        "weights" => TermKind::Weights,
        "peak activations" => TermKind::Activations,
        "non-torch" => TermKind::CudaContext,
        "CUDA graph estimate" => TermKind::CudaGraphs,
        _ => TermKind::Overhead,
    };
    let source = |origin: Origin| match origin {
        Origin::Computed => Source::Computed,
        Origin::Assumed => Source::Assumed,
        Origin::Calibrated => Source::Calibrated,
    };
    let of_term = |t: &engine::budget::EngineTerm| match (term(t.name), t.origin) {
        // The checkpoint's own bytes, unless a log has said what loading took.
        (TermKind::Weights, Origin::Computed) => {
            weights_term(&subject.program, request.spec, request.weights, tensor_parallel_size)
        }
        (name, origin) => Term { name, bytes: t.bytes, source: source(origin) },
    };
    Budget::of_terms(total, theirs.requested_bytes, theirs.terms.iter().map(of_term).collect())
}
