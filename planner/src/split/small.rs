//! Small models on one card: what they are, how many replicas it takes to keep the card busy, and the rate.

use crate::gpus::GpuModel;
use crate::memory::{Budget, EngineLimits, WeightSource};
use crate::model::{ModelSpec, Pooling, Program, Task};
use crate::perf::serving::{Replica, RequestShape, round};
use crate::perf::{Engine, Machine, extract};
use serde::{Deserialize, Serialize};

/// Tokens of one request to a small model, a passage with its question.
pub const DEFAULT_SLM_TOKENS: u64 = 512;
/// Texts that a replica takes in one step.
const BATCH_TEXTS: u64 = 32;
/// Texts that one core makes tokens of, in tokens: Hugging Face's tokenizers on a server's core.
const TOKENIZED_PER_S: f64 = 1.5e6;
/// Field experience: fewer leave a card waiting for the host, more only take memory.
const REPLICAS: std::ops::RangeInclusive<u64> = 2..=5;
/// Share of the time that a card of small models is planned to be busy. At two thirds a text waits, in the mean, as
/// long as a batch takes (M/D/1: rho / (2 (1 - rho)) = 1).
pub(super) const BUSY: f64 = 2.0 / 3.0;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlmKind {
    Embedding,
    Reranker,
    Classifier,
}

impl SlmKind {
    pub fn label(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Reranker => "reranker",
            Self::Classifier => "classifier",
        }
    }
}

/// A model that answers a text with one vector or a few scores.
#[derive(Debug, Clone)]
pub struct SmallModel {
    pub name: String,
    pub kind: SlmKind,
    pub spec: ModelSpec,
    pub weights: WeightSource,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} ({architecture}) generates text: it is no embedding, reranker or classifier model")]
pub struct NotSmall {
    pub name: String,
    pub architecture: String,
}

impl SmallModel {
    /// The kind is what the config says; a generating architecture counts by its name (Qwen3-Embedding and
    /// Qwen3-Reranker are such).
    ///
    /// # Errors
    /// [`NotSmall`] for a model that generates.
    pub fn new(name: &str, spec: ModelSpec, weights: WeightSource) -> Result<Self, NotSmall> {
        let lower = name.to_ascii_lowercase();
        let kind = match spec.task {
            Task::Embed { .. } => SlmKind::Embedding,
            Task::Classify { labels: 1 } => SlmKind::Reranker,
            Task::Classify { .. } => SlmKind::Classifier,
            Task::Generate if lower.contains("rerank") => SlmKind::Reranker,
            Task::Generate if lower.contains("embed") || lower.contains("bge") || lower.contains("gte") => {
                SlmKind::Embedding
            }
            Task::Generate => {
                return Err(NotSmall { name: name.to_owned(), architecture: spec.architecture });
            }
        };
        let spec = match (spec.task, kind) {
            (Task::Generate, SlmKind::Reranker) => spec.with_task(Task::Classify { labels: 1 }),
            (Task::Generate, _) => spec.with_task(Task::Embed { pooling: Pooling::LastToken }),
            _ => spec,
        };
        Ok(Self { name: name.to_owned(), kind, spec, weights })
    }
}

/// Replicas of one small model on one card.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlmReplica {
    pub name: String,
    pub kind: SlmKind,
    pub replicas: u64,
    /// Of one replica, its context and buffers included.
    pub bytes: u64,
    /// Of the card, when it serves nothing else and is always busy.
    pub requests_per_s: f64,
    /// One batch on the device, and on the host before it.
    pub batch_ms: f64,
    pub host_ms: f64,
}

/// All small models together on one card.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlmCard {
    pub models: Vec<SlmReplica>,
    /// Of all replicas.
    pub bytes: u64,
    /// Requests come to all models alike. The card always busy.
    pub busy_requests_per_s: f64,
    /// Planned: busy two thirds of the time.
    pub requests_per_s: f64,
}

/// Small models on a card within `budget_bytes`. `None`: one replica of each does not fit.
pub fn slm_card(
    models: &[SmallModel],
    gpu: &GpuModel,
    engine: Engine,
    tokens: u64,
    budget_bytes: u64,
) -> Option<SlmCard> {
    let mut placed: Vec<SlmReplica> = models.iter().map(|model| replica(model, gpu, engine, tokens)).collect();
    // Fewer replicas of the one with most of them, until all fit.
    let total = |placed: &[SlmReplica]| placed.iter().map(|r| r.replicas * r.bytes).sum::<u64>();
    while total(&placed) > budget_bytes {
        placed.iter_mut().filter(|r| r.replicas > 1).max_by_key(|r| r.replicas * r.bytes)?.replicas -= 1;
    }
    for replica in &mut placed {
        // Each replica tokenises while others compute.
        let (device, host) = (replica.batch_ms, replica.host_ms);
        let overlapped = (replica.replicas as f64 * device / (device + host)).min(1.0);
        replica.requests_per_s = round(replica.requests_per_s * overlapped);
    }
    let mean_s = placed.iter().map(|r| 1.0 / r.requests_per_s).sum::<f64>() / placed.len().max(1) as f64;
    let busy_requests_per_s = round(1.0 / mean_s);
    let bytes = total(&placed);
    Some(SlmCard { models: placed, bytes, busy_requests_per_s, requests_per_s: round(busy_requests_per_s * BUSY) })
}

/// As many replicas as keep the card busy.
fn replica(model: &SmallModel, gpu: &GpuModel, engine: Engine, tokens: u64) -> SlmReplica {
    let program = engine.program(&model.spec);
    let tokens = tokens.min(model.spec.max_position_embeddings).max(1);
    let limits = limits(&model.spec, tokens);
    let speed = engine.speed();
    let work = extract(&program, &model.spec, gpu, speed, 1, crate::memory::served_dtype(&model.spec));
    let timed = Replica {
        work: &work,
        machine: Machine { gpu, tensor_parallel_size: 1, engine: speed },
        shape: RequestShape { input_tokens: tokens, output_tokens: 0 },
        max_num_batched_tokens: limits.max_num_batched_tokens,
    };
    let rates = timed.at(BATCH_TEXTS as f64);
    let batch_ms = 1e3 * BATCH_TEXTS as f64 / rates.requests_per_s;
    let host_ms = 1e3 * (BATCH_TEXTS * tokens) as f64 / TOKENIZED_PER_S;
    let wanted = 1 + (host_ms / batch_ms).ceil() as u64;
    SlmReplica {
        name: model.name.clone(),
        kind: model.kind,
        replicas: wanted.clamp(*REPLICAS.start(), *REPLICAS.end()),
        bytes: bytes(model, &program, gpu, &limits),
        requests_per_s: rates.requests_per_s,
        batch_ms: round(batch_ms),
        host_ms: round(host_ms),
    }
}

fn limits(spec: &ModelSpec, tokens: u64) -> EngineLimits {
    EngineLimits {
        max_num_seqs: BATCH_TEXTS,
        max_num_batched_tokens: BATCH_TEXTS * tokens,
        ..EngineLimits::for_model(spec).with_max_model_len(spec, tokens)
    }
}

fn bytes(model: &SmallModel, program: &Program, gpu: &GpuModel, limits: &EngineLimits) -> u64 {
    Budget::new(program, &model.spec, model.weights, 1, gpu.memory_total_bytes, limits).without_kv_bytes()
}
