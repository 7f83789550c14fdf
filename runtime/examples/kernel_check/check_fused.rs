//! Products with norm, gate, rotation and cache around them against float64, every entry.

use super::card::{Card, NULL, Outcome, int, pointer};
use super::numbers::{Random, close, wide};
use half::bf16;
use mserve_runtime::cuda::kernels::{After, FUSED, Fused, FusedShape};
use mserve_runtime::cuda::module::Arg;

/// Two roundings to bf16, one behind the other, and rounded operands of a norm.
const BOUND: f64 = 4e-5;
const HEADS: usize = 3;
const KV_HEADS: usize = 1;
const HEAD_DIM: usize = 64;
const SLOTS: usize = 512;
const POSITIONS: usize = 16;

pub fn all(card: &Card) -> Outcome {
    for kernel in &FUSED {
        for clusters in [1, 2, 4, 8] {
            for norm in [false, true] {
                let most = kernel.rows_max as usize;
                let rows =
                    if kernel.takes(&shape(kernel, 300, 320, 896, norm), clusters) { 2 * most - 3 } else { most };
                for rows in [rows, most.div_ceil(2)] {
                    one(card, kernel, clusters, norm, rows)?;
                }
            }
        }
    }
    Ok(())
}

fn shape(kernel: &Fused, rows: usize, n: usize, k: usize, norm: bool) -> FusedShape {
    let (rows, n, k) = (rows as u32, n as u32, k as u32);
    FusedShape { after: kernel.after, rows, n, k, norm, head_dim: HEAD_DIM as u32 }
}

fn one(card: &Card, kernel: &Fused, clusters: u32, norm: bool, rows: usize) -> Outcome {
    let (n, k) = ((HEADS + 2 * KV_HEADS) * HEAD_DIM, 896);
    if !kernel.takes(&shape(kernel, rows, n, k, norm), clusters) {
        return Ok(());
    }
    let mut random = Random::new(rows as u64);
    let weight_rows = if kernel.after == After::Gated { 2 * n } else { n };
    let weights = random.bf16s(weight_rows * k, 0.2);
    let (x, scale) = (random.bf16s(rows * k, 2.0), random.bf16s(k, 1.0));
    let (bias, add) = (random.bf16s(n, 1.0), random.bf16s(rows * n, 1.0));
    let (cosine, sine) = (random.floats(POSITIONS * HEAD_DIM / 2, 1.0), random.floats(POSITIONS * HEAD_DIM / 2, 1.0));
    let positions: Vec<i32> = (0..rows).map(|_| random.below(POSITIONS) as i32).collect();
    let slots: Vec<i32> = (0..rows).map(|m| if m == 1 { -1 } else { (7 * m + 3) as i32 % SLOTS as i32 }).collect();
    let (biased, added) = (kernel.after != After::Gated, kernel.after == After::Plain);
    let on: Vec<_> =
        [&weights, &x, &scale, &bias, &add].into_iter().map(|v| card.upload(v)).collect::<Result<_, _>>()?;
    let (positions_on, slots_on) = (card.upload(&positions)?, card.upload(&slots)?);
    let (cosine_on, sine_on) = (card.upload(&cosine)?, card.upload(&sine)?);
    let y = card.poisoned(rows * n * 2)?;
    let caches = [card.poisoned(SLOTS * HEAD_DIM * 2)?, card.poisoned(SLOTS * HEAD_DIM * 2)?];
    let given = |memory, there: bool| if there { pointer(memory) } else { NULL };
    let args = [
        pointer(&on[0]),
        pointer(&on[1]),
        given(&on[2], norm),
        given(&on[3], biased),
        given(&on[4], added),
        pointer(&y),
        int(rows),
        int(n),
        int(k),
        Arg::Float(1e-3),
        int(0),
        pointer(&positions_on),
        pointer(&slots_on),
        pointer(&cosine_on),
        pointer(&sine_on),
        pointer(&caches[0]),
        pointer(&caches[1]),
        int(HEADS),
        int(KV_HEADS),
        int(HEAD_DIM),
    ];
    card.run(kernel.entry, 0, kernel.geometry(rows as u32, n as u32, clusters), &args)?;
    let got = card.bf16s(&y, rows * n)?;
    let caches = [card.bf16s(&caches[0], SLOTS * HEAD_DIM)?, card.bf16s(&caches[1], SLOTS * HEAD_DIM)?];
    let (w, x, scale, add) = (wide(&weights), wide(&x), norm.then(|| wide(&scale)), wide(&add));
    let (mut found, mut want) = (vec![], vec![]);
    for m in 0..rows {
        let dots = products(&w, &x[m * k..][..k], scale.as_deref(), biased.then_some(&bias[..]));
        for c in 0..n {
            match kernel.after {
                After::Plain => want.push(dots[c] + add[m * n + c]),
                After::Gated => want.push(dots[c] / (1.0 + (-dots[c]).exp()) * dots[n + c]),
                After::Rotated => {
                    let (head, i, half) = (c / HEAD_DIM, c % HEAD_DIM, HEAD_DIM / 2);
                    let (a, b) = (dots[head * HEAD_DIM + i % half], dots[head * HEAD_DIM + i % half + half]);
                    let at = positions[m] as usize * half + i % half;
                    let turned = head < HEADS + KV_HEADS;
                    let (c, s) = if turned { (f64::from(cosine[at]), f64::from(sine[at])) } else { (1.0, 0.0) };
                    let value = if i < half { a * c - b * s } else { b * c + a * s };
                    if head >= HEADS {
                        let Ok(slot) = usize::try_from(slots[m]) else { continue };
                        found.push(caches[head - HEADS][slot * HEAD_DIM + i]);
                        want.push(value);
                        continue;
                    }
                    want.push(value);
                }
            }
            found.push(got[m * n + c]);
        }
    }
    close(&format!("{} clusters {clusters} norm {norm} rows {rows}", kernel.entry), &found, &want, BOUND)
}

/// A row of x with every row of the weights, normalised and with the bias.
fn products(weights: &[f64], x: &[f64], norm: Option<&[f64]>, bias: Option<&[bf16]>) -> Vec<f64> {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let factor = if norm.is_some() { 1.0 / (mean + 1e-3).sqrt() } else { 1.0 };
    let x: Vec<f64> = x.iter().enumerate().map(|(i, v)| v * norm.map_or(1.0, |w| w[i])).collect();
    let dot = |row: &[f64]| row.iter().zip(&x).map(|(a, b)| a * b).sum::<f64>() * factor;
    let bias = |row: usize| bias.map_or(0.0, |b| b[row].to_f64());
    weights.chunks(x.len()).enumerate().map(|(row, w)| dot(w) + bias(row)).collect()
}
