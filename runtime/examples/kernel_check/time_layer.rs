//! Each op of a prefill step's layer by itself, beside its bound: where such a step loses time, and which of cuBLASLt's
//! algorithms its products deserve.

use super::card::{Caches, Card, Failure, NULL, Outcome, int, pointer};
use super::time::{BYTES_PER_US, FLOPS_PER_US, SHAPES, Shape};
use mserve_runtime::cuda::gemm::{GemmOperands, GemmShape};
use mserve_runtime::cuda::kernels::{self, Prefill};
use mserve_runtime::cuda::linear::{Choice, Linears};
use mserve_runtime::cuda::memory::DeviceMemory;
use mserve_runtime::cuda::module::Arg;
use std::time::{Duration, Instant};

/// Candidates of cuBLASLt that are timed; the product takes the best of the first few.
const CANDIDATES: usize = 24;
const LAYERS: usize = 4;
const PROMPT: usize = 1024;

struct Layer<'a> {
    card: &'a Card,
    shape: &'a Shape,
    rows: usize,
    linears: Linears,
    /// Inputs and results of the ops, a part each: large enough for gate_up.
    buffers: Vec<DeviceMemory>,
    weights: DeviceMemory,
    total_us: f64,
    total_bound: f64,
}

pub fn all(card: &Card) -> Outcome {
    let rows: Vec<usize> = std::env::var("LAYER_ROWS")
        .unwrap_or_else(|_| "8192 2048".to_owned())
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    for shape in &SHAPES {
        for &rows in &rows {
            layer(card, shape, rows)?;
        }
    }
    Ok(())
}

fn layer(card: &Card, shape: &Shape, rows: usize) -> Outcome {
    println!("-- {} layer, {rows} rows", shape.name);
    let (h, inter) = (shape.hidden, shape.intermediate);
    let qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let buffers = (0..4).map(|_| card.random(rows * 2 * inter.max(qkv) * 2)).collect::<Result<Vec<_>, _>>()?;
    let mut at = Layer {
        card,
        shape,
        rows,
        linears: Linears::new(&card.device, card.product_kernels()?)?,
        buffers,
        weights: card.random(LAYERS * 2 * inter * h * 2)?,
        total_us: 0.0,
        total_bound: 0.0,
    };
    let bias = shape.name == "0.5B";
    at.norm(2)?;
    at.product("qkv", qkv, h, bias, false)?;
    at.rope()?;
    at.attention()?;
    at.product("o", h, shape.heads * shape.head_dim, false, true)?;
    at.product("gate_up", 2 * inter, h, false, false)?;
    at.gated()?;
    at.product("down", h, inter, false, true)?;
    println!(
        "{} layer, {rows} rows: {:.1} us, bound {:.1} ({:.0} %), {:.0} tok/s over {} layers",
        shape.name,
        at.total_us,
        at.total_bound,
        100.0 * at.total_bound / at.total_us,
        rows as f64 / at.total_us * 1e6 / layers(shape) as f64,
        layers(shape)
    );
    Ok(())
}

fn layers(shape: &Shape) -> usize {
    if shape.name == "8B" { 32 } else { 24 }
}

impl Layer<'_> {
    /// `times`: how often a layer has it.
    fn report(&mut self, what: &str, us: f64, flops: f64, bytes: f64, times: usize) {
        let bound = (flops / FLOPS_PER_US).max(bytes / BYTES_PER_US);
        let rate = if flops > 0.0 {
            format!("{:.0} TFLOP/s", flops / us / 1e6)
        } else {
            format!("{:.2} TB/s", bytes / us / 1e6)
        };
        println!("{what}: {us:.1} us, {rate}, bound {bound:.1} us ({:.0} %), {times} a layer", 100.0 * bound / us);
        self.total_us += us * times as f64;
        self.total_bound += bound * times as f64;
    }

    fn norm(&mut self, times: usize) -> Outcome {
        let width = self.shape.hidden;
        let geometry = kernels::rms_norm(self.rows as u32, width as u32).ok_or("too wide")?;
        let us = self.card.time(8, |i| {
            let (x, y) = (&self.buffers[i % 2 * 2], &self.buffers[i % 2 * 2 + 1]);
            let args = [
                pointer(x),
                pointer(&self.weights),
                pointer(y),
                int(self.rows),
                int(width),
                Arg::Float(1e-5),
                Arg::Float(0.0),
            ];
            self.card.run("rms_norm", 0, geometry, &args)
        })?;
        self.report("rms_norm", us, 0.0, (self.rows * width * 4) as f64, times);
        Ok(())
    }

    fn gated(&mut self) -> Outcome {
        let width = self.shape.intermediate;
        let geometry = kernels::gated_act(self.rows as u32, width as u32);
        let us = self.card.time(8, |i| {
            let (x, y) = (&self.buffers[i % 2 * 2], &self.buffers[i % 2 * 2 + 1]);
            self.card.run("silu_mul", 0, geometry, &[pointer(x), pointer(y), int(width)])
        })?;
        self.report("silu_mul", us, 0.0, (self.rows * width * 6) as f64, 1);
        Ok(())
    }

    fn rope(&mut self) -> Outcome {
        let (s, rows) = (self.shape, self.rows);
        let position: Vec<i32> = (0..rows as i32).map(|i| i % PROMPT as i32).collect();
        let slots: Vec<i32> = (0..rows as i32).collect();
        let (positions, slots) = (self.card.upload(&position)?, self.card.upload(&slots)?);
        let tables = self.card.random(PROMPT * s.head_dim * 4)?;
        let geometry = kernels::rope(rows as u32, s.heads as u32, s.kv_heads as u32);
        let us = self.card.time(8, |i| {
            let args = [
                pointer(&self.buffers[i % 4]),
                pointer(&positions),
                pointer(&slots),
                pointer(&tables),
                pointer(&tables),
                NULL,
                NULL,
                pointer(&self.buffers[(i + 1) % 4]),
                pointer(&self.buffers[(i + 2) % 4]),
                int(rows),
                int(s.heads),
                int(s.kv_heads),
                int(s.head_dim),
                Arg::Float(0.0),
                Arg::Float(0.0),
            ];
            self.card.run("qk_norm_rope_kv_write", s.head_dim as u32, geometry, &args)
        })?;
        self.report("rope, KV write", us, 0.0, (rows * (s.heads + 2 * s.kv_heads) * s.head_dim * 4) as f64, 1);
        Ok(())
    }

    fn attention(&mut self) -> Outcome {
        let (s, hd, sequences) = (self.shape, self.shape.head_dim, self.rows / PROMPT);
        let blocks = self.rows / 16;
        let table = self.card.upload(&(0..blocks as i32).rev().collect::<Vec<_>>())?;
        let start = self.card.upload(&(0..=sequences).map(|i| (i * PROMPT) as i32).collect::<Vec<_>>())?;
        let lengths = self.card.upload(&vec![PROMPT as i32; sequences])?;
        let tiles = kernels::prefill_tiles(std::iter::repeat_n(PROMPT as u32, sequences));
        let (capability, processors) = (self.card.device.compute_capability, self.card.device.multiprocessors);
        let prefill = Prefill::new(hd as u32, capability, processors);
        let at = [self.buffers[1].pointer(), self.buffers[2].pointer()];
        let caches = Caches::new(self.card, at, self.rows * s.kv_heads * hd * 2, hd, prefill)?;
        let us = self.card.time(4, |_| {
            let args = vec![
                pointer(&self.buffers[0]),
                int((s.heads + 2 * s.kv_heads) * hd),
                pointer(&self.buffers[1]),
                pointer(&self.buffers[2]),
                pointer(&start),
                pointer(&lengths),
                pointer(&table),
                pointer(&self.buffers[3]),
                int(PROMPT / 16),
                int(0),
                int(sequences),
                int(s.kv_heads),
                Arg::Float(1.0 / (hd as f32).sqrt()),
                Arg::Float(0.0),
                int(0),
                int(s.heads),
                int(tiles as usize),
            ];
            self.card.run(
                prefill.entry(),
                hd as u32,
                prefill.geometry(tiles, s.heads as u32, hd as u32),
                &caches.within(args),
            )
        })?;
        let pairs = sequences as f64 * (PROMPT as f64 * (PROMPT as f64 + 1.0) / 2.0);
        let bytes = self.rows * (2 * s.heads + 2 * s.kv_heads) * hd * 2;
        self.report(prefill.entry(), us, 4.0 * (hd * s.heads) as f64 * pairs, bytes as f64, 1);
        // The next op must not find attention's result to be NaN or huge.
        self.buffers[3] = self.card.random(self.rows * 2 * s.intermediate * 2)?;
        Ok(())
    }

    fn product(&mut self, name: &str, n: usize, k: usize, bias: bool, residual: bool) -> Outcome {
        let shape = GemmShape { m: self.rows, n, k, bias, residual, f32_out: false, gated: false, out_stride: n };
        let candidates = self.linears.candidates(&shape, CANDIDATES)?;
        let mut figures = vec![];
        let begin = Instant::now();
        for (at, &candidate) in candidates.iter().enumerate() {
            let Choice::Blas(_) = candidate else { continue };
            let Ok(route) = self.linears.route(&shape, candidate) else { continue };
            self.linears.keep(shape, route);
            if begin.elapsed() > Duration::from_millis(600) {
                break;
            }
            figures.push((self.time_product(&shape)?, at));
        }
        let first = figures.first().map_or(f64::NAN, |f| f.0);
        let least = |figures: &[(f64, usize)]| figures.iter().copied().min_by(|a, b| a.0.total_cmp(&b.0));
        let six = least(&figures[..figures.len().min(6)]).ok_or("no algorithm")?;
        let best = least(&figures).ok_or("no algorithm")?;
        let flops = 2.0 * self.rows as f64 * n as f64 * k as f64;
        let rate = |us: f64| flops / us / 1e6;
        let what = format!(
            "{name} {n}x{k} (first {:.0}, best of 6 {:.0}, of {} {:.0} TFLOP/s at place {})",
            rate(first),
            rate(six.0),
            figures.len(),
            rate(best.0),
            best.1
        );
        let bytes = 2 * (self.rows * k + n * k + self.rows * n * if residual { 2 } else { 1 });
        self.report(&what, six.0, flops, bytes as f64, 1);
        Ok(())
    }

    /// Microseconds of a product over the weights of several layers.
    fn time_product(&mut self, shape: &GemmShape) -> Result<f64, Failure> {
        let weight = |layer: usize| self.weights.pointer() + (layer * shape.n * shape.k * 2) as u64;
        let operands: Vec<GemmOperands> = (0..LAYERS)
            .map(|i| GemmOperands {
                x: self.buffers[0].pointer(),
                weight: weight(i),
                bias: shape.bias.then(|| self.weights.pointer()),
                residual: shape.residual.then(|| self.buffers[1 + i % 2].pointer()),
                out: self.buffers[1 + i % 2].pointer(),
                gate_up: None,
                sample_rows: None,
            })
            .collect();
        let linears = &mut self.linears;
        // The first run loads the kernel, which a capture may not.
        // SAFETY: operands are parts of buffers as large as the shape needs, alive until `time` has waited.
        unsafe { linears.run(shape, &operands[0])? };
        self.card.device.synchronize()?;
        self.card.time(LAYERS, |i| {
            // SAFETY: as above.
            unsafe { linears.run(shape, &operands[i])? };
            Ok(())
        })
    }
}
