//! What is made ready on the side while weights are read: kernels, cuBLASLt, and as many measured products as time allows.

use super::arena::StepRows;
use super::clock::Clock;
use super::cubin_cache::DiskCache;
use super::device::Device;
use super::executor::Surfaces;
use super::fusion::{GATED_ROWS, ROTATED_ROWS};
use super::gemm::{GemmOperands, GemmShape};
use super::gemm_tuning::{Trial, Tuner};
use super::kernel_set::{Cubins, KernelSet};
use super::kernels::sources;
use super::linear::Linears;
use super::load::Sizes;
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
/// The first steps of all: a short prompt, then one token.
const FIRST_STEPS: [StepRows; 2] = [StepRows { tokens: 8, sequences: 1 }, StepRows { tokens: 1, sequences: 1 }];

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
/// The addresses in plan and surfaces must be device memory for steps as large as `sizes` says, and no step may run.
pub unsafe fn prepare(
    device: &Arc<Device>,
    plan: &Plan,
    surfaces: &Surfaces,
    sizes: &Sizes,
    options: &CudaOptions,
    uploaded: &AtomicBool,
) -> Result<Prepared, CudaError> {
    let mut clock = Clock::start();
    let cache = |folder: &str| options.cache_dir.as_ref().map(|d| DiskCache::at(d.join(folder)));
    let kernels = KernelSet::load(device, &Cubins::build(device, &plan.layers, cache("cubin").as_ref())?)?;
    clock.lap("kernels");
    let mut linears = Linears::new(device, kernels.of_products())?.with_bests(surfaces.bests);
    let version = kernels_version(device.compute_capability);
    let mut tuner = Tuner::new(device, &mut linears, trials(plan, surfaces, sizes), cache("gemm"), version);
    for rows in FIRST_STEPS {
        let rows = StepRows { tokens: rows.tokens.min(sizes.max_num_batched_tokens), ..rows };
        // SAFETY: passed on from the caller.
        unsafe { run_products(plan, surfaces, &mut linears, rows)? };
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

/// Puts each kind of product that a step of these rows has into the stream once: a kernel is loaded when it first runs,
/// which a capture cannot wait for.
///
/// # Safety
/// As [`prepare`].
pub unsafe fn run_products(
    plan: &Plan,
    surfaces: &Surfaces,
    linears: &mut Linears,
    rows: StepRows,
) -> Result<(), CudaError> {
    for (shape, operands) in products(plan, surfaces, rows) {
        // SAFETY: passed on from the caller.
        unsafe { linears.run(&shape, &operands[0])? };
    }
    Ok(())
}

/// The products of a step of these rows, with the operands of each layer that has one. Without outputs there are none
/// behind the gathers: buffers there have as many rows as there may be sequences.
fn products(plan: &Plan, surfaces: &Surfaces, rows: StepRows) -> BTreeMap<GemmShape, Vec<GemmOperands>> {
    let mut products: BTreeMap<GemmShape, Vec<GemmOperands>> = BTreeMap::new();
    for op in plan.ops.iter().chain(&plan.prefill) {
        if let DeviceOp::Linear(linear) = op
            && let rows @ 1.. = rows.of(linear.rows)
        {
            products.entry(linear.shape(rows)).or_default().push(surfaces.trial_operands(linear));
        }
    }
    products
}

/// Every product at every number of rows that decode steps have, and at some of prefill's; the commonest first.
fn trials(plan: &Plan, surfaces: &Surfaces, sizes: &Sizes) -> Vec<Trial> {
    let most = sizes.max_num_batched_tokens;
    let large = LARGE_ROWS.into_iter().filter(|&r| r < most).chain([most]).filter(|&r| r > sizes.max_num_seqs);
    let decodes = sizes.commonest_buckets().into_iter().map(|b| StepRows { tokens: b, sequences: b });
    // Never are there as many outputs as such a step has tokens: what is computed for them was measured with decodes.
    let rows = decodes.chain(large.map(|r| StepRows { tokens: r, sequences: 0 }));
    let of_rows = |rows: StepRows| {
        // Few chunks have few rows, and few outputs are gated in one layer only: the product, measured, and the gate.
        let gated = rows.sequences == 0 || rows.tokens > GATED_ROWS / 2;
        let wanted = move |s: &GemmShape| (!s.gated || gated) && (s.rotated == 0 || s.m >= ROTATED_ROWS);
        products(plan, surfaces, rows).into_iter().filter(move |(shape, _)| wanted(shape))
    };
    rows.flat_map(of_rows)
        .map(|(shape, mut operands)| {
            operands.truncate(TRIAL_LAYERS);
            Trial { shape, operands }
        })
        .collect()
}

/// Files of the kernels that are measured.
const PRODUCT_FILES: [&str; 6] = ["gemv", "gated_act", "wide_linear", "wide_rotated", "wide_head", "split_linear"];

/// A number that changes when the kernels that products are measured against do.
fn kernels_version(compute_capability: (i32, i32)) -> u64 {
    sources(&[], compute_capability)
        .iter()
        .filter(|s| PRODUCT_FILES.contains(&s.name.as_str()))
        .map(|s| xxh3_64(s.text.as_bytes()))
        .sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cuda::arena::ArenaPlan;
    use crate::cuda::buckets::decode_buckets;
    use crate::cuda::executor::RopeTable;
    use crate::cuda::fusion::Abilities;
    use crate::cuda::plan::{Bases, plan};
    use crate::cuda::testing::{llama_program, llama_program_of};
    use crate::cuda::weights::WeightLayout;
    use mserve_planner::model::{Program, Rows};

    const SIZES: StepRows = StepRows { tokens: 1024, sequences: 48 };

    /// Of two layers.
    fn surfaces() -> Surfaces {
        Surfaces { ropes: vec![RopeTable::default()], layers: vec![(1 << 42, 1 << 43); 2], ..Surfaces::default() }
    }

    fn fused(layers: usize) -> Plan {
        fused_of(&llama_program(layers))
    }

    fn fused_of(program: &Program) -> Plan {
        let weights = WeightLayout::new(program).unwrap();
        let bases = Bases { weights: 1 << 40, arena: 1 << 41 };
        let mut plan = plan(program, &weights, &ArenaPlan::new(program, SIZES), bases).unwrap();
        plan.fuse(program, Abilities { clusters: true, chains: false });
        plan
    }

    fn shapes(plan: &Plan) -> Vec<GemmShape> {
        let sizes = Sizes {
            max_model_len: 1024,
            max_num_seqs: SIZES.sequences,
            max_num_batched_tokens: SIZES.tokens,
            max_blocks: 64,
            hidden_size: 64,
            vocab_size: 512,
            decode_buckets: decode_buckets(SIZES.sequences),
        };
        let trials = trials(plan, &surfaces(), &sizes);
        let of_many = trials.iter().filter(|t| t.shape.m > SIZES.sequences).flat_map(|t| &t.operands);
        let last = plan.ops.iter().filter_map(|op| match op {
            DeviceOp::Linear(l) if l.rows == Rows::Sequences => Some(l.weight),
            _ => None,
        });
        let last: Vec<_> = last.collect();
        for operands in of_many {
            assert!(!last.contains(&operands.weight), "written with more rows than its buffers have");
        }
        trials.into_iter().map(|t| t.shape).collect()
    }

    #[test]
    fn products_behind_the_gathers_are_measured_at_rows_of_outputs_alone() {
        let (one, two) = (shapes(&fused(1)), shapes(&fused(2)));
        let of_rows = |shapes: &[GemmShape], m| shapes.iter().filter(|s| s.m == m).count();
        // QKV, output, gate and up with and without the gate, down and head.
        assert_eq!([32, 48].map(|m| of_rows(&one, m)), [6, 6]);
        assert_eq!([1, 8].map(|m| of_rows(&one, m)), [5, 5]);
        // Prompts pass all layers but the last whole; of that, only what makes keys and values.
        assert_eq!([512, 1024].map(|m| of_rows(&two, m)), [5, 5]);
        assert_eq!([512, 1024].map(|m| of_rows(&one, m)), [1, 1]);
    }

    #[test]
    fn rotations_are_measured_where_one_kernel_may_do_them() {
        let shapes = shapes(&fused_of(&llama_program_of(2, 64)));
        let rotated: Vec<usize> = shapes.iter().filter(|s| s.rotated == 64).map(|s| s.m).collect();
        assert_eq!(rotated, [512, 1024]);
        let at = |rotated| shapes.iter().position(|s| s.m == 512 && s.n == 512 && s.rotated == rotated);
        assert!(at(0) < at(64), "what the two are beside one another is known first");
    }

    #[test]
    fn a_decode_step_has_no_product_that_was_not_measured() {
        let (plan, known) = (fused(2), shapes(&fused(2)));
        for list in plan.decode.iter().filter(|l| l.rows_max <= SIZES.sequences) {
            for op in &list.ops {
                let DeviceOp::Linear(linear) = op else { continue };
                assert!(known.contains(&linear.shape(list.rows_max)), "{linear:?}");
            }
        }
    }
}
