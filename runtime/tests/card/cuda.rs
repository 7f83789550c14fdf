//! The CUDA backend as a device under test.

use super::any_device::{Device, Failure, Inspect, Model, Noise, Sizes};
use mserve_runtime::cuda::device::Device as Card;
use mserve_runtime::cuda::{CudaBackend, CudaOptions, GraphCapture, WeightOrigin};
use mserve_runtime::engine::{Backend, RowOutput, StepBatch};
use std::time::Duration;

pub struct Cuda {
    pub name: String,
    pub graphs: GraphCapture,
}

impl Cuda {
    /// # Errors
    /// Why there is no card to test on.
    pub fn open() -> Result<Self, String> {
        let card = Card::open(0).map_err(|error| error.to_string())?;
        let (major, minor) = card.compute_capability;
        Ok(Self { name: format!("{} (sm_{major}{minor})", card.name), graphs: GraphCapture::WhenNeeded })
    }
}

impl Device for Cuda {
    type Backend = CudaBackend;

    fn load(&self, model: &Model, sizes: Sizes) -> Result<CudaBackend, Failure> {
        let options = CudaOptions {
            max_model_len: Some(sizes.max_model_len),
            max_num_seqs: sizes.max_num_seqs,
            max_num_batched_tokens: sizes.max_num_batched_tokens,
            kv_cache_bytes: Some(sizes.kv_cache_bytes(&model.spec, 2)),
            graphs: self.graphs,
            tuning_budget: Duration::from_millis(300),
            ..CudaOptions::default()
        };
        Ok(CudaBackend::load(&model.spec, &WeightOrigin::Source(&*model.weights), &options, &mut |_, _| {})?)
    }

    /// Products of other sizes add in another order, and every op rounds to bf16, 8 bits. On the bundled model logprobs
    /// were then seen up to 0.16 apart (transformers in bf16 is up to 0.36 from its own f32 run there), and a drawn number fell
    /// on the next token in one of some thirty draws.
    fn noise(&self) -> Noise {
        Noise { logprob: 0.3, margin: 0.3, sampling: 1e-4, same_texts: 0.3 }
    }
}

impl Inspect for CudaBackend {
    fn step_and_logits(&mut self, batch: &StepBatch) -> Result<(Vec<RowOutput>, Vec<Vec<f32>>), Failure> {
        let outputs = self.step(batch)?;
        let logits = self.logits(outputs.len())?;
        Ok((outputs, logits))
    }
}
