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

    /// Clusters that have something to do.
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

/// Whether one launch is faster than several: measured on an H200.
pub fn chain_for(rows: u32, sizes: &ChainSizes, head_dim: u32) -> bool {
    let asked = std::env::var("CHAIN_ROWS_HIDDEN").unwrap_or_else(|_| "17 64".to_owned());
    let asked: Vec<u32> = asked.split_whitespace().filter_map(|w| w.parse().ok()).collect();
    rows >= asked[0] && rows <= asked[1].min(CHAIN_ROWS) && sizes.takes(head_dim)
}
