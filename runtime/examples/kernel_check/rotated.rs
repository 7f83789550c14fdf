//! Products whose heads rotate and go to the cache: each entry against float64 and against the two launches that it
//! replaces, and beside them in time.

use super::card::{Card, Failure, Outcome};
use super::numbers::{BF16_BOUND, Random, close};
use super::wide::{BEYOND, Buffers, POOL_BYTES, times};
use half::bf16;
use mserve_runtime::cuda::gemm::{GemmOperands, GemmShape, Rotation};
use mserve_runtime::cuda::kernels::{BLOCK_SIZE, WIDE};
use mserve_runtime::cuda::linear::{Choice, Linears, Route};
use mserve_runtime::cuda::memory::DeviceMemory;

/// Two roundings to bf16, one behind the other.
const BOUND: f64 = 2.0 * BF16_BOUND;
/// Of the tables of the checks.
const POSITIONS: usize = 100;

/// Heads of a model, and the width of what they are computed from.
#[derive(Clone, Copy)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    k: usize,
    bias: bool,
}

const SMALL: Heads = Heads { heads: 14, kv_heads: 2, head_dim: 64, k: 896, bias: true };
const LARGE: Heads = Heads { heads: 32, kv_heads: 8, head_dim: 128, k: 4096, bias: false };
/// Tiles that hold q, k and v, and a last one that is not whole.
const FEW: Heads = Heads { heads: 3, kv_heads: 1, head_dim: 64, k: 136, bias: false };
const WITH_BIAS: Heads = Heads { heads: 3, kv_heads: 1, head_dim: 128, k: 200, bias: true };

impl Heads {
    const fn shape(&self, m: usize) -> GemmShape {
        let n = (self.heads + 2 * self.kv_heads) * self.head_dim;
        let rotated = self.head_dim as u32;
        let Self { k, bias, .. } = *self;
        GemmShape { m, n, k, bias, residual: false, f32_out: false, gated: false, rotated, out_stride: n }
    }

    /// Elements of the keys, or of the values, of so many tokens.
    const fn cache(&self, tokens: usize) -> usize {
        tokens * self.kv_heads * self.head_dim
    }

    /// Where a token's keys or values of a head begin.
    const fn place(&self, slot: usize, kv_head: usize) -> usize {
        let block = BLOCK_SIZE as usize;
        ((slot / block * self.kv_heads + kv_head) * block + slot % block) * self.head_dim
    }
}

/// The operands of one check, on the card and here.
struct Case {
    heads: Heads,
    shape: GemmShape,
    x: Vec<bf16>,
    weights: Vec<bf16>,
    bias: Vec<bf16>,
    positions: Vec<i32>,
    slots: Vec<i32>,
    /// Places of the cache, more than rows.
    places: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
    on: [DeviceMemory; 7],
}

/// What an entry has left: rows of packed q, k and v, the keys, the values.
struct Found {
    out: Vec<f64>,
    caches: [Vec<f64>; 2],
}

pub fn check(card: &Card) -> Outcome {
    for heads in [SMALL, LARGE, FEW, WITH_BIAS] {
        for m in [192, 300, 520] {
            let case = Case::new(card, heads, m)?;
            let linears = Linears::new(&card.device, card.product_kernels()?)?;
            let apart = case.run(card, &linears, linears.route(&case.shape, Choice::Apart)?)?;
            case.compare("apart", &apart, None)?;
            for choice in linears.candidates(&case.shape, 1)? {
                let Choice::Wide(index) = choice else { continue };
                let found = case.run(card, &linears, linears.route(&case.shape, choice)?)?;
                case.compare(WIDE[index].entry, &found, Some(&apart))?;
            }
        }
    }
    Ok(())
}

impl Case {
    fn new(card: &Card, heads: Heads, m: usize) -> Result<Self, Failure> {
        let mut random = Random::new(m as u64);
        let (shape, half) = (heads.shape(m), heads.head_dim / 2);
        let (x, weights, bias) =
            (random.bf16s(m * shape.k, 1.0), random.bf16s(shape.n * shape.k, 1.0), random.bf16s(shape.n, 8.0));
        let positions: Vec<i32> = (0..m).map(|_| random.below(POSITIONS) as i32).collect();
        let places = m.next_multiple_of(BLOCK_SIZE as usize) + 64;
        let mut slots: Vec<i32> = (0..places as i32).collect();
        random.shuffle(&mut slots);
        slots.truncate(m);
        (0..m).filter(|row| row % 11 == 5 || row + 1 == m).for_each(|row| slots[row] = -1);
        let (cos, sin) = (random.floats(POSITIONS * half, 1.0), random.floats(POSITIONS * half, 1.0));
        let on = [
            card.upload(&x)?,
            card.upload(&weights)?,
            card.upload(&bias)?,
            card.upload(&positions)?,
            card.upload(&slots)?,
            card.upload(&cos)?,
            card.upload(&sin)?,
        ];
        Ok(Self { heads, shape, x, weights, bias, positions, slots, places, cos, sin, on })
    }

    fn run(&self, card: &Card, linears: &Linears, mut route: Route) -> Result<Found, Failure> {
        let (elements, cached) = ((self.shape.m + BEYOND) * self.shape.n, self.heads.cache(self.places));
        let out = card.poisoned(elements * 2)?;
        let caches = [card.poisoned(cached * 2)?, card.poisoned(cached * 2)?];
        let [x, weight, bias, positions, slots, cos, sin] = self.on.each_ref().map(DeviceMemory::pointer);
        let [keys, values] = caches.each_ref().map(DeviceMemory::pointer);
        let (heads, kv_heads) = (self.heads.heads as u32, self.heads.kv_heads as u32);
        let operands = GemmOperands {
            x,
            weight,
            bias: self.shape.bias.then_some(bias),
            out: out.pointer(),
            rotation: Some(Rotation { positions, slots, cos, sin, keys, values, heads, kv_heads }),
            ..GemmOperands::default()
        };
        // SAFETY: the buffers have the sizes of the shape and live until the results have been read.
        unsafe { linears.run_by(&mut route, &self.shape, &operands)? };
        let out = card.bf16s(&out, elements)?;
        Ok(Found { out, caches: [card.bf16s(&caches[0], cached)?, card.bf16s(&caches[1], cached)?] })
    }

    /// Every element of row `m` that somebody reads: `take(head, i, value)`.
    fn read(&self, found: &Found, m: usize, mut take: impl FnMut(usize, usize, f64)) {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        let row = &found.out[m * self.shape.n..];
        (0..heads * head_dim).for_each(|c| take(c / head_dim, c % head_dim, row[c]));
        let Ok(slot) = usize::try_from(self.slots[m]) else { return };
        for (cache, first) in found.caches.iter().zip([heads, heads + kv_heads]) {
            for kv_head in 0..kv_heads {
                let from = &cache[self.heads.place(slot, kv_head)..];
                (0..head_dim).for_each(|i| take(first + kv_head, i, from[i]));
            }
        }
    }

    /// Some rows with float64, all rows with the two launches, and nothing written that should not be.
    fn compare(&self, entry: &str, found: &Found, apart: Option<&Found>) -> Outcome {
        let GemmShape { m, n, k, .. } = self.shape;
        let what = format!("{entry} {m}x{n}x{k}");
        self.untouched(&what, found, apart.is_some())?;
        let (mut got, mut want) = (vec![], vec![]);
        for row in [0, 15, 63, 64, 127, 128, 191, m / 2, m - 1] {
            let wanted = self.row(row);
            self.read(found, row, |head, i, value| {
                got.push(value);
                want.push(wanted[head * self.heads.head_dim + i]);
            });
        }
        close(&what, &got, &want, BOUND)?;
        let Some(apart) = apart else { return Ok(()) };
        let all = |found: &Found| {
            let mut values = vec![];
            (0..m).for_each(|row| self.read(found, row, |_, _, value| values.push(value)));
            values
        };
        close(&format!("{what}, all rows beside two launches"), &all(found), &all(apart), BOUND)
    }

    /// Poison stays beyond the last row, where no slot is and, `fused`, in the columns of k and v; nowhere else.
    fn untouched(&self, what: &str, found: &Found, fused: bool) -> Outcome {
        let GemmShape { m, n, .. } = self.shape;
        let (inside, beyond) = found.out.split_at(m * n);
        let queries = self.heads.heads * self.heads.head_dim;
        let wrong = |(at, v): (usize, &f64)| v.is_nan() != (fused && at % n >= queries);
        if inside.iter().enumerate().any(wrong) || !beyond.iter().all(|v| v.is_nan()) {
            return Err(format!("{what}: rows missing, k or v left there, or written beyond the last").into());
        }
        let named = self.slots.iter().filter(|&&slot| slot >= 0).count();
        for cache in &found.caches {
            let written = cache.iter().filter(|v| !v.is_nan()).count();
            if written != self.heads.cache(named) {
                return Err(format!("{what}: {written} elements of the cache for {named} slots").into());
            }
        }
        Ok(())
    }

    /// All heads of a row in float64.
    fn row(&self, m: usize) -> Vec<f64> {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        let (k, half) = (self.shape.k, head_dim / 2);
        let x: Vec<f64> = self.x[m * k..][..k].iter().map(|v| v.to_f64()).collect();
        let sum = |c: usize| -> f64 {
            let bias = if self.shape.bias { self.bias[c].to_f64() } else { 0.0 };
            bias + self.weights[c * k..][..k].iter().zip(&x).map(|(w, x)| w.to_f64() * x).sum::<f64>()
        };
        let sums: Vec<f64> = (0..self.shape.n).map(sum).collect();
        let turned = |c: usize| {
            let (head, i) = (c / head_dim, c % head_dim);
            let at = self.positions[m] as usize * half + i % half;
            let (cos, sin) = (f64::from(self.cos[at]), f64::from(self.sin[at]));
            match (head < heads + kv_heads, i < half) {
                (false, _) => sums[c],
                (true, true) => sums[c] * cos - sums[c + half] * sin,
                (true, false) => sums[c] * cos + sums[c - half] * sin,
            }
        };
        (0..self.shape.n).map(turned).collect()
    }
}

const ROWS: [usize; 4] = [8431, 2048, 512, 256];
/// Layers whose caches the timing goes over.
const LAYERS: usize = 12;

/// ROTATED_ROWS="8431 256": these numbers of rows only.
pub fn time(card: &Card) -> Outcome {
    let asked: Vec<usize> = std::env::var("ROTATED_ROWS")
        .map(|w| w.split_whitespace().filter_map(|w| w.parse().ok()).collect())
        .unwrap_or_default();
    let rows = if asked.is_empty() { ROWS.to_vec() } else { asked };
    let most = rows.iter().copied().max().unwrap_or(0).next_multiple_of(BLOCK_SIZE as usize);
    let positions = card.upload(&(0..most as i32).collect::<Vec<i32>>())?;
    let angles = card.upload(&Random::new(7).floats(most * LARGE.head_dim, 1.0))?;
    let layer_bytes = LARGE.cache(most) as u64 * 2;
    let caches = card.random(2 * LAYERS * layer_bytes as usize)?;
    let mut linears = Linears::new(&card.device, card.product_kernels()?)?;
    let mut buffers = Buffers {
        weights: card.random(POOL_BYTES)?,
        x: card.random(most * LARGE.k * 2)?,
        out: card.random(most * LARGE.shape(1).n * 2)?,
        gate_up: card.random(LARGE.shape(1).n * 2)?,
        caches: None,
    };
    for (name, heads) in [("0.5B qkv", SMALL), ("8B qkv", LARGE)] {
        let rotation = Rotation {
            positions: positions.pointer(),
            slots: positions.pointer(),
            cos: angles.pointer(),
            sin: angles.pointer() + (most * heads.head_dim / 2 * 4) as u64,
            keys: caches.pointer(),
            values: caches.pointer() + LAYERS as u64 * layer_bytes,
            heads: heads.heads as u32,
            kv_heads: heads.kv_heads as u32,
        };
        buffers.caches = Some((rotation, layer_bytes, LAYERS));
        for &m in &rows {
            println!("{name} rows {m}: {}", time_one(card, &mut linears, &buffers, &heads.shape(m))?);
        }
    }
    Ok(())
}

/// The fastest products of either kind with the rotation behind them, then the entries that do both.
fn time_one(card: &Card, linears: &mut Linears, buffers: &Buffers, shape: &GemmShape) -> Result<String, Failure> {
    let product = shape.alone();
    let mut parts = Vec::new();
    for own in [false, true] {
        let kind = |c| matches!(c, Choice::Wide(_)) == own;
        let Some(&(alone, choice)) = times(card, linears, buffers, &product, kind)?.first() else { continue };
        linears.keep(product, linears.route(&product, choice)?);
        let both = times(card, linears, buffers, shape, |c| c == Choice::Apart)?.first().map_or(f64::NAN, |t| t.0);
        parts.push(format!("{} {alone:.1} us, with rotation {both:.1}", linears.computed_by(&product)));
    }
    for (us, choice) in times(card, linears, buffers, shape, |c| matches!(c, Choice::Wide(_)))? {
        let Choice::Wide(index) = choice else { continue };
        let tera = 2.0 * (shape.m * shape.n * shape.k) as f64 / us / 1e6;
        parts.push(format!("{} {us:.1} ({tera:.0} TFLOP/s)", WIDE[index].entry));
    }
    Ok(parts.join(", "))
}
