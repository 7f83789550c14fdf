//! Matrix products by whichever is fastest for their shape: cuBLASLt, or for a few rows a kernel of ours.

use super::CudaError;
use super::device::Device;
use super::gemm::{Algorithm, Blas, GemmOperands, GemmShape};
use super::kernels::{self, Products};
use super::module::{Arg, Kernel};
use std::collections::HashMap;
use std::sync::Arc;

/// How a shape is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    Blas(Algorithm),
    /// Index into [`Products::ALL`].
    Own(usize),
}

#[derive(Debug)]
pub struct Linears {
    blas: Blas,
    kernels: Vec<Kernel>,
    /// Shapes that a kernel of ours computes.
    own: HashMap<GemmShape, usize>,
}

impl Linears {
    /// `kernels` in the order of [`Products::ALL`].
    pub fn new(device: &Arc<Device>, kernels: Vec<Kernel>) -> Result<Self, CudaError> {
        Ok(Self { blas: Blas::new(device)?, kernels, own: HashMap::new() })
    }

    pub fn blas_version(&self) -> usize {
        self.blas.version
    }

    /// What could compute a shape: our kernels that take it, then up to `want` of cuBLASLt's algorithms.
    pub fn candidates(&self, shape: &GemmShape, want: usize) -> Result<Vec<Choice>, CudaError> {
        let (m, n, k) = (shape.m as u32, shape.n as u32, shape.k as u32);
        let dense = shape.out_stride == shape.n;
        let fits = |p: &Products| dense && !p.gated && p.takes(m, n, k);
        let own = Products::ALL.iter().enumerate().filter(|(_, p)| fits(p)).map(|(i, _)| Choice::Own(i));
        Ok(own.chain(self.blas.candidates(shape, want)?.into_iter().map(Choice::Blas)).collect())
    }

    /// Uses `choice` for this shape from now on.
    ///
    /// # Errors
    /// When cuBLASLt does not take the algorithm, or there is no such kernel.
    pub fn keep(&mut self, shape: GemmShape, choice: Choice) -> Result<(), CudaError> {
        match choice {
            Choice::Blas(algorithm) => {
                self.blas.keep(shape, algorithm)?;
                self.own.remove(&shape);
            }
            Choice::Own(index) if index < self.kernels.len() => {
                self.own.insert(shape, index);
            }
            Choice::Own(index) => {
                return Err(CudaError::Unsupported { op: "Linear", what: format!("product kernel {index}") });
            }
        }
        Ok(())
    }

    /// Puts one product into the device's stream.
    ///
    /// # Safety
    /// As [`Blas::run`].
    pub unsafe fn run(&mut self, shape: &GemmShape, operands: &GemmOperands) -> Result<(), CudaError> {
        let Some(&index) = self.own.get(shape) else {
            // SAFETY: passed on from the caller.
            return unsafe { self.blas.run(shape, operands) };
        };
        let geometry = kernels::product(&Products::ALL[index], shape.n as u32);
        let args = [
            Arg::Pointer(operands.weight),
            Arg::Pointer(operands.x),
            Arg::Pointer(operands.bias.unwrap_or(0)),
            Arg::Pointer(operands.residual.unwrap_or(0)),
            Arg::Pointer(operands.out),
            Arg::Int(shape.m as i32),
            Arg::Int(shape.n as i32),
            Arg::Int(shape.k as i32),
            Arg::Int(i32::from(shape.f32_out)),
        ];
        // SAFETY: the kernel reads `[n, k]` weights, `[m, k]` x and the optional `[n]` bias and `[m, n]` residual, and
        // writes `[m, n]`, which the caller vouches for; it takes this shape (`candidates`).
        unsafe { self.kernels[index].launch(&geometry, &args) }
    }
}
