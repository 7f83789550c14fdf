//! The products of `wide_linear.cu` and `split_linear.cu`: which there are, what each takes and how one is launched.

use super::Geometry;

/// An entry of either file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wide {
    pub entry: &'static str,
    /// y = silu of the first half of the product, times the second.
    pub gated: bool,
    /// Rows of x of a tile.
    rows: u32,
    /// Rows of weights of a tile.
    columns: u32,
    division: Division,
}

/// How tiles are given to blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Division {
    /// `wide_linear.cu`: as many blocks as multiprocessors take one pair of row tiles after another.
    Persistent,
    /// `split_linear.cu`: a cluster for each tile, or pair of them; its blocks divide k.
    Clusters { pairs: Pairs, split: u32 },
}

/// Tiles of which each block brings a half of what both need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pairs {
    Alone,
    Rows,
    Columns,
}

/// Elements of k that a block takes at a time: a row of 128 bytes.
const DEPTH: u32 = 64;
/// Of `wide_linear.cu`. Below this many rows blocks compute more of nothing than other kernels take.
const ROWS_MIN: usize = 192;
const CLUSTER: u32 = 2;
const STAGES: u32 = 4;
const THREADS: u32 = 384;
/// Of `split_linear.cu`: room for the ring of a block that has a multiprocessor to itself, and of one that does not.
const ROOM: u32 = 231_168;
const LIGHT: u32 = 108_544;
const SPLIT_THREADS: u32 = 288;
/// Blocks of `split_linear.cu` at a time on the smallest Hopper card that is sold as one; and fewer leave most of it idle.
const BLOCKS_MOST: usize = 132;
const BLOCKS_LEAST: usize = 24;

const fn wide(entry: &'static str, gated: bool, columns: u32) -> Wide {
    Wide { entry, gated, rows: 128, columns, division: Division::Persistent }
}

const fn split(entry: &'static str, gated: bool, [rows, columns]: [u32; 2], pairs: Pairs, split: u32) -> Wide {
    Wide { entry, gated, rows, columns, division: Division::Clusters { pairs, split } }
}

/// Every entry, to be measured once per shape beside cuBLASLt's algorithms.
pub const WIDE: [Wide; 18] = [
    wide("wide_gated_n256", true, 256),
    wide("wide_gated_n224", true, 224),
    wide("wide_plain_n256", false, 256),
    wide("wide_plain_n192", false, 192),
    split("split_gated_m128_n256_columns_s1", true, [128, 256], Pairs::Columns, 1),
    split("split_gated_m128_n128_columns_s1", true, [128, 128], Pairs::Columns, 1),
    split("split_gated_m64_n256_s1", true, [64, 256], Pairs::Alone, 1),
    split("split_gated_m64_n64_s1", true, [64, 64], Pairs::Alone, 1),
    split("split_plain_m128_n256_rows_s4", false, [128, 256], Pairs::Rows, 4),
    split("split_plain_m128_n192_rows_s2", false, [128, 192], Pairs::Rows, 2),
    split("split_plain_m128_n256_rows_s2", false, [128, 256], Pairs::Rows, 2),
    split("split_plain_m128_n128_rows_s2", false, [128, 128], Pairs::Rows, 2),
    split("split_plain_m128_n192_columns_s4", false, [128, 192], Pairs::Columns, 4),
    split("split_plain_m128_n128_s4", false, [128, 128], Pairs::Alone, 4),
    split("split_plain_m64_n256_s8", false, [64, 256], Pairs::Alone, 8),
    split("split_plain_m64_n192_s4", false, [64, 192], Pairs::Alone, 4),
    split("split_plain_m64_n64_s8", false, [64, 64], Pairs::Alone, 8),
    split("split_plain_m64_n64_s4", false, [64, 64], Pairs::Alone, 4),
];

impl Wide {
    /// Whether it computes x `[rows, k]` W `[n, k]`^T.
    pub const fn takes(&self, rows: usize, n: usize, k: usize) -> bool {
        let whole = if self.gated { 16 } else { 8 };
        if rows == 0 || n == 0 || !n.is_multiple_of(whole) || k == 0 || !k.is_multiple_of(8) {
            return false;
        }
        match self.division {
            Division::Persistent => rows >= ROWS_MIN,
            Division::Clusters { split, .. } => {
                let blocks = self.blocks(rows as u32, if self.gated { n / 2 } else { n } as u32) as usize;
                let most = if self.is_light() { 2 * BLOCKS_MOST } else { BLOCKS_MOST };
                blocks >= BLOCKS_LEAST && blocks <= most && k >= (DEPTH * split) as usize
            }
        }
    }

    /// The `.cu` file.
    pub const fn file(&self) -> &'static str {
        match self.division {
            Division::Persistent => "wide_linear",
            Division::Clusters { .. } => "split_linear",
        }
    }

    /// Whether two blocks of it fit a multiprocessor.
    const fn is_light(&self) -> bool {
        self.columns <= 64
    }

    const fn pairs(&self) -> Pairs {
        match self.division {
            Division::Persistent => Pairs::Rows,
            Division::Clusters { pairs, .. } => pairs,
        }
    }

    const fn cluster(&self) -> u32 {
        match self.division {
            Division::Persistent => CLUSTER,
            Division::Clusters { pairs: Pairs::Alone, split } => split,
            Division::Clusters { split, .. } => 2 * split,
        }
    }

    /// Columns of y of a tile.
    const fn width(&self) -> u32 {
        if self.gated { self.columns / 2 } else { self.columns }
    }

    /// Of `split_linear.cu`: clusters for all tiles, times their blocks.
    const fn blocks(&self, rows: u32, width: u32) -> u32 {
        let (of_rows, of_columns) = match self.pairs() {
            Pairs::Alone => (1, 1),
            Pairs::Rows => (2, 1),
            Pairs::Columns => (1, 2),
        };
        rows.div_ceil(self.rows * of_rows) * width.div_ceil(self.width() * of_columns) * self.cluster()
    }

    /// Rows of a box of x: each block of a pair of column tiles brings half of a tile's.
    pub const fn x_box_rows(&self) -> u32 {
        if matches!(self.pairs(), Pairs::Columns) { self.rows / 2 } else { self.rows }
    }

    /// Rows of a box of weights: half of a tile's, one of gates and one of ups.
    pub const fn box_rows(&self) -> u32 {
        self.columns / 2
    }

    /// The ring, barriers, room to begin at a multiple of 1,024, and of `wide_linear.cu` 16 rows of results for each of
    /// eight warps.
    pub const fn shared_bytes(&self) -> u32 {
        let stage = (self.rows + self.columns) * 2 * DEPTH;
        match self.division {
            Division::Persistent => STAGES * stage + 8 * 4096 + STAGES * 16 + 8 + 1024,
            Division::Clusters { .. } => {
                let stages = if self.is_light() { LIGHT } else { ROOM } / stage;
                stages * (stage + 16) + 1024
            }
        }
    }

    /// The launch for `rows` rows and `width` columns of y.
    pub const fn geometry(&self, rows: u32, width: u32, multiprocessors: u32) -> Geometry {
        let (blocks, block) = match self.division {
            Division::Persistent => (multiprocessors / CLUSTER * CLUSTER, THREADS),
            Division::Clusters { .. } => (self.blocks(rows, width), SPLIT_THREADS),
        };
        let shared_bytes = self.shared_bytes();
        Geometry { grid: [1, blocks, 1], block, shared_bytes, overlap: true, cluster: self.cluster() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(file: &str) -> &'static str {
        super::super::file(file).map_or("", |f| f.body)
    }

    #[test]
    fn every_entry_fits_a_multiprocessor_and_its_file_knows_the_same_sizes() {
        for entry in WIDE {
            let (name, columns) = (entry.entry, entry.columns);
            let most = if entry.is_light() { 113 << 10 } else { 227 << 10 };
            assert!(entry.shared_bytes() <= most, "{name}");
            let after = if entry.gated { "GATED" } else { "PLAIN" };
            let line = match entry.division {
                Division::Persistent => format!("WIDE({name}, {after}, {columns})"),
                Division::Clusters { pairs, split } => {
                    let pairs = match pairs {
                        Pairs::Alone => "ALONE",
                        Pairs::Rows => "ROW_PAIRS",
                        Pairs::Columns => "COLUMN_PAIRS",
                    };
                    format!("SPLIT({name}, {after}, {}, {columns}, {pairs}, {split})", entry.rows)
                }
            };
            assert!(body(entry.file()).contains(&line), "{line}");
            assert!(entry.cluster() <= 8, "{name}");
        }
        let sizes =
            [("BLOCK_ROWS", 128), ("DEPTH", DEPTH), ("CLUSTER", CLUSTER), ("STAGES", STAGES), ("THREADS", THREADS)];
        for (name, value) in sizes {
            assert!(body("wide_linear").contains(&format!("#define {name} {value}")), "{name}");
        }
        for (name, value) in [("DEPTH", DEPTH), ("THREADS", SPLIT_THREADS), ("ROOM", ROOM), ("LIGHT", LIGHT)] {
            assert!(body("split_linear").contains(&format!("#define {name} {value} ")) || name == "THREADS", "{name}");
        }
    }

    #[test]
    fn shapes_that_the_copy_engine_cannot_take_are_left_to_others() {
        let [gated, _, plain, ..] = WIDE;
        assert!(gated.takes(520, 28_672, 4096) && plain.takes(8183, 1152, 896));
        assert!(!gated.takes(520, 24, 4096) && plain.takes(520, 24, 4096));
        assert!(!plain.takes(520, 24, 4092) && !plain.takes(191, 24, 4096));
    }

    #[test]
    fn clusters_are_for_what_fits_the_card_once() {
        let of = |name: &str| WIDE.into_iter().find(|w| w.entry == name);
        let Some(down) = of("split_plain_m128_n256_rows_s4") else { panic!("no such entry") };
        assert!(down.takes(256, 4096, 14_336) && !down.takes(512, 4096, 14_336) && !down.takes(256, 4096, 128));
        assert_eq!((down.geometry(256, 4096, 132).grid, down.geometry(256, 4096, 132).cluster), ([1, 128, 1], 8));
        let Some(gated) = of("split_gated_m64_n64_s1") else { panic!("no such entry") };
        assert!(gated.takes(64, 9728, 896) && !gated.takes(128, 9728, 896) && !gated.takes(64, 28_672, 4096));
        assert_eq!(gated.geometry(64, 4864, 132).grid, [1, 152, 1]);
    }
}
