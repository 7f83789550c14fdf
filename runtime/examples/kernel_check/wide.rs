//! Products of many rows: each entry against float64, and beside cuBLASLt.

use super::card::{Card, Failure, Outcome};
use super::numbers::{BF16_BOUND, close};
use mserve_runtime::cuda::gemm::{GemmOperands, GemmShape};
use mserve_runtime::cuda::kernels::WIDE;
use mserve_runtime::cuda::linear::{Choice, Linears, Route};
use mserve_runtime::cuda::memory::DeviceMemory;

const POOL_BYTES: usize = 2 << 30;
const ROWS: [usize; 8] = [8448, 4096, 1024, 512, 256, 128, 64, 32];
/// cuBLASLt's algorithms that are tried for a shape.
const CANDIDATES: usize = 6;
/// Of one replay, about.
const REPLAY_US: f64 = 12_000.0;
/// Rows after the last that must stay as they were.
const BEYOND: usize = 300;

const fn shape(m: usize, n: usize, k: usize, [gated, bias, residual]: [bool; 3]) -> GemmShape {
    GemmShape { m, n, k, bias, residual, f32_out: false, gated, out_stride: n }
}

const PLAIN: [bool; 3] = [false; 3];
const GATED: [bool; 3] = [true, false, false];
const BIAS: [bool; 3] = [false, true, false];
const RESIDUAL: [bool; 3] = [false, false, true];

pub fn check(card: &Card) -> Outcome {
    let linears = Linears::new(&card.device, card.product_kernels()?)?;
    for shape in [
        shape(1000, 9728, 896, GATED),
        shape(256, 272, 72, GATED),
        shape(520, 28_672, 4096, GATED),
        shape(777, 896, 4864, RESIDUAL),
        shape(8183, 1152, 896, BIAS),
        shape(515, 6144, 4096, PLAIN),
        shape(300, 264, 136, [false, true, true]),
        shape(256, 4096, 14_336, RESIDUAL),
        shape(200, 6144, 4096, BIAS),
        shape(256, 896, 4864, RESIDUAL),
        shape(128, 28_672, 4096, GATED),
        shape(100, 9728, 896, GATED),
        shape(61, 9728, 896, GATED),
        shape(64, 28_672, 4096, GATED),
        shape(64, 4096, 4096, RESIDUAL),
        shape(33, 1152, 896, [false, true, false]),
        shape(17, 896, 4864, [false, true, true]),
    ] {
        for choice in linears.candidates(&shape, 1)? {
            if let Choice::Wide(index) = choice {
                one(card, &linears, linears.route(&shape, choice)?, &shape, WIDE[index].entry)?;
            }
        }
    }
    Ok(())
}

/// Some rows, all columns; no row missing, none too many.
fn one(card: &Card, linears: &Linears, mut route: Route, shape: &GemmShape, entry: &str) -> Outcome {
    let GemmShape { m, n, k, .. } = *shape;
    let width = if shape.gated { n / 2 } else { n };
    let [x, weight, bias, residual] = [m * k, n * k, n, m * width]
        .map(|count| card.random(count * 2))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?
        .try_into()
        .map_err(|_| "four buffers")?;
    let out = card.poisoned((m + BEYOND) * width * 2)?;
    let operands = GemmOperands {
        x: x.pointer(),
        weight: weight.pointer(),
        bias: shape.bias.then(|| bias.pointer()),
        residual: shape.residual.then(|| residual.pointer()),
        out: out.pointer(),
        gate_up: None,
        sample_rows: None,
    };
    // SAFETY: the buffers have the sizes of the shape and live until the results have been read.
    unsafe { linears.run_by(&mut route, shape, &operands)? };
    let got = card.bf16s(&out, (m + BEYOND) * width)?;
    let (inside, beyond) = got.split_at(m * width);
    if inside.iter().any(|v| v.is_nan()) || beyond.iter().any(|v| !v.is_nan()) {
        return Err(format!("{entry} {shape:?}: rows missing, or written beyond the last").into());
    }
    let (hx, hw) = (card.bf16s(&x, m * k)?, card.bf16s(&weight, n * k)?);
    let (hb, hr) = (card.bf16s(&bias, n)?, card.bf16s(&residual, m * width)?);
    let dot = |r: usize, c: usize| -> f64 {
        hx[r * k..(r + 1) * k].iter().zip(&hw[c * k..(c + 1) * k]).map(|(a, b)| a * b).sum()
    };
    let want = |r: usize, c: usize| {
        let product = dot(r, c);
        let bias = if shape.bias { hb[c] } else { 0.0 };
        let residual = if shape.residual { hr[r * width + c] } else { 0.0 };
        if shape.gated { product / (1.0 + (-product).exp()) * dot(r, width + c) } else { product + bias + residual }
    };
    let rows = [0, 15, 63, 64, 127, 128, 255, m / 2, m - 1].into_iter().filter(|&r| r < m);
    let places: Vec<(usize, usize)> = rows.flat_map(|r| (0..width).map(move |c| (r, c))).collect();
    let got: Vec<f64> = places.iter().map(|&(r, c)| inside[r * width + c]).collect();
    let want: Vec<f64> = places.iter().map(|&(r, c)| want(r, c)).collect();
    close(&format!("{entry} {m}x{n}x{k}"), &got, &want, BF16_BOUND)
}

/// WIDE_ROWS="8448 64": these numbers of rows only.
pub fn time(card: &Card) -> Outcome {
    let mut linears = Linears::new(&card.device, card.product_kernels()?)?;
    let buffers = Buffers {
        weights: card.random(POOL_BYTES)?,
        x: card.random(ROWS[0] * 14_336 * 2)?,
        out: card.random(ROWS[0] * 14_336 * 2)?,
        gate_up: card.random(ROWS[0] * 28_672 * 2)?,
    };
    let asked: Vec<usize> = std::env::var("WIDE_ROWS")
        .map(|w| w.split_whitespace().filter_map(|w| w.parse().ok()).collect())
        .unwrap_or_default();
    for m in if asked.is_empty() { ROWS.to_vec() } else { asked } {
        for (name, shape) in [
            ("8B gate_up", shape(m, 28_672, 4096, GATED)),
            ("8B down", shape(m, 4096, 14_336, RESIDUAL)),
            ("8B qkv", shape(m, 6144, 4096, PLAIN)),
            ("8B o", shape(m, 4096, 4096, RESIDUAL)),
            ("0.5B gate_up", shape(m, 9728, 896, GATED)),
            ("0.5B down", shape(m, 896, 4864, RESIDUAL)),
            ("0.5B qkv", shape(m, 1152, 896, BIAS)),
            ("0.5B o", shape(m, 896, 896, RESIDUAL)),
        ] {
            let product = GemmShape { gated: false, ..shape };
            let blas = times(card, &linears, &buffers, &product, |c| matches!(c, Choice::Blas(_)))?;
            let Some((blas_us, choice)) = blas.first().copied() else { return Err("cuBLASLt has nothing".into()) };
            linears.keep(product, linears.route(&product, choice)?);
            let mut line = format!("{name} rows {m}: cuBLASLt {blas_us:.1} us");
            if shape.gated {
                let apart = times(card, &linears, &buffers, &shape, |c| c == Choice::Apart)?;
                line += &format!(", with gate {:.1}", apart.first().map_or(0.0, |t| t.0));
            }
            for (us, choice) in times(card, &linears, &buffers, &shape, |c| matches!(c, Choice::Wide(_)))? {
                let Choice::Wide(index) = choice else { continue };
                let tera = 2.0 * (m * shape.n * shape.k) as f64 / us / 1e6;
                line += &format!(", {} {us:.1} ({tera:.0} TFLOP/s)", WIDE[index].entry);
            }
            println!("{line}");
        }
    }
    Ok(())
}

struct Buffers {
    weights: DeviceMemory,
    x: DeviceMemory,
    out: DeviceMemory,
    gate_up: DeviceMemory,
}

impl Buffers {
    /// Those of layer `layer`, whose weights are `shift` bytes from the first.
    fn operands(&self, shape: &GemmShape, shift: usize) -> GemmOperands {
        GemmOperands {
            x: self.x.pointer(),
            weight: self.weights.pointer() + shift as u64,
            bias: shape.bias.then(|| self.gate_up.pointer()),
            residual: shape.residual.then(|| self.out.pointer()),
            out: if shape.n > 14_336 && !shape.gated { self.gate_up.pointer() } else { self.out.pointer() },
            gate_up: shape.gated.then(|| self.gate_up.pointer()),
            sample_rows: None,
        }
    }
}

/// Microseconds of the candidates of a kind over the weights of several layers, the fastest first. In two rounds, since a
/// card slows down as it gets warm.
fn times(
    card: &Card,
    linears: &Linears,
    buffers: &Buffers,
    shape: &GemmShape,
    kind: impl Fn(Choice) -> bool,
) -> Result<Vec<(f64, Choice)>, Failure> {
    let bytes = shape.n * shape.k * 2;
    let flops_us = 2.0 * (shape.m * shape.n * shape.k) as f64 / 7e8;
    let rounds = ((REPLAY_US / flops_us) as usize).clamp(4, 48);
    let mut all: Vec<(f64, Choice)> = Vec::new();
    let candidates: Vec<Choice> = linears.candidates(shape, CANDIDATES)?.into_iter().filter(|&c| kind(c)).collect();
    for choice in candidates.iter().chain(&candidates) {
        let Ok(mut route) = linears.route(shape, *choice) else { continue };
        let mut run = |i: usize| {
            let operands = buffers.operands(shape, i % (POOL_BYTES / bytes) * bytes);
            // SAFETY: the buffers are as large as the largest of these shapes and outlive the timing.
            unsafe { linears.run_by(&mut route, shape, &operands) }
        };
        // The first run loads the kernel, which a capture may not.
        run(0)?;
        card.device.synchronize()?;
        let us = card.time(rounds, |i| Ok(run(i)?))?;
        match all.iter_mut().find(|(_, c)| c == choice) {
            Some(known) => known.0 = known.0.min(us),
            None => all.push((us, *choice)),
        }
    }
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    Ok(all)
}
