//! All products between two attentions in one launch: against float64, and beside the bytes of their weights.

use super::card::{Card, Failure, Outcome, int, pointer};
use super::numbers::{Random, close, wide};
use super::time::{SHAPES, Shape, line};
use half::bf16;
use mserve_runtime::cuda::kernels::{self, ChainSizes};
use mserve_runtime::cuda::memory::DeviceMemory;
use mserve_runtime::cuda::module::Arg;
use mserve_runtime::cuda::tensor_map::matrix_map;

/// Several roundings to bf16, one behind the other.
const BOUND: f64 = 6e-5;
const SLOTS: usize = 512;
const POSITIONS: usize = 1024;
const POOL_BYTES: usize = 2 << 30;
const ROUNDS: usize = 24;

/// Columns of a layer's matrices.
#[derive(Clone, Copy)]
struct Layer {
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Layer {
    fn of(shape: &Shape) -> Self {
        let Shape { hidden, intermediate: inner, heads, kv_heads, head_dim, .. } = *shape;
        Self { hidden, inner, heads, kv_heads, head_dim }
    }
    fn attention(&self) -> usize {
        self.heads * self.head_dim
    }
    fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
    fn sizes(&self) -> ChainSizes {
        ChainSizes { hidden: self.hidden as u32, attention: self.attention() as u32, inner: self.inner as u32 }
    }
    /// Elements of o, gate_up, down and qkv.
    fn weights(&self) -> [usize; 4] {
        [self.attention(), 2 * self.inner, self.inner, self.qkv()].map(|n| n * self.hidden)
    }
}

/// What a launch reads and writes beside weights.
struct Buffers {
    x: DeviceMemory,
    h: DeviceMemory,
    normed: DeviceMemory,
    squares: DeviceMemory,
    inner: DeviceMemory,
    count: DeviceMemory,
    norms: DeviceMemory,
    bias: DeviceMemory,
    out: DeviceMemory,
    positions: DeviceMemory,
    slots: DeviceMemory,
    tables: [DeviceMemory; 2],
    caches: [DeviceMemory; 2],
}

/// Values of a check.
struct Values {
    x: Vec<bf16>,
    h: Vec<bf16>,
    norms: Vec<bf16>,
    bias: Vec<bf16>,
    positions: Vec<i32>,
    slots: Vec<i32>,
    tables: [Vec<f32>; 2],
}

impl Values {
    fn new(layer: &Layer, rows: usize) -> Self {
        let mut random = Random::new(rows as u64);
        let half = layer.head_dim / 2;
        Self {
            x: random.bf16s(rows * layer.attention(), 1.0),
            h: random.bf16s(rows * layer.hidden, 1.0),
            norms: random.bf16s(2 * layer.hidden, 1.0),
            bias: random.bf16s(layer.qkv(), 1.0),
            positions: (0..rows).map(|_| random.below(POSITIONS) as i32).collect(),
            slots: (0..rows).map(|m| if m == 1 { -1 } else { (7 * m + 3) as i32 % SLOTS as i32 }).collect(),
            tables: [0; 2].map(|_| random.floats(POSITIONS * half, 1.0)),
        }
    }
    fn upload(&self, card: &Card, layer: &Layer) -> Result<Buffers, Failure> {
        let room = kernels::CHAIN_ROWS as usize;
        let rows = self.positions.len();
        let count = card.poisoned(16)?;
        count.fill(0)?;
        let cache = || card.poisoned(SLOTS * layer.kv_heads * layer.head_dim * 2);
        Ok(Buffers {
            x: card.upload(&self.x)?,
            h: card.upload(&self.h)?,
            normed: card.poisoned(room * layer.hidden * 2)?,
            squares: card.poisoned(room * layer.hidden / 16 * 4)?,
            inner: card.poisoned(rows * layer.inner * 2)?,
            count,
            norms: card.upload(&self.norms)?,
            bias: card.upload(&self.bias)?,
            out: card.poisoned(rows * layer.qkv() * 2)?,
            positions: card.upload(&self.positions)?,
            slots: card.upload(&self.slots)?,
            tables: [card.upload(&self.tables[0])?, card.upload(&self.tables[1])?],
            caches: [cache()?, cache()?],
        })
    }
}

fn run(card: &Card, layer: &Layer, rows: usize, weights: u64, b: &Buffers) -> Outcome {
    let resident = card.kernel("chain_linear", 0)?.clusters_resident(&kernels::chain_block())?;
    let map = |base: u64, rows: usize, columns: usize, box_rows: u32| {
        matrix_map(&card.device, base, [rows as u64, columns as u64], box_rows).map(Arg::Map)
    };
    let x = |memory: &DeviceMemory, columns| map(memory.pointer(), rows, columns, kernels::CHAIN_ROWS);
    let [o, gate_up, down, _] = layer.weights();
    let at = |elements: usize| weights + 2 * elements as u64;
    let (hidden, [o_box, gate_up_box, down_box, qkv_box]) = (layer.hidden, kernels::CHAIN_BOX_ROWS);
    let norm = |which: usize| Arg::Pointer(b.norms.pointer() + (which * hidden * 2) as u64);
    let args = [
        x(&b.x, layer.attention())?,
        map(at(0), hidden, layer.attention(), o_box)?,
        x(&b.normed, hidden)?,
        map(at(o), 2 * layer.inner, hidden, gate_up_box)?,
        x(&b.inner, layer.inner)?,
        map(at(o + gate_up), hidden, layer.inner, down_box)?,
        map(at(o + gate_up + down), layer.qkv(), hidden, qkv_box)?,
        pointer(&b.h),
        pointer(&b.h),
        pointer(&b.normed),
        pointer(&b.squares),
        pointer(&b.inner),
        pointer(&b.count),
        norm(0),
        norm(1),
        pointer(&b.bias),
        pointer(&b.out),
        pointer(&b.positions),
        pointer(&b.slots),
        pointer(&b.tables[0]),
        pointer(&b.tables[1]),
        pointer(&b.caches[0]),
        pointer(&b.caches[1]),
        int(rows),
        int(hidden),
        int(layer.attention()),
        int(layer.inner),
        int(layer.qkv()),
        int(layer.heads),
        int(layer.kv_heads),
        int(layer.head_dim),
        Arg::Float(1e-3),
        Arg::Float(1e-2),
    ];
    card.run("chain_linear", 0, layer.sizes().geometry(resident), &args)
}

pub fn check(card: &Card) -> Outcome {
    if card.device.compute_capability.0 != 9 {
        return Ok(());
    }
    let small = Layer { hidden: 896, inner: 4864, heads: 14, kv_heads: 2, head_dim: 64 };
    let other = Layer { hidden: 960, inner: 1224, heads: 5, kv_heads: 1, head_dim: 128 };
    for (layer, rows) in [(small, 64), (small, 17), (small, 1), (other, 33), (other, 64)] {
        one(card, &layer, rows)?;
    }
    Ok(())
}

fn one(card: &Card, layer: &Layer, rows: usize) -> Outcome {
    let mut random = Random::new(7);
    let weights: Vec<Vec<bf16>> = layer.weights().iter().map(|&n| random.bf16s(n, 0.1)).collect();
    let on = card.upload(&weights.concat())?;
    let values = Values::new(layer, rows);
    let buffers = values.upload(card, layer)?;
    run(card, layer, rows, on.pointer(), &buffers)?;
    let what = |name: &str| format!("chain_linear {} rows {rows}: {name}", layer.hidden);
    let w: Vec<Vec<f64>> = weights.iter().map(|w| wide(w)).collect();
    let norms = wide(&values.norms);
    let (x, mut h) = (wide(&values.x), wide(&values.h));
    add(&mut h, &product(&x, &w[0], layer.attention()));
    h.iter_mut().for_each(|v| *v = bf16::from_f64(*v).to_f64());
    let both = product(&normed(&h, &norms[..layer.hidden], 1e-3), &w[1], layer.hidden);
    let inner: Vec<f64> = both.chunks(2 * layer.inner).flat_map(|row| gated(row, layer.inner)).collect();
    close(&what("inner"), &card.bf16s(&buffers.inner, rows * layer.inner)?, &inner, BOUND)?;
    add(&mut h, &product(&inner, &w[2], layer.inner));
    close(&what("h"), &card.bf16s(&buffers.h, rows * layer.hidden)?, &h, BOUND)?;
    let qkv = product(&normed(&h, &norms[layer.hidden..], 1e-2), &w[3], layer.hidden);
    let (found, want) = turned(card, layer, &values, &buffers, &qkv)?;
    close(&what("qkv"), &found, &want, BOUND)
}

fn add(to: &mut [f64], what: &[f64]) {
    to.iter_mut().zip(what).for_each(|(a, b)| *a += b);
}

fn gated(row: &[f64], inner: usize) -> Vec<f64> {
    (0..inner).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[inner + i]).collect()
}

fn normed(h: &[f64], weights: &[f64], eps: f64) -> Vec<f64> {
    let row = |row: &[f64]| {
        let factor = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64 + eps).sqrt();
        row.iter().zip(weights).map(|(v, w)| v * factor * w).collect::<Vec<f64>>()
    };
    h.chunks(weights.len()).flat_map(row).collect()
}

/// x `[rows, k]`, weights `[n, k]`.
fn product(x: &[f64], weights: &[f64], k: usize) -> Vec<f64> {
    let dot = |row: &[f64], w: &[f64]| row.iter().zip(w).map(|(a, b)| a * b).sum::<f64>();
    x.chunks(k).flat_map(|row| weights.chunks(k).map(move |w| dot(row, w)).collect::<Vec<_>>()).collect()
}

/// What was written to queries and caches, and what should have been.
fn turned(
    card: &Card,
    layer: &Layer,
    values: &Values,
    buffers: &Buffers,
    qkv: &[f64],
) -> Result<(Vec<f64>, Vec<f64>), Failure> {
    let (n, d, half) = (layer.qkv(), layer.head_dim, layer.head_dim / 2);
    let rows = values.positions.len();
    let out = card.bf16s(&buffers.out, rows * n)?;
    let cache = |memory| card.bf16s(memory, SLOTS * layer.kv_heads * d);
    let caches = [cache(&buffers.caches[0])?, cache(&buffers.caches[1])?];
    let (mut found, mut want) = (vec![], vec![]);
    for (m, c) in (0..rows).flat_map(|m| (0..n).map(move |c| (m, c))) {
        let (head, i) = (c / d, c % d);
        let dot = |at: usize| qkv[m * n + at] + values.bias[at].to_f64();
        let (a, b) = (dot(head * d + i % half), dot(head * d + i % half + half));
        let at = values.positions[m] as usize * half + i % half;
        let is_turned = head < layer.heads + layer.kv_heads;
        let angle = [&values.tables[0], &values.tables[1]].map(|t| f64::from(t[at]));
        let (cosine, sine) = if is_turned { (angle[0], angle[1]) } else { (1.0, 0.0) };
        let value = if i < half { a * cosine - b * sine } else { b * cosine + a * sine };
        if head < layer.heads {
            found.push(out[m * n + c]);
        } else {
            let Ok(slot) = usize::try_from(values.slots[m]) else { continue };
            let (of, kv_head) = ((head - layer.heads) / layer.kv_heads, (head - layer.heads) % layer.kv_heads);
            found.push(caches[of][((slot / 16 * layer.kv_heads + kv_head) * 16 + slot % 16) * d + i]);
        }
        want.push(value);
    }
    Ok((found, want))
}

pub fn time(card: &Card) -> Outcome {
    if card.device.compute_capability.0 != 9 {
        return Ok(());
    }
    let pool = card.random(POOL_BYTES)?;
    for shape in &SHAPES {
        let layer = Layer::of(shape);
        if !layer.sizes().takes(layer.head_dim as u32) {
            continue;
        }
        let bytes = 2 * layer.weights().iter().sum::<usize>();
        for rows in [1, 8, 16, 32, 64] {
            let buffers = Values::new(&layer, rows).upload(card, &layer)?;
            let weights = |i: usize| pool.pointer() + (i % (POOL_BYTES / bytes) * bytes) as u64;
            let us = card.time(ROUNDS, |i| run(card, &layer, rows, weights(i), &buffers))?;
            line(&format!("{} chain_linear rows {rows}", shape.name), us, bytes as f64);
        }
    }
    Ok(())
}
