//! One card's memory as vLLM or SGLang divides it when it starts.

use super::sglang::{self, StaticFraction};
use super::vllm::{Groups, PoolOptions, PrintRule, Printed};
use super::{Calibration, Engine, Version};
use crate::memory::{activation_bytes, rank_weight_bytes};
use crate::model::{Mixer, ModelSpec, Program, Task};
use crate::units::{GIB, MIB};
use serde::Serialize;

/// What an engine is started with. `None`: its own default for the version and card.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineSettings {
    pub engine: Engine,
    pub version: Version,
    pub memory_total_bytes: u64,
    /// Free before the engine starts. SGLang's fraction is of this.
    pub memory_free_bytes: u64,
    /// `--gpu-memory-utilization`, or `--mem-fraction-static`.
    pub fraction: Option<f64>,
    pub max_model_len: u64,
    pub max_num_seqs: Option<u64>,
    pub max_num_batched_tokens: Option<u64>,
    /// A100s have the smaller default of sequences whatever their memory.
    pub a100: bool,
    pub pool: PoolOptions,
}

impl EngineSettings {
    /// The newest release, on a card that nothing else uses.
    pub fn new(engine: Engine, memory_total_bytes: u64, max_model_len: u64, pool: PoolOptions) -> Self {
        let version = match engine {
            Engine::Vllm => Version::new(0, 33, 0),
            Engine::Sglang => Version::new(0, 5, 23),
        };
        Self {
            engine,
            version,
            memory_total_bytes,
            memory_free_bytes: memory_total_bytes,
            fraction: None,
            max_model_len,
            max_num_seqs: None,
            max_num_batched_tokens: None,
            a100: false,
            pool,
        }
    }

    fn large_card(&self) -> bool {
        self.memory_total_bytes >= 70 * GIB
    }

    /// 1,024 sequences on cards from 70 GiB on since V1, 256 elsewhere (`engine/arg_utils.py`).
    pub fn max_num_seqs(&self) -> u64 {
        let large = self.large_card() && !self.a100 && self.version >= Version::new(0, 8, 3);
        self.max_num_seqs.unwrap_or(if large { 1024 } else { 256 })
    }

    /// Of a server (`engine/arg_utils.py`).
    pub fn max_num_batched_tokens(&self) -> u64 {
        let default = match (self.large_card(), self.engine) {
            (true, _) => 8192,
            (false, Engine::Vllm) => 2048,
            (false, Engine::Sglang) => 4096,
        };
        self.max_num_batched_tokens.unwrap_or(default)
    }

    /// vLLM's part of the card: 0.92 from 0.22 on, 0.9 before (`config/cache.py`).
    pub fn gpu_memory_utilization(&self) -> f64 {
        self.fraction.unwrap_or(if self.version >= Version::new(0, 22, 0) { 0.92 } else { 0.9 })
    }
}

/// Where a term comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Summed over the model.
    Computed,
    /// A figure of logs, taken for all cards.
    Assumed,
    /// From a boot log of this model and card.
    Calibrated,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineTerm {
    pub name: &'static str,
    pub bytes: u64,
    pub origin: Origin,
    /// Upstream file or log.
    pub source: &'static str,
}

/// A fact that the figures depend on and that nobody stated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unknown(pub String);

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EngineBudget {
    pub engine: Engine,
    pub version: Version,
    /// What the engine may take in all.
    pub requested_bytes: u64,
    /// All but the KV pool.
    pub terms: Vec<EngineTerm>,
    pub kv_bytes: u64,
    /// What it prints of the pool.
    pub printed: Printed,
    /// Keys and values of one size side by side, which SGLang counts apart.
    #[serde(skip)]
    pub keys_and_values: bool,
    /// The fit is good to about this much either way without a boot log.
    pub uncertainty_bytes: u64,
    pub assumed: Vec<Unknown>,
}

/// PyTorch's top-k and top-p: bytes for each sequence and vocabulary entry, by version. The sampler runs on all
/// sequences in the profiling step, and on gathered logits, so TP does not divide it.
fn sampler_bytes_per_logit(version: Version) -> f64 {
    if version < Version::new(0, 18, 0) { 38.5 } else { 17.0 }
}

/// Outside PyTorch: context, NCCL, workspaces (vLLM logs "non_torch_memory").
fn non_torch_bytes(tensor_parallel_size: u64) -> u64 {
    match tensor_parallel_size {
        1 => 133 * MIB,
        _ => 563 * MIB,
    }
}

/// The estimate for CUDA graphs is subtracted since 0.21 (`gpu_worker.determine_available_memory`).
const GRAPHS_SINCE: Version = Version::new(0, 21, 0);
const GRAPHS_BYTES: u64 = 102 * MIB;
/// Formulas alone, against logged pools.
const UNCERTAINTY_BYTES: u64 = 2 * GIB;
const CALIBRATED_UNCERTAINTY_BYTES: u64 = 20 * MIB;

impl EngineBudget {
    /// `calibration` replaces what formulas can only estimate.
    pub fn new(
        program: &Program,
        spec: &ModelSpec,
        settings: &EngineSettings,
        calibration: Option<&Calibration>,
    ) -> Self {
        match settings.engine {
            Engine::Vllm => vllm(program, spec, settings, calibration),
            Engine::Sglang => sglang(program, spec, settings, calibration),
        }
    }

    /// What the engine writes of its pool when it starts, in its own words.
    pub fn lines(&self) -> String {
        match self.engine {
            Engine::Vllm => self.printed.to_string(),
            Engine::Sglang => sglang::lines(&self.printed, self.keys_and_values),
        }
    }

    /// All but the KV pool.
    pub fn without_kv_bytes(&self) -> u64 {
        self.terms.iter().fold(0, |sum, term| sum.saturating_add(term.bytes))
    }
}

fn vllm(
    program: &Program,
    spec: &ModelSpec,
    settings: &EngineSettings,
    calibration: Option<&Calibration>,
) -> EngineBudget {
    let tp = settings.pool.tensor_parallel_size;
    let requested_bytes = (settings.memory_total_bytes as f64 * settings.gpu_memory_utilization()).ceil() as u64;
    let mut terms = vec![weights(program, spec, tp, calibration)];
    match calibration.and_then(|c| c.overhead_bytes) {
        Some(bytes) => terms.push(EngineTerm {
            name: "activations, context, graphs",
            bytes,
            origin: Origin::Calibrated,
            source: "boot log: utilization x total - weights - KV",
        }),
        None => terms.extend(estimates(program, spec, settings)),
    }
    let taken: u64 = terms.iter().fold(0, |sum, t| sum.saturating_add(t.bytes));
    let kv_bytes = requested_bytes.saturating_sub(taken);
    let options = PoolOptions { max_num_batched_tokens: settings.max_num_batched_tokens(), ..settings.pool };
    let groups = Groups::new(spec, options);
    let rule = PrintRule::of(settings.version);
    EngineBudget {
        engine: Engine::Vllm,
        version: settings.version,
        requested_bytes,
        terms,
        kv_bytes,
        printed: Printed::new(&groups, kv_bytes, settings.max_model_len, rule),
        keys_and_values: true,
        uncertainty_bytes: uncertainty(calibration),
        assumed: assumed(spec, settings),
    }
}

fn uncertainty(calibration: Option<&Calibration>) -> u64 {
    match calibration.and_then(|c| c.overhead_bytes) {
        Some(_) => CALIBRATED_UNCERTAINTY_BYTES,
        None => UNCERTAINTY_BYTES,
    }
}

fn weights(program: &Program, spec: &ModelSpec, tp: u64, calibration: Option<&Calibration>) -> EngineTerm {
    let name = "weights";
    match calibration.and_then(|c| c.weights_bytes) {
        Some(bytes) => EngineTerm { name, bytes, origin: Origin::Calibrated, source: "boot log: model loading took" },
        None => {
            let bytes = rank_weight_bytes(program, spec, tp);
            EngineTerm { name, bytes, origin: Origin::Computed, source: "config.json: every tensor of one rank" }
        }
    }
}

fn estimates(program: &Program, spec: &ModelSpec, settings: &EngineSettings) -> Vec<EngineTerm> {
    let tp = settings.pool.tensor_parallel_size;
    let sequences = settings.max_num_seqs();
    let forward = activation_bytes(program, spec, tp, settings.max_num_batched_tokens(), sequences);
    let sampler = match spec.task {
        Task::Generate => sampler_bytes_per_logit(settings.version) * sequences as f64 * spec.vocab_size as f64,
        _ => 0.0,
    };
    // The peak of the profiling step is the larger of the two: they do not run at once.
    let (peak, source) = if sampler > forward as f64 {
        (sampler as u64, "sampler: max_num_seqs x vocabulary (logs of 0.11 to 0.20)")
    } else {
        (forward, "forward pass of max_num_batched_tokens")
    };
    let assumed = |name, bytes, source| EngineTerm { name, bytes, origin: Origin::Assumed, source };
    let mut terms = vec![
        assumed("peak activations", peak, source),
        assumed("non-torch", non_torch_bytes(tp), "vLLM 0.11 logs: 0.13 GiB at TP 1, 0.55 above"),
    ];
    if settings.version >= GRAPHS_SINCE {
        terms.push(assumed("CUDA graph estimate", GRAPHS_BYTES, "subtracted since 0.21"));
    }
    terms
}

fn sglang(
    program: &Program,
    spec: &ModelSpec,
    settings: &EngineSettings,
    calibration: Option<&Calibration>,
) -> EngineBudget {
    let tp = settings.pool.tensor_parallel_size;
    let fraction = settings.fraction.unwrap_or_else(|| static_fraction(settings));
    // Of memory free before loading; activations and graphs live in what is left.
    let requested_bytes = (settings.memory_free_bytes as f64 * fraction) as u64;
    let mut terms = vec![weights(program, spec, tp, calibration)];
    match calibration.and_then(|c| c.overhead_bytes) {
        Some(bytes) => terms.push(EngineTerm {
            name: "context and workspaces",
            bytes,
            origin: Origin::Calibrated,
            source: "boot log: fraction x free - weights - KV",
        }),
        None => terms.push(EngineTerm {
            name: "context and workspaces",
            bytes: non_torch_bytes(tp),
            origin: Origin::Assumed,
            source: "as vLLM's",
        }),
    }
    let taken: u64 = terms.iter().fold(0, |sum, t| sum.saturating_add(t.bytes));
    let kv_bytes = requested_bytes.saturating_sub(taken);
    let tokens = sglang::Cell::new(spec, tp, settings.pool.kv).tokens(kv_bytes);
    let concurrency = tokens as f64 / settings.max_model_len.max(1) as f64;
    EngineBudget {
        engine: Engine::Sglang,
        version: settings.version,
        requested_bytes,
        terms,
        kv_bytes,
        printed: Printed {
            available_bytes: kv_bytes,
            num_blocks: tokens,
            tokens,
            max_model_len: settings.max_model_len,
            concurrency,
        },
        keys_and_values: spec.layers.iter().all(|layer| matches!(layer.mixer, Mixer::Attention(_))),
        uncertainty_bytes: uncertainty(calibration),
        assumed: assumed(spec, settings),
    }
}

fn static_fraction(settings: &EngineSettings) -> f64 {
    StaticFraction {
        memory_total_bytes: settings.memory_total_bytes,
        tensor_parallel_size: settings.pool.tensor_parallel_size,
        chunked_prefill_tokens: settings.max_num_batched_tokens(),
    }
    .default_fraction()
}

fn assumed(spec: &ModelSpec, settings: &EngineSettings) -> Vec<Unknown> {
    let mut assumed = Vec::new();
    let mut say = |text: String| assumed.push(Unknown(text));
    if settings.fraction.is_none() {
        say(match settings.engine {
            Engine::Vllm => {
                format!(
                    "gpu_memory_utilization {} (default of {})",
                    settings.gpu_memory_utilization(),
                    settings.version
                )
            }
            Engine::Sglang => format!("mem_fraction_static {:.3} (as 0.5.23 works it out)", static_fraction(settings)),
        });
    }
    if settings.max_num_seqs.is_none() {
        say(format!("max_num_seqs {}", settings.max_num_seqs()));
    }
    if settings.max_num_batched_tokens.is_none() {
        say(format!("max_num_batched_tokens {}", settings.max_num_batched_tokens()));
    }
    if spec.extras.mtp_layers > 0 && settings.pool.speculative_tokens == 0 {
        say("speculative decoding off: the multi-token prediction layers are not loaded".to_owned());
    }
    if spec.extras.image_text {
        say("image tower and its buffers not counted".to_owned());
    }
    assumed
}
