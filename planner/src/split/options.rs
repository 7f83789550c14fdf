//! Every way to share the cards out, ranked.

use super::small::{SlmCard, SmallModel, slm_card};
use super::{Workload, slm_gpus};
use crate::gpus::{self, GpuModel};
use crate::memory::KvCacheDtype;
use crate::perf::serving::round;
use crate::plan::{Change, PlanError, PlanOption, PlanRequest, Rank, plan};
use crate::units::format_bytes;
use serde::{Deserialize, Serialize};

/// An LLM card waits for its host, its network and for requests about this share of the time (field experience).
const LLM_IDLE: f64 = 0.15;

/// All ways, best first; the first is the advice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Split {
    pub workload: Workload,
    pub ratio: f64,
    pub gpus: u64,
    pub slm_tokens: u64,
    /// A card with nothing but small models.
    pub slm_card: SlmCard,
    pub options: Vec<SplitOption>,
    /// Cards for small models that each named workload wants beside the best option's LLM rate, or the one asked for.
    pub wanted: Vec<Wanted>,
    pub llm_rate_for_wanted: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Wanted {
    pub workload: Workload,
    pub low: u64,
    pub high: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SplitOption {
    pub llm_gpus: u64,
    /// Cards with nothing but small models.
    pub slm_gpus: u64,
    /// Small models on the LLM's cards too.
    pub co_located: bool,
    pub kv_cache_dtype: KvCacheDtype,
    pub llm: PlanOption,
    /// What the LLM side could serve, and the small models' side.
    pub llm_requests_per_s: f64,
    pub slm_requests_per_s: f64,
    /// LLM requests a second, each with its small ones, that the whole serves.
    pub served_requests_per_s: f64,
    pub limited_by: Side,
    pub idle: Idle,
    /// Why it is not the first; empty for the first.
    pub lost_because: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Llm,
    Slm,
}

/// Shares of each side that nothing uses while the other is at its limit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Idle {
    pub llm: f64,
    pub slm: f64,
}

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SplitError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("small models need the rates of the card, and {card} is not in the table")]
    UnknownCard { card: String },
    #[error("the small models need {} of a card that has {}", format_bytes(*needed_bytes), format_bytes(*total_bytes))]
    SmallModelsDoNotFit { needed_bytes: u64, total_bytes: u64 },
    #[error("no way to share {gpus} {}: {why}", if *gpus == 1 { "card" } else { "cards" })]
    NoOption { gpus: u64, why: String },
}

/// Share out `request.gpus` cards between the request's model and small ones.
///
/// # Errors
/// [`SplitError`]; a split that leaves the LLM too few cards is left out.
pub fn split(
    request: &PlanRequest<'_>,
    models: &[SmallModel],
    workload: Workload,
    slm_tokens: u64,
) -> Result<Split, SplitError> {
    let card = || SplitError::UnknownCard { card: request.card.name.clone() };
    let gpu = gpus::find(&request.card.name).map_err(|_| card())?;
    let engine = request.demand.engine;
    let usable = (gpu.memory_total_bytes as f64 * request.limits.gpu_memory_utilization) as u64;
    let place = |bytes| slm_card(models, gpu, engine, slm_tokens, bytes);
    let alone = place(usable).ok_or_else(|| SplitError::SmallModelsDoNotFit {
        needed_bytes: slm_card(models, gpu, engine, slm_tokens, u64::MAX).map_or(0, |card| card.bytes),
        total_bytes: gpu.memory_total_bytes,
    })?;
    let sharing = Sharing { request, gpu, alone: &alone, ratio: workload.ratio() };
    let mut options = Vec::new();
    let mut first_error = None;
    for slm_gpus in 0..request.gpus {
        for (co_located, kv) in sharing.ways(slm_gpus) {
            match sharing.option(slm_gpus, co_located, kv) {
                Ok(option) => options.push(option),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
    }
    rank(&mut options);
    let Some(best) = options.first() else {
        let why = first_error.map_or_else(|| "one card is not enough for both".to_owned(), |e| e.to_string());
        return Err(SplitError::NoOption { gpus: request.gpus, why });
    };
    let llm_rate = request.demand.targets.request_rate.unwrap_or(best.llm_requests_per_s);
    let wanted = Workload::NAMED.map(|workload| {
        let (low, high) = slm_gpus(llm_rate, workload, alone.requests_per_s, request.gpus);
        Wanted { workload, low, high }
    });
    Ok(Split {
        workload,
        ratio: workload.ratio(),
        gpus: request.gpus,
        slm_tokens,
        wanted: wanted.to_vec(),
        llm_rate_for_wanted: llm_rate,
        options,
        slm_card: alone,
    })
}

/// What would make a split possible: the next power of two of cards, and the smallest larger card.
pub fn changes(request: &PlanRequest<'_>, models: &[SmallModel], workload: Workload, slm_tokens: u64) -> Vec<Change> {
    let works = |request: &PlanRequest<'_>| split(request, models, workload, slm_tokens).is_ok();
    let counts = [2, 4, 8, 16, 32, 64].into_iter().filter(|&gpus| gpus > request.gpus);
    let more = counts.map(|gpus| PlanRequest { gpus, tensor_parallel_size: None, ..request.clone() }).find(works);
    let cards = gpus::GPUS.iter().filter(|gpu| gpu.memory_total_bytes > request.card.memory_total_bytes);
    let larger = cards.into_iter().find(|gpu| works(&PlanRequest { card: (*gpu).into(), ..request.clone() }));
    more.map(|request| Change::Gpus(request.gpus)).into_iter().chain(larger.map(|gpu| Change::Gpu(gpu.name))).collect()
}

struct Sharing<'a> {
    request: &'a PlanRequest<'a>,
    gpu: &'a GpuModel,
    alone: &'a SlmCard,
    ratio: f64,
}

impl Sharing<'_> {
    /// With and without small models on the LLM's cards, in the cache types that the card has.
    fn ways(&self, slm_gpus: u64) -> Vec<(bool, KvCacheDtype)> {
        let asked = self.request.kv_cache_dtype;
        let fp8 = asked == KvCacheDtype::Auto && self.gpu.compute_capability >= (8, 0);
        let dtypes = std::iter::once(asked).chain(fp8.then_some(KvCacheDtype::Fp8));
        let places: &[bool] = if slm_gpus == 0 { &[true] } else { &[false, true] };
        dtypes.flat_map(|dtype| places.iter().map(move |&place| (place, dtype))).collect()
    }

    fn option(&self, slm_gpus: u64, co_located: bool, kv: KvCacheDtype) -> Result<SplitOption, PlanError> {
        let llm_gpus = self.request.gpus - slm_gpus;
        let mut request = PlanRequest { gpus: llm_gpus, kv_cache_dtype: kv, ..self.request.clone() };
        request.demand.rank = Rank::RequestRate;
        // The whole is asked for a rate, not this side of this option.
        request.demand.targets.request_rate = None;
        if co_located {
            let share = self.alone.bytes as f64 / self.gpu.memory_total_bytes as f64;
            request.limits.gpu_memory_utilization -= share;
        }
        let llm = plan(&request)?.options.swap_remove(0);
        let llm_requests_per_s = llm.speed.as_ref().map_or(0.0, |speed| speed.requests_per_s);
        let beside = if co_located { LLM_IDLE * self.alone.busy_requests_per_s * llm.gpus_used as f64 } else { 0.0 };
        let slm_requests_per_s = round(self.alone.requests_per_s * slm_gpus as f64 + beside);
        let by_slm = slm_requests_per_s / self.ratio.max(1e-9);
        let served = llm_requests_per_s.min(by_slm);
        let idle = Idle { llm: round(1.0 - served / llm_requests_per_s), slm: round(1.0 - served / by_slm) };
        Ok(SplitOption {
            llm_gpus,
            slm_gpus,
            co_located,
            kv_cache_dtype: kv,
            llm,
            llm_requests_per_s,
            slm_requests_per_s,
            served_requests_per_s: round(served),
            limited_by: if llm_requests_per_s <= by_slm { Side::Llm } else { Side::Slm },
            idle,
            lost_because: String::new(),
        })
    }
}

/// More served first; of equals the simpler: not co-located, fewer cards in use, the cache as it was asked for.
fn rank(options: &mut [SplitOption]) {
    let plain = |o: &SplitOption| (o.co_located, o.kv_cache_dtype == KvCacheDtype::Fp8, o.slm_gpus);
    options.sort_by(|a, b| {
        b.served_requests_per_s.total_cmp(&a.served_requests_per_s).then_with(|| plain(a).cmp(&plain(b)))
    });
    let Some(best) = options.first().map(|best| best.served_requests_per_s) else { return };
    for option in options.iter_mut().skip(1) {
        option.lost_because = why_it_lost(option, best);
    }
}

fn why_it_lost(option: &SplitOption, best: f64) -> String {
    let less = 100.0 * (1.0 - option.served_requests_per_s / best.max(1e-9));
    let side = match option.limited_by {
        Side::Llm => "LLM",
        Side::Slm => "SLM",
    };
    if less < 0.05 {
        return "as much, with more sharing".to_owned();
    }
    format!("{less:.0} % less: the {side} side is short")
}
