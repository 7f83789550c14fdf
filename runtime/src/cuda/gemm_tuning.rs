//! Which kernel for which product: measured once on the card, over the model's own weights, then kept on disk.

use super::CudaError;
use super::cubin_cache::DiskCache;
use super::device::Device;
use super::gemm::{GemmOperands, GemmShape};
use super::graph::Graph;
use super::linear::{Choice, Linears};
use super::memory::Event;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// cuBLASLt's algorithms that are tried for a shape. Its order is good: later ones have not been seen to win.
const CANDIDATES: usize = 6;
/// Products of one measurement. They go over the weights of different layers, so that the cache does not help.
const REPEATS: usize = 12;
/// One that takes this much longer than the best so far after its first run is not measured again.
const HOPELESS: f32 = 1.5;

/// Choices of one card and library version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Choices(BTreeMap<GemmShape, Choice>);

const RECORD_WORDS: usize = 13;

impl Choices {
    fn load(cache: Option<&DiskCache>, name: &str) -> Self {
        cache.and_then(|c| c.get(name)).and_then(|data| Self::from_bytes(&data)).unwrap_or_default()
    }

    fn from_bytes(data: &[u8]) -> Option<Self> {
        let words: Vec<u64> = data.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        let mut choices = BTreeMap::new();
        for record in words.chunks(RECORD_WORDS) {
            let [m, n, k, stride, flags, algorithm @ ..] = <[u64; RECORD_WORDS]>::try_from(record).ok()?;
            let flag = |bit: u64| flags >> bit & 1 == 1;
            let (m, n, k, out_stride) = (m as usize, n as usize, k as usize, stride as usize);
            let shape = GemmShape { m, n, k, bias: flag(0), residual: flag(1), f32_out: flag(2), out_stride };
            let choice = if flag(3) { Choice::Own(algorithm[0] as usize) } else { Choice::Blas(algorithm) };
            choices.insert(shape, choice);
        }
        Some(Self(choices))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let record = |(s, choice): (&GemmShape, &Choice)| {
            let (own, algorithm) = match *choice {
                Choice::Blas(algorithm) => (false, algorithm),
                Choice::Own(index) => (true, [index as u64, 0, 0, 0, 0, 0, 0, 0]),
            };
            let flags = [s.bias, s.residual, s.f32_out, own];
            let flags = flags.iter().zip(0..).map(|(&set, bit)| u64::from(set) << bit).sum();
            let head = [s.m as u64, s.n as u64, s.k as u64, s.out_stride as u64, flags];
            head.into_iter().chain(algorithm).flat_map(u64::to_le_bytes).collect::<Vec<u8>>()
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

/// Where choices are kept, and how long measuring may take.
#[derive(Debug, Clone, Copy)]
pub struct TuningLimits<'a> {
    pub cache: Option<&'a DiskCache>,
    /// Changes when our own kernels do: what was measured with others is measured again.
    pub kernels_version: u64,
    pub budget: Duration,
}

/// What tuning did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TuningReport {
    pub remembered: usize,
    pub measured: usize,
    /// Of the measured, how many a kernel of ours won.
    pub own: usize,
    /// Left to the heuristic because the time was up. The next start goes on from here.
    pub left: usize,
}

/// Gives every trial's shape a kernel: one remembered from an earlier start, else the fastest of several as measured
/// now, until the budget is spent.
///
/// # Safety
/// The operands must be device memory of their shapes' sizes that nobody else uses now. `out` is overwritten.
pub unsafe fn tune(
    device: &Arc<Device>,
    linears: &mut Linears,
    trials: &[Trial],
    limits: &TuningLimits<'_>,
) -> Result<TuningReport, CudaError> {
    let card = device.name.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
    let name = format!("gemm-{card}-{}-{:016x}", linears.blas_version(), limits.kernels_version);
    let mut choices = Choices::load(limits.cache, &name);
    let mut report = TuningReport::default();
    let begin = Instant::now();
    for trial in trials {
        let remembered = choices.0.get(&trial.shape).is_some_and(|c| linears.keep(trial.shape, *c).is_ok());
        if remembered {
            report.remembered += 1;
        } else if begin.elapsed() < limits.budget {
            // SAFETY: passed on from the caller.
            let fastest = unsafe { fastest(device, linears, trial)? };
            linears.keep(trial.shape, fastest)?;
            choices.0.insert(trial.shape, fastest);
            report.measured += 1;
            report.own += usize::from(matches!(fastest, Choice::Own(_)));
        } else {
            report.left += 1;
        }
    }
    if report.measured > 0
        && let Some(Err(error)) = limits.cache.map(|c| c.put(&name, &choices.to_bytes()))
    {
        tracing::warn!("measured matrix products could not be kept: {error}");
    }
    Ok(report)
}

unsafe fn fastest(device: &Arc<Device>, linears: &mut Linears, trial: &Trial) -> Result<Choice, CudaError> {
    let candidates = linears.candidates(&trial.shape, CANDIDATES)?;
    let mut best: Option<(f32, Choice)> = None;
    for &candidate in &candidates {
        if linears.keep(trial.shape, candidate).is_err() {
            continue;
        }
        // SAFETY: passed on from the caller.
        let time = unsafe { time_ms(device, linears, trial, best.map_or(f32::INFINITY, |b| b.0))? };
        if best.is_none_or(|b| time < b.0) {
            best = Some((time, candidate));
        }
    }
    let what = || format!("{:?}: no candidate runs", trial.shape);
    best.map(|b| b.1).ok_or_else(|| CudaError::Unsupported { op: "Linear", what: what() })
}

/// Milliseconds of a pass over the operands. In a graph, since small products are faster than launching them.
unsafe fn time_ms(device: &Arc<Device>, linears: &mut Linears, trial: &Trial, to_beat: f32) -> Result<f32, CudaError> {
    // SAFETY: passed on from the caller. The first run loads the kernel, which a capture may not.
    unsafe { linears.run(&trial.shape, &trial.operands[0])? };
    device.synchronize()?;
    let graph = Graph::capture(device, || {
        // SAFETY: as above.
        trial.operands.iter().cycle().take(REPEATS).try_for_each(|o| unsafe { linears.run(&trial.shape, o) })
    })?;
    let (begin, end) = (Event::new(device, true)?, Event::new(device, true)?);
    let mut best = f32::INFINITY;
    for _ in 0..3 {
        begin.record(device.stream())?;
        // SAFETY: the operands outlive the measurement.
        unsafe { graph.launch()? };
        end.record(device.stream())?;
        end.wait()?;
        best = best.min(begin.elapsed_ms(&end)?);
        if best > to_beat * HOPELESS {
            break;
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn shape(m: usize, residual: bool) -> GemmShape {
        GemmShape { m, n: 28672, k: 4096, bias: !residual, residual, f32_out: m == 3, out_stride: 28672 + m }
    }

    #[test]
    fn choices_survive_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let cache = DiskCache::at(directory.path());
        let choices = Choices(BTreeMap::from([
            (shape(1, false), Choice::Blas([1, 2, 3, 4, 5, 6, 7, u64::MAX])),
            (shape(1, true), Choice::Own(11)),
            (shape(3, true), Choice::Blas([0; 8])),
        ]));
        cache.put("gemm-x", &choices.to_bytes()).unwrap();
        assert_eq!(Choices::load(Some(&cache), "gemm-x"), choices);
        assert_eq!(Choices::load(Some(&cache), "gemm-y"), Choices::default());
        cache.put("gemm-x", &choices.to_bytes()[..40]).unwrap();
        assert_eq!(Choices::load(Some(&cache), "gemm-x"), Choices::default());
    }
}
