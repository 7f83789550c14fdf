//! Blocks, threads and shared memory of each kernel's launch, from shapes alone.
//!
//! Every kernel waits for the one before it before it touches what that one wrote, so all may overlap with it.

use super::{Geometry, PREFILL_ROWS, head_bests, prefill_key_tile};

/// Widest row that a norm holds in registers: 1,024 threads of 4 vectors of 8.
pub const NORM_WIDTH_MAX: u32 = 32_768;
/// Blocks of `sample_scan`.
pub const SCAN_BLOCKS: u32 = 1024;
const WARP: u32 = 32;
/// From here on a row is work enough for a warp.
const MANY_ROWS: u32 = 1024;

const fn plain(grid: [u32; 3], block: u32) -> Geometry {
    Geometry { grid, block, shared_bytes: 0, overlap: true, cluster: 1 }
}

/// Threads for rows of `width` elements, 8 a thread, in whole warps.
fn row_threads(width: u32, least: u32, most: u32) -> u32 {
    width.div_ceil(8).next_multiple_of(WARP).clamp(least, most)
}

pub fn embed(tokens: u32, width: u32) -> Geometry {
    plain([tokens, 1, 1], row_threads(width, 32, 256))
}

pub fn gather(rows: u32, width: u32) -> Geometry {
    plain([rows, 1, 1], row_threads(width, 32, 256))
}

/// `rms_norm`, `rms_norm_add`, `add_rms_norm`. `None` when the row does not fit a block's registers.
pub fn rms_norm(rows: u32, width: u32) -> Option<Geometry> {
    if rows >= MANY_ROWS && width <= 1024 {
        return Some(plain([rows.div_ceil(4), 1, 1], 4 * WARP)); // a warp for each row
    }
    // Few rows: one vector a thread, for latency. Many: two, so that more rows are under way.
    let vectors_per_thread = if rows >= 256 && width >= 2_048 { 2 } else { 1 };
    (width <= NORM_WIDTH_MAX).then(|| plain([rows, 1, 1], row_threads(width.div_ceil(vectors_per_thread), 32, 1024)))
}

/// `qk_norm_rope_kv_write`: a warp for four heads, or of many tokens for each.
pub fn rope(tokens: u32, heads: u32, kv_heads: u32) -> Geometry {
    if tokens >= MANY_ROWS && heads + 2 * kv_heads > 4 {
        return plain([tokens.div_ceil(4), 1, 1], 128);
    }
    plain([(tokens * (heads + 2 * kv_heads)).div_ceil(16), 1, 1], 128)
}

/// `silu_mul` and its kin; `width` of the result.
pub fn gated_act(rows: u32, width: u32) -> Geometry {
    let threads = row_threads(width, 32, 256);
    plain([width.div_ceil(8).div_ceil(threads), rows, 1], threads)
}

/// Blocks along the rows of a step's prefill chunks.
pub fn prefill_tiles(query_lens: impl IntoIterator<Item = u32>) -> u32 {
    query_lens.into_iter().map(|rows| rows.div_ceil(PREFILL_ROWS)).sum()
}

/// The prefill attention of a card: its entry, and how to launch it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefill {
    /// Any card.
    WarpProducts { compute_capability: (i32, i32) },
    /// Hopper's warpgroup products; a grid of as many blocks as there are multiprocessors takes one item after another.
    WarpgroupProducts { multiprocessors: u32 },
}

impl Prefill {
    /// The fastest for a card. Both kernels take the same arguments, but for [`Self::takes_maps`].
    pub fn new(head_dim: u32, compute_capability: (i32, i32), multiprocessors: u32) -> Self {
        match (compute_capability.0, head_dim) {
            (9, 64 | 128) => Self::WarpgroupProducts { multiprocessors },
            _ => Self::WarpProducts { compute_capability },
        }
    }

    pub const fn entry(self) -> &'static str {
        match self {
            Self::WarpProducts { .. } => "attn_prefill",
            Self::WarpgroupProducts { .. } => "attn_prefill_wgmma",
        }
    }

    /// Maps of the caches in place of the caches themselves.
    pub const fn takes_maps(self) -> bool {
        matches!(self, Self::WarpgroupProducts { .. })
    }

    /// `tiles` from [`prefill_tiles`]; more do no harm.
    pub fn geometry(self, tiles: u32, heads: u32, head_dim: u32) -> Geometry {
        match self {
            Self::WarpProducts { compute_capability } => {
                let shared_bytes = (PREFILL_ROWS + 4 * prefill_key_tile(compute_capability)) * (head_dim + 8) * 2;
                Geometry { shared_bytes, ..plain([heads, tiles, 1], 128) }
            }
            Self::WarpgroupProducts { multiprocessors } => {
                // Queries, two stages of K and V tiles of 128, and what aligning them to 1,024 bytes takes.
                let shared_bytes = (PREFILL_ROWS + 4 * 128) * head_dim * 2 + 1024;
                let blocks = (heads * tiles).min(multiprocessors);
                Geometry { shared_bytes, ..plain([blocks, 1, 1], 384) }
            }
        }
    }
}

pub fn sample(rows: u32) -> Geometry {
    plain([rows, 1, 1], 1024)
}

/// Scratch of the choice of tokens in steps of at most so many rows, u64: the likeliest of parts of rows, from `sample_scan`
/// or from the head.
pub fn bests(rows: usize, vocab: u32) -> usize {
    rows.max(SCAN_BLOCKS as usize).max(head_bests(rows, vocab))
}

/// Blocks that look at one row in `sample_scan`: about eight a multiprocessor in all. Scratch: `rows * parts` u64, at most
/// the larger of `rows` and [`SCAN_BLOCKS`].
pub fn sample_parts(rows: u32) -> u32 {
    (SCAN_BLOCKS / rows.max(1)).clamp(1, 128)
}

pub fn sample_scan(rows: u32) -> Geometry {
    plain([sample_parts(rows), rows, 1], 256)
}

pub fn token_state_reset() -> Geometry {
    plain([1, 1, 1], 1024)
}

/// What a product kernel of `gemv.cu` can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Products {
    pub entry: &'static str,
    /// Rows of x.
    pub rows_max: u32,
    /// n and k must be multiples.
    pub n_multiple: u32,
    pub k_multiple: u32,
    rows_per_block: u32,
    threads: u32,
}

const fn gemv(entry: &'static str, rows_per_block: u32) -> Products {
    Products { entry, rows_max: 1, n_multiple: 1, k_multiple: 8, rows_per_block, threads: 128 }
}

const fn skinny(entry: &'static str, tiles: u32, warps: u32) -> Products {
    let n = 16 * tiles;
    Products { entry, rows_max: 8, n_multiple: n, k_multiple: 32, rows_per_block: n, threads: 32 * warps }
}

impl Products {
    /// Every variant, to be measured once per shape beside cuBLASLt's algorithms.
    pub const ALL: [Self; 11] = [
        gemv("gemv_r1_u4_s1", 4),
        gemv("gemv_r2_u4_s1", 8),
        gemv("gemv_r4_u2_s1", 16),
        gemv("gemv_r1_u4_s4", 1),
        gemv("gemv_r2_u4_s4", 2),
        gemv("gemv_r1_u4_s2", 2),
        skinny("skinny_t1_w4", 1, 4),
        skinny("skinny_t1_w8", 1, 8),
        skinny("skinny_t1_w16", 1, 16),
        skinny("skinny_t2_w8", 2, 8),
        skinny("skinny_t2_w16", 2, 16),
    ];

    pub fn takes(&self, rows: u32, n: u32, k: u32) -> bool {
        rows >= 1 && rows <= self.rows_max && n.is_multiple_of(self.n_multiple) && k.is_multiple_of(self.k_multiple)
    }
}

/// A product kernel's launch for `n` columns of y.
pub fn product(kernel: &Products, n: u32) -> Geometry {
    plain([n.div_ceil(kernel.rows_per_block), 1, 1], kernel.threads)
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    #[test]
    fn norms_hold_a_row_in_registers() {
        for width in [8, 896, 4096, 16_384, NORM_WIDTH_MAX] {
            for rows in [1, 256, 4096] {
                let Some(geometry) = rms_norm(rows, width) else { panic!("{width}") };
                let threads_a_row = geometry.block * geometry.grid[0] / rows;
                assert!(threads_a_row * 8 * 4 >= width, "{width}");
                assert!(geometry.block.is_multiple_of(32) && geometry.block <= 1024);
            }
        }
        assert_eq!(rms_norm(1, 4096).map(|g| g.block), Some(512));
        assert_eq!(rms_norm(1, NORM_WIDTH_MAX + 8), None);
    }

    #[test]
    fn prefill_counts_ragged_tiles_and_fits_a_block() {
        assert_eq!(prefill_tiles([1, 128, 129, 0]), 4);
        let hopper = Prefill::WarpProducts { compute_capability: (9, 0) }.geometry(4, 32, 128);
        assert_eq!((hopper.grid, hopper.shared_bytes), ([32, 4, 1], 104_448));
        let wgmma = Prefill::new(128, (9, 0), 132);
        assert_eq!((wgmma.entry(), wgmma.geometry(4, 32, 128).grid), ("attn_prefill_wgmma", [128, 1, 1]));
        assert_eq!(
            (wgmma.geometry(40, 32, 128).grid, wgmma.geometry(40, 32, 128).shared_bytes),
            ([132, 1, 1], 164_864)
        );
        assert_eq!(Prefill::new(96, (9, 0), 132).entry(), "attn_prefill");
        let ada = Prefill::new(128, (8, 9), 128);
        assert_eq!(ada.entry(), "attn_prefill");
        assert!(ada.geometry(4, 32, 128).shared_bytes <= 99 << 10);
    }

    #[test]
    fn every_product_is_an_entry_and_covers_n() {
        let entries = file("gemv").map(|f| f.entries).unwrap_or_default();
        assert_eq!(Products::ALL.map(|p| p.entry), entries);
        for p in Products::ALL {
            assert!(product(&p, 4096).grid[0] * p.rows_per_block >= 4096);
            assert!(p.takes(1, 4096, 4096) && !p.takes(p.rows_max + 1, 4096, 4096) && !p.takes(1, 4096, 4100));
        }
    }

    #[test]
    fn a_scan_needs_no_more_scratch_than_there_is() {
        assert_eq!([1, 8, 64, 256, 2000].map(sample_parts), [128, 128, 16, 4, 1]);
        assert!((1..4096).all(|rows| (sample_parts(rows) * rows) as usize <= bests(rows as usize, 1)));
        assert_eq!([bests(16, 151_936), bests(512, 151_936)], [1024, 512 * 594]);
    }

    #[test]
    fn grids_cover_their_work() {
        assert_eq!(rope(3, 32, 8).grid, [9, 1, 1]);
        assert_eq!((rope(8191, 32, 8).grid, rms_norm(8191, 896).map(|g| g.grid)), ([2048, 1, 1], Some([2048, 1, 1])));
        assert_eq!((gated_act(7, 14_336).grid, gated_act(7, 14_336).block), ([7, 7, 1], 256));
        assert_eq!(embed(5, 896).block, 128);
        assert_eq!(gather(2, 8).block, 32);
    }
}
