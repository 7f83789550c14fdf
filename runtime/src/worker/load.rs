//! From a model directory to an engine that runs.

use super::backend::{LoadedBackend, choose_target, load_backend};
use super::{ReadyInfo, WorkerConfig, WorkerError, WorkerEvent, WorkerKind, pooling};
use crate::engine::{Backend, BackendInfo, Engine, EngineConfig, RowSampling, SamplingParams, StepBatch, StepSequence};
use crate::server::{ServedKind, ServedModel};
use crate::tokenizer::{ChatTemplate, GenerationDefaults, ModelFiles, Tokenizer, eos_token_ids};
use crate::weights::Checkpoint;
use mserve_planner::model::{ModelSpec, Pooling, Task, parse_config};
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

const MAX_CONFIG_BYTES: u64 = 16 << 20;
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
const WARMUP_TOKENS: usize = 8;

/// Read tokenizer and weights, run one step, start the engine.
///
/// # Errors
/// Whatever is wrong with files, settings or memory. Nothing is left behind.
pub fn load(
    config: &WorkerConfig,
    events: &(dyn Fn(WorkerEvent) + Sync),
) -> Result<(ServedModel, ReadyInfo), WorkerError> {
    let mut last = Instant::now();
    let mut phases = vec![("listening", ms(last - config.started))];
    let phase = |phase: &str, done, total| events(WorkerEvent::Phase { phase: phase.to_owned(), done, total });
    let spec = served_spec(config)?;
    let target = choose_target(config, &spec)?;
    phase("tokenizer", 0, 1);
    let files = ModelFiles::read(&config.model_dir)?;
    let vocab_size = usize::try_from(spec.vocab_size).unwrap_or(usize::MAX);
    let tokenizer = Arc::new(Tokenizer::load(&files, vocab_size)?);
    let eos_token_ids = eos_token_ids(&files, &tokenizer, vocab_size)?;
    let generation_defaults = GenerationDefaults::read(&files)?;
    let chat_template = match spec.task {
        Task::Generate => ChatTemplate::load(&files, config.chat_template.as_deref())?.map(Arc::new),
        Task::Embed { .. } | Task::Classify { .. } => None,
    };
    phase("tokenizer", 1, 1);

    let checkpoint = Checkpoint::open(&config.model_dir)?;
    phases.push(("files and tokenizer", ms(last.elapsed())));
    let mut told = None;
    let mut progress = |done: u64, total: u64| {
        if done == total || told.is_none_or(|told: Instant| told.elapsed() >= PROGRESS_EVERY) {
            told = Some(Instant::now());
            events(WorkerEvent::Phase { phase: "weights".to_owned(), done, total });
        }
    };
    let LoadedBackend {
        mut backend,
        weight_bytes,
        max_num_seqs,
        max_num_batched_tokens,
        phases: of_device,
        phases_beside,
    } = load_backend(config, target, &spec, &checkpoint, &mut progress)?;
    phases.extend(of_device);
    last = Instant::now();
    phase("warmup", 0, 1);
    warm_up(backend.as_mut(), &spec)?;
    phase("warmup", 1, 1);
    phases.push(("first step", ms(last.elapsed())));

    let info = backend.info().clone();
    let max_model_len = usable_context(config, &info)?;
    let kind = match spec.task {
        Task::Generate => ServedKind::Chat,
        Task::Embed { .. } | Task::Classify { .. } => ServedKind::Embedding { width: info.output_width },
    };
    let engine_config = EngineConfig {
        model_name: config.names().swap_remove(0),
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        max_num_queued_reqs: config.max_num_queued_reqs,
        enable_prefix_caching: config.enable_prefix_caching,
    };
    let ready = ReadyInfo {
        device: info.device.clone(),
        load_ms: u64::try_from(config.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        weight_bytes,
        kv_cache_bytes: info.kv_cache_bytes,
        num_blocks: info.num_blocks as u64,
        block_size: info.block_size as u64,
        max_model_len: max_model_len as u64,
        max_num_seqs: max_num_seqs as u64,
    };
    let engine = Engine::start(backend, engine_config)?;
    let beside = list(&phases_beside);
    tracing::info!(exec_to_ready_ms = ready.load_ms, phases = %list(&phases), %beside, "where the time of the start went");
    let eos_token_ids = eos_token_ids.into();
    let model =
        ServedModel { engine, tokenizer, chat_template, eos_token_ids, generation_defaults, kind, max_model_len };
    Ok((model, ready))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn list(phases: &[(&str, f64)]) -> String {
    phases.iter().map(|(name, ms)| format!("{name} {ms:.0} ms")).collect::<Vec<_>>().join(", ")
}

/// `config.json` as the task asked for.
fn served_spec(config: &WorkerConfig) -> Result<ModelSpec, WorkerError> {
    let path = config.model_dir.join("config.json");
    let read = |source| WorkerError::Read { path: path.clone(), source };
    let metadata = fs::metadata(&path).map_err(read)?;
    if !metadata.is_file() || metadata.len() > MAX_CONFIG_BYTES {
        let what = format!("not a regular file of at most {MAX_CONFIG_BYTES} bytes");
        return Err(WorkerError::ModelFile { path, field: "(file)", what });
    }
    let bytes = fs::read(&path).map_err(read)?;
    let spec = parse_config(&bytes).map_err(|source| WorkerError::ModelConfig { path, source })?;
    let wrong = |asked, hint| WorkerError::WrongKind { architecture: spec.architecture.clone(), asked, hint };
    match (config.kind, spec.task) {
        (_, Task::Classify { .. }) => Err(wrong("a classifier", "the worker serves chat and embedding models")),
        (Some(WorkerKind::Chat), Task::Embed { .. }) => Err(wrong("a chat model", "serve it with --kind embedding")),
        (Some(WorkerKind::Embedding), _) | (None, Task::Embed { .. }) => {
            let pooling = match config.pooling {
                Some(pooling) => pooling,
                None => pooling::from_files(&config.model_dir)?.unwrap_or(Pooling::Mean),
            };
            Ok(spec.with_task(Task::Embed { pooling }))
        }
        (Some(WorkerKind::Chat) | None, Task::Generate) => Ok(spec),
    }
}

/// The context that a single request can really use. A length that was asked for is kept or refused; the model's own
/// is lowered to what the cache holds.
fn usable_context(config: &WorkerConfig, info: &BackendInfo) -> Result<usize, WorkerError> {
    if info.num_blocks == 0 {
        return Ok(info.max_model_len);
    }
    let fits_tokens = info.num_blocks.saturating_mul(info.block_size);
    if info.max_model_len <= fits_tokens {
        return Ok(info.max_model_len);
    }
    if config.max_model_len.is_some() {
        let block_bytes = info.kv_cache_bytes / info.num_blocks as u64;
        return Err(WorkerError::ContextDoesNotFit {
            max_model_len: info.max_model_len,
            needed_bytes: block_bytes.saturating_mul(info.max_model_len.div_ceil(info.block_size) as u64),
            kv_cache_bytes: info.kv_cache_bytes,
            fits_tokens: fits_tokens as u64,
        });
    }
    tracing::warn!(from = info.max_model_len, to = fits_tokens, "max_model_len is lowered to what the KV cache holds");
    Ok(fits_tokens)
}

/// One step that touches all weights, so that the first request does not pay for it and a broken device shows now.
fn warm_up(backend: &mut dyn Backend, spec: &ModelSpec) -> Result<(), WorkerError> {
    let info = backend.info().clone();
    let cached = info.num_blocks > 0;
    let tokens = WARMUP_TOKENS.min(info.max_model_len).min(if cached { info.block_size } else { usize::MAX });
    let positions: Vec<u32> = (0..u32::try_from(tokens).unwrap_or(u32::MAX)).collect();
    let sampling = matches!(spec.task, Task::Generate).then(|| RowSampling {
        params: Arc::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() }),
        seed: 0,
        step: 0,
        prompt_token_ids: Arc::from([]),
        output_token_ids: Vec::new(),
        forbidden_token_ids: Vec::new(),
    });
    let batch = StepBatch {
        token_ids: vec![0; tokens],
        slot_mapping: if cached { positions.clone() } else { Vec::new() },
        positions,
        block_tables: if cached { vec![0] } else { Vec::new() },
        sequences: vec![StepSequence {
            query_start: 0,
            query_len: tokens,
            context_len: tokens,
            block_table: 0..usize::from(cached),
            wants_output: true,
            sampling,
        }],
    };
    backend.step(&batch)?;
    Ok(())
}
