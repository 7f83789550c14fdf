//! Which cards serve a group, decided and leased before anything is started.

use super::group::GroupPlan;
use crate::control::runtime_dir;
use crate::exit::Failure;
use crate::hardware::{GpuLease, LeaseError, NoGpus, pick_gpus, probe_gpus};
use crate::settings::ModelSettings;
use crate::settings::values::Share;
use mserve_planner::hardware::GpuDevice;
use mserve_planner::memory::{Budget, CachePlan, EngineLimits, WeightSource, cache_plan};
use mserve_planner::model::{DType, ModelSpec, families};
use mserve_planner::units::format_bytes;
use mserve_runtime::cuda;

/// What one card gives one replica.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct CardPlan {
    /// Must be free when the replica starts.
    pub needed_bytes: u64,
    pub weight_bytes: u64,
    pub cache: CachePlan,
    pub max_model_len: u64,
    /// The model's own context, where it does not fit and nobody asked for it.
    pub lowered_from: Option<u64>,
    pub max_num_seqs: u32,
    pub gpu_memory_utilization: f64,
}

/// The cards of a group, one for each replica, leased for as long as this lives.
#[derive(Debug)]
pub(super) struct GpuShare {
    pub plan: CardPlan,
    pub cards: Vec<GpuDevice>,
    _leases: Vec<GpuLease>,
}

/// Why a group does not run on cards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NotOnGpu {
    /// No card, or no library.
    Cannot(String),
    /// The runtime has no kernels for such a model.
    Unsupported(String),
    /// It could, with more memory free.
    DoesNotFit(String),
}

impl NotOnGpu {
    pub fn why(&self) -> &str {
        match self {
            Self::Cannot(why) | Self::Unsupported(why) | Self::DoesNotFit(why) => why,
        }
    }

    /// When a GPU was asked for.
    pub fn failure(self, model: &str) -> Failure {
        let hint = "devices = \"cpu\" serves it on the processor";
        match self {
            Self::Cannot(why) | Self::Unsupported(why) => {
                Failure::usage(format!("model {model}: devices = \"gpu\", but {why}")).hint(hint)
            }
            Self::DoesNotFit(why) => Failure::does_not_fit(format!("model {model}: {why}")).hint(hint),
        }
    }
}

/// Whether everything that the CUDA backend opens is there. The first thing missing, with the command that brings it.
pub(super) fn libraries() -> Result<(), String> {
    match cuda::report().into_iter().find_map(|line| line.found.err()) {
        Some(missing) => Err(missing.to_string()),
        None => Ok(()),
    }
}

/// Choose and lease one card for each replica, the last free one first.
///
/// # Errors
/// Why there are not enough.
pub(super) fn share(
    settings: &ModelSettings,
    spec: &ModelSpec,
    gpus: &Result<Vec<GpuDevice>, NoGpus>,
    libraries: &Result<(), String>,
) -> Result<GpuShare, NotOnGpu> {
    cuda::check_model(spec).map_err(|error| NotOnGpu::Unsupported(error.to_string()))?;
    let gpus = gpus.as_ref().map_err(|why| NotOnGpu::Cannot(format!("there is {why}")))?;
    libraries.clone().map_err(NotOnGpu::Cannot)?;
    let largest = gpus.iter().max_by_key(|gpu| gpu.memory_total_bytes);
    let largest = largest.ok_or_else(|| NotOnGpu::Cannot("there is no card".to_owned()))?;
    let plan = card_plan(settings, spec, largest)?;
    let (cards, leases) = lease(gpus, settings.replicas as usize, plan.needed_bytes)?;
    Ok(GpuShare { plan, cards, _leases: leases })
}

/// What a replica needs of a card, and what the card then holds.
fn card_plan(settings: &ModelSettings, spec: &ModelSpec, card: &GpuDevice) -> Result<CardPlan, NotOnGpu> {
    if let Some(other) = settings.block_size.filter(|&size| size != cuda::kernels::BLOCK_SIZE) {
        let only = cuda::kernels::BLOCK_SIZE;
        return Err(NotOnGpu::Cannot(format!("block_size is {other} and the CUDA runtime has blocks of {only}")));
    }
    let mut limits = EngineLimits::for_model(spec);
    if let Some(asked) = settings.max_model_len {
        limits = limits.with_max_model_len(spec, asked);
    }
    limits.gpu_memory_utilization = settings.gpu_memory_utilization.map_or(limits.gpu_memory_utilization, Share::ratio);
    limits.max_num_seqs = settings.max_num_seqs.map_or(limits.max_num_seqs, u64::from);
    limits.max_num_batched_tokens = settings.max_num_batched_tokens.unwrap_or(limits.max_num_batched_tokens);
    let program = families::program(spec);
    let budget = Budget::new(&program, spec, WeightSource::Program, 1, card.memory_total_bytes, &limits);
    let fixed_bytes = budget.without_kv_bytes();
    let room = budget.requested_bytes.saturating_sub(fixed_bytes);
    let kv_bytes = settings.kv_cache_memory_bytes.unwrap_or(room).min(room);
    let cache = cache_plan(spec, kv_bytes, limits.block_size_tokens, DType::BF16);
    let too_short = settings.max_model_len.is_some() && cache.tokens() < limits.max_model_len;
    if cache.num_blocks == 0 || too_short {
        return Err(NotOnGpu::DoesNotFit(format!(
            "{} of {} leaves {} for the KV cache after {} for weights and the rest: too little for one request of {} \
             tokens",
            format_bytes(budget.requested_bytes),
            card.name,
            format_bytes(kv_bytes),
            format_bytes(fixed_bytes),
            limits.max_model_len
        )));
    }
    Ok(CardPlan {
        needed_bytes: match settings.kv_cache_memory_bytes {
            Some(_) => fixed_bytes + cache.kv_cache_bytes,
            None => budget.requested_bytes,
        },
        weight_bytes: budget.term(mserve_planner::memory::TermKind::Weights),
        max_model_len: limits.max_model_len.min(cache.tokens()),
        lowered_from: (cache.tokens() < limits.max_model_len).then_some(limits.max_model_len),
        cache,
        max_num_seqs: u32::try_from(limits.max_num_seqs).unwrap_or(u32::MAX),
        gpu_memory_utilization: limits.gpu_memory_utilization,
    })
}

/// A card that another launcher leases meanwhile counts as leased, and the choice is made again.
fn lease(gpus: &[GpuDevice], count: usize, needed_bytes: u64) -> Result<(Vec<GpuDevice>, Vec<GpuLease>), NotOnGpu> {
    let directory = runtime_dir().map_err(|error| NotOnGpu::Cannot(format!("{error:#}")))?;
    let mut leased: Vec<String> = Vec::new();
    loop {
        let picked = pick_gpus(gpus, count, needed_bytes, &leased);
        let picked = picked.map_err(|error| NotOnGpu::DoesNotFit(error.to_string()))?;
        let mut leases = Vec::new();
        let mut held = None;
        for gpu in &picked {
            match GpuLease::take(&directory, &gpu.uuid) {
                Ok(lease) => leases.push(lease),
                Err(LeaseError::Held { uuid, .. }) => held = Some(uuid),
                Err(error) => return Err(NotOnGpu::Cannot(error.to_string())),
            }
        }
        match held {
            // Each round takes one card away, so this ends.
            Some(uuid) => leased.push(uuid),
            None => return Ok((picked.into_iter().cloned().collect(), leases)),
        }
    }
}

/// Look at the cards once more, right before replicas start: somebody else may have come.
///
/// # Errors
/// Exit 3 naming the card and who holds its memory.
pub(super) fn check_still_free(groups: &[GroupPlan]) -> Result<(), Failure> {
    if groups.iter().all(|group| group.gpu.is_none()) {
        return Ok(());
    }
    let now = probe_gpus().map_err(|why| Failure::usage(format!("the cards are gone: {why}")))?;
    for share in groups.iter().filter_map(|group| group.gpu.as_ref()) {
        let chosen: Vec<GpuDevice> =
            now.iter().filter(|gpu| share.cards.iter().any(|card| card.uuid == gpu.uuid)).cloned().collect();
        pick_gpus(&chosen, share.cards.len(), share.plan.needed_bytes, &[]).map_err(|error| {
            Failure::does_not_fit(error.to_string()).hint("launch again: it picks among what is free")
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::settings::values::parse_share;
    use crate::settings::{Flags, ModelOverrides, resolve};
    use mserve_planner::model::{Pooling, Task, parse_config};
    use mserve_planner::units::{GIB, MIB};
    use std::path::Path;

    fn demo(overrides: ModelOverrides) -> (ModelSettings, ModelSpec) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo-model");
        let spec = parse_config(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let flags = Flags { model: Some(dir), overrides, ..Flags::default() };
        (resolve(flags, Path::new("/")).unwrap().models.remove(0), spec)
    }

    fn card(total_bytes: u64) -> GpuDevice {
        GpuDevice {
            index: 0,
            uuid: "GPU-0".to_owned(),
            name: "NVIDIA H200".to_owned(),
            memory_total_bytes: total_bytes,
            memory_free_bytes: total_bytes,
            compute_capability: Some((9, 0)),
            processes: Vec::new(),
        }
    }

    #[test]
    fn a_card_gives_its_share_less_weights_and_the_rest() {
        let (settings, spec) = demo(ModelOverrides::default());
        let plan = card_plan(&settings, &spec, &card(140 * GIB)).unwrap();
        assert_eq!((plan.needed_bytes, plan.max_model_len, plan.max_num_seqs), (126 * GIB, 2048, 256));
        assert!(plan.cache.kv_cache_bytes < 126 * GIB && plan.cache.kv_cache_bytes > 120 * GIB, "{plan:?}");
        let (settings, _) = demo(ModelOverrides { kv_cache_memory_bytes: Some(GIB), ..ModelOverrides::default() });
        let asked = card_plan(&settings, &spec, &card(140 * GIB)).unwrap();
        assert!(asked.cache.kv_cache_bytes <= GIB && asked.needed_bytes < 6 * GIB, "{asked:?}");
    }

    #[test]
    fn a_context_that_does_not_fit_is_lowered_unless_it_was_asked_for() {
        let tight = ModelOverrides { gpu_memory_utilization: parse_share("0.02").ok(), ..ModelOverrides::default() };
        let (settings, mut spec) = demo(tight.clone());
        spec.max_position_embeddings = 1 << 20;
        let lowered = card_plan(&settings, &spec, &card(140 * GIB)).unwrap();
        assert_eq!((lowered.lowered_from, lowered.gpu_memory_utilization), (Some(1 << 20), 0.02));
        assert!(lowered.max_model_len < 1 << 20 && lowered.max_model_len > 1 << 18, "{lowered:?}");
        let (asked, _) = demo(ModelOverrides { max_model_len: Some(1 << 20), ..tight });
        assert!(matches!(card_plan(&asked, &spec, &card(140 * GIB)), Err(NotOnGpu::DoesNotFit(_))));
    }

    #[test]
    fn what_does_not_fit_and_what_cannot_run_are_told_apart() {
        let (settings, spec) = demo(ModelOverrides::default());
        let small = card_plan(&settings, &spec, &card(256 * MIB)).unwrap_err();
        assert_eq!(small.failure("m").code, crate::exit::DOES_NOT_FIT);
        let here = Ok(vec![card(140 * GIB)]);
        let embedding = spec.clone().with_task(Task::Embed { pooling: Pooling::Mean });
        let cannot = [
            share(&settings, &embedding, &here, &Ok(())),
            share(&settings, &spec, &here, &Err("no libnvrtc".to_owned())),
            share(&settings, &spec, &Err(NoGpus::NoLibrary), &Ok(())),
        ];
        for refused in cannot {
            assert_eq!(refused.unwrap_err().failure("m").code, crate::exit::USAGE);
        }
    }
}
