//! The products of `wide_linear.cu`: which there are, what each takes and how one is launched.

use super::Geometry;

/// An entry of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wide {
    pub entry: &'static str,
    /// y = silu of the first half of the product, times the second.
    pub gated: bool,
    /// Rows of weights of a tile.
    columns: u32,
}

/// Rows of x of a tile; the height of its boxes.
pub const WIDE_ROWS: u32 = 128;
/// Below this many rows blocks compute more of nothing than other kernels take.
const ROWS_MIN: usize = 256;
const CLUSTER: u32 = 2;
const STAGES: u32 = 4;
const THREADS: u32 = 384;

const fn wide(entry: &'static str, gated: bool, columns: u32) -> Wide {
    Wide { entry, gated, columns }
}

/// Every entry, to be measured once per shape beside cuBLASLt's algorithms.
pub const WIDE: [Wide; 3] =
    [wide("wide_gated_n256", true, 256), wide("wide_plain_n256", false, 256), wide("wide_plain_n192", false, 192)];

impl Wide {
    /// Whether it computes x `[rows, k]` W `[n, k]`^T.
    pub const fn takes(&self, rows: usize, n: usize, k: usize) -> bool {
        let whole = if self.gated { 16 } else { 8 };
        rows >= ROWS_MIN && n > 0 && n.is_multiple_of(whole) && k > 0 && k.is_multiple_of(8)
    }

    /// Rows of a box of weights: each block of a cluster brings half of a tile's.
    pub const fn box_rows(&self) -> u32 {
        self.columns / CLUSTER
    }

    /// A ring of tiles 64 deep, 16 rows of results for each of eight warps, barriers, and room to begin at a multiple of
    /// 1,024.
    pub const fn shared_bytes(&self) -> u32 {
        STAGES * (WIDE_ROWS + self.columns) * 128 + 8 * 4096 + STAGES * 16 + 1024
    }

    /// A block a multiprocessor, however many tiles there are.
    pub const fn geometry(&self, multiprocessors: u32) -> Geometry {
        let blocks = multiprocessors / CLUSTER * CLUSTER;
        let shared_bytes = self.shared_bytes();
        Geometry { grid: [1, blocks, 1], block: THREADS, shared_bytes, overlap: true, cluster: CLUSTER }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_fits_a_multiprocessor_and_its_file_knows_the_same_sizes() {
        let source = super::super::file("wide_linear").map_or("", |f| f.body);
        for entry in WIDE {
            assert!(entry.shared_bytes() <= 227 << 10, "{}", entry.entry);
            let after = if entry.gated { "GATED" } else { "PLAIN" };
            assert!(source.contains(&format!("WIDE({}, {after}, {})", entry.entry, entry.columns)));
        }
        for (name, value) in [("BLOCK_ROWS", WIDE_ROWS), ("CLUSTER", CLUSTER), ("STAGES", STAGES), ("THREADS", THREADS)]
        {
            assert!(source.contains(&format!("#define {name} {value}\n")), "{name}");
        }
    }

    #[test]
    fn shapes_that_the_copy_engine_cannot_take_are_left_to_others() {
        let [gated, plain, _] = WIDE;
        assert!(gated.takes(520, 28_672, 4096) && plain.takes(8183, 1152, 896));
        assert!(!gated.takes(520, 24, 4096) && plain.takes(520, 24, 4096));
        assert!(!plain.takes(520, 24, 4092) && !plain.takes(255, 24, 4096));
    }
}
