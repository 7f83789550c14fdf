//! The products of `fused_linear.cu` and `tile_linear.cu`: which there are, what each takes, how one is launched and which is used when.

use super::Geometry;

/// What is done with a product's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum After {
    /// Bias and residual are added.
    Plain,
    /// silu of the first half, times the second.
    Gated,
    /// Queries turned, keys and values into the cache.
    Rotated,
}

/// An entry of either file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fused {
    pub entry: &'static str,
    pub after: After,
    /// Rows of x of a block; of the whole product for `fused_linear.cu`.
    pub rows_max: u32,
    /// Columns (pairs of columns) of a block.
    pub columns: u32,
    warps: u32,
    /// Blocks of a cluster of `tile_linear.cu`; 0 for `fused_linear.cu`, which takes any number.
    tile: u32,
}

/// A product as a kernel of this file sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FusedShape {
    pub after: After,
    pub rows: u32,
    /// Of y; packed heads for [`After::Rotated`].
    pub n: u32,
    pub k: u32,
    /// With an RMS norm of x.
    pub norm: bool,
    /// 0 where nothing turns.
    pub head_dim: u32,
}

const fn gemv(entry: &'static str, after: After) -> Fused {
    Fused { entry, after, rows_max: 1, columns: if matches!(after, After::Plain) { 2 } else { 1 }, warps: 4, tile: 0 }
}

const fn skinny(entry: &'static str, rows_max: u32, after: After, tiles: u32, warps: u32) -> Fused {
    let columns = if matches!(after, After::Plain) { 16 * tiles } else { 8 * tiles };
    Fused { entry, after, rows_max, columns, warps, tile: 0 }
}

const fn tile(entry: &'static str, rows_max: u32, after: After, clusters: u32) -> Fused {
    let columns = if matches!(after, After::Plain) { TILE_N } else { TILE_N / 2 };
    Fused { entry, after, rows_max, columns, warps: 8, tile: clusters }
}

/// Rows of weights of a block of `tile_linear.cu`.
const TILE_N: u32 = 64;
/// Elements of k that a block of `tile_linear.cu` takes at a time, and how many such tiles are under way.
const TILE_K: u32 = 64;
const TILE_STAGES: u32 = 5;

/// Every entry, in the order of the files.
pub const FUSED: [Fused; 15] = [
    gemv("fused_gemv_plain", After::Plain),
    gemv("fused_gemv_gated", After::Gated),
    gemv("fused_gemv_rotated", After::Rotated),
    skinny("fused_m8_plain_t1_w8", 8, After::Plain, 1, 8),
    skinny("fused_m8_plain_t1_w16", 8, After::Plain, 1, 16),
    skinny("fused_m8_gated_t2_w8", 8, After::Gated, 2, 8),
    skinny("fused_m8_rotated_t1_w16", 8, After::Rotated, 1, 16),
    skinny("fused_m16_plain_t1_w16", 16, After::Plain, 1, 16),
    skinny("fused_m16_gated_t2_w8", 16, After::Gated, 2, 8),
    skinny("fused_m16_rotated_t1_w8", 16, After::Rotated, 1, 8),
    tile("tile_m32_plain_c8", 32, After::Plain, 8),
    tile("tile_m32_gated_c2", 32, After::Gated, 2),
    tile("tile_m32_rotated_c8", 32, After::Rotated, 8),
    tile("tile_m64_plain_c8", 64, After::Plain, 8),
    tile("tile_m64_rotated_c8", 64, After::Rotated, 8),
];

impl Fused {
    pub fn takes(&self, shape: &FusedShape, clusters: u32) -> bool {
        let one_row = self.rows_max == 1;
        let whole = one_row || self.units(shape.n).is_multiple_of(self.columns);
        let k = shape.k.is_multiple_of(if self.tile > 0 {
            TILE_K
        } else if one_row {
            8
        } else {
            32
        });
        let heads = self.after != After::Rotated || (shape.head_dim / 2).is_multiple_of(self.columns);
        let split = clusters == self.tile
            || (self.tile == 0 && clusters == 1)
            || (self.tile == 0 && !one_row && self.after == After::Plain && !shape.norm && clusters <= 8);
        let rows = shape.rows > 0 && (self.tile > 0 || shape.rows <= self.rows_max);
        self.after == shape.after && rows && whole && k && heads && split
    }

    /// Whether it has x through L1, not in shared memory.
    pub const fn reads_through_l1(&self) -> bool {
        self.tile == 0
    }

    /// The `.cu` file.
    pub const fn file(&self) -> &'static str {
        if self.tile > 0 { "tile_linear" } else { "fused_linear" }
    }

    /// Columns of y, or pairs of them.
    const fn units(&self, n: u32) -> u32 {
        if matches!(self.after, After::Rotated) { n / 2 } else { n }
    }

    pub const fn shared_bytes(&self) -> u32 {
        if self.rows_max == 1 {
            return 0;
        }
        if self.tile > 0 {
            return TILE_STAGES * (TILE_N + self.rows_max + 1) * TILE_K * 2 + self.rows_max * (TILE_N + 5) * 4;
        }
        let weight_rows = if matches!(self.after, After::Plain) { self.columns } else { 2 * self.columns };
        let m = self.rows_max;
        4 * (self.warps * (weight_rows * (m + 1) + m) + m + self.columns * m)
    }

    /// The launch for `rows` rows and `n` columns of y and clusters of so many blocks, among which k is divided.
    pub fn geometry(&self, rows: u32, n: u32, clusters: u32) -> Geometry {
        Geometry {
            grid: [self.units(n).div_ceil(self.columns), clusters, rows.div_ceil(self.rows_max)],
            block: 32 * self.warps,
            shared_bytes: self.shared_bytes(),
            overlap: true,
            cluster: clusters,
        }
    }
}

/// Index into [`FUSED`] and blocks of a cluster, more than one only when `clustered`; `None` where separate kernels are faster. From measurements on an H200.
pub fn fused_for(shape: &FusedShape, clustered: bool) -> Option<(usize, u32)> {
    let small = shape.k <= 2048;
    let narrow = shape.n <= 2048;
    let (entry, clusters) = match (shape.after, shape.rows) {
        (After::Plain, 1) if shape.norm && !small => ("fused_gemv_plain", 1),
        (After::Gated, 1) if !small => ("fused_gemv_gated", 1),
        (After::Rotated, 1) => ("fused_gemv_rotated", 1),
        // More rows of longer ones: the separate products reach the memory's rate.
        (After::Gated | After::Rotated, _) if !small => return None,
        (After::Plain, _) if shape.norm || !narrow => return None,
        (After::Gated, 1..=8) => ("fused_m8_gated_t2_w8", 1),
        (After::Gated, 9..=16) => ("fused_m16_gated_t2_w8", 1),
        (After::Gated, 17..=32) => ("tile_m32_gated_c2", 2),
        (After::Rotated, 2..=8) => ("fused_m8_rotated_t1_w16", 1),
        (After::Rotated, 9..=16) => ("fused_m16_rotated_t1_w8", 1),
        (After::Rotated, 17..=32) => ("tile_m32_rotated_c8", 8),
        (After::Rotated, 33..=64) => ("tile_m64_rotated_c8", 8),
        (After::Plain, 1..=8) if small => ("fused_m8_plain_t1_w8", 1),
        (After::Plain, 1..=8) => ("fused_m8_plain_t1_w16", 2),
        (After::Plain, 9..=16) => ("fused_m16_plain_t1_w16", if small { 1 } else { 2 }),
        (After::Plain, 17..=32) if small => ("tile_m32_plain_c8", 8),
        (After::Plain, 33..=64) if small => ("tile_m64_plain_c8", 8),
        _ => return None,
    };
    let clusters = if clustered { clusters } else { 1 }; // which some do not take
    let index = FUSED.iter().position(|f| f.entry == entry)?;
    FUSED[index].takes(shape, clusters).then_some((index, clusters))
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    fn shape(after: After, rows: u32, n: u32, k: u32) -> FusedShape {
        FusedShape { after, rows, n, k, norm: after != After::Plain, head_dim: 64 }
    }

    #[test]
    fn every_product_is_an_entry_and_fits_a_block() {
        let entries = ["fused_linear", "tile_linear"].into_iter().filter_map(file).flat_map(|f| f.entries.to_vec());
        assert_eq!(entries.collect::<Vec<_>>(), FUSED.map(|f| f.entry));
        for f in FUSED {
            assert!(f.shared_bytes() <= 160 << 10, "{}: {}", f.entry, f.shared_bytes());
            let shape = |rows| FusedShape { norm: false, ..shape(f.after, rows, 4096, 4096) };
            assert!(f.takes(&shape(f.rows_max), f.tile.max(1)));
            assert_eq!(f.takes(&shape(f.rows_max + 1), f.tile.max(1)), f.tile > 0);
        }
    }

    #[test]
    fn the_choice_takes_what_it_is_asked_for() {
        for rows in 1..=70 {
            for (after, n, k) in [
                (After::Rotated, 1152, 896),
                (After::Plain, 896, 896),
                (After::Plain, 896, 4864),
                (After::Gated, 4864, 896),
                (After::Rotated, 6144, 4096),
                (After::Gated, 14_336, 4096),
            ] {
                let Some((index, clusters)) = fused_for(&shape(after, rows, n, k), true) else { continue };
                assert!(FUSED[index].takes(&shape(after, rows, n, k), clusters));
                assert!(FUSED[index].geometry(rows, n, clusters).grid[1] == clusters);
            }
        }
        assert_eq!(fused_for(&shape(After::Gated, 2, 4865, 896), true), None, "not whole blocks");
        assert_eq!(fused_for(&shape(After::Gated, 65, 4864, 896), true), None);
        assert_eq!(fused_for(&shape(After::Gated, 32, 4864, 896), false), None, "needs clusters");
        let down = fused_for(&shape(After::Plain, 8, 896, 4864), true);
        assert_eq!(down.map(|(i, c)| FUSED[i].geometry(8, 896, c).grid), Some([56, 2, 1]));
    }
}
