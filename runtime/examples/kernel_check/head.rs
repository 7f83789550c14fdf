//! The head of steps of many rows: what it finds and what it stores, and its time beside cuBLASLt with the scan.

use super::card::{Card, Failure, NULL, Outcome, int, pointer};
use super::numbers::{Random, close};
use half::bf16;
use mserve_runtime::cuda::gemm::{GemmOperands, GemmShape};
use mserve_runtime::cuda::kernels::{self, SampleRow, WIDE, Wide};
use mserve_runtime::cuda::linear::{Choice, Linears, Route};
use mserve_runtime::cuda::memory::DeviceMemory;
use mserve_runtime::cuda::module::Arg;

/// Top tokens that the sampler has room for.
const TOP: usize = 20;

/// Everything of one head.
struct Head {
    shape: GemmShape,
    linears: Linears,
    x: DeviceMemory,
    weights: DeviceMemory,
    logits: DeviceMemory,
    bests: DeviceMemory,
    state: DeviceMemory,
    outputs: [DeviceMemory; 5],
}

impl Head {
    /// x and weights are filled in by the caller.
    fn new(card: &Card, m: usize, n: usize, k: usize) -> Result<Self, Failure> {
        let out_stride = n.next_multiple_of(8);
        let shape =
            GemmShape { m, n, k, bias: false, residual: false, f32_out: true, gated: false, rotated: 0, out_stride };
        let bests = card.poisoned(kernels::bests(m, n as u32) * 8)?;
        let linears = Linears::new(&card.device, card.product_kernels()?)?.with_bests(bests.pointer());
        let [ids, logprobs, ranks] = [(); 3].map(|()| card.poisoned(m * 4));
        let [top_ids, top_logprobs] = [(); 2].map(|()| card.poisoned(m * TOP * 4));
        let state = card.poisoned(m * out_stride * 2)?;
        state.fill(0)?;
        let (x, weights, logits) =
            (card.poisoned(m * k * 2)?, card.poisoned(n * k * 2)?, card.poisoned(m * out_stride * 4)?);
        let outputs = [ids?, logprobs?, ranks?, top_ids?, top_logprobs?];
        Ok(Self { shape, linears, x, weights, logits, bests, state, outputs })
    }

    /// By our kernel.
    fn own(&self) -> Result<Route, Failure> {
        let GemmShape { m, n, k, .. } = self.shape;
        let index = WIDE.iter().position(|w: &Wide| w.chooses() && w.takes(m, n, k)).ok_or("no such entry")?;
        Ok(self.linears.route(&self.shape, Choice::Wide(index))?)
    }

    fn product(&self, route: &mut Route, sample_rows: &DeviceMemory) -> Outcome {
        let operands = GemmOperands {
            x: self.x.pointer(),
            weight: self.weights.pointer(),
            bias: None,
            residual: None,
            out: self.logits.pointer(),
            gate_up: None,
            sample_rows: Some(sample_rows.pointer()),
            rotation: None,
        };
        // SAFETY: the buffers have the sizes of the shape and live as long as `self`; the parameters are the caller's, who
        // reads results before they go.
        unsafe { self.linears.run_by(route, &self.shape, &operands)? };
        Ok(())
    }

    /// The choice of tokens: after our kernel, or with the scan.
    fn choose(&self, card: &Card, sample_rows: &DeviceMemory, chosen: bool) -> Outcome {
        let (rows, vocab, stride) = (self.shape.m as u32, int(self.shape.n), int(self.shape.out_stride));
        let seen = [pointer(&self.logits), pointer(sample_rows), pointer(&self.state), NULL, NULL];
        if !chosen {
            let args = [&seen[..], &[pointer(&self.bests), vocab, stride, stride]].concat();
            card.run("sample_scan", 0, kernels::sample_scan(rows), &args)?;
        }
        let parts = if chosen { kernels::head_parts(self.shape.n as u32) } else { kernels::sample_parts(rows) };
        let mut args: Vec<Arg> = seen.into_iter().chain(self.outputs.iter().map(pointer)).collect();
        args.extend([pointer(&self.bests), vocab, stride, stride, int(TOP), int(parts as usize), int(chosen.into())]);
        card.run("sample", 0, kernels::sample(rows), &args)
    }

    fn logits(&self) -> Result<Vec<f32>, Failure> {
        let bytes = self.logits.read(0, self.shape.m * self.shape.out_stride * 4)?;
        Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }
}

fn words(card: &Card, rows: impl Iterator<Item = Option<SampleRow>>) -> Result<DeviceMemory, Failure> {
    card.upload(&rows.flat_map(|row| row.map_or(SampleRow::PADDING, |row| row.words())).collect::<Vec<i32>>())
}

pub fn check(card: &Card) -> Outcome {
    for (m, n, k) in [
        (64, 151_936, 896),
        (33, 5000, 136),
        (128, 32_003, 896),
        (192, 5000, 896),
        (256, 151_936, 896),
        (300, 32_003, 136),
        (449, 128_256, 512),
        (520, 1001, 4096),
        (200, 40, 64),
    ] {
        one(card, m, n, k)?;
    }
    Ok(())
}

/// Of five rows one each is plain, plain, sampled, with logprobs, with token counts; the last is nobody's.
fn kind(row: usize, rows: usize) -> Option<SampleRow> {
    (row + 1 < rows).then_some(match row % 5 {
        2 => SampleRow { temperature: 0.7, ..SampleRow::GREEDY },
        3 => SampleRow { logprobs: Some(3), ..SampleRow::GREEDY },
        4 => SampleRow { state_slot: Some(row as u32), ..SampleRow::GREEDY },
        _ => SampleRow::GREEDY,
    })
}

/// Columns that are large and equal, in one part and in several; one that is not a number. The first of k is positive.
fn weights(random: &mut Random, n: usize, k: usize) -> Vec<bf16> {
    let mut weights = random.bf16s(n * k, 1.0);
    let large: Vec<bf16> = random.bf16s(k, 4.0);
    for column in [n / 2, n / 2 + 9, n - 1, n / 3] {
        weights[column * k..(column + 1) * k].copy_from_slice(&large);
    }
    (0..n).for_each(|column| weights[column * k] = bf16::from_f32(0.5 + random.below(64) as f32));
    weights[7 * k..8 * k].fill(bf16::NAN);
    weights
}

fn one(card: &Card, m: usize, n: usize, k: usize) -> Outcome {
    let mut random = Random::new(n as u64);
    let mut head = Head::new(card, m, n, k)?;
    let mut x = random.bf16s(m * k, 1.0);
    x[k..2 * k].fill(bf16::INFINITY); // every logit of this row is infinite, or not a number
    x[5 * k..6 * k].fill(bf16::NAN);
    x[6 * k..7 * k].fill(bf16::ZERO);
    x[6 * k] = bf16::NEG_ONE; // its logits are all negative, and many are equal
    head.x = card.upload(&x)?;
    head.weights = card.upload(&weights(&mut random, n, k))?;
    let Some(&blas) = head.linears.candidates(&head.shape, 1)?.iter().find(|c| matches!(c, Choice::Blas(_))) else {
        return Err("cuBLASLt has nothing".into());
    };
    let all = words(card, (0..m).map(|_| Some(SampleRow { temperature: 1.0, ..SampleRow::GREEDY })))?;
    head.product(&mut head.linears.route(&head.shape, blas)?, &all)?;
    let by_blas = head.logits()?;
    head.logits.fill(0xff)?;
    head.product(&mut head.own()?, &all)?;
    let full = head.logits()?;
    let what = format!("wide_head {m}x{n}x{k}");
    let stride = head.shape.out_stride;
    let inside = |i: &usize| i % stride < n;
    let odd =
        |i: &usize| by_blas[*i].is_nan() != full[*i].is_nan() || by_blas[*i].is_infinite() != full[*i].is_infinite();
    if let Some(i) = (0..m * stride).filter(inside).find(odd) {
        return Err(format!("{what}: logit {i} is {} by cuBLASLt, here {}", by_blas[i], full[i]).into());
    }
    let finite: Vec<usize> = (0..m * stride).filter(inside).filter(|&i| full[i].is_finite()).collect();
    let pick = |from: &[f32]| -> Vec<f64> { finite.iter().map(|&i| f64::from(from[i])).collect() };
    close(&what, &pick(&full), &pick(&by_blas), 1e-9)?;
    mixed(card, &head, &full, &what)
}

/// Rows of all kinds: stored is what somebody reads, to the bit as before, and chosen is the likeliest.
fn mixed(card: &Card, head: &Head, full: &[f32], what: &str) -> Outcome {
    let GemmShape { m, n, out_stride: stride, .. } = head.shape;
    let params = words(card, (0..m).map(|row| kind(row, m)))?;
    head.logits.fill(0xff)?;
    head.bests.fill(0xff)?;
    head.product(&mut head.own()?, &params)?;
    head.choose(card, &params, true)?;
    let (stored, ids) = (head.logits()?, card.ints(&head.outputs[0], m)?);
    for row in 0..m {
        let (stored, full) = (&stored[row * stride..][..n], &full[row * stride..][..n]);
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        let Some(sampling) = kind(row, m) else {
            if ids[row] != -1 {
                return Err(format!("{what}: row {row} is nobody's and has a token").into());
            }
            continue;
        };
        let wanted = sampling != SampleRow::GREEDY;
        if wanted && !stored.iter().zip(full).all(same) || !wanted && !stored.iter().all(|v| v.to_bits() == u32::MAX) {
            return Err(format!("{what}: row {row}: logits missing, or stored for nobody").into());
        }
        let likelier = |best: (usize, f32), (id, &v): (usize, &f32)| {
            if v.min(f32::MAX) > best.1 { (id, v.min(f32::MAX)) } else { best }
        };
        let tame = |v: f32| if v.is_nan() { f32::NEG_INFINITY } else { v };
        let tamed: Vec<f32> = full.iter().map(|&v| tame(v)).collect();
        let best = tamed.iter().enumerate().fold((0, f32::NEG_INFINITY), likelier).0;
        if sampling.temperature == 0.0 && ids[row] != best as i32 {
            return Err(format!("{what}: row {row}: token {}, the likeliest is {best}", ids[row]).into());
        }
    }
    println!("{what}: tokens and stored rows exact");
    Ok(())
}

/// HEAD_ROWS="256": these numbers of rows only.
pub fn time(card: &Card) -> Outcome {
    let asked: Vec<usize> = std::env::var("HEAD_ROWS")
        .map(|w| w.split_whitespace().filter_map(|w| w.parse().ok()).collect())
        .unwrap_or_default();
    let rows = if asked.is_empty() { vec![32, 64, 96, 128, 192, 224, 256, 288, 320, 384, 448, 512] } else { asked };
    for (name, n, k) in [("0.5B", 151_936, 896), ("8B", 128_256, 4096)] {
        for &m in &rows {
            time_one(card, name, m, n, k)?;
        }
    }
    Ok(())
}

fn time_one(card: &Card, name: &str, m: usize, n: usize, k: usize) -> Outcome {
    const ROUNDS: usize = 12;
    let mut head = Head::new(card, m, n, k)?;
    (head.x, head.weights) = (card.random(m * k * 2)?, card.random(n * k * 2)?);
    let plain = words(card, (0..m).map(|_| Some(SampleRow::GREEDY)))?;
    let sampled = words(card, (0..m).map(|_| Some(SampleRow { temperature: 1.0, ..SampleRow::GREEDY })))?;
    let mut figures = Vec::new();
    for choice in head.linears.candidates(&head.shape, 6)? {
        let mut route = head.linears.route(&head.shape, choice)?;
        let chooses = route.chooses();
        // The first run loads the kernel, which a capture may not.
        head.product(&mut route, &plain)?;
        head.choose(card, &plain, chooses)?;
        card.device.synchronize()?;
        let alone = card.time(ROUNDS, |_| head.product(&mut route, &plain))?;
        let stores = card.time(ROUNDS, |_| head.product(&mut route, &sampled))?;
        let whole = card.time(ROUNDS, |_| {
            head.product(&mut route, &plain)?;
            head.choose(card, &plain, chooses)
        })?;
        figures.push((whole, alone, stores, chooses));
    }
    figures.sort_by(|a, b| a.0.total_cmp(&b.0));
    let flops = 2.0 * (m * n * k) as f64;
    for (kind, chooses) in [("cuBLASLt, scan", false), ("wide_head", true)] {
        let Some((whole, alone, stores, _)) = figures.iter().find(|f| f.3 == chooses) else { continue };
        println!(
            "{name} head rows {m}: {kind} and choice {whole:.1} us; the product {alone:.1} ({:.0} TFLOP/s), {stores:.1} where all rows are sampled",
            flops / alone / 1e6
        );
    }
    Ok(())
}
