//! Matrix products by whichever is fastest for their shape: cuBLASLt, or for a few rows a kernel of ours.

use super::CudaError;
use super::device::Device;
use super::gemm::{Algorithm, Blas, BlasPlan, GemmOperands, GemmShape};
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

/// A choice made ready to run products of one shape.
#[derive(Debug)]
pub enum Route {
    Blas(Algorithm, BlasPlan),
    Own(usize),
}

impl Route {
    pub const fn choice(&self) -> Choice {
        match self {
            Self::Blas(algorithm, _) => Choice::Blas(*algorithm),
            Self::Own(index) => Choice::Own(*index),
        }
    }
}

#[derive(Debug)]
pub struct Linears {
    blas: Blas,
    kernels: Vec<Kernel>,
    routes: HashMap<GemmShape, Route>,
}

impl Linears {
    /// `kernels` in the order of [`Products::ALL`].
    pub fn new(device: &Arc<Device>, kernels: Vec<Kernel>) -> Result<Self, CudaError> {
        Ok(Self { blas: Blas::new(device)?, kernels, routes: HashMap::new() })
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

    /// # Errors
    /// When cuBLASLt does not take the algorithm, or there is no such kernel.
    pub fn route(&self, shape: &GemmShape, choice: Choice) -> Result<Route, CudaError> {
        match choice {
            Choice::Blas(algorithm) => Ok(Route::Blas(algorithm, self.blas.plan(shape, algorithm)?)),
            Choice::Own(index) if index < self.kernels.len() => Ok(Route::Own(index)),
            Choice::Own(index) => Err(CudaError::Unsupported { op: "Linear", what: format!("product kernel {index}") }),
        }
    }

    /// Computes this shape so from now on. True: it was computed in another way until now.
    pub fn keep(&mut self, shape: GemmShape, route: Route) -> bool {
        let choice = route.choice();
        self.routes.insert(shape, route).is_some_and(|before| before.choice() != choice)
    }

    /// Puts one product into the device's stream. A shape without a route gets the heuristic's first choice.
    ///
    /// # Safety
    /// The operands must be device memory of the sizes that `shape` says, bf16 (f32 for `out` where it says so), alive
    /// until the stream has passed it.
    pub unsafe fn run(&mut self, shape: &GemmShape, operands: &GemmOperands) -> Result<(), CudaError> {
        if !self.routes.contains_key(shape) {
            let first = self.blas.candidates(shape, 1)?.remove(0);
            let route = self.route(shape, Choice::Blas(first))?;
            self.routes.insert(*shape, route);
        }
        let Self { blas, kernels, routes } = self;
        let Some(route) = routes.get_mut(shape) else { return Ok(()) };
        // SAFETY: passed on from the caller.
        unsafe { launch(blas, kernels, route, shape, operands) }
    }

    /// The same by `route`, which need not be the one that is kept.
    ///
    /// # Safety
    /// As [`Self::run`]; `route` must have been made for `shape`.
    pub unsafe fn run_by(
        &self,
        route: &mut Route,
        shape: &GemmShape,
        operands: &GemmOperands,
    ) -> Result<(), CudaError> {
        // SAFETY: passed on from the caller.
        unsafe { launch(&self.blas, &self.kernels, route, shape, operands) }
    }
}

unsafe fn launch(
    blas: &Blas,
    kernels: &[Kernel],
    route: &mut Route,
    shape: &GemmShape,
    operands: &GemmOperands,
) -> Result<(), CudaError> {
    let index = match route {
        // SAFETY: passed on from the caller.
        Route::Blas(_, plan) => return unsafe { blas.run(plan, shape, operands) },
        Route::Own(index) => *index,
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
    unsafe { kernels[index].launch(&geometry, &args) }
}
