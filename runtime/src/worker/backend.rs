//! Which device runs the model, and the model brought onto it.

use super::memory::{default_kv_cache_bytes, kv_bytes_per_token};
use super::{CudaDevice, DeviceChoice, WorkerConfig, WorkerError, pooling};
use crate::cpu::{CpuBackend, CpuOptions, WeightFormat, host_memory};
use crate::cuda::device::Device;
use crate::cuda::{self, CudaBackend, CudaError, CudaOptions, GraphCapture, WeightOrigin};
use crate::engine::Backend;
use crate::weights::Checkpoint;
use mserve_planner::memory::DEFAULT_MAX_NUM_BATCHED_TOKENS;
use mserve_planner::model::{ModelSpec, Positions, Program, families};
use mserve_planner::units::format_bytes;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

/// A card takes four times as many: see [`CudaOptions`].
const CPU_MAX_NUM_SEQS: usize = 64;
const CPU_BATCHED_TOKENS: usize = 2048;
/// What plans are made with.
const CARD_BATCHED_TOKENS: usize = DEFAULT_MAX_NUM_BATCHED_TOKENS as usize;
/// Embedding runs a whole text in one step; longer ones want `--max-model-len`.
const DEFAULT_EMBEDDING_LEN: usize = 8192;

/// A model that is ready for its first step.
pub(super) struct LoadedBackend {
    pub backend: Box<dyn Backend>,
    pub weight_bytes: u64,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    /// Where the time went, one after the other, in milliseconds.
    pub phases: Vec<(&'static str, f64)>,
    /// Beside them.
    pub phases_beside: Vec<(&'static str, f64)>,
}

type Progress<'a> = &'a mut (dyn FnMut(u64, u64) + Send);

/// Where the model is going to run.
pub(super) enum Target {
    Cpu,
    /// It takes as long to open as a tokenizer to read, and needs no other thread's help.
    Card(JoinHandle<Result<Device, CudaError>>),
}

/// Choose the device and begin to open it.
///
/// # Errors
/// When a card was named and cannot run this model.
pub(super) fn choose_target(config: &WorkerConfig, spec: &ModelSpec) -> Result<Target, WorkerError> {
    let device = match &config.device {
        DeviceChoice::Cpu => return Ok(Target::Cpu),
        DeviceChoice::Cuda(device) => {
            can_run(config, spec)?;
            device.clone()
        }
        DeviceChoice::Auto => match can_run(config, spec) {
            Ok(()) => CudaDevice::Ordinal(0),
            Err(why) => {
                tracing::info!(%why, "device auto: the CPU serves this model");
                return Ok(Target::Cpu);
            }
        },
    };
    let open = move || match device {
        CudaDevice::Ordinal(ordinal) => Device::open(ordinal),
        CudaDevice::Uuid(uuid) => Device::open(cuda::device::ordinal_of(&uuid)?),
    };
    let opening = std::thread::Builder::new().name("open-card".to_owned()).spawn(open);
    Ok(Target::Card(opening.map_err(CudaError::Thread)?))
}

/// Bring the model onto its device.
///
/// # Errors
/// Of the device that was named. With `auto` a machine that no card can serve is served by the CPU, with one line in the
/// log that says why; a card that could serve it and is full or too small is an error there too.
pub(super) fn load_backend(
    config: &WorkerConfig,
    target: Target,
    spec: &ModelSpec,
    checkpoint: &Checkpoint,
    progress: Progress<'_>,
) -> Result<LoadedBackend, WorkerError> {
    let Target::Card(opening) = target else { return on_cpu(config, spec, checkpoint, progress) };
    let panicked = |_| Err(CudaError::Thread(std::io::Error::other("opening the card panicked")));
    match opening.join().unwrap_or_else(panicked) {
        Ok(device) => {
            let loaded = on_cuda(config, device, spec, checkpoint, progress);
            Ok(loaded.map_err(|error| error.naming_holders(config.card_holders))?)
        }
        Err(why) if config.device == DeviceChoice::Auto && leaves_it_to_the_cpu(&why) => {
            tracing::info!(%why, "device auto: the CPU serves this model");
            on_cpu(config, spec, checkpoint, progress)
        }
        Err(error) => Err(error.into()),
    }
}

/// Found out before anything is put on a card, and the same at every start.
const fn leaves_it_to_the_cpu(error: &CudaError) -> bool {
    matches!(
        error,
        CudaError::NoDriver { .. }
            | CudaError::DriverTooOld { .. }
            | CudaError::NoDevice { .. }
            | CudaError::CardTooOld { .. }
            | CudaError::LibraryMissing(_)
            | CudaError::Unsupported { .. }
    )
}

fn on_cuda(
    config: &WorkerConfig,
    device: Device,
    spec: &ModelSpec,
    checkpoint: &Checkpoint,
    progress: Progress<'_>,
) -> Result<LoadedBackend, CudaError> {
    let standard = CudaOptions::default();
    let max_num_seqs = config.max_num_seqs.unwrap_or(standard.max_num_seqs);
    let options = CudaOptions {
        gpu_memory_utilization: config.gpu_memory_utilization,
        max_model_len: config.max_model_len,
        max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens.unwrap_or_else(|| CARD_BATCHED_TOKENS.max(max_num_seqs)),
        kv_cache_bytes: config.kv_cache_bytes,
        graphs: GraphCapture::WhenNeeded,
        ..standard
    };
    let origin = WeightOrigin::Source(checkpoint);
    let backend = CudaBackend::load_on(&Arc::new(device), spec, &origin, &options, progress)?;
    log_memory(&backend)?;
    Ok(LoadedBackend {
        weight_bytes: backend.weight_bytes(),
        phases: backend.timings().to_vec(),
        phases_beside: backend.timings_beside().to_vec(),
        backend: Box::new(backend),
        max_num_seqs,
        max_num_batched_tokens: options.max_num_batched_tokens,
    })
}

/// Whether a card can run this model with these settings at all.
fn can_run(config: &WorkerConfig, spec: &ModelSpec) -> Result<(), CudaError> {
    if !matches!(config.weights, WeightFormat::Auto | WeightFormat::Bf16) {
        let what = format!("weights kept as {:?}, only as bf16", config.weights);
        return Err(CudaError::Unsupported { op: "Linear", what });
    }
    if config.block_size != cuda::kernels::BLOCK_SIZE as usize {
        let what = format!("KV blocks of {} tokens, only of {}", config.block_size, cuda::kernels::BLOCK_SIZE);
        return Err(CudaError::Unsupported { op: "Attention", what });
    }
    cuda::check_model(spec)
}

/// The plan of the card's memory beside what is really in use.
fn log_memory(backend: &CudaBackend) -> Result<(), CudaError> {
    let terms = backend.planned_memory();
    let planned_bytes: u64 = terms.iter().map(|term| term.bytes).sum();
    let terms: Vec<String> = terms.iter().map(|term| format!("{} {}", term.name, format_bytes(term.bytes))).collect();
    tracing::info!(
        device = %backend.info().device,
        planned = format_bytes(planned_bytes),
        actual = format_bytes(backend.used_bytes()?),
        planned_bytes,
        actual_bytes = backend.used_bytes()?,
        kv_cache_bytes = backend.info().kv_cache_bytes,
        terms = %terms.join(", "),
        "memory of the card, planned and actual"
    );
    let (remembered, measured, own, left) = backend.tuned_products();
    tracing::info!(remembered, measured, own, left, "matrix products: what is left is measured in idle times");
    Ok(())
}

fn on_cpu(
    config: &WorkerConfig,
    spec: &ModelSpec,
    checkpoint: &Checkpoint,
    progress: Progress<'_>,
) -> Result<LoadedBackend, WorkerError> {
    let max_num_seqs = config.max_num_seqs.unwrap_or(CPU_MAX_NUM_SEQS);
    let options = cpu_options(config, max_num_seqs, spec, checkpoint)?;
    let begin = Instant::now();
    let backend = CpuBackend::load(spec, checkpoint, &options, progress)?;
    Ok(LoadedBackend {
        weight_bytes: backend.weight_bytes(),
        phases: vec![("weights", begin.elapsed().as_secs_f64() * 1e3)],
        phases_beside: Vec::new(),
        backend: Box::new(backend),
        max_num_seqs,
        max_num_batched_tokens: options.max_num_batched_tokens,
    })
}

/// Sizes of cache and arena: what was asked for, else what the model and this machine's memory give.
fn cpu_options(
    config: &WorkerConfig,
    max_num_seqs: usize,
    spec: &ModelSpec,
    checkpoint: &Checkpoint,
) -> Result<CpuOptions, WorkerError> {
    let program = families::program(spec);
    let standard = CpuOptions::default();
    let max_model_len = match config.max_model_len {
        Some(asked) => asked,
        None => default_model_len(config, spec, &program)?,
    };
    let budget = CPU_BATCHED_TOKENS.max(max_num_seqs);
    let whole_texts = if program.cached_attentions().next().is_none() { max_model_len } else { 0 };
    let max_num_batched_tokens = config.max_num_batched_tokens.unwrap_or(budget).max(whole_texts);
    let (weight_bytes, free) =
        (checkpoint.tensors().map(|tensor| tensor.bytes()).sum::<u64>(), host_memory::free_bytes());
    let bytes_per_token = kv_bytes_per_token(&program);
    let kv_cache_bytes = config.kv_cache_bytes.unwrap_or_else(|| {
        let left = free.map(|free| free.saturating_sub(weight_bytes));
        default_kv_cache_bytes(bytes_per_token, max_num_seqs, max_model_len, left)
    });
    tracing::info!(
        weight_bytes,
        kv_cache_bytes,
        kv_bytes_per_token = bytes_per_token,
        free_bytes = free,
        max_model_len,
        max_num_batched_tokens,
        "memory of the replica"
    );
    Ok(CpuOptions {
        threads: config.threads.unwrap_or(standard.threads),
        block_size: config.block_size,
        kv_cache_bytes,
        max_model_len: Some(max_model_len),
        max_num_batched_tokens,
        weights: config.weights,
    })
}

fn default_model_len(config: &WorkerConfig, spec: &ModelSpec, program: &Program) -> Result<usize, WorkerError> {
    let positions = match spec.positions {
        Positions::Rope => spec.max_position_embeddings,
        Positions::Learned { rows, offset, .. } => spec.max_position_embeddings.min(rows.saturating_sub(offset)),
    };
    let positions = usize::try_from(positions).unwrap_or(usize::MAX);
    if program.cached_attentions().next().is_some() {
        return Ok(positions);
    }
    let made_for = pooling::max_seq_length(&config.model_dir)?.unwrap_or(DEFAULT_EMBEDDING_LEN);
    Ok(positions.min(made_for))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cuda::CardHolder;
    use crate::worker::FailureKind;
    use mserve_planner::memory::EngineLimits;
    use mserve_planner::model::{Pooling, Task};

    /// As an embedding model, which no card serves yet.
    fn demo() -> (WorkerConfig, ModelSpec) {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/demo-model");
        let spec = mserve_planner::model::parse_config(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        (WorkerConfig::new(dir), spec.with_task(Task::Embed { pooling: Pooling::Mean }))
    }

    #[test]
    fn what_a_card_cannot_run_is_said_before_one_is_looked_for() {
        let (config, spec) = demo();
        let why = can_run(&config, &spec).unwrap_err();
        assert!(matches!(why, CudaError::Unsupported { .. }) && leaves_it_to_the_cpu(&why), "{why}");
        can_run(&config, &ModelSpec { task: Task::Generate, ..spec.clone() }).unwrap();
        let quantized = can_run(&WorkerConfig { weights: WeightFormat::Q8_0, ..config }, &spec).unwrap_err();
        assert!(quantized.to_string().contains("only as bf16"), "{quantized}");
    }

    #[test]
    fn auto_serves_on_the_cpu_and_cuda_refuses() {
        let (config, spec) = demo();
        let checkpoint = Checkpoint::open(&config.model_dir).unwrap();
        let target = choose_target(&config, &spec).unwrap();
        let loaded = load_backend(&config, target, &spec, &checkpoint, &mut |_, _| {});
        assert!(loaded.map(|l| l.backend.info().device.clone()).unwrap().starts_with("cpu"));
        let explicit = WorkerConfig { device: DeviceChoice::Cuda(CudaDevice::Ordinal(0)), ..config };
        let error = choose_target(&explicit, &spec).err().unwrap();
        assert_eq!(error.kind(), FailureKind::Config, "{error}");
    }

    #[test]
    fn a_card_takes_what_plans_are_made_with() {
        let (_, spec) = demo();
        let spec = ModelSpec { task: Task::Generate, ..spec };
        let (engine, planned) = (CudaOptions::default(), EngineLimits::for_model(&spec));
        assert_eq!(engine.max_num_batched_tokens as u64, planned.max_num_batched_tokens);
        assert_eq!(engine.max_num_seqs as u64, planned.max_num_seqs);
        assert_eq!(engine.gpu_memory_utilization, planned.gpu_memory_utilization);
        assert_eq!(u64::from(cuda::kernels::BLOCK_SIZE), planned.block_size_tokens);
    }

    #[test]
    fn a_full_card_is_an_error_with_auto_too_and_names_who_holds_it() {
        let full = CudaError::CardFull {
            device: "d".into(),
            uuid: "GPU-1".into(),
            needed_bytes: 2,
            free_bytes: 1,
            total_bytes: 4,
            fitting_utilization: None,
            holders: None,
        };
        assert!(!leaves_it_to_the_cpu(&full));
        let ask: fn(&str) -> Vec<CardHolder> = |uuid| {
            assert_eq!(uuid, "GPU-1");
            vec![CardHolder { pid: 77, name: None, used_bytes: None }]
        };
        let named = WorkerError::from(full.naming_holders(Some(ask)));
        assert_eq!(named.kind(), FailureKind::CardFull);
        assert!(named.to_string().contains("pid 77"), "{named}");
    }
}
