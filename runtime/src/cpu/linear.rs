//! Matrix products, `y = x W^T + bias (+ residual)`, over packed or quantised weights.
//!
//! Which kernel does what was measured (one core of a 2.6 GHz Xeon with AVX-512 and AMX, 4096x4096, ms):
//!
//! | tokens | bf16, panels | f32, panels | f32, candle | Q8_0, candle |
//! |---|---|---|---|---|
//! | 1 | 1.2 | 2.5 | 3.8 | 0.65 |
//! | 8 | 1.7 | 2.6 | 9.1 | 1.5 |
//! | 256 | 59 | 62 | 97 | 44 |
//!
//! So candle-core multiplies Q8_0 and the panels all floating-point types.

use super::kernels::panel::{PANEL_ROWS, PanelMatrix, Tiles};
use super::kernels::{Line, Lines, PARALLEL_ELEMENTS};
use super::quantized::QuantizedMatrix;
use pulp::Arch;
use rayon::prelude::*;
use std::sync::Arc;

#[derive(Debug, Clone)]
pub enum Matrix {
    Panels(Arc<PanelMatrix>),
    Quantized(Arc<QuantizedMatrix>),
}

#[derive(Debug)]
pub struct Linear {
    pub matrix: Matrix,
    pub bias: Option<Vec<f32>>,
}

/// Memory that products need, reused from one to the next.
#[derive(Debug, Default)]
pub struct LinearScratch {
    tiles: Tiles,
    sums: Lines<f32>,
    /// One for each thread, when tokens are shared out between them.
    per_task: Vec<TaskScratch>,
}

#[derive(Debug, Default)]
struct TaskScratch {
    tiles: Tiles,
    sums: Lines<f32>,
}

/// Rows to add to a product.
#[derive(Debug, Clone, Copy)]
pub enum Residual<'a> {
    None,
    Rows(&'a [f32]),
    /// The output's own former content.
    InPlace,
}

/// Tokens that a thread must get before it is better to share out tokens than rows of the matrix: enough to stay
/// bound by arithmetic although every thread then reads all weights.
const TOKENS_PER_THREAD: usize = 64;
/// Activations of one pass over the weights when tokens are shared out: half of a usual L2 cache.
const PASS_BYTES: usize = 1 << 20;
/// Weights that one task of a product takes at least, so that handing it out costs little beside it.
const TASK_BYTES: usize = 1 << 16;

impl Matrix {
    pub fn rows(&self) -> usize {
        match self {
            Self::Panels(m) => m.rows(),
            Self::Quantized(m) => m.rows(),
        }
    }

    pub fn bytes(&self) -> u64 {
        match self {
            Self::Panels(m) => m.bytes(),
            Self::Quantized(m) => m.bytes(),
        }
    }
}

impl Linear {
    /// `x` is `[tokens, cols]`, `out` `[tokens, rows]`.
    ///
    /// # Errors
    /// When candle's quantised product fails.
    pub fn forward(
        &self,
        arch: Arch,
        x: &[f32],
        residual: Residual<'_>,
        scratch: &mut LinearScratch,
        out: &mut [f32],
    ) -> Result<(), candle_core::Error> {
        // A step of prompt chunks alone has no rows behind the gathers.
        if x.is_empty() {
            return Ok(());
        }
        let epilogue = Epilogue { bias: self.bias.as_deref(), residual, width: self.matrix.rows() };
        match &self.matrix {
            Matrix::Panels(matrix) => {
                let tokens = x.len() / matrix.cols();
                if tokens >= TOKENS_PER_THREAD * rayon::current_num_threads() {
                    share_tokens(arch, matrix, x, epilogue, &mut scratch.per_task, out);
                } else {
                    share_panels(arch, matrix, x, epilogue, scratch, out);
                }
            }
            Matrix::Quantized(matrix) => {
                let sums = matrix.multiply(x)?;
                let rows = out.chunks_exact_mut(epilogue.width).zip(sums.chunks_exact(matrix.stride()));
                rows.enumerate().for_each(|(token, (out, sums))| epilogue.write(sums, token, 0, out));
            }
        }
        Ok(())
    }
}

/// Few tokens: each task takes a run of panels and reads its weights once.
fn share_panels(
    arch: Arch,
    matrix: &PanelMatrix,
    x: &[f32],
    epilogue: Epilogue<'_>,
    scratch: &mut LinearScratch,
    out: &mut [f32],
) {
    scratch.tiles.fill(arch, x, matrix.cols());
    let tiles = &scratch.tiles;
    let panel_lines = 2 * tiles.tokens();
    scratch.sums.reserve(matrix.panels() * panel_lines);
    let sums = &mut scratch.sums.as_mut_slice()[..matrix.panels() * panel_lines];
    let panel_bytes = matrix.bytes() as usize / matrix.panels();
    let panels_per_task = panels_per_task(matrix.panels(), panel_bytes);
    sums.par_chunks_mut(panels_per_task * panel_lines)
        .enumerate()
        .for_each(|(task, sums)| matrix.multiply_panels(arch, task * panels_per_task, tiles, sums));
    let sums = &*sums;
    let row = |token: usize, out: &mut [f32]| epilogue.write_panels(sums, tiles.tokens(), token, token, out);
    if out.len() >= PARALLEL_ELEMENTS {
        out.par_chunks_exact_mut(epilogue.width).enumerate().for_each(|(token, out)| row(token, out));
    } else {
        out.chunks_exact_mut(epilogue.width).enumerate().for_each(|(token, out)| row(token, out));
    }
}

/// A few tasks for each thread, so that one that is held up does not hold up all.
fn panels_per_task(panels: usize, panel_bytes: usize) -> usize {
    let even = panels.div_ceil(4 * rayon::current_num_threads());
    even.max(TASK_BYTES.div_ceil(panel_bytes)).max(1)
}

/// Many tokens: each task takes a run of tokens and goes over all panels, a few tokens at a time so that both its
/// activations and the panel stay in cache.
fn share_tokens(
    arch: Arch,
    matrix: &PanelMatrix,
    x: &[f32],
    epilogue: Epilogue<'_>,
    scratch: &mut Vec<TaskScratch>,
    out: &mut [f32],
) {
    let (cols, rows) = (matrix.cols(), epilogue.width);
    let tokens = x.len() / cols;
    let per_task = (PASS_BYTES / (cols * 4)).clamp(16, tokens.div_ceil(rayon::current_num_threads()));
    let per_task = per_task.next_multiple_of(8);
    scratch.resize_with(tokens.div_ceil(per_task), TaskScratch::default);
    out.par_chunks_mut(per_task * rows)
        .zip(x.par_chunks(per_task * cols))
        .zip(scratch)
        .enumerate()
        .with_max_len(1)
        .for_each(|(task, ((out, x), scratch))| {
            scratch.tiles.fill_serial(arch, x, cols);
            let tokens = scratch.tiles.tokens();
            scratch.sums.reserve(2 * tokens);
            for panel in 0..matrix.panels() {
                let sums = &mut scratch.sums.as_mut_slice()[..2 * tokens];
                matrix.multiply_panels(arch, panel, &scratch.tiles, sums);
                for (token, (out, sums)) in out.chunks_exact_mut(rows).zip(sums.chunks_exact(2)).enumerate() {
                    epilogue.write(sums.as_flattened(), task * per_task + token, panel * PANEL_ROWS, out);
                }
            }
        });
}

/// What happens to a sum on its way out.
#[derive(Debug, Clone, Copy)]
struct Epilogue<'a> {
    bias: Option<&'a [f32]>,
    residual: Residual<'a>,
    width: usize,
}

impl Epilogue<'_> {
    /// `sums` holds (at least) the values of columns `first..` of row `token`, whose output row is `out`.
    #[inline]
    fn write(&self, sums: &[f32], token: usize, first: usize, out: &mut [f32]) {
        let end = (first + sums.len()).min(self.width);
        let out = &mut out[first..end];
        let at = token * self.width;
        match (self.bias, self.residual) {
            (None, Residual::None) => out.copy_from_slice(&sums[..end - first]),
            (Some(bias), Residual::None) => {
                for ((o, &s), &b) in out.iter_mut().zip(sums).zip(&bias[first..end]) {
                    *o = s + b;
                }
            }
            (None, Residual::Rows(rows)) => {
                for ((o, &s), &r) in out.iter_mut().zip(sums).zip(&rows[at + first..at + end]) {
                    *o = s + r;
                }
            }
            (Some(bias), Residual::Rows(rows)) => {
                let rest = bias[first..end].iter().zip(&rows[at + first..at + end]);
                for ((o, &s), (&b, &r)) in out.iter_mut().zip(sums).zip(rest) {
                    *o = s + b + r;
                }
            }
            (bias, Residual::InPlace) => {
                for (i, (o, &s)) in out.iter_mut().zip(sums).enumerate() {
                    *o += s + bias.map_or(0.0, |b| b[first + i]);
                }
            }
        }
    }

    /// Output row `token` out of panel-major sums, `[panel][tokens][32]`.
    fn write_panels(&self, sums: &[Line<f32>], tokens: usize, row: usize, token: usize, out: &mut [f32]) {
        for (panel, sums) in sums.chunks_exact(2 * tokens).enumerate() {
            self.write(sums[2 * row..2 * row + 2].as_flattened(), token, panel * PANEL_ROWS, out);
        }
    }
}
