//! Products of many rows: each entry against float64, and beside cuBLASLt.

use super::card::{Card, Failure, Outcome};
use super::numbers::{BF16_BOUND, close};
use mserve_runtime::cuda::gemm::{GemmOperands, GemmShape};
use mserve_runtime::cuda::kernels::WIDE;
use mserve_runtime::cuda::linear::{Choice, Linears, Route};
use mserve_runtime::cuda::memory::DeviceMemory;

const POOL_BYTES: usize = 2 << 30;
const ROWS: [usize; 5] = [8192, 4096, 2048, 1024, 512];
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

pub fn time(card: &Card) -> Outcome {
    let mut linears = Linears::new(&card.device, card.product_kernels()?)?;
    let buffers = Buffers {
        weights: card.random(POOL_BYTES)?,
        x: card.random(ROWS[0] * 14_336 * 2)?,
        out: card.random(ROWS[0] * 14_336 * 2)?,
        gate_up: card.random(ROWS[0] * 28_672 * 2)?,
    };
    for m in ROWS {
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
            let (blas, route) = fastest(card, &linears, &buffers, &product, |c| matches!(c, Choice::Blas(_)))?;
            linears.keep(product, route);
            let (other, _) = match shape.gated {
                true => fastest(card, &linears, &buffers, &shape, |c| c == Choice::Apart)?,
                false => (blas, Route::Wide(0)),
            };
            let (own, route) = fastest(card, &linears, &buffers, &shape, |c| matches!(c, Choice::Wide(_)))?;
            let Choice::Wide(index) = route.choice() else { return Err("not a wide product".into()) };
            let tera = 2.0 * (m * shape.n * shape.k) as f64 / own / 1e6;
            let entry = WIDE[index].entry;
            println!(
                "{name} rows {m}: {entry} {own:.1} us ({tera:.0} TFLOP/s), cuBLASLt {blas:.1}, with gate {other:.1}"
            );
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

/// Microseconds of the fastest candidate of a kind, over the weights of several layers.
fn fastest(
    card: &Card,
    linears: &Linears,
    buffers: &Buffers,
    shape: &GemmShape,
    kind: impl Fn(Choice) -> bool,
) -> Result<(f64, Route), Failure> {
    let bytes = shape.n * shape.k * 2;
    let flops_us = 2.0 * (shape.m * shape.n * shape.k) as f64 / 7e8;
    let rounds = ((REPLAY_US / flops_us) as usize).clamp(4, 48);
    let mut best: Option<(f64, Route)> = None;
    for choice in linears.candidates(shape, CANDIDATES)?.into_iter().filter(|&c| kind(c)) {
        let Ok(mut route) = linears.route(shape, choice) else { continue };
        let mut run = |i: usize| {
            let operands = GemmOperands {
                x: buffers.x.pointer(),
                weight: buffers.weights.pointer() + (i % (POOL_BYTES / bytes) * bytes) as u64,
                bias: shape.bias.then(|| buffers.gate_up.pointer()),
                residual: shape.residual.then(|| buffers.out.pointer()),
                out: if shape.n > 14_336 && !shape.gated { buffers.gate_up.pointer() } else { buffers.out.pointer() },
                gate_up: shape.gated.then(|| buffers.gate_up.pointer()),
            };
            // SAFETY: the buffers are as large as the largest of these shapes and outlive the timing.
            unsafe { linears.run_by(&mut route, shape, &operands) }
        };
        // The first run loads the kernel, which a capture may not.
        run(0)?;
        card.device.synchronize()?;
        let us = card.time(rounds, |i| Ok(run(i)?))?;
        if best.as_ref().is_none_or(|b| us < b.0) {
            best = Some((us, route));
        }
    }
    best.ok_or_else(|| format!("{shape:?}: no candidate").into())
}
