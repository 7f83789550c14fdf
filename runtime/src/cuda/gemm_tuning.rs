//! Which algorithm for which product: measured once on the card, over the model's own weights, then kept on disk.

use super::CudaError;
use super::cubin_cache::DiskCache;
use super::device::Device;
use super::gemm::{Algorithm, Blas, GemmOperands, GemmShape};
use super::graph::Graph;
use super::memory::Event;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Algorithms that are tried for a shape. The heuristic's order is good: later ones have not been seen to win.
const CANDIDATES: usize = 6;
/// Products of one measurement. They go over the weights of different layers, so that the cache does not help.
const REPEATS: usize = 12;

/// Choices of one card and library version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choices(BTreeMap<GemmShape, Algorithm>);

const RECORD_WORDS: usize = 12;

impl Choices {
    pub fn load(cache: Option<&DiskCache>, name: &str) -> Self {
        cache.and_then(|c| c.get(name)).and_then(|data| Self::from_bytes(&data)).unwrap_or_default()
    }

    fn from_bytes(data: &[u8]) -> Option<Self> {
        let words: Vec<u64> = data.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        let mut choices = BTreeMap::new();
        for record in words.chunks(RECORD_WORDS) {
            let [m, n, k, flags, algorithm @ ..] = <[u64; RECORD_WORDS]>::try_from(record).ok()?;
            let flag = |bit: u64| flags >> bit & 1 == 1;
            let (bias, residual, f32_out) = (flag(0), flag(1), flag(2));
            let shape = GemmShape { m: m as usize, n: n as usize, k: k as usize, bias, residual, f32_out };
            choices.insert(shape, algorithm);
        }
        Some(Self(choices))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let record = |(s, algorithm): (&GemmShape, &Algorithm)| {
            let flags = u64::from(s.bias) | u64::from(s.residual) << 1 | u64::from(s.f32_out) << 2;
            let head = [s.m as u64, s.n as u64, s.k as u64, flags];
            head.into_iter().chain(*algorithm).flat_map(u64::to_le_bytes).collect::<Vec<u8>>()
        };
        self.0.iter().flat_map(record).collect()
    }
}

/// A product to measure, with operands of several layers.
#[derive(Debug, Clone)]
pub struct Trial {
    pub shape: GemmShape,
    pub operands: Vec<GemmOperands>,
}

/// What tuning did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TuningReport {
    pub remembered: usize,
    pub measured: usize,
    /// Left to the heuristic because the time was up. The next start goes on from here.
    pub left: usize,
}

/// Gives every trial's shape an algorithm: one remembered from an earlier start, else the fastest of several as measured
/// now, until `budget` is spent.
///
/// # Safety
/// The operands must be device memory of their shapes' sizes that nobody else uses now. `out` is overwritten.
pub unsafe fn tune(
    device: &Arc<Device>,
    blas: &mut Blas,
    trials: &[Trial],
    cache: Option<&DiskCache>,
    budget: Duration,
) -> Result<TuningReport, CudaError> {
    let name = format!("gemm-{}-{}", device.name.replace(|c: char| !c.is_ascii_alphanumeric(), "_"), blas.version);
    let mut choices = Choices::load(cache, &name);
    let mut report = TuningReport::default();
    let begin = Instant::now();
    for trial in trials {
        let remembered = choices.0.get(&trial.shape).is_some_and(|a| blas.keep(trial.shape, *a).is_ok());
        if remembered {
            report.remembered += 1;
        } else if begin.elapsed() < budget {
            // SAFETY: passed on from the caller.
            let fastest = unsafe { fastest(device, blas, trial)? };
            blas.keep(trial.shape, fastest)?;
            choices.0.insert(trial.shape, fastest);
            report.measured += 1;
        } else {
            report.left += 1;
        }
    }
    if report.measured > 0
        && let Some(Err(error)) = cache.map(|c| c.put(&name, &choices.to_bytes()))
    {
        tracing::warn!("measured matrix products could not be kept: {error}");
    }
    Ok(report)
}

unsafe fn fastest(device: &Arc<Device>, blas: &mut Blas, trial: &Trial) -> Result<Algorithm, CudaError> {
    let candidates = blas.candidates(&trial.shape, CANDIDATES)?;
    let mut best = (f32::INFINITY, candidates[0]);
    for &candidate in &candidates {
        if blas.keep(trial.shape, candidate).is_err() {
            continue;
        }
        // SAFETY: passed on from the caller.
        let time = unsafe { time_ms(device, blas, trial)? };
        if time < best.0 {
            best = (time, candidate);
        }
    }
    Ok(best.1)
}

/// Milliseconds of a pass over the operands. In a graph, since small products are faster than launching them.
unsafe fn time_ms(device: &Arc<Device>, blas: &mut Blas, trial: &Trial) -> Result<f32, CudaError> {
    // SAFETY: passed on from the caller. The first run loads the kernel, which a capture may not.
    unsafe { blas.run(&trial.shape, &trial.operands[0])? };
    device.synchronize()?;
    let graph = Graph::capture(device, || {
        // SAFETY: as above.
        trial.operands.iter().cycle().take(REPEATS).try_for_each(|o| unsafe { blas.run(&trial.shape, o) })
    })?;
    let (begin, end) = (Event::new(device, true)?, Event::new(device, true)?);
    let mut best = f32::INFINITY;
    for _ in 0..2 {
        begin.record(device.stream())?;
        // SAFETY: the operands outlive the measurement.
        unsafe { graph.launch()? };
        end.record(device.stream())?;
        end.wait()?;
        best = best.min(begin.elapsed_ms(&end)?);
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn shape(m: usize, residual: bool) -> GemmShape {
        GemmShape { m, n: 28672, k: 4096, bias: !residual, residual, f32_out: m == 3 }
    }

    #[test]
    fn choices_survive_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let cache = DiskCache::at(directory.path());
        let choices = Choices(BTreeMap::from([
            (shape(1, false), [1, 2, 3, 4, 5, 6, 7, u64::MAX]),
            (shape(1, true), [9; 8]),
            (shape(3, true), [0; 8]),
        ]));
        cache.put("gemm-x", &choices.to_bytes()).unwrap();
        assert_eq!(Choices::load(Some(&cache), "gemm-x"), choices);
        assert_eq!(Choices::load(Some(&cache), "gemm-y"), Choices::default());
        cache.put("gemm-x", &choices.to_bytes()[..40]).unwrap();
        assert_eq!(Choices::load(Some(&cache), "gemm-x"), Choices::default());
    }
}
