//! What must hold on any device, through its backend and through the engine over it. `tests/it` runs these checks in
//! small on the CPU, `tests/card` at full size on a card.

pub mod cpu;
pub mod sampling;
pub mod soak;
pub mod steps;
pub mod texts;

use mserve_planner::model::{LayerSpec, ModelSpec, parse_config};
use mserve_runtime::engine::{Backend, BackendError, BackendInfo, RowOutput, StepBatch};
use mserve_runtime::weights::{Checkpoint, TensorSource};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

pub type Failure = Box<dyn std::error::Error + Send + Sync>;
pub type Outcome = Result<(), Failure>;

/// A model and where its weights come from.
pub struct Model {
    pub name: String,
    pub spec: ModelSpec,
    pub weights: Box<dyn TensorSource>,
}

impl Model {
    pub fn from_checkpoint(dir: &Path) -> Result<Self, Failure> {
        let spec = parse_config(&std::fs::read(dir.join("config.json"))?)?;
        let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        Ok(Self { name, spec, weights: Box::new(Checkpoint::open(dir)?) })
    }
}

/// What a device is loaded for.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub max_model_len: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    /// KV blocks of [`BLOCK_SIZE`] tokens.
    pub num_blocks: usize,
}

pub const BLOCK_SIZE: usize = 16;

impl Sizes {
    /// Bytes of a cache of `num_blocks` with `bytes` an element.
    pub fn kv_cache_bytes(&self, spec: &ModelSpec, bytes: u64) -> u64 {
        let layer =
            |l: &LayerSpec| l.attention().map_or(0, |a| 2 * a.num_kv_heads * a.head_dim * BLOCK_SIZE as u64 * bytes);
        spec.layers.iter().map(layer).sum::<u64>() * self.num_blocks as u64
    }
}

/// How far a device's rounding may move what is exact on paper.
#[derive(Debug, Clone, Copy)]
pub struct Noise {
    /// Of a logprob, when the same text is computed in other pieces or beside other texts.
    pub logprob: f32,
    /// Two tokens whose logprobs are nearer than this may change places.
    pub margin: f32,
    /// Of a logprob or a share, when sampling has computed it from the same logits.
    pub sampling: f32,
    /// Share of sampled texts that must come out the same again, whatever ran beside them.
    pub same_texts: f64,
}

impl Noise {
    /// Bit for bit.
    pub const NONE: Self = Self { logprob: 0.0, margin: 0.0, sampling: 0.0, same_texts: 1.0 };
}

pub trait Device {
    type Backend: Inspect + 'static;

    fn load(&self, model: &Model, sizes: Sizes) -> Result<Self::Backend, Failure>;

    fn noise(&self) -> Noise;
}

/// A backend that shows what it chose from.
pub trait Inspect: Backend {
    /// One step, with the logits of each row of output.
    fn step_and_logits(&mut self, batch: &StepBatch) -> Result<(Vec<RowOutput>, Vec<Vec<f32>>), Failure>;
}

/// A backend that outlives the engine over it, perhaps with fewer blocks than it has: loading is slow, engines are not.
pub struct Lent<B> {
    backend: Arc<Mutex<B>>,
    info: BackendInfo,
}

impl<B: Backend> Lent<B> {
    pub fn new(backend: B) -> Self {
        let info = backend.info().clone();
        Self { backend: Arc::new(Mutex::new(backend)), info }
    }

    /// For one engine.
    pub fn with_blocks(&self, num_blocks: usize) -> Self {
        let info = BackendInfo { num_blocks: num_blocks.min(self.info.num_blocks), ..self.info.clone() };
        Self { backend: Arc::clone(&self.backend), info }
    }

    pub fn all_blocks(&self) -> Self {
        self.with_blocks(self.info.num_blocks)
    }

    pub fn with<T>(&self, call: impl FnOnce(&mut B) -> T) -> T {
        call(&mut self.backend.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<B: Backend> Backend for Lent<B> {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn step(&mut self, batch: &StepBatch) -> Result<Vec<RowOutput>, BackendError> {
        self.with(|backend| backend.step(batch))
    }

    fn max_steps_in_flight(&self) -> usize {
        self.with(|backend| backend.max_steps_in_flight())
    }

    fn submit(&mut self, batch: &StepBatch) -> Result<(), BackendError> {
        self.with(|backend| backend.submit(batch))
    }

    fn collect(&mut self) -> Result<Vec<RowOutput>, BackendError> {
        self.with(|backend| backend.collect())
    }
}
