//! Matrix products by whichever is fastest for their shape: cuBLASLt, or a kernel of ours for few rows or for many.

use super::CudaError;
use super::device::Device;
use super::gemm::{Algorithm, Blas, BlasPlan, GemmOperands, GemmShape, Rotation};
use super::kernels::{self, Products, WIDE, WideResult};
use super::memory::DevicePointer;
use super::module::{Arg, Kernel};
use super::tensor_map::matrix_map;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// How a shape is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    Blas(Algorithm),
    /// Index into [`Products::ALL`].
    Own(usize),
    /// Index into [`WIDE`].
    Wide(usize),
    /// Of gated and rotated products: as the product alone is computed, then the gate or the rotation.
    Apart,
}

/// A choice made ready to run products of one shape.
#[derive(Debug)]
pub enum Route {
    Blas(Algorithm, BlasPlan),
    Own(usize),
    Wide(usize),
    /// With the route of the product itself.
    Apart(Box<Route>),
}

impl Route {
    pub const fn choice(&self) -> Choice {
        match self {
            Self::Blas(algorithm, _) => Choice::Blas(*algorithm),
            Self::Own(index) => Choice::Own(*index),
            Self::Wide(index) => Choice::Wide(*index),
            Self::Apart(_) => Choice::Apart,
        }
    }

    /// Whether it leaves the likeliest token of each part of each row.
    pub fn chooses(&self) -> bool {
        matches!(self, Self::Wide(index) if WIDE[*index].chooses())
    }

    /// Of the product, for people.
    fn name(&self) -> &'static str {
        match self {
            Self::Own(index) => Products::ALL[*index].entry,
            Self::Wide(index) => WIDE[*index].entry,
            Self::Blas(..) => "cuBLASLt",
            Self::Apart(product) => product.name(),
        }
    }
}

/// Kernels of ours for products.
#[derive(Debug)]
pub struct ProductKernels {
    /// In the order of [`Products::ALL`].
    pub few_rows: Vec<Kernel>,
    /// In the order of [`WIDE`], or none.
    pub many_rows: Vec<Kernel>,
    pub silu_mul: Kernel,
    /// `qk_norm_rope_kv_write` by head dimension.
    pub ropes: BTreeMap<u32, Kernel>,
}

#[derive(Debug)]
pub struct Linears {
    launcher: Launcher,
    /// Measured.
    routes: HashMap<GemmShape, Route>,
    /// Of shapes that were not.
    guesses: HashMap<GemmShape, Route>,
}

impl Linears {
    pub fn new(device: &Arc<Device>, kernels: ProductKernels) -> Result<Self, CudaError> {
        let launcher = Launcher { device: device.clone(), blas: Blas::new(device)?, kernels, bests: None };
        Ok(Self { launcher, routes: HashMap::new(), guesses: HashMap::new() })
    }

    /// Heads may leave the likeliest tokens here: room for [`kernels::head_bests`] of the largest step.
    #[must_use]
    pub const fn with_bests(mut self, bests: DevicePointer) -> Self {
        self.launcher.bests = Some(bests);
        self
    }

    pub fn blas_version(&self) -> usize {
        self.launcher.blas.version
    }

    /// What computes a shape now, for people.
    pub fn computed_by(&self, shape: &GemmShape) -> &'static str {
        self.routes.get(shape).or_else(|| self.guesses.get(shape)).map_or("nothing yet", Route::name)
    }

    /// What could compute a shape: our kernels that take it, then up to `want` of cuBLASLt's algorithms.
    pub fn candidates(&self, shape: &GemmShape, want: usize) -> Result<Vec<Choice>, CudaError> {
        let (m, n, k) = (shape.m as u32, shape.n as u32, shape.k as u32);
        let dense = shape.out_stride == shape.n;
        let fits = |p: &Products| dense && p.takes(m, n, k);
        let own = Products::ALL.iter().enumerate().filter(|(_, p)| fits(p)).map(|(i, _)| Choice::Own(i));
        let wide = (0..WIDE.len()).filter(|&i| self.takes_wide(shape, i)).map(Choice::Wide);
        if *shape != shape.alone() {
            return Ok(wide.chain([Choice::Apart]).collect());
        }
        let blas = self.launcher.blas.candidates(shape, want)?;
        Ok(own.chain(wide).chain(blas.into_iter().map(Choice::Blas)).collect())
    }

    fn takes_wide(&self, shape: &GemmShape, index: usize) -> bool {
        let dense = shape.out_stride == shape.n && !shape.f32_out;
        let there = index < self.launcher.kernels.many_rows.len() && WIDE[index].takes(shape.m, shape.n, shape.k);
        let alone = *shape == shape.alone();
        let bare = !shape.bias && !shape.residual && alone && shape.out_stride.is_multiple_of(2);
        there
            && match WIDE[index].result {
                WideResult::Plain => dense && alone,
                WideResult::Gated => dense && shape.gated && shape.rotated == 0,
                WideResult::Rotated(head_dim) => dense && shape.rotated == head_dim && !shape.gated && !shape.residual,
                WideResult::Head => self.launcher.bests.is_some() && shape.f32_out && bare,
            }
    }

    /// Whether the head of this shape leaves the likeliest token of each part of each row.
    pub fn chooses(&self, shape: &GemmShape) -> bool {
        self.routes.get(shape).or_else(|| self.guesses.get(shape)).is_some_and(Route::chooses)
    }

    /// # Errors
    /// When cuBLASLt does not take the algorithm, or there is no such kernel.
    pub fn route(&self, shape: &GemmShape, choice: Choice) -> Result<Route, CudaError> {
        match choice {
            Choice::Blas(algorithm) => Ok(Route::Blas(algorithm, self.launcher.blas.plan(shape, algorithm)?)),
            Choice::Own(index) if index < self.launcher.kernels.few_rows.len() => Ok(Route::Own(index)),
            Choice::Wide(index) if self.takes_wide(shape, index) => Ok(Route::Wide(index)),
            Choice::Apart => {
                let product = shape.alone();
                let choice = self.routes.get(&product).map_or_else(|| self.guess(&product), |r| Ok(r.choice()))?;
                Ok(Route::Apart(Box::new(self.route(&product, choice)?)))
            }
            Choice::Own(index) | Choice::Wide(index) => {
                Err(CudaError::Unsupported { op: "Linear", what: format!("product kernel {index}") })
            }
        }
    }

    /// For a shape that was not measured: the kernel for many rows where it was fastest at the nearest number of them.
    fn guess(&self, shape: &GemmShape) -> Result<Choice, CudaError> {
        let alike = |s: &&GemmShape| GemmShape { m: shape.m, ..**s } == *shape && WIDE[0].takes(s.m, 16, 8);
        let nearest = self.routes.keys().filter(alike).min_by_key(|s| s.m.abs_diff(shape.m));
        match nearest.and_then(|s| self.routes.get(s)) {
            Some(&Route::Wide(index)) if self.takes_wide(shape, index) => Ok(Choice::Wide(index)),
            _ if *shape != shape.alone() => Ok(Choice::Apart),
            _ => Ok(Choice::Blas(self.launcher.blas.candidates(shape, 1)?.remove(0))),
        }
    }

    /// Computes this shape so from now on. True: it was computed in another way until now.
    pub fn keep(&mut self, shape: GemmShape, route: Route) -> bool {
        let choice = route.choice();
        let guess = self.guesses.remove(&shape);
        let GemmShape { m, gated, rotated, .. } = shape;
        self.guesses.retain(|guessed, _| GemmShape { m, gated, rotated, ..*guessed } != shape);
        self.routes.insert(shape, route).or(guess).is_some_and(|before| before.choice() != choice)
    }

    /// Puts one product into the device's stream. A shape that was not measured is computed as those like it, or by the
    /// heuristic's first choice.
    ///
    /// # Safety
    /// The operands must be device memory of the sizes that `shape` says, bf16 (f32 for `out` where it says so), alive
    /// until the stream has passed it.
    pub unsafe fn run(&mut self, shape: &GemmShape, operands: &GemmOperands) -> Result<(), CudaError> {
        if !self.routes.contains_key(shape) && !self.guesses.contains_key(shape) {
            let route = self.route(shape, self.guess(shape)?)?;
            self.guesses.insert(*shape, route);
        }
        let Self { launcher, routes, guesses } = self;
        let Some(route) = routes.get_mut(shape).or_else(|| guesses.get_mut(shape)) else { return Ok(()) };
        // SAFETY: passed on from the caller.
        unsafe { launcher.launch(route, shape, operands) }
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
        unsafe { self.launcher.launch(route, shape, operands) }
    }
}

/// What computes products.
#[derive(Debug)]
struct Launcher {
    device: Arc<Device>,
    blas: Blas,
    kernels: ProductKernels,
    /// Where heads leave the likeliest tokens.
    bests: Option<DevicePointer>,
}

impl Launcher {
    /// # Safety
    /// As [`Linears::run_by`].
    unsafe fn launch(&self, route: &mut Route, shape: &GemmShape, operands: &GemmOperands) -> Result<(), CudaError> {
        match route {
            // SAFETY: the plan was made for this shape (`route`); the caller vouches for the operands.
            Route::Blas(_, plan) => unsafe { self.blas.run(plan, shape, operands) },
            // SAFETY: `route` gave out an index of `few_rows` only; the caller vouches for the operands.
            Route::Own(index) => unsafe { self.few_rows(*index, shape, operands) },
            // SAFETY: `route` asked `takes_wide` for this shape and index; the caller vouches for the operands.
            Route::Wide(index) => unsafe { self.many_rows(*index, shape, operands) },
            // SAFETY: the inner route was made for the product alone; the caller vouches for the operands.
            Route::Apart(product) if shape.gated => unsafe { self.gate_apart(product, shape, operands) },
            // SAFETY: as above.
            Route::Apart(product) => unsafe { self.rotation_apart(product, shape, operands) },
        }
    }

    unsafe fn few_rows(&self, index: usize, shape: &GemmShape, operands: &GemmOperands) -> Result<(), CudaError> {
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
        unsafe { self.kernels.few_rows[index].launch(&geometry, &args) }
    }

    unsafe fn many_rows(&self, index: usize, shape: &GemmShape, operands: &GemmOperands) -> Result<(), CudaError> {
        let wide = &WIDE[index];
        let (m, n, k) = (shape.m as u64, shape.n as u64, shape.k as u64);
        let columns = if shape.gated { shape.n / 2 } else { shape.n };
        let [bias, residual] = [operands.bias, operands.residual].map(|p| Arg::Pointer(p.unwrap_or(0)));
        let out = Arg::Pointer(operands.out);
        let [rows, bests] = [operands.sample_rows, self.bests].map(|p| Arg::Pointer(p.unwrap_or(0)));
        let mut tail = Vec::new();
        let mut args = vec![
            Arg::Map(matrix_map(&self.device, operands.x, [m, k], wide.x_box_rows())?),
            Arg::Map(matrix_map(&self.device, operands.weight, [n, k], wide.box_rows())?),
        ];
        match wide.result {
            WideResult::Plain | WideResult::Gated => args.extend([bias, residual, out]),
            WideResult::Rotated(_) => {
                let rotation = rotation(operands)?;
                args.extend([bias, out]);
                args.extend(rotation.places());
                tail.extend([rotation.heads, rotation.kv_heads].map(|heads| Arg::Int(heads as i32)));
            }
            WideResult::Head => {
                args.extend([rows, out, bests]);
                tail.push(Arg::Int(shape.out_stride as i32));
            }
        }
        args.extend([m, columns as u64, k].map(|size| Arg::Int(size as i32)));
        args.extend(tail);
        let geometry = wide.geometry(shape.m as u32, columns as u32, self.device.multiprocessors);
        // The kernel reads what its maps and rows say: `[n, k]` weights, `[m, k]` x, the optional `[n]` bias and `[m, n]`
        // residual, a head the optional parameters of m rows; it writes `[m, columns]`, rows `out_stride` apart, and a head
        // `head_bests`; a rotated one follows the m positions and slots.
        // SAFETY: the caller vouches for all of these but `bests`, for which there is room (`with_bests`); it takes this
        // shape (`takes_wide`: with `bests` only, if a head).
        unsafe { self.kernels.many_rows[index].launch(&geometry, &args) }
    }

    /// The product, then the gate.
    unsafe fn gate_apart(
        &self,
        route: &mut Route,
        shape: &GemmShape,
        operands: &GemmOperands,
    ) -> Result<(), CudaError> {
        let Some(gate_up) = operands.gate_up else {
            return Err(CudaError::Unsupported {
                op: "Linear",
                what: "a gate without room for the product".to_owned(),
            });
        };
        let product = shape.alone();
        // SAFETY: passed on from the caller; there is room for the product.
        unsafe { self.launch(route, &product, &GemmOperands { out: gate_up, gate_up: None, ..*operands })? };
        let width = shape.n as u32 / 2;
        let args = [Arg::Pointer(gate_up), Arg::Pointer(operands.out), Arg::Int(width as i32)];
        // SAFETY: reads the product, `[m, n]`, and writes `[m, n / 2]`, which the caller vouches for.
        unsafe { self.kernels.silu_mul.launch(&kernels::gated_act(shape.m as u32, width), &args) }
    }

    /// The product, then the rotation over it: k and v lie in `out` too meanwhile.
    unsafe fn rotation_apart(
        &self,
        route: &mut Route,
        shape: &GemmShape,
        operands: &GemmOperands,
    ) -> Result<(), CudaError> {
        let rotation = rotation(operands)?;
        let Some(rope) = self.kernels.ropes.get(&shape.rotated) else {
            return Err(CudaError::Unsupported { op: "Linear", what: format!("heads of {} rotated", shape.rotated) });
        };
        // SAFETY: passed on from the caller.
        unsafe { self.launch(route, &shape.alone(), operands)? };
        let Rotation { heads, kv_heads, .. } = rotation;
        let [positions, slots, cos, sin, keys, values] = rotation.places();
        let no_norm = Arg::Pointer(0);
        let mut args = vec![Arg::Pointer(operands.out), positions, slots, cos, sin, no_norm, no_norm, keys, values];
        args.extend([shape.m as u32, heads, kv_heads, shape.rotated].map(|size| Arg::Int(size as i32)));
        args.extend([0.0, 0.0].map(Arg::Float));
        // SAFETY: reads and writes the product, `[m, n]`, and follows the positions and slots of m rows, which the caller
        // vouches for.
        unsafe { rope.launch(&kernels::rope(shape.m as u32, heads, kv_heads), &args) }
    }
}

fn rotation(operands: &GemmOperands) -> Result<Rotation, CudaError> {
    let missing = || CudaError::Unsupported { op: "Linear", what: "rotated heads without a place for them".to_owned() };
    operands.rotation.ok_or_else(missing)
}

impl Rotation {
    /// In the order of all kernels that rotate.
    pub fn places(&self) -> [Arg; 6] {
        [self.positions, self.slots, self.cos, self.sin, self.keys, self.values].map(Arg::Pointer)
    }
}
