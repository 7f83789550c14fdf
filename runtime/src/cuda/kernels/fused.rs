//! The products of `fused_linear.cu`: which there are, what each takes, how one is launched and which is used when.

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

/// An entry of `fused_linear.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fused {
    pub entry: &'static str,
    pub after: After,
    /// Rows of x.
    pub rows_max: u32,
    /// Columns (pairs of columns) of a block.
    pub columns: u32,
    warps: u32,
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
    Fused { entry, after, rows_max: 1, columns: if matches!(after, After::Plain) { 2 } else { 1 }, warps: 4 }
}

const fn skinny(entry: &'static str, rows_max: u32, after: After, tiles: u32, warps: u32) -> Fused {
    let columns = if matches!(after, After::Plain) { 16 * tiles } else { 8 * tiles };
    Fused { entry, after, rows_max, columns, warps }
}

/// Every entry, in the order of the file.
pub const FUSED: [Fused; 21] = [
    gemv("fused_gemv_plain", After::Plain),
    gemv("fused_gemv_gated", After::Gated),
    gemv("fused_gemv_rotated", After::Rotated),
    skinny("fused_m8_plain_t1_w8", 8, After::Plain, 1, 8),
    skinny("fused_m8_plain_t1_w16", 8, After::Plain, 1, 16),
    skinny("fused_m8_plain_t2_w8", 8, After::Plain, 2, 8),
    skinny("fused_m8_plain_t2_w16", 8, After::Plain, 2, 16),
    skinny("fused_m8_gated_t2_w8", 8, After::Gated, 2, 8),
    skinny("fused_m8_gated_t1_w8", 8, After::Gated, 1, 8),
    skinny("fused_m8_rotated_t1_w8", 8, After::Rotated, 1, 8),
    skinny("fused_m8_rotated_t1_w16", 8, After::Rotated, 1, 16),
    skinny("fused_m8_rotated_t2_w16", 8, After::Rotated, 2, 16),
    skinny("fused_m16_plain_t1_w8", 16, After::Plain, 1, 8),
    skinny("fused_m16_plain_t1_w16", 16, After::Plain, 1, 16),
    skinny("fused_m16_plain_t2_w8", 16, After::Plain, 2, 8),
    skinny("fused_m16_gated_t2_w8", 16, After::Gated, 2, 8),
    skinny("fused_m16_rotated_t1_w8", 16, After::Rotated, 1, 8),
    skinny("fused_m32_plain_t1_w8", 32, After::Plain, 1, 8),
    skinny("fused_m32_plain_t1_w16", 32, After::Plain, 1, 16),
    skinny("fused_m32_gated_t2_w8", 32, After::Gated, 2, 8),
    skinny("fused_m32_rotated_t1_w8", 32, After::Rotated, 1, 8),
];

impl Fused {
    pub fn takes(&self, shape: &FusedShape, clusters: u32) -> bool {
        let one_row = self.rows_max == 1;
        let whole = one_row || self.units(shape.n).is_multiple_of(self.columns);
        let k = shape.k.is_multiple_of(if one_row { 8 } else { 32 });
        let heads = self.after != After::Rotated || (shape.head_dim / 2).is_multiple_of(self.columns);
        let split = clusters == 1 || (!one_row && self.after == After::Plain && !shape.norm && clusters <= 8);
        self.after == shape.after && (1..=self.rows_max).contains(&shape.rows) && whole && k && heads && split
    }

    /// Columns of y, or pairs of them.
    const fn units(&self, n: u32) -> u32 {
        if matches!(self.after, After::Rotated) { n / 2 } else { n }
    }

    pub const fn shared_bytes(&self) -> u32 {
        if self.rows_max == 1 {
            return 0;
        }
        let weight_rows = if matches!(self.after, After::Plain) { self.columns } else { 2 * self.columns };
        let m = self.rows_max;
        4 * (self.warps * (weight_rows * (m + 1) + m) + m + self.columns * m)
    }

    /// The launch for `n` columns of y and clusters of so many blocks, among which k is divided.
    pub fn geometry(&self, n: u32, clusters: u32) -> Geometry {
        Geometry {
            grid: [self.units(n).div_ceil(self.columns), clusters, 1],
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
    let (entry, clusters) = match (shape.after, shape.rows) {
        (After::Plain, 1) if shape.norm && !small => ("fused_gemv_plain", 1),
        (After::Gated, 1) if !small => ("fused_gemv_gated", 1),
        (After::Rotated, 1) if !small => ("fused_gemv_rotated", 1),
        (After::Plain, 1..=8) if shape.norm => ("fused_m8_plain_t2_w8", 1),
        (After::Gated, 1..=8) => ("fused_m8_gated_t2_w8", 1),
        (After::Rotated, 1..=8) if small => ("fused_m8_rotated_t1_w8", 1),
        (After::Rotated, 1..=8) => ("fused_m8_rotated_t2_w16", 1),
        (After::Plain, 9..=16) if shape.norm => ("fused_m16_plain_t2_w8", 1),
        (After::Gated, 9..=16) => ("fused_m16_gated_t2_w8", 1),
        (After::Rotated, 9..=16) => ("fused_m16_rotated_t1_w8", 1),
        (After::Gated, 17..=32) if small => ("fused_m32_gated_t2_w8", 1),
        (After::Rotated, 17..=32) if small => ("fused_m32_rotated_t1_w8", 1),
        (After::Plain, rows @ 1..=32) if !shape.norm && shape.n <= 2048 => {
            let clusters = if small || !clustered { 1 } else { 4 };
            (["fused_m8_plain_t1_w8", "fused_m16_plain_t1_w8", "fused_m32_plain_t1_w8"][rows.div_ceil(16) as usize - usize::from(rows <= 8)], clusters)
        }
        _ => return None,
    };
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
        assert_eq!(file("fused_linear").map(|f| f.entries.to_vec()), Some(FUSED.map(|f| f.entry).to_vec()));
        for f in FUSED {
            assert!(f.shared_bytes() <= 96 << 10, "{}: {}", f.entry, f.shared_bytes());
            assert!(f.takes(&shape(f.after, f.rows_max, 4096, 4096), 1));
            assert!(!f.takes(&shape(f.after, f.rows_max + 1, 4096, 4096), 1));
        }
    }

    #[test]
    fn the_choice_takes_what_it_is_asked_for() {
        for rows in 1..=40 {
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
                assert!(FUSED[index].geometry(n, clusters).grid[1] == clusters);
            }
        }
        assert_eq!(fused_for(&shape(After::Gated, 2, 4865, 896), true), None, "not whole blocks");
        assert_eq!(fused_for(&shape(After::Gated, 64, 4864, 896), true), None);
        let down = fused_for(&shape(After::Plain, 8, 896, 4864), true);
        assert_eq!(down.map(|(i, c)| FUSED[i].geometry(896, c).grid), Some([56, 4, 1]));
    }
}
