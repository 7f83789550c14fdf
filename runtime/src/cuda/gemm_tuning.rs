//! Which kernel for which product: measured once on the card, over the model's own weights, then kept on disk. A start
//! waits for none of it: what is not known yet is measured while weights are read and while no request runs.

use super::CudaError;
use super::cubin_cache::DiskCache;
use super::device::Device;
use super::gemm::{GemmOperands, GemmShape};
use super::graph::Graph;
use super::linear::{Choice, Linears, Route};
use super::memory::Event;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// cuBLASLt's algorithms that are tried for a shape. Its order is good: later ones have not been seen to win.
const CANDIDATES: usize = 6;
/// Products of one measurement at most. They go over the weights of different layers, so that the cache does not help.
const MOST_REPEATS: usize = 12;
/// A measurement has fewer when they would take longer than this.
const PASS_MS: f32 = 1.0;
const PASSES: usize = 3;
/// One that takes this much longer than the best so far after its first run is not measured again.
const HOPELESS: f32 = 1.5;
/// What a kernel of cuBLASLt costs those before and after it: it neither starts early nor lets the next one, which a chain
/// of one product does not show. On an H200 a decode step of 64 rows took 6 us a layer more than its kernels in chains, two
/// of them cuBLASLt's.
const ALONE_MS: f32 = 1e-3;
/// What the choice of tokens reads again where the head has not found the likeliest itself, in bytes a millisecond: on an
/// H200 52 us for 256 rows of 151,936.
const SCAN_BYTES_PER_MS: f32 = 3e9;
/// Shapes between writes to the cache.
const SAVE_EVERY: usize = 8;

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
            let [bias, residual, f32_out, gated] = [flag(0), flag(1), flag(2), flag(4)];
            let shape = GemmShape { m, n, k, bias, residual, f32_out, gated, out_stride };
            let choice = match [flag(3), flag(5), flag(6)] {
                [true, ..] => Choice::Own(algorithm[0] as usize),
                [_, true, _] => Choice::Wide(algorithm[0] as usize),
                [.., true] => Choice::Apart,
                _ => Choice::Blas(algorithm),
            };
            choices.insert(shape, choice);
        }
        Some(Self(choices))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let record = |(s, choice): (&GemmShape, &Choice)| {
            let algorithm = match *choice {
                Choice::Blas(algorithm) => algorithm,
                Choice::Own(index) | Choice::Wide(index) => [index as u64, 0, 0, 0, 0, 0, 0, 0],
                Choice::Apart => [0; 8],
            };
            let [own, wide] = [matches!(choice, Choice::Own(_)), matches!(choice, Choice::Wide(_))];
            let flags = [s.bias, s.residual, s.f32_out, own, s.gated, wide, *choice == Choice::Apart];
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

/// What tuning has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TuningReport {
    pub remembered: usize,
    pub measured: usize,
    /// Of the measured, how many a kernel of ours won.
    pub own: usize,
    /// Still computed by the heuristic's choice.
    pub left: usize,
}

/// Measures products one candidate at a time, so that whoever calls can stop after a few milliseconds and go on later.
///
/// Until a shape is through, it is computed by the heuristic's first choice. Another choice sums in another order: results
/// differ by bf16 rounding, as they do between batch sizes. Measuring goes on only while no request runs, so nothing
/// changes under a request.
#[derive(Debug)]
pub struct Tuner {
    cache: Option<DiskCache>,
    /// Of the file in the cache: card, library version and our kernels.
    name: String,
    choices: Choices,
    queue: VecDeque<Trial>,
    contest: Option<Contest>,
    report: TuningReport,
    unsaved: usize,
}

/// One shape under way.
#[derive(Debug)]
struct Contest {
    trial: Trial,
    candidates: VecDeque<Choice>,
    /// Products of one measurement, once the first has shown how long one takes.
    repeats: Option<usize>,
    /// Milliseconds of one product.
    best: Option<(f32, Route)>,
}

impl Tuner {
    /// Takes over the choices that an earlier start has measured; the other trials are left to [`Self::step`].
    /// `kernels_version` changes when our own kernels do: what was measured with others is measured again.
    pub fn new(
        device: &Device,
        linears: &mut Linears,
        trials: Vec<Trial>,
        cache: Option<DiskCache>,
        kernels_version: u64,
    ) -> Self {
        let card = device.name.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        let name = format!("gemm-{card}-{}-{kernels_version:016x}", linears.blas_version());
        let choices = Choices::load(cache.as_ref(), &name);
        let (mut queue, mut report) = (VecDeque::new(), TuningReport::default());
        for trial in trials {
            let known = choices.0.get(&trial.shape).and_then(|&choice| linears.route(&trial.shape, choice).ok());
            match known {
                Some(route) => {
                    linears.keep(trial.shape, route);
                    report.remembered += 1;
                }
                None => queue.push_back(trial),
            }
        }
        report.left = queue.len();
        Self { cache, name, choices, queue, contest: None, report, unsaved: 0 }
    }

    pub const fn report(&self) -> TuningReport {
        self.report
    }

    pub fn is_done(&self) -> bool {
        self.report.left == 0
    }

    /// Whether products of this many rows are still to be measured.
    pub fn is_pending(&self, rows: usize) -> bool {
        let under_way = self.contest.as_ref().map(|contest| &contest.trial);
        under_way.into_iter().chain(&self.queue).any(|trial| trial.shape.m == rows)
    }

    /// Measures one candidate: some milliseconds. Returns the rows of a shape that is computed in another way from now on:
    /// graphs that hold it are to be captured again.
    ///
    /// # Safety
    /// The operands of the trials must be device memory of their shapes' sizes that nobody else uses now. `out` is
    /// overwritten.
    pub unsafe fn step(&mut self, device: &Arc<Device>, linears: &mut Linears) -> Result<Option<usize>, CudaError> {
        let Some(mut contest) = self.contest.take().or_else(|| self.queue.pop_front().map(Contest::of)) else {
            return Ok(None);
        };
        let shape = contest.trial.shape;
        if contest.candidates.is_empty() {
            contest.candidates = linears.candidates(&shape, CANDIDATES)?.into();
        }
        if let Some(candidate) = contest.candidates.pop_front()
            && let Ok(route) = linears.route(&shape, candidate)
        {
            // SAFETY: passed on from the caller.
            unsafe { contest.measure(device, linears, route)? };
        }
        if !contest.candidates.is_empty() {
            self.contest = Some(contest);
            return Ok(None);
        }
        self.report.left -= 1;
        let Some((_, route)) = contest.best else { return Ok(None) };
        self.report.measured += 1;
        self.report.own += usize::from(matches!(route, Route::Own(_) | Route::Wide(_)));
        self.choices.0.insert(shape, route.choice());
        self.unsaved += 1;
        if self.unsaved >= SAVE_EVERY || self.is_done() {
            self.save();
        }
        Ok(linears.keep(shape, route).then_some(shape.m))
    }

    /// Another process may have measured other shapes meanwhile: theirs are kept.
    fn save(&mut self) {
        self.unsaved = 0;
        let mut merged = Choices::load(self.cache.as_ref(), &self.name);
        merged.0.extend(&self.choices.0);
        if let Some(Err(error)) = self.cache.as_ref().map(|cache| cache.put(&self.name, &merged.to_bytes())) {
            tracing::warn!("measured matrix products could not be kept: {error}");
        }
    }
}

impl Drop for Tuner {
    fn drop(&mut self) {
        if self.unsaved > 0 {
            self.save();
        }
    }
}

impl Contest {
    fn of(trial: Trial) -> Self {
        Self { trial, candidates: VecDeque::new(), repeats: None, best: None }
    }

    unsafe fn measure(&mut self, device: &Arc<Device>, linears: &Linears, mut route: Route) -> Result<(), CudaError> {
        let (shape, operands) = (&self.trial.shape, &self.trial.operands);
        let mut run = |count: usize| {
            let some = operands.iter().cycle().take(count);
            // SAFETY: passed on from the caller.
            some.into_iter().try_for_each(|o| unsafe { linears.run_by(&mut route, shape, o) })
        };
        // The first run loads the kernel, which a capture may not.
        run(1)?;
        device.synchronize()?;
        let stopwatch = Stopwatch::new(device)?;
        let single = stopwatch.time_ms(|| run(1))?;
        let repeats = *self.repeats.get_or_insert_with(|| ((PASS_MS / single) as usize).clamp(1, MOST_REPEATS));
        let to_beat = self.best.as_ref().map_or(f32::INFINITY, |best| best.0);
        let mut time = single;
        if repeats > 1 {
            // In a graph, since small products are faster than launching them.
            let graph = Graph::capture(device, || run(repeats))?;
            time = f32::INFINITY;
            for _ in 0..PASSES {
                // SAFETY: the operands outlive the measurement.
                time = time.min(stopwatch.time_ms(|| unsafe { graph.launch() })? / repeats as f32);
                if time > to_beat * HOPELESS {
                    break;
                }
            }
        } else if single < to_beat * HOPELESS {
            time = single.min(stopwatch.time_ms(|| run(1))?);
        }
        time += if overlaps(&route) { 0.0 } else { ALONE_MS } + scan_ms(&route, shape);
        if time < to_beat {
            self.best = Some((time, route));
        }
        Ok(())
    }
}

/// Whether its kernels overlap with those before and after them.
fn overlaps(route: &Route) -> bool {
    match route {
        Route::Blas(..) => false,
        Route::Own(_) | Route::Wide(_) => true,
        Route::Apart(product) => overlaps(product),
    }
}

/// Milliseconds that the choice of tokens takes longer after a head by this route.
fn scan_ms(route: &Route, shape: &GemmShape) -> f32 {
    let scans = shape.f32_out && !route.chooses();
    if scans { (shape.m * shape.n * 4) as f32 / SCAN_BYTES_PER_MS } else { 0.0 }
}

/// Two events around work in the device's stream.
struct Stopwatch<'a> {
    device: &'a Device,
    begin: Event,
    end: Event,
}

impl<'a> Stopwatch<'a> {
    fn new(device: &'a Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self { device, begin: Event::new(device, true)?, end: Event::new(device, true)? })
    }

    fn time_ms(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<f32, CudaError> {
        self.begin.record(self.device.stream())?;
        work()?;
        self.end.record(self.device.stream())?;
        self.end.wait()?;
        self.begin.elapsed_ms(&self.end)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::kernels::{WIDE, Wide};
    use super::*;

    fn shape(m: usize, residual: bool) -> GemmShape {
        let (f32_out, gated) = (m == 3, m == 512);
        GemmShape { m, n: 28672, k: 4096, bias: !residual, residual, f32_out, gated, out_stride: 28672 + m }
    }

    #[test]
    fn a_head_that_leaves_the_choice_to_others_pays_for_it() {
        let head = GemmShape { m: 256, n: 151_936, f32_out: true, gated: false, ..shape(3, false) };
        let chooses = WIDE.iter().position(Wide::chooses).unwrap();
        assert_eq!(scan_ms(&Route::Wide(chooses), &head), 0.0);
        assert!((scan_ms(&Route::Own(0), &head) - 0.052).abs() < 1e-3);
        assert_eq!(scan_ms(&Route::Own(0), &shape(8, false)), 0.0);
    }

    #[test]
    fn choices_survive_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let cache = DiskCache::at(directory.path());
        let choices = Choices(BTreeMap::from([
            (shape(1, false), Choice::Blas([1, 2, 3, 4, 5, 6, 7, u64::MAX])),
            (shape(1, true), Choice::Own(11)),
            (shape(3, true), Choice::Blas([0; 8])),
            (shape(512, true), Choice::Wide(1)),
            (shape(512, false), Choice::Apart),
        ]));
        cache.put("gemm-x", &choices.to_bytes()).unwrap();
        assert_eq!(Choices::load(Some(&cache), "gemm-x"), choices);
        assert_eq!(Choices::load(Some(&cache), "gemm-y"), Choices::default());
        cache.put("gemm-x", &choices.to_bytes()[..40]).unwrap();
        assert_eq!(Choices::load(Some(&cache), "gemm-x"), Choices::default());
    }
}
