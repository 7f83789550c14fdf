//! The entries of `attn_decode_ring.cu` and how one is launched.

use super::Geometry;

/// An entry of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeRing {
    pub entry: &'static str,
    warps: u32,
    stages: u32,
}

/// What divides a context: `clusters` of `blocks` each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// 1, 2, 4 or 8.
    pub blocks: u32,
    pub clusters: u32,
}

/// Blocks of a launch with several clusters to a context: they meet at counters that are in the kernel's file.
const TICKETS: u32 = 2048;
const SHARED_BYTES_MAX: u32 = 227 << 10;

const fn ring(entry: &'static str, warps: u32, stages: u32) -> DecodeRing {
    DecodeRing { entry, warps, stages }
}

pub const DECODE_RINGS: [DecodeRing; 17] = [
    ring("attn_decode_w4s2", 4, 2),
    ring("attn_decode_w4s3", 4, 3),
    ring("attn_decode_w4s4", 4, 4),
    ring("attn_decode_w8s2", 8, 2),
    ring("attn_decode_w8s3", 8, 3),
    ring("attn_decode_w8s6", 8, 6),
    ring("attn_decode_w16s3", 16, 3),
    ring("attn_decode_w4s3u", 4, 3),
    ring("attn_decode_w8s2u", 8, 2),
    ring("attn_decode_w8s3u", 8, 3),
    ring("attn_decode_w16s3u", 16, 3),
    ring("attn_decode_w4s2a", 4, 2),
    ring("attn_decode_w4s3a", 4, 3),
    ring("attn_decode_w4s4a", 4, 4),
    ring("attn_decode_w8s2a", 8, 2),
    ring("attn_decode_w8s3a", 8, 3),
    ring("attn_decode_w16s3a", 16, 3),
];

impl DecodeRing {
    /// Rings of tiles of K and V, V with gaps of 32 bytes; what the blocks of a cluster tell one another; barriers.
    pub const fn shared_bytes(&self, head_dim: u32) -> u32 {
        let tiles = self.warps * self.stages;
        tiles * (64 * head_dim + 4 * 32) + 32 * head_dim + 512 + tiles * 8 + 16
    }

    pub const fn takes(&self, head_dim: u32) -> bool {
        head_dim.is_multiple_of(64) && self.shared_bytes(head_dim) <= SHARED_BYTES_MAX
    }

    pub fn geometry(&self, sequences: u32, [heads, kv_heads, head_dim]: [u32; 3], shares: Shares) -> Geometry {
        let pairs = kv_heads * (heads / kv_heads).div_ceil(8);
        let fits = shares.clusters == 1 || sequences * pairs * shares.blocks <= TICKETS;
        let clusters = if fits { shares.clusters } else { 1 };
        Geometry {
            grid: [clusters * pairs, shares.blocks, sequences],
            block: self.warps * 32,
            shared_bytes: self.shared_bytes(head_dim),
            overlap: true,
            cluster: shares.blocks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_knows_the_same_entries_and_sizes() {
        let source = super::super::file("attn_decode_ring").map_or("", |f| f.body);
        for ring in DECODE_RINGS {
            assert!(source.contains(&format!("DECODE({}, {}, {},", ring.entry, ring.warps, ring.stages)));
        }
        assert!(source.contains(&format!("#define TICKETS {TICKETS}\n")));
        let [small, _, _, _, _, large, ..] = DECODE_RINGS;
        assert!(large.takes(64) && !large.takes(128) && small.takes(128) && !small.takes(96));
    }
}
