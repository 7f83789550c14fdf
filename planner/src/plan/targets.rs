//! What is asked of a deployment, and how many cards that takes.

use super::{DoesNotFit, PlanError, PlanOption, PlanRequest, RejectedReason, error};
use crate::perf::Engine;
use crate::perf::serving::RequestShape;
use crate::tensor_parallel;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What users do, and what they are promised.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Demand {
    pub engine: Engine,
    pub shape: RequestShape,
    pub targets: Targets,
    pub rank: Rank,
}

/// By what options are ranked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rank {
    /// Requests of typical length that memory holds at once.
    #[default]
    Concurrency,
    /// Cards that the targets need, then requests a second.
    RequestRate,
}

impl Demand {
    /// The bundled runtime under requests of one shape, without targets.
    pub fn of(input_tokens: u64, output_tokens: u64) -> Self {
        Self {
            engine: Engine::default(),
            shape: RequestShape { input_tokens, output_tokens },
            targets: Targets::default(),
            rank: Rank::default(),
        }
    }
}

/// All that is `Some` must be met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Targets {
    /// Mean time to first token, at the planned load.
    pub ttft_ms: Option<f64>,
    /// Mean time per output token.
    pub tpot_ms: Option<f64>,
    /// Requests a second, all replicas together.
    pub request_rate: Option<f64>,
    /// Requests at once, all replicas together.
    pub concurrency: Option<u64>,
}

impl Targets {
    pub fn any(&self) -> bool {
        *self != Self::default()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetKind {
    Ttft,
    Tpot,
    RequestRate,
    Concurrency,
}

/// A target that an option does not meet, and the best that it reaches.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Miss {
    pub target: TargetKind,
    pub asked: f64,
    pub reached: f64,
}

impl Miss {
    pub(super) fn new(target: TargetKind, asked: f64, reached: f64) -> Self {
        Self { target, asked, reached }
    }
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (asked, reached) = (self.asked, self.reached);
        match self.target {
            TargetKind::Ttft => write!(f, "first token after {reached:.0} ms at best, {asked} asked"),
            TargetKind::Tpot => write!(f, "{reached:.1} ms a token at best, {asked} asked"),
            TargetKind::RequestRate => write!(f, "{reached:.2} requests/s at most, {asked} asked"),
            TargetKind::Concurrency => write!(f, "{reached:.0} requests at once at most, {asked} asked"),
        }
    }
}

/// The fewest cards of the request's kind that meet its targets; `request.gpus` does not count.
///
/// # Errors
/// [`PlanError`]: an argument out of range, [`PlanError::UnknownSpeed`], or what no number of cards can meet.
pub fn gpus_needed(request: &PlanRequest<'_>) -> Result<u64, PlanError> {
    let any_number = PlanRequest { gpus: super::MAX_GPUS, ..request.clone() };
    error::check(&any_number)?;
    let program = request.demand.engine.program(request.spec);
    super::support::check(request).map_err(|unsupported| {
        let smallest_card = super::changes::bigger_or_newer_card(request, &program).map(str::to_owned);
        PlanError::Unsupported(super::Unsupported { smallest_card, ..unsupported })
    })?;
    let mut best: Option<(u64, f64)> = None;
    let mut misses = Vec::new();
    for tp in sizes(request) {
        if tensor_parallel::check(request.spec, tp).is_err() {
            continue;
        }
        // One replica within the latencies asked for; rate and concurrency follow from how many there are.
        let mut one = PlanRequest { gpus: tp, tensor_parallel_size: Some(tp), ..request.clone() };
        one.demand.targets.request_rate = None;
        one.demand.targets.concurrency = None;
        match PlanOption::new(&one, &program, tp) {
            Ok(option) => {
                let Some(speed) = &option.speed else { return Err(error::unknown_speed(request)) };
                let targets = &request.demand.targets;
                let for_rate = targets.request_rate.map_or(1.0, |rate| (rate / speed.requests_per_s).ceil());
                let for_users = targets.concurrency.map_or(1.0, |n| (n as f64 / speed.replica.concurrency).ceil());
                let gpus = (tp as f64 * for_rate.max(for_users).max(1.0)) as u64;
                let rate = speed.requests_per_s / tp as f64;
                if best.is_none_or(|(fewest, its_rate)| gpus < fewest || (gpus == fewest && rate > its_rate)) {
                    best = Some((gpus, rate));
                }
            }
            Err(RejectedReason::MissesTarget(miss)) => misses.push(miss),
            Err(_) => {}
        }
    }
    match best {
        Some((gpus, _)) if gpus <= super::MAX_GPUS => Ok(gpus),
        Some((needed, _)) => Err(PlanError::TooManyGpus { needed, card: request.card.name.clone() }),
        None => Err(misses.into_iter().next().map_or_else(|| too_large(request), PlanError::MissesTarget)),
    }
}

/// Sizes that a replica may have: engines stay within a few boxes.
fn sizes(request: &PlanRequest<'_>) -> Vec<u64> {
    match request.tensor_parallel_size {
        Some(size) => vec![size],
        None => (1..=16).chain([32, 64]).collect(),
    }
}

fn too_large(request: &PlanRequest<'_>) -> PlanError {
    let program = request.demand.engine.program(request.spec);
    let largest = PlanRequest { gpus: 16, ..request.clone() };
    let error: DoesNotFit = super::changes::does_not_fit(&largest, &program);
    PlanError::DoesNotFit(Box::new(error))
}
