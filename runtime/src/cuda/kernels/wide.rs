//! The products of `wide_linear.cu`, `wide_rotated.cu`, `wide_head.cu` and `split_linear.cu`: which there are, what each
//! takes and how one is launched.

use super::Geometry;

/// An entry of these files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wide {
    pub entry: &'static str,
    pub result: WideResult,
    /// Rows of x of a tile.
    rows: u32,
    /// Rows of weights of a tile.
    columns: u32,
    division: Division,
}

/// What an entry makes of its sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WideResult {
    /// y: the sums, with bias and residual.
    Plain,
    /// y = silu of the first half of the product, times the second.
    Gated,
    /// q rotated, k rotated and v to the cache, of packed heads of so many elements.
    Rotated(u32),
    /// Logits where somebody reads them, and the likeliest token of each part of each row.
    Head,
}

/// How tiles are given to blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Division {
    /// `wide.cuh`: as many blocks as multiprocessors take one pair of row tiles after another.
    Persistent,
    /// `wide.cuh`: the same, where the blocks of a pair have the same rows.
    Beside,
    /// `split_linear.cu`: a cluster for each tile; its blocks divide k.
    Split(u32),
}

/// Elements of k that a block takes at a time: a row of 128 bytes.
const DEPTH: u32 = 64;
/// Of `wide.cuh`. Below this many rows blocks compute more of nothing than other kernels take.
pub const WIDE_ROWS_MIN: usize = 192;
/// Of pairs that have the same rows. Below these the kernels for few rows are faster.
const BESIDE_ROWS: [usize; 2] = [32, 128];
const CLUSTER: u32 = 2;
const STAGES: u32 = 4;
const THREADS: u32 = 384;
/// Of `split_linear.cu`: rows of x and of weights of a tile, and shared memory of which two blocks fit a multiprocessor.
const SPLIT_ROWS: u32 = 64;
const SPLIT_COLUMNS: u32 = 64;
const ROOM: u32 = 114_688;
const SPLIT_THREADS: u32 = 288;
/// Blocks of `split_linear.cu` that run at a time; fewer leave most of the card idle.
const BLOCKS_MOST: u32 = 264;
const BLOCKS_LEAST: u32 = 24;

const fn wide(entry: &'static str, result: WideResult, columns: u32) -> Wide {
    Wide { entry, result, rows: 128, columns, division: Division::Persistent }
}

const fn split(entry: &'static str, result: WideResult, blocks: u32) -> Wide {
    Wide { entry, result, rows: SPLIT_ROWS, columns: SPLIT_COLUMNS, division: Division::Split(blocks) }
}

/// Every entry, to be measured once per shape beside cuBLASLt's algorithms.
pub const WIDE: [Wide; 13] = [
    wide("wide_gated_n256", WideResult::Gated, 256),
    wide("wide_gated_n224", WideResult::Gated, 224),
    wide("wide_gated_n160", WideResult::Gated, 160),
    wide("wide_plain_n256", WideResult::Plain, 256),
    wide("wide_plain_n192", WideResult::Plain, 192),
    wide("wide_head_n256", WideResult::Head, HEAD_COLUMNS),
    Wide { division: Division::Beside, ..wide("wide_head_beside_n256", WideResult::Head, HEAD_COLUMNS) },
    wide("wide_rotated_n192_d64", WideResult::Rotated(64), 192),
    wide("wide_rotated_n64_d64", WideResult::Rotated(64), 64),
    wide("wide_rotated_n256_d128", WideResult::Rotated(128), 256),
    split("split_gated", WideResult::Gated, 1),
    split("split_plain_s4", WideResult::Plain, 4),
    split("split_plain_s8", WideResult::Plain, 8),
];

/// Columns of a part of `wide_head.cu`.
const HEAD_COLUMNS: u32 = 256;

/// Parts of a row of logits of which `wide_head.cu` keeps the likeliest token.
pub const fn head_parts(vocab: u32) -> u32 {
    vocab.div_ceil(HEAD_COLUMNS)
}

/// Tokens that `wide_head.cu` keeps of a step of `rows` at most.
pub const fn head_bests(rows: usize, vocab: u32) -> usize {
    if rows < BESIDE_ROWS[0] { 0 } else { rows * head_parts(vocab) as usize }
}

impl Wide {
    /// Whether it computes x `[rows, k]` W `[n, k]`^T.
    pub const fn takes(&self, rows: usize, n: usize, k: usize) -> bool {
        let whole = match self.result {
            WideResult::Plain => 8,
            WideResult::Gated => 16,
            WideResult::Head => 1,
            WideResult::Rotated(head_dim) => head_dim as usize,
        };
        if rows == 0 || n == 0 || !n.is_multiple_of(whole) || k == 0 || !k.is_multiple_of(8) {
            return false;
        }
        match self.division {
            Division::Persistent => return rows >= WIDE_ROWS_MIN,
            Division::Beside => return rows >= BESIDE_ROWS[0] && rows <= BESIDE_ROWS[1],
            Division::Split(_) => {}
        }
        let blocks = self.blocks(rows as u32, if self.gated() { n / 2 } else { n } as u32);
        blocks >= BLOCKS_LEAST && blocks <= BLOCKS_MOST && k >= (DEPTH * self.split()) as usize
    }

    pub const fn gated(&self) -> bool {
        matches!(self.result, WideResult::Gated)
    }

    /// Whether it finds the likeliest token of each part of a row itself.
    pub const fn chooses(&self) -> bool {
        matches!(self.result, WideResult::Head)
    }

    /// Whether it rotates heads of so many elements and keeps keys and values.
    pub fn rotates(&self, head_dim: u32) -> bool {
        self.result == WideResult::Rotated(head_dim)
    }

    /// The `.cu` file.
    pub const fn file(&self) -> &'static str {
        match (self.division, self.result) {
            (Division::Split(_), _) => "split_linear",
            (_, WideResult::Head) => "wide_head",
            (_, WideResult::Rotated(_)) => "wide_rotated",
            _ => "wide_linear",
        }
    }

    /// Blocks that divide k.
    const fn split(&self) -> u32 {
        if let Division::Split(blocks) = self.division { blocks } else { 1 }
    }

    const fn cluster(&self) -> u32 {
        match self.division {
            Division::Persistent | Division::Beside => CLUSTER,
            Division::Split(blocks) => blocks,
        }
    }

    /// Columns of y of a tile.
    const fn width(&self) -> u32 {
        if self.gated() { self.columns / 2 } else { self.columns }
    }

    /// Of `split_linear.cu`: clusters for all tiles, times their blocks.
    const fn blocks(&self, rows: u32, width: u32) -> u32 {
        rows.div_ceil(self.rows) * width.div_ceil(self.width()) * self.cluster()
    }

    /// Rows of a box of x.
    pub const fn x_box_rows(&self) -> u32 {
        if matches!(self.division, Division::Beside) { self.rows / 2 } else { self.rows }
    }

    /// Rows of a box of weights: half of a tile's, one of gates and one of ups.
    pub const fn box_rows(&self) -> u32 {
        self.columns / 2
    }

    /// The ring, barriers, room to begin at a multiple of 1,024; of `wide.cuh` 16 rows of results for each of eight
    /// warps; of clusters of `split_linear.cu` the parts of the sums.
    pub const fn shared_bytes(&self) -> u32 {
        let stage = (self.rows + self.columns) * 2 * DEPTH;
        if !matches!(self.division, Division::Split(_)) {
            return STAGES * (stage + 16) + 8 * 4096 + 8 + 1024;
        }
        let parts = if self.split() > 1 { 2 * self.rows * (self.columns + 16) * 4 } else { 0 };
        let stages = (ROOM - 2048 - parts) / stage;
        stages * (stage + 16) + parts + 1024
    }

    /// The launch for `rows` rows and `width` columns of y.
    pub const fn geometry(&self, rows: u32, width: u32, multiprocessors: u32) -> Geometry {
        let (blocks, block) = match self.division {
            Division::Persistent | Division::Beside => (multiprocessors / CLUSTER * CLUSTER, THREADS),
            Division::Split(_) => (self.blocks(rows, width), SPLIT_THREADS),
        };
        let shared_bytes = self.shared_bytes();
        Geometry { grid: [1, blocks, 1], block, shared_bytes, overlap: true, cluster: self.cluster() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(file: &str) -> String {
        super::super::file(file).map_or_else(String::new, |f| f.source(None, (9, 0)).text)
    }

    #[test]
    fn every_entry_fits_a_multiprocessor_and_its_file_knows_the_same_sizes() {
        for entry in WIDE {
            let (name, columns) = (entry.entry, entry.columns);
            let most = if matches!(entry.division, Division::Split(_)) { 113 << 10 } else { 227 << 10 };
            assert!(entry.shared_bytes() <= most, "{name}");
            let result = format!("{:?}", entry.result);
            let line = match (entry.division, entry.result) {
                (Division::Beside, _) => format!("HEAD({name}, {columns}, true)"),
                (_, WideResult::Head) => format!("HEAD({name}, {columns})"),
                (_, WideResult::Rotated(head_dim)) => format!("ROTATED({name}, {head_dim}, {columns})"),
                (Division::Persistent, _) => format!("WIDE({name}, {result}, {columns})"),
                _ => format!("SPLIT({name}, {}, {})", result.to_uppercase(), entry.split()),
            };
            assert!(text(entry.file()).contains(&line), "{line}");
            assert!(entry.cluster() <= 8, "{name}");
            if let WideResult::Rotated(head_dim) = entry.result {
                assert!(columns.is_multiple_of(head_dim), "{name}: tiles are whole heads");
            }
        }
        let wide =
            [("BLOCK_ROWS", 128), ("DEPTH", DEPTH), ("CLUSTER", CLUSTER), ("STAGES", STAGES), ("THREADS", THREADS)];
        let split = [
            ("ROWS", SPLIT_ROWS),
            ("DEPTH", DEPTH),
            ("THREADS", SPLIT_THREADS),
            ("COLUMNS", SPLIT_COLUMNS),
            ("ROOM", ROOM),
        ];
        for (file, sizes) in
            [("wide_linear", wide), ("wide_rotated", wide), ("wide_head", wide), ("split_linear", split)]
        {
            let text = text(file);
            let defined = |name: &str| text.lines().find_map(|l| l.strip_prefix(&format!("#define {name} ")));
            for (name, value) in sizes {
                let found = defined(name).and_then(|rest| rest.split_whitespace().next());
                assert_eq!(found, Some(value.to_string().as_str()), "{name} of {file}");
            }
        }
    }

    #[test]
    fn shapes_that_the_copy_engine_cannot_take_are_left_to_others() {
        let [gated, _, _, plain, _, head, beside, ..] = WIDE;
        assert!(gated.takes(520, 28_672, 4096) && plain.takes(8183, 1152, 896));
        assert!(!gated.takes(520, 24, 4096) && plain.takes(520, 24, 4096));
        assert!(!plain.takes(520, 24, 4092) && !plain.takes(191, 24, 4096));
        assert!(head.takes(256, 32_003, 896) && !head.takes(191, 32_003, 896) && !head.takes(256, 32_003, 892));
        assert!(beside.takes(64, 32_003, 896) && !beside.takes(31, 32_003, 896) && !beside.takes(129, 32_003, 896));
    }

    #[test]
    fn heads_rotate_where_a_tile_holds_whole_ones() {
        let taking = |head_dim, n| -> Vec<&str> {
            let takes = |w: &&Wide| w.rotates(head_dim) && w.takes(520, n, 896);
            WIDE.iter().filter(takes).map(|w| w.entry).collect()
        };
        assert_eq!(taking(64, 1152), ["wide_rotated_n192_d64", "wide_rotated_n64_d64"]);
        assert_eq!(taking(128, 6144), ["wide_rotated_n256_d128"]);
        assert!(taking(128, 6144 + 64).is_empty() && taking(80, 960).is_empty());
    }

    #[test]
    fn there_is_room_for_the_likeliest_of_each_part_of_every_row() {
        assert_eq!([head_parts(151_936), head_parts(128_256), head_parts(1)], [594, 501, 1]);
        assert_eq!([head_bests(31, 151_936), head_bests(512, 151_936)], [0, 512 * 594]);
    }

    #[test]
    fn clusters_are_for_what_fits_the_card_once() {
        let [.., gated, four, eight] = WIDE;
        assert!(eight.takes(64, 896, 4864) && !eight.takes(256, 896, 4864) && four.takes(256, 896, 4864));
        assert_eq!((eight.geometry(64, 896, 132).grid, eight.geometry(64, 896, 132).cluster), ([1, 112, 1], 8));
        assert!(gated.takes(64, 9728, 896) && !gated.takes(128, 9728, 896) && !gated.takes(64, 28_672, 4096));
        assert_eq!((gated.geometry(64, 4864, 132).grid, gated.geometry(64, 4864, 132).cluster), ([1, 152, 1], 1));
    }
}
