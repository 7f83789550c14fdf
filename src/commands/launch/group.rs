//! What each group of replicas gets, decided before anything is started.

#[cfg(test)]
mod tests;

use super::gpus::{self, GpuShare, NotOnGpu};
use crate::commands::plan::model;
use crate::exit::Failure;
use crate::hardware::{NoGpus, probe_gpus, probe_host, visible_gpus};
use crate::settings::ModelSettings;
use crate::settings::values::Devices;
use crate::status::ModelKind;
use mserve_planner::hardware::{GpuDevice, Host};
use mserve_planner::model::{ModelSpec, Pooling, Task, families};
use mserve_planner::units::{MIB, format_bytes, format_count};
use mserve_runtime::worker::{default_kv_cache_bytes, kv_bytes_per_token};
use std::path::{Path, PathBuf};
use std::time::Duration;

const DEFAULT_BLOCK_SIZE: u32 = 16;
const DEFAULT_MAX_NUM_SEQS: u32 = 64;
/// The worker's own default.
const DEFAULT_MAX_NUM_BATCHED_TOKENS: u64 = 2048;
/// Two operations for a weight of two bytes: a byte is an operation. Far below what a core does (20 to 100 GFLOP/s).
const SLOW_CORE_FLOPS_PER_S: f64 = 2e9;
const LEAST_STALL: Duration = Duration::from_secs(60);
const LONGEST_STALL_S: f64 = 86_400.0;
/// Caches that nobody asked for take at most this share of what the weights leave, all replicas together.
const CACHE_SHARE: u64 = 4;
/// A process, its tokenizer and its buffers, besides weights and cache: 60 MiB resident with the demo model.
const PROCESS_BYTES: u64 = 64 * MIB;

/// What there is to plan with.
#[derive(Debug)]
pub(super) struct ThisMachine {
    host: Host,
    gpus: Result<Vec<GpuDevice>, NoGpus>,
    /// What of CUDA is missing.
    gpu_libraries: Result<(), String>,
}

/// Where a group runs.
#[derive(Debug)]
struct Placement {
    gpu: Option<GpuShare>,
    /// Why not on a card, where there are cards.
    why_not: Option<String>,
}

/// A group as it will be started.
#[derive(Debug)]
pub(super) struct GroupPlan {
    pub settings: ModelSettings,
    /// The model's directory, absolute.
    pub directory: PathBuf,
    pub kind: ModelKind,
    pub architecture: String,
    pub weight_bytes: u64,
    pub kv_bytes_per_token: u64,
    pub block_size: u32,
    /// 0 for models that keep no cache.
    pub num_blocks: u64,
    pub max_model_len: u64,
    pub max_num_seqs: u32,
    pub threads: u32,
    /// Its cards; the CPU when `None`.
    pub gpu: Option<GpuShare>,
    why_not_gpu: Option<String>,
}

/// A model whose files have been looked at.
struct Inspected {
    settings: ModelSettings,
    directory: PathBuf,
    kind: ModelKind,
    spec: ModelSpec,
    weight_bytes: u64,
    kv_bytes_per_token: u64,
    max_model_len: u64,
    placement: Placement,
}

impl ThisMachine {
    pub fn probe() -> anyhow::Result<Self> {
        let variable = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        let shown = probe_gpus().map(|gpus| visible_gpus(gpus, variable.as_deref()));
        let gpus = shown.and_then(|gpus| if gpus.is_empty() { Err(NoGpus::Hidden) } else { Ok(gpus) });
        let gpu_libraries = if gpus.is_ok() { gpus::libraries() } else { Ok(()) };
        Ok(Self { host: probe_host()?, gpus, gpu_libraries })
    }

    /// Where replicas will run, and why.
    pub fn line(&self) -> String {
        let cpus = self.host.cpus;
        let cores = if cpus == 1 { "1 core".to_owned() } else { format!("{cpus} cores") };
        let memory = format_bytes(self.host.memory_available_bytes);
        match &self.gpus {
            Ok(gpus) => {
                let cards: Vec<String> = gpus.iter().map(describe_card).collect();
                format!("devices: {cores}, {memory} of memory free; {}", cards.join("; "))
            }
            Err(why) => format!("devices: CPU, {cores}, {memory} of memory free ({why})"),
        }
    }

    /// Cards for a model, or why it runs on the CPU.
    fn place(&self, settings: &ModelSettings, spec: &ModelSpec) -> Result<Placement, Failure> {
        if settings.devices == Devices::Cpu {
            let why = self.gpus.is_ok().then(|| "devices = \"cpu\" here; --devices gpu asks for one".to_owned());
            return Ok(Placement { gpu: None, why_not: why });
        }
        match gpus::share(settings, spec, &self.gpus, &self.gpu_libraries) {
            Ok(share) => Ok(Placement { gpu: Some(share), why_not: None }),
            Err(refused) if settings.devices == Devices::Gpu => Err(refused.failure(&settings.name)),
            Err(NotOnGpu::Unsupported(why)) => Ok(Placement { gpu: None, why_not: Some(why) }),
            Err(refused) if settings.devices == Devices::GpuWhereSupported => Err(refused.failure(&settings.name)),
            // The line about devices has said that there are none.
            Err(refused) => Ok(Placement { gpu: None, why_not: self.gpus.is_ok().then(|| refused.why().to_owned()) }),
        }
    }
}

/// `GPU 1 NVIDIA H200 139.00 GiB free`, with who holds the rest.
fn describe_card(gpu: &GpuDevice) -> String {
    let holders: Vec<String> = gpu.processes.iter().map(|process| process.pid.to_string()).collect();
    let holders = if holders.is_empty() { String::new() } else { format!(" (pid {})", holders.join(", ")) };
    format!("GPU {} {} {} free{holders}", gpu.index, gpu.name, format_bytes(gpu.memory_free_bytes))
}

/// Look at all models, then share out cores and memory.
///
/// # Errors
/// [`Failure`] with exit code 2 for what is wrong with a model, 3 when not all fit.
pub(super) fn plan_all(models: &[ModelSettings], machine: &ThisMachine) -> anyhow::Result<Vec<GroupPlan>> {
    let inspected = models.iter().map(|settings| inspect(settings, machine)).collect::<Result<Vec<_>, _>>()?;
    Ok(share_out(inspected, machine.host)?)
}

fn inspect(settings: &ModelSettings, machine: &ThisMachine) -> anyhow::Result<Inspected> {
    let loaded = model::load(&settings.path)?;
    // A config.json stands for its directory.
    let given = &settings.path;
    let directory = if given.is_dir() { given.as_path() } else { given.parent().unwrap_or(Path::new(".")) };
    let directory = directory.canonicalize()?;
    let weight_bytes = weight_bytes(&directory)?;
    if !directory.join("tokenizer.json").is_file() {
        let message = format!("{}: no tokenizer.json in this directory", directory.display());
        return Err(Failure::usage(message).hint("the model's repository has one beside its weights").into());
    }
    if let Some(template) = &settings.chat_template
        && template.is_absolute()
        && !template.is_file()
    {
        return Err(Failure::usage(format!("chat template {}: no such file", template.display())).into());
    }
    let (kind, spec) = served_as(settings, loaded.spec)?;
    let positions = spec.max_position_embeddings;
    if let Some(asked) = settings.max_model_len.filter(|asked| *asked > positions) {
        let message =
            format!("model {}: max_model_len is {asked}, and the model has {positions} positions", settings.name);
        return Err(Failure::usage(message).hint(format!("at most {positions}")).into());
    }
    Ok(Inspected {
        placement: machine.place(settings, &spec)?,
        kv_bytes_per_token: kv_bytes_per_token(&families::program(&spec)),
        max_model_len: settings.max_model_len.unwrap_or(positions),
        settings: settings.clone(),
        directory,
        kind,
        spec,
        weight_bytes,
    })
}

fn served_as(settings: &ModelSettings, spec: ModelSpec) -> Result<(ModelKind, ModelSpec), Failure> {
    let wrong = |what: &str| {
        Failure::usage(format!("model {}: {} cannot be served as a {what} model", settings.name, spec.architecture))
    };
    match (settings.kind, spec.task) {
        (_, Task::Classify { .. }) => Err(Failure::usage(format!(
            "model {}: classifiers such as {} cannot be served yet",
            settings.name, spec.architecture
        ))),
        (Some(ModelKind::Chat), Task::Embed { .. }) => Err(wrong("chat").hint("kind = \"embedding\" would do")),
        (Some(ModelKind::Embedding), Task::Generate) => {
            Ok((ModelKind::Embedding, spec.with_task(Task::Embed { pooling: Pooling::Mean })))
        }
        (_, Task::Embed { .. }) => Ok((ModelKind::Embedding, spec)),
        (_, Task::Generate) => Ok((ModelKind::Chat, spec)),
    }
}

/// The CPU keeps weights as they are stored.
fn weight_bytes(directory: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            bytes += std::fs::metadata(&path)?.len();
        }
    }
    if bytes == 0 {
        let message = format!("{}: no safetensors weights in this directory", directory.display());
        let hint = "to plan without weights: mserve plan; .bin and .gguf files are not read";
        return Err(Failure::usage(message).hint(hint).into());
    }
    Ok(bytes)
}

fn share_out(models: Vec<Inspected>, host: Host) -> Result<Vec<GroupPlan>, Failure> {
    let on_cpu = |model: &&Inspected| model.placement.gpu.is_none();
    let replicas: u64 = models.iter().filter(on_cpu).map(|model| u64::from(model.settings.replicas)).sum();
    let fixed: u64 = models
        .iter()
        .map(|m| (if on_cpu(&m) { m.weight_bytes } else { 0 } + PROCESS_BYTES) * u64::from(m.settings.replicas))
        .sum();
    let available = host.memory_available_bytes;
    let Some(left) = available.checked_sub(fixed) else {
        return Err(does_not_fit(&models, fixed, available));
    };
    let threads = u32::try_from(u64::from(host.cpus) / replicas.max(1)).unwrap_or(1).max(1);
    let share = left / CACHE_SHARE / replicas.max(1);
    let plans = models.into_iter().map(|model| plan_group(model, share, threads)).collect::<Result<Vec<_>, _>>()?;
    let caches: u64 = plans
        .iter()
        .filter(|plan| plan.gpu.is_none())
        .map(|plan| plan.kv_cache_bytes() * u64::from(plan.settings.replicas))
        .sum();
    if caches > left {
        let message = format!(
            "the KV caches need {}, and weights leave {} of the {} that are free",
            format_bytes(caches),
            format_bytes(left),
            format_bytes(available)
        );
        return Err(Failure::does_not_fit(message).hint("lower kv_cache_memory or replicas"));
    }
    Ok(plans)
}

fn does_not_fit(models: &[Inspected], needed: u64, available: u64) -> Failure {
    let parts: Vec<String> = models
        .iter()
        .map(|m| format!("{} x {} for {}", m.settings.replicas, format_bytes(m.weight_bytes), m.settings.name))
        .collect();
    let message = format!(
        "the weights do not fit: {} are needed ({}), {} are free",
        format_bytes(needed),
        parts.join(", "),
        format_bytes(available)
    );
    Failure::does_not_fit(message).hint("every replica holds its own copy: fewer replicas, or a smaller model")
}

/// `share` is the cache that one replica may take unasked.
fn plan_group(model: Inspected, share: u64, threads: u32) -> Result<GroupPlan, Failure> {
    if let Some(share) = model.placement.gpu {
        return Ok(GroupPlan {
            directory: model.directory,
            kind: model.kind,
            architecture: model.spec.architecture,
            weight_bytes: share.plan.weight_bytes,
            kv_bytes_per_token: share.plan.cache.bytes_per_token,
            block_size: u32::try_from(share.plan.cache.block_size_tokens).unwrap_or(DEFAULT_BLOCK_SIZE),
            num_blocks: share.plan.cache.num_blocks,
            max_model_len: share.plan.max_model_len,
            max_num_seqs: share.plan.max_num_seqs,
            threads: model.settings.threads.unwrap_or(threads),
            settings: model.settings,
            gpu: Some(share),
            why_not_gpu: None,
        });
    }
    let settings = model.settings;
    let block_size = settings.block_size.unwrap_or(DEFAULT_BLOCK_SIZE);
    let max_num_seqs = settings.max_num_seqs.unwrap_or(DEFAULT_MAX_NUM_SEQS);
    let block_bytes = model.kv_bytes_per_token.saturating_mul(block_size.into());
    let whole = model.max_model_len.next_multiple_of(block_size.into());
    let unasked = || {
        let seqs = usize::try_from(max_num_seqs).unwrap_or(usize::MAX);
        let len = usize::try_from(whole).unwrap_or(usize::MAX);
        default_kv_cache_bytes(model.kv_bytes_per_token, seqs, len, Some(share.saturating_mul(CACHE_SHARE)))
    };
    let given = settings.kv_cache_memory_bytes.unwrap_or_else(unasked);
    let num_blocks = given.checked_div(block_bytes).unwrap_or(0);
    let tokens = num_blocks.saturating_mul(block_size.into());
    let cached = model.kv_bytes_per_token > 0;
    let too_small = cached && (num_blocks == 0 || (settings.max_model_len.is_some() && tokens < model.max_model_len));
    if too_small {
        let needed = model.kv_bytes_per_token.saturating_mul(whole);
        let message = format!(
            "model {}: one sequence of {} tokens needs {} of KV cache, and a replica has {}",
            settings.name,
            format_count(model.max_model_len),
            format_bytes(needed),
            format_bytes(given)
        );
        return Err(Failure::does_not_fit(message)
            .hint(format!("max_model_len = {tokens} would fit, or a larger kv_cache_memory")));
    }
    Ok(GroupPlan {
        directory: model.directory,
        kind: model.kind,
        architecture: model.spec.architecture,
        weight_bytes: model.weight_bytes,
        kv_bytes_per_token: model.kv_bytes_per_token,
        block_size,
        num_blocks,
        max_model_len: if cached { model.max_model_len.min(tokens) } else { model.max_model_len },
        max_num_seqs,
        threads: settings.threads.unwrap_or(threads),
        settings,
        gpu: None,
        why_not_gpu: model.placement.why_not,
    })
}

impl GroupPlan {
    pub fn kv_cache_bytes(&self) -> u64 {
        self.kv_bytes_per_token * u64::from(self.block_size) * self.num_blocks
    }

    /// A bound on one step's time, far beyond what it takes: every weight times every token of the step, on a slow
    /// core. Busy is not dead.
    pub fn max_stall(&self) -> Duration {
        if self.gpu.is_some() {
            return LEAST_STALL;
        }
        let tokens = self.settings.max_num_batched_tokens.unwrap_or(DEFAULT_MAX_NUM_BATCHED_TOKENS);
        let step_s = self.weight_bytes as f64 * tokens as f64 / SLOW_CORE_FLOPS_PER_S / f64::from(self.threads);
        LEAST_STALL + Duration::from_secs_f64(step_s.min(LONGEST_STALL_S))
    }

    /// Requests of full length that one replica holds at once, at most `max_num_seqs`.
    fn concurrency(&self) -> f64 {
        let blocks = self.max_model_len.div_ceil(self.block_size.into()).max(1);
        (self.num_blocks as f64 / blocks as f64).min(self.max_num_seqs.into())
    }

    /// The plan in one line.
    pub fn line(&self) -> String {
        let replicas = self.settings.replicas;
        let replicas = if replicas == 1 { "1 replica".to_owned() } else { format!("{replicas} replicas") };
        let threads = if self.threads == 1 { "1 thread".to_owned() } else { format!("{} threads", self.threads) };
        let kind = match self.kind {
            ModelKind::Chat => "chat",
            ModelKind::Embedding => "embedding",
        };
        let place = match &self.gpu {
            None => format!("cpu with {threads} each"),
            Some(share) => {
                let cards: Vec<String> = share.cards.iter().map(|card| card.index.to_string()).collect();
                let name = share.cards.first().map_or("", |card| card.name.as_str());
                format!("GPU {} ({name}), one each", cards.join(", "))
            }
        };
        let why = self.why_not_gpu.as_ref().map_or(String::new(), |why| format!(" (not on a GPU: {why})"));
        let start = format!(
            "{} ({}, {kind}): {replicas} on {place}, {} of weights",
            self.settings.name,
            self.architecture,
            format_bytes(self.weight_bytes)
        );
        if self.num_blocks == 0 {
            return format!("{start}, no KV cache; texts up to {} tokens{why}", format_count(self.max_model_len));
        }
        let lowered = self.gpu.as_ref().and_then(|share| share.plan.lowered_from);
        let lowered = lowered.map_or(String::new(), |from| {
            format!("; max_model_len is lowered from {} to what fits", format_count(from))
        });
        format!(
            "{start}; KV {} a token, {} blocks of {} tokens = {}; a replica holds {:.1} requests of {} tokens{lowered}{why}",
            format_bytes(self.kv_bytes_per_token),
            format_count(self.num_blocks),
            self.block_size,
            format_bytes(self.kv_cache_bytes()),
            self.concurrency(),
            format_count(self.max_model_len),
        )
    }
}
