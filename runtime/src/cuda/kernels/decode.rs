//! The decode attention of a card: which of its entries, and how many blocks divide a context.

use super::super::module::BESIDE_L1_BYTES;
use super::{Geometry, decode_stages};

/// Tiles that a warp should have before one more cluster takes part in a context, as in the `.cu` file.
const TILES_A_WARP: u32 = 4;
/// Tokens of a tile: a block of the cache.
const TILE: u32 = super::BLOCK_SIZE;
/// Heads that a block takes, of those that share a KV head.
const HEADS_A_PASS: u32 = 8;
/// Up to so many sequences the products beside the attention read through L1: see [`super::super::module::Kernel::beside_l1`].
const FEW: u32 = 16;
/// Shared memory of a multiprocessor that each block takes beside what it asked for.
const RESERVED_BYTES: u32 = 1 << 10;

/// A card and a head dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decode {
    pub head_dim: u32,
    pub compute_capability: (i32, i32),
    pub multiprocessors: u32,
    pub shared_memory_per_block_bytes: u32,
}

/// What divides a context: `clusters` of `blocks` each. Several clusters meet through memory, which costs about 1 us; a
/// context that is too short for them is left to fewer by the kernel itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// 1, 2, 4 or 8.
    pub blocks: u32,
    pub clusters: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLaunch {
    pub warps: u32,
    pub shares: Shares,
    /// By the function that leaves much of a multiprocessor's memory to L1.
    pub beside_l1: bool,
}

/// Sequences times KV heads, the latter once more for every eight heads that share one.
const fn pairs(sequences: u32, heads: u32, kv_heads: u32) -> u32 {
    sequences * kv_heads * (heads / kv_heads).div_ceil(HEADS_A_PASS)
}

impl Decode {
    /// Warps of a block of each entry, in the order of [`Self::entry`]'s names.
    pub const WARPS: [u32; 2] = [4, 8];

    pub const fn entry(warps: u32) -> &'static str {
        if warps == 4 { "attn_decode_w4" } else { "attn_decode_w8" }
    }

    /// Rings of tiles of K and V, V with gaps of 32 bytes; what the blocks of a cluster tell one another.
    pub const fn shared_bytes(&self, warps: u32) -> u32 {
        warps * decode_stages(self.compute_capability) * (4 * TILE * self.head_dim + 4 * 32) + 32 * self.head_dim + 528
    }

    pub const fn takes(&self, warps: u32) -> bool {
        self.shared_bytes(warps) <= self.shared_memory_per_block_bytes
    }

    /// Blocks that the card holds at a time, by shared memory and registers (the `.cu` file's launch bounds).
    const fn resident(&self, warps: u32) -> u32 {
        if !self.takes(warps) {
            return 0;
        }
        let by_memory =
            (self.shared_memory_per_block_bytes + RESERVED_BYTES) / (self.shared_bytes(warps) + RESERVED_BYTES);
        let warps_by_registers = if self.head_dim > 64 { 8 } else { 16 };
        let by_registers = warps_by_registers / warps;
        self.multiprocessors * if by_memory < by_registers { by_memory } else { by_registers }
    }

    /// Clusters of so many blocks that the card holds at a time. What one cluster more than that costs is a whole round:
    /// of 132 multiprocessors 16 clusters of 8, or 32 of 4, do not run together (measured), as no cluster spans two parts
    /// of the card and the parts are not multiples of 4 and 8.
    const fn clusters_resident(&self, warps: u32, blocks: u32) -> u32 {
        let room = self.resident(warps);
        if blocks >= 4 { room / 8 * 7 / blocks } else { room / blocks }
    }

    /// The launch for a step of `sequences`, whatever their lengths.
    ///
    /// More pairs of sequence and KV head than blocks of 8 warps find room: a block each. While all blocks of 4 warps run
    /// at a time they are faster, and from several rounds on again; in between blocks of 8 even out what contexts of mixed
    /// lengths leave uneven. Fewer pairs: blocks of 8 warps, and several to a context.
    pub fn launch(&self, sequences: u32, heads: u32, kv_heads: u32, max_model_len: u32) -> DecodeLaunch {
        if sequences > FEW || self.compute_capability.0 != 9 {
            return self.launch_within(sequences, heads, kv_heads, max_model_len);
        }
        let beside = Self { shared_memory_per_block_bytes: BESIDE_L1_BYTES - RESERVED_BYTES, ..*self };
        DecodeLaunch { beside_l1: true, ..beside.launch_within(sequences, heads, kv_heads, max_model_len) }
    }

    fn launch_within(&self, sequences: u32, heads: u32, kv_heads: u32, max_model_len: u32) -> DecodeLaunch {
        let pairs = pairs(sequences, heads, kv_heads).max(1);
        let (small, large) = (self.resident(4), self.resident(8));
        if pairs > large && pairs > small {
            let warps = if pairs > 2 * small || large == 0 { 4 } else { 8 };
            return DecodeLaunch { warps, shares: Shares { blocks: 1, clusters: 1 }, beside_l1: false };
        }
        let warps = if pairs > large { 4 } else { 8 };
        let shares = self.shares(warps, pairs, max_model_len.div_ceil(TILE));
        DecodeLaunch { warps, shares, beside_l1: false }
    }

    /// The largest clusters of which so many run at a time as contexts of `max_tiles` can use, or as cover two thirds of
    /// the card: 64 multiprocessors do not draw the memory's whole rate. Where none do: clusters of at most 4, as many as
    /// there is room for.
    fn shares(&self, warps: u32, pairs: u32, max_tiles: u32) -> Shares {
        let sizes: &[u32] = if self.compute_capability.0 >= 9 { &[8, 4, 2, 1] } else { &[1] };
        let useful = |blocks: u32| {
            let covering = (self.multiprocessors * 2 / 3).div_ceil(pairs * blocks);
            covering.min(max_tiles.div_ceil(blocks * warps * TILES_A_WARP)).max(1)
        };
        let room = |blocks: u32| self.clusters_resident(warps, blocks) / pairs;
        let covers = |&&blocks: &&u32| blocks >= 4 && room(blocks) >= useful(blocks);
        let fits = |&&blocks: &&u32| blocks <= 4 && room(blocks) >= 1;
        let blocks = sizes.iter().find(covers).or_else(|| sizes.iter().find(fits)).copied().unwrap_or(1);
        Shares { blocks, clusters: useful(blocks).min(room(blocks).max(1)) }
    }

    pub const fn geometry(&self, sequences: u32, heads: u32, kv_heads: u32, launch: DecodeLaunch) -> Geometry {
        let DecodeLaunch { warps, shares: Shares { blocks, clusters }, .. } = launch;
        Geometry {
            grid: [clusters * pairs(1, heads, kv_heads), blocks, sequences],
            block: warps * 32,
            shared_bytes: self.shared_bytes(warps),
            overlap: true,
            cluster: blocks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counters in the `.cu` file at which several clusters meet.
    const TICKETS: u32 = 2048;

    const fn hopper(head_dim: u32) -> Decode {
        Decode { head_dim, compute_capability: (9, 0), multiprocessors: 132, shared_memory_per_block_bytes: 227 << 10 }
    }

    const fn ada(head_dim: u32) -> Decode {
        Decode { head_dim, compute_capability: (8, 9), multiprocessors: 128, shared_memory_per_block_bytes: 99 << 10 }
    }

    /// Warps, blocks of a cluster, clusters.
    fn chosen(card: Decode, sequences: u32, [heads, kv_heads]: [u32; 2], max_model_len: u32) -> [u32; 3] {
        let launch = card.launch(sequences, heads, kv_heads, max_model_len);
        [launch.warps, launch.shares.blocks, launch.shares.clusters]
    }

    #[test]
    fn the_fastest_of_the_measured_is_chosen() {
        let of_8b = |sequences| chosen(hopper(128), sequences, [32, 8], 131_072);
        assert_eq!([1, 2, 4, 8].map(of_8b), [[4, 4, 3], [4, 4, 1], [4, 2, 2], [4, 2, 1]]);
        assert_eq!([16, 32, 64, 128, 512].map(of_8b), [[4, 1, 1], [4, 1, 1], [8, 1, 1], [4, 1, 1], [4, 1, 1]]);
        let of_05b = |sequences| chosen(hopper(64), sequences, [14, 2], 32_768);
        assert_eq!([1, 8, 32, 64].map(of_05b), [[8, 8, 6], [8, 4, 1], [8, 2, 1], [8, 2, 1]]);
        assert_eq!([128, 256, 512, 1024].map(of_05b), [[8, 1, 1], [4, 1, 1], [8, 1, 1], [4, 1, 1]]);
        // No long contexts, no need of more than a cluster.
        assert_eq!(chosen(hopper(128), 1, [32, 8], 1024), [4, 8, 1]);
    }

    #[test]
    fn a_launch_with_several_blocks_to_a_context_runs_all_of_them_at_a_time() {
        for card in [16, 32, 64, 80, 96, 128].into_iter().flat_map(|d| [hopper(d), ada(d)]) {
            for (sequences, heads) in (1..600).flat_map(|s| [[14, 2], [32, 8], [12, 1], [8, 8]].map(|h| (s, h))) {
                let launch = card.launch(sequences, heads[0], heads[1], 131_072);
                let geometry = card.geometry(sequences, heads[0], heads[1], launch);
                assert!(geometry.shared_bytes <= card.shared_memory_per_block_bytes);
                let blocks: u32 = geometry.grid.iter().product();
                let Shares { blocks: cluster, clusters } = launch.shares;
                assert!(cluster * clusters == 1 || blocks <= card.resident(launch.warps), "{card:?} {launch:?}");
                assert!(clusters == 1 || blocks / clusters <= TICKETS);
                assert!(cluster == 1 || card.compute_capability.0 >= 9);
            }
        }
    }

    #[test]
    fn the_file_knows_the_same_entries_and_sizes() {
        let source = super::super::file("attn_decode").map_or("", |f| f.body);
        for warps in Decode::WARPS {
            assert!(source.contains(&format!("\nDECODE({}, {warps})", Decode::entry(warps))));
        }
        assert!(source.contains(&format!("#define TICKETS {TICKETS}\n")));
        assert!(source.contains(&format!("#define TILES_A_WARP {TILES_A_WARP} ")));
        assert_eq!([4, 8].map(|w| hopper(128).resident(w)), [264, 132]);
        assert_eq!([4, 8].map(|w| hopper(64).resident(w)), [528, 264]);
        assert_eq!([4, 8].map(|w| ada(128).resident(w)), [128, 0]);
    }
}
