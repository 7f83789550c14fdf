use super::{HostTensor, StoredType, TensorSource, WeightsError};
use half::{bf16, f16};
use mserve_planner::model::{Program, Weight};
use rayon::prelude::*;

/// Weights made up in memory: a model's speed without its files. The same seed gives the same weights.
///
/// Matrices are uniform with variance 1/columns, so that activations keep their size from layer to layer; norm weights
/// are 1 and biases 0.
#[derive(Debug, Clone, Copy)]
pub struct RandomWeights {
    pub seed: u64,
    pub stored: StoredType,
}

/// Elements made from one seed, so that filling can be shared out between threads.
const CHUNK: usize = 1 << 16;

impl TensorSource for RandomWeights {
    fn check(&self, program: &Program) -> Result<u64, WeightsError> {
        Ok(program.parameters() * self.stored.bytes() as u64)
    }

    fn read(&self, weight: &Weight, _prefixes: &[String]) -> Result<HostTensor, WeightsError> {
        let shape: Vec<usize> = weight.shape.iter().map(|&n| n as usize).collect();
        let mut bytes = vec![0; shape.iter().product::<usize>() * self.stored.bytes()];
        let seed = self.seed ^ weight.name.bytes().fold(0, |h: u64, b| h.wrapping_mul(31).wrapping_add(b.into()));
        let bound = match shape.as_slice() {
            [_, columns, ..] => (3.0 / *columns as f32).sqrt(),
            _ => 0.0,
        };
        let offset = if shape.len() == 1 && !weight.name.ends_with("bias") { 1.0 } else { 0.0 };
        bytes.par_chunks_mut(CHUNK * self.stored.bytes()).enumerate().for_each(|(i, chunk)| {
            let mut random = fastrand::Rng::with_seed(seed.wrapping_add(i as u64));
            fill(self.stored, chunk, || offset + bound * (2.0 * random.f32() - 1.0));
        });
        Ok(HostTensor { stored: self.stored, shape, bytes })
    }
}

fn fill(stored: StoredType, bytes: &mut [u8], mut next: impl FnMut() -> f32) {
    for element in bytes.chunks_exact_mut(stored.bytes()) {
        match stored {
            StoredType::F32 => element.copy_from_slice(&next().to_le_bytes()),
            StoredType::F16 => element.copy_from_slice(&f16::from_f32(next()).to_le_bytes()),
            StoredType::BF16 => element.copy_from_slice(&bf16::from_f32(next()).to_le_bytes()),
        }
    }
}
