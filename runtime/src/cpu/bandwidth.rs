//! How fast this machine reads memory: the bound of decoding.

use super::kernels::{LANES, Line, Lines, prefetch};
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

/// Lines between what is added and what is fetched meanwhile.
const AHEAD: usize = 64;

#[inline(always)]
fn sum(lines: &[Line<u32>]) -> u32 {
    let mut sums = [[0_u32; LANES]; 4];
    let last = lines.len().saturating_sub(AHEAD);
    for (group, ahead) in lines[..last].as_chunks().0.iter().zip(lines[AHEAD.min(lines.len())..].as_chunks::<4>().0) {
        prefetch(ahead);
        add(&mut sums, group);
    }
    for group in lines[last..].as_chunks().0 {
        add(&mut sums, group);
    }
    sums.as_flattened().iter().fold(0, |sum: u32, &v| sum.wrapping_add(v))
}

#[inline(always)]
fn add(sums: &mut [Line<u32>; 4], group: &[Line<u32>; 4]) {
    for (s, &v) in sums.as_flattened_mut().iter_mut().zip(group.as_flattened()) {
        *s = s.wrapping_add(v);
    }
}
