//! What fits: every legal tensor-parallel size with as many replicas as the cards allow, ranked.

mod accounting;
mod changes;
mod error;
mod notes;
mod option;
mod speed;
mod support;
mod targets;

pub use accounting::{Accounting, engine_budget};
pub use changes::Change;
pub use error::{DoesNotFit, PlanError};
pub use option::{Concurrency, PlanOption, Rejected, RejectedReason};
pub use speed::{Bottleneck, Bound, LoadLimit, OptionSpeed, Timed};
pub use support::Unsupported;
pub use targets::{Demand, Miss, Rank, TargetKind, Targets, gpus_needed};

use crate::gpus::GpuModel;
use crate::memory::{
    EngineLimits, KvCacheDtype, KvLayout, SlidingLayers, Source, WeightSource, rank_weight_bytes, served_dtype,
};
use crate::model::{DType, Family, ModelSpec, Program, Quantization, Storage, Task};
use crate::tensor_parallel;
use serde::{Deserialize, Serialize};

/// Version of [`Plan`]'s shape; raised when a field changes meaning or goes.
pub const SCHEMA: u32 = 2;

/// More cards than any one plan is made for.
pub const MAX_GPUS: u64 = 1024;

/// All that a plan depends on.
#[derive(Debug, Clone)]
pub struct PlanRequest<'a> {
    pub model_name: &'a str,
    pub spec: &'a ModelSpec,
    pub weights: WeightSource,
    pub card: Card,
    pub gpus: u64,
    /// Only this size; `None` tries every legal one.
    pub tensor_parallel_size: Option<u64>,
    pub limits: EngineLimits,
    /// Prompt and output of a typical request (at most `limits.max_model_len` of it counts), the engine, and what is
    /// asked of it.
    pub demand: Demand,
    pub accounting: Accounting,
    pub kv_cache_dtype: KvCacheDtype,
    pub sliding: SlidingLayers,
}

/// One kind of card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    pub name: String,
    pub memory_total_bytes: u64,
}

impl From<&GpuModel> for Card {
    fn from(gpu: &GpuModel) -> Self {
        Self { name: gpu.full_name.to_owned(), memory_total_bytes: gpu.memory_total_bytes }
    }
}

/// The answer. Options are ranked by total requests of typical length, then by fewer GPUs a replica.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub schema: u32,
    pub model: ModelSummary,
    pub card: Card,
    pub gpus: u64,
    pub limits: EngineLimits,
    pub typical_len_tokens: u64,
    pub demand: Demand,
    /// Best first; never empty.
    pub options: Vec<PlanOption>,
    pub rejected: Vec<Rejected>,
    /// What was assumed, and what a reader should know, one sentence each.
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelSummary {
    pub name: String,
    pub architecture: String,
    pub family: Family,
    pub task: Task,
    pub layers: u64,
    pub parameters: u64,
    pub stored_dtype: DType,
    pub served_dtype: DType,
    /// How the checkpoint stores its linear weights: `None` for plain tensors.
    pub quantization: Option<QuantizationSummary>,
    pub max_position_embeddings: u64,
    pub weights_bytes: u64,
    pub weights_source: Source,
    /// The cache at TP 1; no groups for models that keep none.
    pub kv: KvLayout,
    /// All layers of one token at TP 1, while every window still holds it.
    pub kv_bytes_per_token: u64,
}

/// Quantised weights in a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuantizationSummary {
    pub method: String,
    /// Of linear layers that the checkpoint does not except.
    pub linear: Storage,
    pub experts: Storage,
    pub kv_cache_fp8: bool,
}

impl QuantizationSummary {
    fn of(quantization: &Quantization) -> Option<Self> {
        let Quantization::Stored(stored) = quantization else { return None };
        let (linear, experts) = (stored.linear, stored.experts);
        Some(Self { method: stored.method.clone(), linear, experts, kv_cache_fp8: stored.kv_cache_fp8 })
    }

    /// `fp8`, `int4`, `fp4 experts`.
    pub fn name(&self) -> String {
        match (self.linear, self.experts) {
            (Storage::Packed(linear), _) => linear.name(),
            (Storage::Plain, Storage::Packed(experts)) => format!("{} experts", experts.name()),
            (Storage::Plain, Storage::Plain) => "mixed precision".to_owned(),
        }
    }
}

/// The best that one kind of card can do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CardRow {
    pub card: Card,
    /// `None`: the model does not fit.
    pub best: Option<PlanOption>,
    /// When it does not: the longest sequence that would. 0 when the weights alone are too large.
    pub max_model_len_that_fits: u64,
}

/// Plan a model on `gpus` equal cards.
///
/// # Errors
/// [`PlanError`]: an argument out of range, a TP size that is not legal, or [`DoesNotFit`].
pub fn plan(request: &PlanRequest<'_>) -> Result<Plan, PlanError> {
    error::check(request)?;
    let program = request.demand.engine.program(request.spec);
    let (options, rejected) = search(request, &program);
    if options.is_empty() {
        if let Err(unsupported) = support::check(request) {
            let smallest_card = changes::bigger_or_newer_card(request, &program).map(str::to_owned);
            return Err(PlanError::Unsupported(Unsupported { smallest_card, ..unsupported }));
        }
        if let Some(miss) = Rejected::nearest_miss(&rejected) {
            return Err(PlanError::MissesTarget(miss));
        }
        return Err(PlanError::DoesNotFit(Box::new(changes::does_not_fit(request, &program))));
    }
    let mut plan = Plan {
        schema: SCHEMA,
        model: summary(request, &program),
        card: request.card.clone(),
        gpus: request.gpus,
        limits: request.limits,
        typical_len_tokens: request.typical_len(),
        demand: Demand { shape: request.demand.shape.within(request.limits.max_model_len), ..request.demand },
        options,
        rejected,
        notes: Vec::new(),
    };
    plan.notes = notes::notes(request, &program, &plan);
    Ok(plan)
}

/// The same model on each of `cards`, as many of them as the request has.
///
/// # Errors
/// [`PlanError`] for an argument out of range; a card that is too small is a row without `best`.
pub fn across_cards<'c>(
    request: &PlanRequest<'_>,
    cards: impl IntoIterator<Item = &'c GpuModel>,
) -> Result<Vec<CardRow>, PlanError> {
    error::check(request)?;
    let program = request.demand.engine.program(request.spec);
    let row = |card: Card| {
        let request = PlanRequest { card: card.clone(), ..request.clone() };
        let (options, rejected) = search(&request, &program);
        let best = options.into_iter().next();
        CardRow { card, best, max_model_len_that_fits: Rejected::longest(&rejected) }
    };
    Ok(cards.into_iter().map(|gpu| row(Card::from(gpu))).collect())
}

impl PlanRequest<'_> {
    fn typical_len(&self) -> u64 {
        self.demand.shape.total_tokens().min(self.limits.max_model_len)
    }

    fn layout(&self, tensor_parallel_size: u64) -> KvLayout {
        let dtype = self.kv_cache_dtype.resolve(self.spec);
        KvLayout::new(self.spec, tensor_parallel_size, dtype, self.limits.block_size_tokens, self.sliding)
    }

    /// Sizes worth trying: the one asked for, or all up to the number of cards.
    fn sizes(&self) -> Vec<u64> {
        match self.tensor_parallel_size {
            Some(size) => vec![size],
            None => (1..=self.gpus).collect(),
        }
    }
}

/// Options that fit and meet the targets, best first, and the sizes that do not. A size that cannot divide the model is worth telling
/// when it is a power of two, which people try.
fn search(request: &PlanRequest<'_>, program: &Program) -> (Vec<PlanOption>, Vec<Rejected>) {
    let (mut options, mut rejected) = (Vec::new(), Vec::new());
    let unsupported = support::check(request);
    for tensor_parallel_size in request.sizes() {
        let reason = match tensor_parallel::check(request.spec, tensor_parallel_size) {
            Err(indivisible) => RejectedReason::Indivisible(indivisible),
            Ok(()) if unsupported.is_err() => continue,
            Ok(()) => match PlanOption::new(request, program, tensor_parallel_size) {
                Ok(option) => {
                    options.push(option);
                    continue;
                }
                Err(reason) => reason,
            },
        };
        if tensor_parallel_size.is_power_of_two() || matches!(reason, RejectedReason::TooLittleMemory { .. }) {
            rejected.push(Rejected { tensor_parallel_size, reason });
        }
    }
    match request.demand.rank {
        Rank::Concurrency => {
            options.sort_by_key(|o| (std::cmp::Reverse(o.typical.requests_total), o.tensor_parallel_size));
        }
        Rank::RequestRate => options.sort_by(|a, b| PlanOption::by_rate(a, b, &request.demand.targets)),
    }
    (options, rejected)
}

fn summary(request: &PlanRequest<'_>, program: &Program) -> ModelSummary {
    let spec = request.spec;
    let (weights_bytes, weights_source) = match request.weights {
        WeightSource::Program => (rank_weight_bytes(program, spec, 1), Source::Computed),
        WeightSource::Checkpoint { bytes } => (bytes, Source::Checkpoint),
    };
    let kv = request.layout(1);
    ModelSummary {
        name: request.model_name.to_owned(),
        architecture: spec.architecture.clone(),
        family: spec.family,
        task: spec.task,
        layers: spec.layers.len() as u64,
        parameters: program.parameters(),
        stored_dtype: spec.dtype,
        served_dtype: served_dtype(spec),
        quantization: QuantizationSummary::of(&spec.quantization),
        max_position_embeddings: spec.max_position_embeddings,
        weights_bytes,
        weights_source,
        kv_bytes_per_token: kv.bytes_per_token(),
        kv,
    }
}
