//! Attention of a few query rows over a paged context, in one pass with a running softmax (FlashAttention,
//! arXiv 2205.14135; paged as in vLLM, arXiv 2309.06180).
//!
//! Query rows are pairs (token, query head of one KV group): all heads that share a KV head read each key once. Both
//! products, scores and weighted values, are the same little outer-product kernel. What a row computes depends on its
//! own context only, never on the rows beside it, so batches and chunks give equal results bit for bit.

use super::math::{exp, tanh};
use super::{LANES, Line};
use crate::cpu::kv_cache::LayerCache;
use pulp::{Simd, WithSimd};

/// Query rows of one kernel call: as many sums as hide the latency of a multiply-add.
pub const TILE_ROWS: usize = 8;

/// What all rows of one attention share.
#[derive(Debug, Clone, Copy)]
pub struct Scores {
    pub scale: f32,
    pub softcap: Option<f32>,
}

/// Positions that a query row sees: `first..end` of its sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visible {
    pub first: usize,
    pub end: usize,
}

/// Query rows of one sequence and one KV head, with their running softmax. Reused from task to task.
#[derive(Debug, Default)]
pub struct Rows {
    /// Tiles of eight rows, each `[head_dim][8]`.
    queries: Vec<[f32; TILE_ROWS]>,
    visible: Vec<Visible>,
    maxima: Vec<f32>,
    sums: Vec<f32>,
    /// Tiles of weighted value sums, each `[line of dimensions][8]`.
    outputs: Vec<Line<f32>>,
    head_dim: usize,
}

impl Rows {
    /// Takes new rows. `queries` gives each row's `head_dim` values and what it sees.
    pub fn fill<'q>(&mut self, head_dim: usize, queries: impl Iterator<Item = (&'q [f32], Visible)>) {
        self.head_dim = head_dim;
        self.queries.clear();
        self.visible.clear();
        for (i, (query, visible)) in queries.enumerate() {
            let row = i % TILE_ROWS;
            if row == 0 {
                self.queries.resize(self.queries.len() + head_dim, [0.0; TILE_ROWS]);
            }
            let tile = self.queries.len() - head_dim;
            for (slot, &q) in self.queries[tile..].iter_mut().zip(query) {
                slot[row] = q;
            }
            self.visible.push(visible);
        }
        let rows = self.visible.len().next_multiple_of(TILE_ROWS);
        self.visible.resize(rows, Visible { first: 0, end: 0 });
        self.maxima.clear();
        self.maxima.resize(rows, f32::NEG_INFINITY);
        self.sums.clear();
        self.sums.resize(rows, 0.0);
        self.outputs.clear();
        self.outputs.resize(rows * head_dim.div_ceil(LANES), [0.0; LANES]);
    }

    /// Row `row`'s result, `head_dim` values.
    pub fn read(&self, row: usize, out: &mut [f32]) {
        let dim_lines = self.head_dim.div_ceil(LANES);
        let (tile, lane) = (row / TILE_ROWS, row % TILE_ROWS);
        let factor = 1.0 / self.sums[row];
        for (line, out) in out.chunks_mut(LANES).enumerate() {
            let values = &self.outputs[(tile * dim_lines + line) * TILE_ROWS + lane];
            for (o, &v) in out.iter_mut().zip(values) {
                *o = v * factor;
            }
        }
    }
}

/// One task: `rows` over the blocks of one sequence.
#[derive(Debug)]
pub struct Attend<'a> {
    pub rows: &'a mut Rows,
    pub cache: &'a LayerCache,
    pub kv_head: usize,
    pub block_table: &'a [u32],
    pub scores: Scores,
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, cache, kv_head, block_table, scores } = self;
        let shape = cache.shape();
        let seen = rows.visible.iter().filter(|v| v.first < v.end);
        let first = seen.clone().map(|v| v.first).min().unwrap_or(0);
        let end = seen.map(|v| v.end).max().unwrap_or(0);
        let blocks = first / shape.block_size..end.div_ceil(shape.block_size);
        for (block, &physical) in blocks.clone().zip(&block_table[blocks]) {
            for group in 0..shape.groups_per_block() {
                let start = block * shape.block_size + group * LANES;
                let len = LANES.min(shape.block_size - group * LANES);
                let span = Visible { first: start, end: start + len };
                if span.end <= first || start >= end {
                    continue;
                }
                let (keys, values) = cache.group(kv_head, physical as usize, group);
                rows.attend_group(simd, keys, values, span, scores);
            }
        }
    }
}

impl Rows {
    /// Sixteen more positions for every row that sees any of them.
    #[inline(always)]
    fn attend_group<S: Simd>(
        &mut self,
        simd: S,
        keys: &[Line<f32>],
        values: &[Line<f32>],
        span: Visible,
        scores: Scores,
    ) {
        let dim_lines = self.head_dim.div_ceil(LANES);
        for tile in 0..self.visible.len() / TILE_ROWS {
            let rows = tile * TILE_ROWS..(tile + 1) * TILE_ROWS;
            let visible = &self.visible[rows.clone()];
            if visible.iter().all(|v| v.end <= span.first || v.first >= span.end) {
                continue;
            }
            let mut weights = [[0.0; LANES]; TILE_ROWS];
            let queries = &self.queries[tile * self.head_dim..(tile + 1) * self.head_dim];
            accumulate(simd, queries, keys, &mut weights);
            let mut corrections = [1.0; TILE_ROWS];
            for (i, row) in rows.enumerate() {
                if visible[i].end <= span.first || visible[i].first >= span.end {
                    weights[i] = [0.0; LANES];
                    continue;
                }
                scale_and_mask(&mut weights[i], span, visible[i], scores);
                corrections[i] = soften(&mut weights[i], &mut self.maxima[row], &mut self.sums[row]);
            }
            let weights = transpose(&weights);
            let outputs = &mut self.outputs[tile * dim_lines * TILE_ROWS..(tile + 1) * dim_lines * TILE_ROWS];
            for (out, values) in outputs.as_chunks_mut::<TILE_ROWS>().0.iter_mut().zip(values.chunks_exact(LANES)) {
                for (line, &correction) in out.iter_mut().zip(&corrections) {
                    for o in line {
                        *o *= correction;
                    }
                }
                accumulate(simd, &weights, values, out);
            }
        }
    }
}

/// out[row] += sum over k of factors[k][row] * lines[k].
#[inline(always)]
fn accumulate<S: Simd>(simd: S, factors: &[[f32; TILE_ROWS]], lines: &[Line<f32>], out: &mut [Line<f32>; TILE_ROWS]) {
    for part in 0..LANES / S::F32_LANES {
        let mut sums = [simd.splat_f32s(0.0); TILE_ROWS];
        for (sum, line) in sums.iter_mut().zip(out.iter()) {
            *sum = S::as_simd_f32s(line).0[part];
        }
        for (factors, line) in factors.iter().zip(lines) {
            let line = S::as_simd_f32s(line).0[part];
            for (sum, &factor) in sums.iter_mut().zip(factors) {
                *sum = simd.mul_add_e_f32s(simd.splat_f32s(factor), line, *sum);
            }
        }
        for (sum, line) in sums.iter().zip(out.iter_mut()) {
            S::as_mut_simd_f32s(line).0[part] = *sum;
        }
    }
}

#[inline(always)]
fn scale_and_mask(scores: &mut Line<f32>, span: Visible, visible: Visible, how: Scores) {
    for s in scores.iter_mut() {
        *s *= how.scale;
    }
    if let Some(cap) = how.softcap {
        for s in scores.iter_mut() {
            *s = cap * tanh(*s / cap);
        }
    }
    if visible.first > span.first || visible.end < span.first + LANES || span.end < span.first + LANES {
        let seen = visible.first.max(span.first) - span.first..visible.end.min(span.end) - span.first;
        for (lane, s) in scores.iter_mut().enumerate() {
            if !seen.contains(&lane) {
                *s = f32::NEG_INFINITY;
            }
        }
    }
}

/// Turns scores into weights relative to the running maximum; returns the factor for what was summed before.
/// At least one score is finite.
#[inline(always)]
fn soften(scores: &mut Line<f32>, maximum: &mut f32, sum: &mut f32) -> f32 {
    let mut largest = *maximum;
    for &s in scores.iter() {
        largest = if s > largest { s } else { largest };
    }
    let mut added = 0.0;
    for s in scores.iter_mut() {
        // A masked score is -inf, and exp of a very negative number here is tiny but not zero.
        *s = if *s == f32::NEG_INFINITY { 0.0 } else { exp(*s - largest) };
        added += *s;
    }
    let correction = if *maximum == f32::NEG_INFINITY { 0.0 } else { exp(*maximum - largest) };
    *maximum = largest;
    *sum = *sum * correction + added;
    correction
}

#[inline(always)]
fn transpose(rows: &[Line<f32>; TILE_ROWS]) -> [[f32; TILE_ROWS]; LANES] {
    let mut columns = [[0.0; TILE_ROWS]; LANES];
    for (lane, column) in columns.iter_mut().enumerate() {
        for (value, row) in column.iter_mut().zip(rows) {
            *value = row[lane];
        }
    }
    columns
}
