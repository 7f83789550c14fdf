//! The products between two attentions in one launch: `chain_linear.cu`.

use super::Geometry;

/// Most rows that it takes.
pub const CHAIN_ROWS: u32 = 64;
/// Rows of boxes of weights of its products: o, gate_up, down, QKV.
pub const CHAIN_BOX_ROWS: [u32; 4] = [COLUMNS, GATED_WIDTH, COLUMNS, COLUMNS / 2];

/// As in the `.cu` file.
const CLUSTER: u32 = 8;
const DEPTH: u32 = 64;
const COLUMNS: u32 = 64;
const GATED_WIDTH: u32 = 48;
const X_SLOTS: u32 = 15;
const PARTS_SLOTS: u32 = 3;
const W_SLOTS: u32 = 8;
const STAGED_ROW: u32 = 112;
const W_BYTES: u32 = 2 * GATED_WIDTH * DEPTH * 2;
const THREADS: u32 = 256;

/// Columns of what is computed between two attentions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainSizes {
    pub hidden: u32,
    /// Of the attention's result.
    pub attention: u32,
    /// Of the gated product's result.
    pub inner: u32,
}

impl ChainSizes {
    /// `head_dim`: of the heads that are turned at the end, 0 for none.
    pub const fn takes(&self, head_dim: u32) -> bool {
        let whole = self.hidden.is_multiple_of(64) && self.attention.is_multiple_of(8) && self.inner.is_multiple_of(8);
        let room = (X_SLOTS - PARTS_SLOTS) * DEPTH * CLUSTER;
        let fits = self.hidden <= X_SLOTS * DEPTH && self.attention <= room && self.inner <= room;
        whole && fits && self.hidden > 0 && (head_dim / 2).is_multiple_of(COLUMNS / 2)
    }

    /// Bytes of scratch for h times a norm's weights, then for sums of squares.
    pub const fn scratch_bytes(hidden: u64) -> (u64, u64) {
        let rows = CHAIN_ROWS as u64;
        (rows * hidden * 2, rows * hidden.div_ceil(16) * 4)
    }

    /// Clusters that have something to do at a time.
    const fn clusters(&self) -> u32 {
        let (o, gated) = (self.hidden / COLUMNS, self.inner.div_ceil(GATED_WIDTH).div_ceil(CLUSTER));
        if o > gated { o } else { gated }
    }

    /// `resident`: clusters that the card holds at a time. All blocks wait for one another, and a count of theirs goes on
    /// from launch to launch: every launch of a model has the same.
    pub const fn geometry(&self, resident: u32) -> Geometry {
        let wanted = self.clusters();
        let clusters = if wanted < resident { wanted } else { resident };
        Geometry { grid: [1, clusters * CLUSTER, 1], ..chain_block() }
    }
}

/// A launch of one cluster.
pub const fn chain_block() -> Geometry {
    let slots = X_SLOTS * CHAIN_ROWS * DEPTH * 2 + W_SLOTS * W_BYTES;
    let staged = CHAIN_ROWS * STAGED_ROW;
    let barriers = (X_SLOTS + 2 * W_SLOTS + 7) * 8;
    let shared_bytes = 1024 + slots + staged + CHAIN_ROWS * 4 + barriers;
    Geometry { grid: [1, CLUSTER, 1], block: THREADS, shared_bytes, overlap: true, cluster: CLUSTER }
}

/// Whether one launch is faster than several. On an H200 a step of the 0.5B shape takes 869 us against 1,009 with 64 rows,
/// 774 against 819 with 32, 715 against 722 with 16, 653 against 553 with 8.
pub const fn chain_for(rows: u32, sizes: &ChainSizes, head_dim: u32) -> bool {
    rows > 16 && rows <= CHAIN_ROWS && sizes.takes(head_dim)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: ChainSizes = ChainSizes { hidden: 896, attention: 896, inner: 4864 };

    #[test]
    fn the_file_knows_the_same_sizes_and_a_block_fits_a_multiprocessor() {
        assert!(chain_block().shared_bytes <= 227 << 10);
        let text = super::super::file("chain_linear").map_or("", |f| f.body);
        let defined = |name: &str| {
            let rest = text.lines().find_map(|l| l.strip_prefix(&format!("#define {name} ")));
            rest.and_then(|r| r.split_whitespace().next()).map(str::to_owned)
        };
        let sizes = [
            ("CLUSTER", CLUSTER),
            ("DEPTH", DEPTH),
            ("COLUMNS", COLUMNS),
            ("ROWS", CHAIN_ROWS),
            ("X_SLOTS", X_SLOTS),
            ("PARTS_SLOTS", PARTS_SLOTS),
            ("W_SLOTS", W_SLOTS),
            ("W_BYTES", W_BYTES),
            ("STAGED_ROW", STAGED_ROW),
        ];
        for (name, value) in sizes {
            assert_eq!(defined(name), Some(value.to_string()), "{name}");
        }
        assert!(text.contains(&format!("W == GATE_UP ? {GATED_WIDTH} :")));
    }

    #[test]
    fn a_launch_has_no_more_clusters_than_run_at_a_time_and_none_without_a_tile() {
        assert_eq!(SMALL.geometry(16).grid, [1, 14 * 8, 1]);
        assert_eq!(SMALL.geometry(13).grid, [1, 13 * 8, 1]);
        assert_eq!(ChainSizes { inner: 10_000, ..SMALL }.clusters(), 27);
    }

    #[test]
    fn what_does_not_fit_shared_memory_is_left_to_others() {
        assert!(chain_for(64, &SMALL, 64) && chain_for(17, &SMALL, 128) && chain_for(33, &SMALL, 0));
        assert!(!chain_for(16, &SMALL, 64) && !chain_for(65, &SMALL, 64) && !chain_for(64, &SMALL, 80));
        assert!(!ChainSizes { hidden: 1024, ..SMALL }.takes(64) && !ChainSizes { hidden: 880, ..SMALL }.takes(64));
        assert!(!ChainSizes { inner: 8192, ..SMALL }.takes(64) && ChainSizes { inner: 6144, ..SMALL }.takes(64));
    }
}
