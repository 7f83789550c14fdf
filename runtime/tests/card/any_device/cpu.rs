//! The CPU backend: the reference. Sums of a token are made in one order whatever runs beside it, so it has no noise.

use super::{BLOCK_SIZE, Device, Failure, Inspect, Model, Noise, Sizes};
use mserve_runtime::cpu::{CpuBackend, CpuOptions};
use mserve_runtime::engine::{Backend, RowOutput, StepBatch};

pub struct Cpu {
    pub threads: usize,
}

impl Device for Cpu {
    type Backend = CpuBackend;

    fn load(&self, model: &Model, sizes: Sizes) -> Result<CpuBackend, Failure> {
        let options = CpuOptions {
            threads: self.threads,
            block_size: BLOCK_SIZE,
            kv_cache_bytes: sizes.kv_cache_bytes(&model.spec, 4),
            max_model_len: Some(sizes.max_model_len),
            max_num_batched_tokens: sizes.max_num_batched_tokens,
            ..CpuOptions::default()
        };
        Ok(CpuBackend::load(&model.spec, &*model.weights, &options, &mut |_, _| {})?)
    }

    fn noise(&self) -> Noise {
        Noise { sampling: 1e-5, ..Noise::NONE }
    }
}

impl Inspect for CpuBackend {
    /// The same step twice: what is in the cache after it is what the first run wrote.
    fn step_and_logits(&mut self, batch: &StepBatch) -> Result<(Vec<RowOutput>, Vec<Vec<f32>>), Failure> {
        let width = self.info().output_width;
        let logits = self.forward_rows(batch)?.chunks_exact(width).map(<[f32]>::to_vec).collect();
        Ok((self.step(batch)?, logits))
    }
}
