//! Random weights of a model's shape, made on the card: for measuring speed without a checkpoint.

use super::CudaError;
use super::compile::{KernelSource, compile};
use super::device::Device;
use super::memory::DeviceMemory;
use super::module::{Arg, Geometry, Module};
use super::weights::WeightLayout;
use mserve_planner::model::{Program, WeightId};
use std::sync::Arc;

const SOURCE: &str = include_str!("random_weights.cu");
const GEOMETRY: Geometry = Geometry { grid: [1056, 1, 1], block: 256, shared_bytes: 0, overlap: false, cluster: 1 };

/// Matrices get a spread of inputs^-1/2, norms ones, biases zeros: activations keep their size from layer to layer.
pub fn fill(
    device: &Arc<Device>,
    program: &Program,
    layout: &WeightLayout,
    memory: &DeviceMemory,
    seed: u64,
) -> Result<(), CudaError> {
    let source = KernelSource { name: "random_weights".to_owned(), text: SOURCE.to_owned(), options: Vec::new() };
    let module = Module::load(device, &compile(&source, &device.arch())?)?;
    let (uniform, constant) = (module.kernel("fill_uniform", 0)?, module.kernel("fill_constant", 0)?);
    for (id, weight) in program.weights.iter().enumerate() {
        let out = Arg::Pointer(memory.pointer() + layout.offset(WeightId(id)));
        let count = Arg::Long(weight.elements());
        let launched = match weight.shape.as_slice() {
            [_, inputs] => {
                // A uniform number in [-b, b) has spread b / sqrt(3).
                let bound = (3.0 / *inputs as f32).sqrt();
                let seed = Arg::Long(seed.wrapping_add((id as u64) << 40));
                // SAFETY: the weight's place has `elements` bf16 values (`WeightLayout`); the memory outlives the launch,
                // which is waited for below.
                unsafe { uniform.launch(&GEOMETRY, &[out, count, Arg::Float(bound), seed]) }
            }
            _ => {
                let value = if weight.name.ends_with("bias") { 0.0 } else { 1.0 };
                // SAFETY: as above.
                unsafe { constant.launch(&GEOMETRY, &[out, count, Arg::Float(value)]) }
            }
        };
        launched?;
    }
    device.synchronize()
}
