//! How fast this machine reads memory: the bound of decoding.

use super::kernels::{LANES, Line, Lines};
use pulp::Arch;
use rayon::prelude::*;
use std::time::Instant;

/// Passes over the memory; the best counts, since everything that disturbs a pass makes it slower.
const PASSES: usize = 7;

/// Bytes per second that `threads` threads read from an array of `bytes`, front to back.
///
/// # Errors
/// When the threads cannot be started.
pub fn read_bandwidth(threads: usize, bytes: u64) -> Result<f64, rayon::ThreadPoolBuildError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let line_bytes = size_of::<Line<u32>>() as u64;
    let mut lines = Lines::<u32>::zeroed((bytes / line_bytes).max(1) as usize);
    let arch = Arch::new();
    Ok(pool.install(|| {
        // Pages that were never written are all one page of zeros, which would be read from cache.
        lines.as_mut_slice().par_iter_mut().for_each(|line| line.fill(1));
        let share = lines.len().div_ceil(threads);
        let best = (0..PASSES).map(|_| {
            let start = Instant::now();
            let sum: u32 = lines.as_slice().par_chunks(share).map(|lines| arch.dispatch(|| sum(lines))).sum();
            std::hint::black_box(sum);
            start.elapsed().as_secs_f64()
        });
        lines.bytes() as f64 / best.fold(f64::INFINITY, f64::min)
    }))
}

#[inline(always)]
fn sum(lines: &[Line<u32>]) -> u32 {
    let mut sums = [[0_u32; LANES]; 4];
    for group in lines.as_chunks::<4>().0 {
        for (sums, line) in sums.iter_mut().zip(group) {
            for (s, &v) in sums.iter_mut().zip(line) {
                *s = s.wrapping_add(v);
            }
        }
    }
    sums.as_flattened().iter().fold(0, |sum: u32, &v| sum.wrapping_add(v))
}
