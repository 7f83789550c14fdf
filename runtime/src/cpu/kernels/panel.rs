//! The matrix product of the CPU backend: `y = x W^T` with W packed for streaming.
//!
//! W's rows are packed in panels of 32. A panel holds, column after column, the 32 weights of that column: one cache
//! line of 16-bit weights, two of f32. The kernel walks a panel once, from front to back, and keeps the running sums of
//! 32 rows x M tokens in registers, so the weights of a step are read from memory once, in order, for all tokens of a
//! tile. Each sum is formed in column order with one accumulator whatever M is: a token's result does not depend on
//! what else is in the batch, bit for bit.
//!
//! 16-bit weights stay 16 bits wide in memory and are widened in registers, exactly. A 32-bit word holds row j in its
//! low half and row j + 16 in its high half, so widening bf16 is one shift or one mask.

use super::{LANES, Line, Lines, prefetch};
use crate::weights::{HostTensor, StoredType};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// How far ahead of the sums weights are fetched. With several tokens a column takes longer to work on than the
/// processor can look ahead by itself, and its own prefetchers stop at every 4 KiB page. Measured on a 2-core Xeon, GB/s
/// of bf16 weights from memory for each core: 10.7 -> 12.8 with one token, 6.6 -> 10 with eight.
const PREFETCH_LINES: usize = 64;

/// Rows of W in one panel.
pub const PANEL_ROWS: usize = 2 * LANES;

/// A matrix `[rows, cols]`, packed. Rows are padded to whole panels with zeros.
#[derive(Debug)]
pub struct PanelMatrix {
    rows: usize,
    cols: usize,
    stored: StoredType,
    lines: Lines<u32>,
}

const fn lines_per_column(stored: StoredType) -> usize {
    match stored {
        StoredType::F32 => 2,
        StoredType::F16 | StoredType::BF16 => 1,
    }
}

impl PanelMatrix {
    /// Stacks matrices of equal width and type by rows and packs them.
    ///
    /// # Panics
    /// When widths or types differ: the loader has checked them.
    pub fn pack(parts: &[HostTensor]) -> Self {
        let (cols, stored) = (parts[0].row_len(), parts[0].stored);
        assert!(parts.iter().all(|p| p.row_len() == cols && p.stored == stored), "parts of one matrix differ");
        let rows: usize = parts.iter().map(|p| p.shape[0]).sum();
        let sources: Vec<&[u8]> = parts.iter().flat_map(|p| p.bytes.chunks_exact(cols * stored.bytes())).collect();
        let panel_lines = cols * lines_per_column(stored);
        let mut lines = Lines::zeroed(rows.div_ceil(PANEL_ROWS) * panel_lines);
        lines.as_mut_slice().par_chunks_mut(panel_lines).zip(sources.par_chunks(PANEL_ROWS)).for_each(
            |(panel, rows)| {
                for (row, bytes) in rows.iter().enumerate() {
                    pack_row(stored, panel, row, bytes);
                }
            },
        );
        Self { rows, cols, stored, lines }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn stored(&self) -> StoredType {
        self.stored
    }

    pub fn bytes(&self) -> u64 {
        self.lines.bytes()
    }

    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL_ROWS)
    }

    fn panel_lines(&self) -> usize {
        self.cols * lines_per_column(self.stored)
    }

    /// Widens row `row` into `out`: the table lookup of a model whose output head shares this matrix.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        let first = row / PANEL_ROWS * self.panel_lines();
        let panel = &self.lines.as_slice()[first..first + self.panel_lines()];
        let (high, lane) = ((row % PANEL_ROWS) >= LANES, row % LANES);
        match self.stored {
            StoredType::F32 => {
                for (o, pair) in out.iter_mut().zip(panel.as_chunks::<2>().0) {
                    *o = f32::from_bits(pair[usize::from(high)][lane]);
                }
            }
            StoredType::BF16 | StoredType::F16 => {
                for (o, line) in out.iter_mut().zip(panel) {
                    let bits = (line[lane] >> if high { 16 } else { 0 }) as u16;
                    *o = match self.stored {
                        StoredType::F16 => half::f16::from_bits(bits).to_f32(),
                        _ => half::bf16::from_bits(bits).to_f32(),
                    };
                }
            }
        }
    }

    /// Sums of panels `first..` for every token of `x`, panel-major: `out` is `[panel][token][32]`.
    pub fn multiply_panels(&self, arch: Arch, first: usize, x: &Tiles, out: &mut [Line<f32>]) {
        for (i, out) in out.chunks_exact_mut(2 * x.tokens).enumerate() {
            let start = (first + i) * self.panel_lines();
            let panel = &self.lines.as_slice()[start..start + self.panel_lines()];
            for tile in 0..x.count() {
                // The first tile brings the panel into cache; for the others it is there.
                let ahead = if tile == 0 { self.ahead(start) } else { panel };
                let rows = x.token_range(tile);
                self.multiply_tile(arch, [panel, ahead], x.tile(tile), &mut out[2 * rows.start..2 * rows.end]);
            }
        }
    }

    /// As many lines as a panel has, [`PREFETCH_LINES`] further on: into the next panel, which the same task takes next.
    fn ahead(&self, start: usize) -> &[Line<u32>] {
        let start = (start + PREFETCH_LINES).min(self.lines.len() - self.panel_lines());
        &self.lines.as_slice()[start..start + self.panel_lines()]
    }

    /// `panels`: the lines to multiply, and those to fetch meanwhile.
    fn multiply_tile(&self, arch: Arch, panels: [&[Line<u32>]; 2], x: &[f32], out: &mut [Line<f32>]) {
        match self.stored {
            StoredType::F32 => Tile::<F32Pair>::run(arch, panels, x, out),
            StoredType::F16 => Tile::<F16Pair>::run(arch, panels, x, out),
            StoredType::BF16 => Tile::<Bf16Pair>::run(arch, panels, x, out),
        }
    }
}

fn pack_row(stored: StoredType, panel: &mut [Line<u32>], row: usize, bytes: &[u8]) {
    let (high, lane) = (row >= LANES, row % LANES);
    match stored {
        StoredType::F32 => {
            for (pair, b) in panel.as_chunks_mut::<2>().0.iter_mut().zip(bytes.as_chunks::<4>().0) {
                pair[usize::from(high)][lane] = u32::from_le_bytes(*b);
            }
        }
        StoredType::F16 | StoredType::BF16 => {
            let shift = if high { 16 } else { 0 };
            for (line, b) in panel.iter_mut().zip(bytes.as_chunks::<2>().0) {
                line[lane] |= u32::from(u16::from_le_bytes(*b)) << shift;
            }
        }
    }
}

/// Rows of activations regrouped for the kernel: tiles of a few tokens, `[cols][tokens of the tile]` each.
#[derive(Debug, Default)]
pub struct Tiles {
    values: Vec<f32>,
    tokens: usize,
    cols: usize,
    tile_tokens: usize,
}

/// Tokens whose sums fit the vector registers: 2 sums a token, 32 registers with AVX-512 and 16 otherwise.
pub fn tile_tokens(arch: Arch) -> usize {
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => 8,
        _ => 6,
    }
}

impl Tiles {
    /// Regroups `x`, `[tokens, cols]`, reusing this value's memory.
    pub fn fill(&mut self, arch: Arch, x: &[f32], cols: usize) {
        let tile_len = self.resize(arch, x.len(), cols);
        if x.len() >= super::PARALLEL_ELEMENTS {
            let tiles = self.values.par_chunks_mut(tile_len).zip(x.par_chunks(tile_len));
            tiles.for_each(|(tile, x)| regroup(tile, x, cols));
        } else {
            self.values.chunks_mut(tile_len).zip(x.chunks(tile_len)).for_each(|(tile, x)| regroup(tile, x, cols));
        }
    }

    /// As [`Self::fill`], on the calling thread alone.
    pub fn fill_serial(&mut self, arch: Arch, x: &[f32], cols: usize) {
        let tile_len = self.resize(arch, x.len(), cols);
        self.values.chunks_mut(tile_len).zip(x.chunks(tile_len)).for_each(|(tile, x)| regroup(tile, x, cols));
    }

    fn resize(&mut self, arch: Arch, len: usize, cols: usize) -> usize {
        self.tile_tokens = tile_tokens(arch);
        self.cols = cols;
        self.tokens = len / cols;
        self.values.resize(len, 0.0);
        self.tile_tokens * cols
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    fn count(&self) -> usize {
        self.tokens.div_ceil(self.tile_tokens)
    }

    fn token_range(&self, tile: usize) -> std::ops::Range<usize> {
        tile * self.tile_tokens..((tile + 1) * self.tile_tokens).min(self.tokens)
    }

    fn tile(&self, tile: usize) -> &[f32] {
        let tokens = self.token_range(tile);
        &self.values[tokens.start * self.cols..tokens.end * self.cols]
    }
}

fn regroup(tile: &mut [f32], x: &[f32], cols: usize) {
    let tokens = x.len() / cols;
    for (token, row) in x.chunks_exact(cols).enumerate() {
        for (column, &value) in tile.chunks_exact_mut(tokens).zip(row) {
            column[token] = value;
        }
    }
}

/// One column of one panel, widened: rows 0..16 and rows 16..32, `part` of each when vectors are narrower than a line.
trait Pair {
    const LINES: usize;
    fn widen<S: Simd>(simd: S, column: &[Line<u32>], part: usize) -> (S::f32s, S::f32s);
}

struct F32Pair;
struct Bf16Pair;
struct F16Pair;

#[inline(always)]
fn words<S: Simd>(line: &Line<u32>, part: usize) -> S::u32s {
    S::as_simd_u32s(line).0[part]
}

impl Pair for F32Pair {
    const LINES: usize = 2;
    #[inline(always)]
    fn widen<S: Simd>(simd: S, column: &[Line<u32>], part: usize) -> (S::f32s, S::f32s) {
        let (low, high) = (words::<S>(&column[0], part), words::<S>(&column[1], part));
        (simd.transmute_f32s_u32s(low), simd.transmute_f32s_u32s(high))
    }
}

impl Pair for Bf16Pair {
    const LINES: usize = 1;
    #[inline(always)]
    fn widen<S: Simd>(simd: S, column: &[Line<u32>], part: usize) -> (S::f32s, S::f32s) {
        let words = words::<S>(&column[0], part);
        let low = simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16));
        let high = simd.and_u32s(words, simd.splat_u32s(0xffff_0000));
        (simd.transmute_f32s_u32s(low), simd.transmute_f32s_u32s(high))
    }
}

impl Pair for F16Pair {
    const LINES: usize = 1;
    /// Exponent and mantissa moved to their places in f32 and rescaled by 2^112, which is exact, subnormals included.
    /// Infinities and NaN would come out finite: no weight is either.
    #[inline(always)]
    fn widen<S: Simd>(simd: S, column: &[Line<u32>], part: usize) -> (S::f32s, S::f32s) {
        let high = words::<S>(&column[0], part);
        let low = simd.wrapping_dyn_shl_u32s(high, simd.splat_u32s(16));
        (widen_f16(simd, low), widen_f16(simd, high))
    }
}

/// The f16 in the upper half of each word.
#[inline(always)]
fn widen_f16<S: Simd>(simd: S, word: S::u32s) -> S::f32s {
    let shifted = simd.wrapping_dyn_shr_u32s(word, simd.splat_u32s(3));
    let magnitude = simd.and_u32s(shifted, simd.splat_u32s(0x0fff_e000));
    let sign = simd.and_u32s(word, simd.splat_u32s(0x8000_0000));
    let scaled = simd.mul_f32s(simd.transmute_f32s_u32s(magnitude), simd.splat_f32s(TWO_TO_112));
    simd.transmute_f32s_u32s(simd.or_u32s(simd.transmute_u32s_f32s(scaled), sign))
}

const TWO_TO_112: f32 = f32::from_bits((112 + 127) << 23);

/// One panel times one tile of M tokens.
struct Tile<'a, P, const M: usize = 1> {
    panel: &'a [Line<u32>],
    /// Fetched into cache meanwhile; as long as `panel`.
    ahead: &'a [Line<u32>],
    x: &'a [[f32; M]],
    /// `[token][2]`
    out: &'a mut [Line<f32>],
    pair: std::marker::PhantomData<P>,
}

impl<P: Pair> Tile<'_, P> {
    fn run(arch: Arch, [panel, ahead]: [&[Line<u32>]; 2], x: &[f32], out: &mut [Line<f32>]) {
        macro_rules! tile {
            ($m:literal) => {
                arch.dispatch(Tile::<P, $m> { panel, ahead, x: x.as_chunks().0, out, pair: std::marker::PhantomData })
            };
        }
        match out.len() / 2 {
            1 => tile!(1),
            2 => tile!(2),
            3 => tile!(3),
            4 => tile!(4),
            5 => tile!(5),
            6 => tile!(6),
            7 => tile!(7),
            8 => tile!(8),
            tokens => unreachable!("a tile of {tokens} tokens"),
        }
    }
}

impl<P: Pair, const M: usize> WithSimd for Tile<'_, P, M> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for part in 0..LANES / S::F32_LANES {
            let mut sums = [[simd.splat_f32s(0.0); 2]; M];
            let columns = self.panel.chunks_exact(P::LINES).zip(self.ahead.chunks_exact(P::LINES));
            for ((column, ahead), x) in columns.zip(self.x) {
                prefetch(ahead);
                let (low, high) = P::widen(simd, column, part);
                for m in 0..M {
                    let x = simd.splat_f32s(x[m]);
                    sums[m][0] = simd.mul_add_e_f32s(low, x, sums[m][0]);
                    sums[m][1] = simd.mul_add_e_f32s(high, x, sums[m][1]);
                }
            }
            for (lines, sums) in self.out.chunks_exact_mut(2).zip(sums) {
                for (line, sum) in lines.iter_mut().zip(sums) {
                    S::as_mut_simd_f32s(line).0[part] = sum;
                }
            }
        }
    }
}
