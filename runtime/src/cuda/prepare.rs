//! What is made ready on the side while weights are read: kernels, cuBLASLt, and as many measured products as time allows.

use super::clock::Clock;
use super::cubin_cache::DiskCache;
use super::device::Device;
use super::executor::operands;
use super::fusion::GATED_ROWS;
use super::gemm::{GemmOperands, GemmShape};
use super::gemm_tuning::{Trial, Tuner};
use super::kernel_set::{Cubins, KernelSet};
use super::kernels::sources;
use super::linear::Linears;
use super::load::Sizes;
use super::memory::DevicePointer;
use super::plan::{DeviceOp, Plan};
use super::{CudaError, CudaOptions};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

/// Products are measured at these rows too, as far as steps may be that large, and at those of the largest step: while
/// prompts wait every step is that large.
const LARGE_ROWS: [usize; 4] = [512, 1024, 2048, 4096];
/// Operands of one product that a measurement goes over.
const TRIAL_LAYERS: usize = 12;
/// Rows of the first steps of all: a short prompt, then one token.
const FIRST_ROWS: [usize; 2] = [8, 1];

#[derive(Debug)]
pub struct Prepared {
    pub kernels: KernelSet,
    pub linears: Linears,
    pub tuner: Tuner,
    pub clock: Clock,
}

/// Runs beside the upload of weights, until `uploaded` and the tuning budget is spent. The only user of the device's
/// stream meanwhile.
///
/// # Safety
/// The addresses in the plan, and `bests` (see [`Linears::with_bests`]), must be device memory for steps as large as `sizes`
/// says, and no step may run.
pub unsafe fn prepare(
    device: &Arc<Device>,
    plan: &Plan,
    bests: DevicePointer,
    sizes: &Sizes,
    options: &CudaOptions,
    uploaded: &AtomicBool,
) -> Result<Prepared, CudaError> {
    let mut clock = Clock::start();
    let cache = |folder: &str| options.cache_dir.as_ref().map(|d| DiskCache::at(d.join(folder)));
    let kernels = KernelSet::load(device, &Cubins::build(device, &plan.layers, cache("cubin").as_ref())?)?;
    clock.lap("kernels");
    let mut linears = Linears::new(device, kernels.of_products())?.with_bests(bests);
    let version = kernels_version(device.compute_capability);
    let mut tuner = Tuner::new(device, &mut linears, trials(plan, sizes), cache("gemm"), version);
    for rows in FIRST_ROWS {
        // SAFETY: passed on from the caller.
        unsafe { run_products(plan, &mut linears, rows)? };
    }
    device.synchronize()?;
    clock.lap("cuBLASLt");
    let begin = Instant::now();
    while !tuner.is_done() && (!uploaded.load(Ordering::Relaxed) || begin.elapsed() < options.tuning_budget) {
        // SAFETY: passed on from the caller.
        unsafe { tuner.step(device, &mut linears)? };
    }
    clock.lap("matrix products");
    Ok(Prepared { kernels, linears, tuner, clock })
}

/// Puts each kind of product that a step of so many rows has into the stream once: a kernel is loaded when it first runs,
/// which a capture cannot wait for.
///
/// # Safety
/// As [`prepare`].
pub unsafe fn run_products(plan: &Plan, linears: &mut Linears, rows: usize) -> Result<(), CudaError> {
    for (shape, operands) in products(plan, rows) {
        // SAFETY: passed on from the caller.
        unsafe { linears.run(&shape, &operands[0])? };
    }
    Ok(())
}

/// The products of a step with this many tokens and output rows, with the operands of each layer that has one.
fn products(plan: &Plan, rows: usize) -> BTreeMap<GemmShape, Vec<GemmOperands>> {
    let mut products: BTreeMap<GemmShape, Vec<GemmOperands>> = BTreeMap::new();
    for op in plan.ops.iter().chain(&plan.prefill) {
        if let DeviceOp::Linear(linear) = op {
            products.entry(linear.shape(rows)).or_default().push(operands(linear));
        }
    }
    products
}

/// Every product at every number of rows that decode steps have, and at some of prefill's; the commonest first.
fn trials(plan: &Plan, sizes: &Sizes) -> Vec<Trial> {
    let most = sizes.max_num_batched_tokens;
    let large = LARGE_ROWS.into_iter().filter(|&r| r < most).chain([most]).filter(|&r| r > sizes.max_num_seqs);
    let rows = sizes.commonest_buckets().into_iter().map(|b| (b, true)).chain(large.map(|r| (r, false)));
    let of_rows = |(rows, is_decode)| {
        // Heads have rows only for sequences: never as many as prefill has tokens. Few chunks have few rows.
        let wanted = move |shape: &GemmShape| match is_decode {
            true => !shape.gated || rows > GATED_ROWS / 2,
            false => !shape.f32_out,
        };
        products(plan, rows).into_iter().filter(move |(shape, _)| wanted(shape))
    };
    rows.flat_map(of_rows)
        .map(|(shape, mut operands)| {
            operands.truncate(TRIAL_LAYERS);
            Trial { shape, operands }
        })
        .collect()
}

/// Files of the kernels that are measured.
const PRODUCT_FILES: [&str; 5] = ["gemv", "gated_act", "wide_linear", "wide_head", "split_linear"];

/// A number that changes when the kernels that products are measured against do.
fn kernels_version(compute_capability: (i32, i32)) -> u64 {
    sources(&[], compute_capability)
        .iter()
        .filter(|s| PRODUCT_FILES.contains(&s.name.as_str()))
        .map(|s| xxh3_64(s.text.as_bytes()))
        .sum()
}
