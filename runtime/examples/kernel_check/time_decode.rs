//! Every variant of the decode attention beside the bound, as it stands in a step: between two other kernels.

use super::card::{Card, Failure, Outcome, int, pointer, pointer_at};
use super::numbers::Random;
use super::time::BYTES_PER_US;
use super::time_attention::scattered;
use mserve_runtime::cuda::kernels::{self, DECODE_RINGS, DecodeRing, Geometry, Shares};
use mserve_runtime::cuda::memory::DeviceMemory;
use mserve_runtime::cuda::module::Arg;

const CACHE_BYTES: usize = 4 << 30;
/// What the layers of one graph read: nothing of it is left in L2 at the next replay.
const COLD_BYTES: usize = 256 << 20;
const MAX_MODEL_LEN: u32 = 131_072;
/// Room for the results of splits.
const SPLITS_MAX: usize = 64;

/// Name, heads, KV heads, head dimension.
const SHAPES: [(&str, [u32; 3]); 5] = [
    ("0.5B", [14, 2, 64]),
    ("8B", [32, 8, 128]),
    ("Qwen3", [16, 8, 128]),
    ("1.5B", [12, 2, 128]),
    ("70B", [64, 8, 128]),
];

pub fn decode(card: &Card) -> Outcome {
    let cache = card.random(CACHE_BYTES)?;
    for (at, (name, sizes)) in SHAPES.into_iter().enumerate() {
        let sequences: &[usize] = if at < 2 { &[1, 8, 32, 64, 128, 256, 512] } else { &[1, 8, 64, 256] };
        for &n in sequences {
            Point::new(card, &cache, sizes, &vec![1024; n])?.print(name, &format!("{n} x 1024"))?;
        }
        for (n, length) in [(1, 8192), (8, 8192), (1, 32_768), (4, 32_768)] {
            Point::new(card, &cache, sizes, &vec![length; n])?.print(name, &format!("{n} x {length}"))?;
        }
        for n in [64, 256].into_iter().filter(|_| at < 2) {
            let mut random = Random::new(5);
            let lengths: Vec<i32> = (0..n).map(|_| 128 + random.below(1793) as i32).collect();
            Point::new(card, &cache, sizes, &lengths)?.print(name, &format!("{n} x 128..1920"))?;
        }
    }
    Ok(())
}

/// A way to launch it.
enum Way {
    /// `attn_decode`, and `attn_combine` for several splits.
    Registers { splits: u32 },
    Ring { ring: DecodeRing, shares: Shares },
}

impl Way {
    fn name(&self) -> String {
        match self {
            Self::Registers { splits } => format!("registers/{splits}"),
            Self::Ring { ring, shares: Shares { blocks, clusters: 1 } } => {
                format!("{}/{blocks}", ring.entry.trim_start_matches("attn_decode_"))
            }
            Self::Ring { ring, shares: Shares { blocks, clusters } } => {
                format!("{}/{blocks}x{clusters}", ring.entry.trim_start_matches("attn_decode_"))
            }
        }
    }
}

/// Sequences of one shape, and everything a launch needs.
struct Point<'a> {
    card: &'a Card,
    cache: &'a DeviceMemory,
    sizes: [u32; 3],
    sequences: usize,
    max_blocks: usize,
    /// Bytes of K of a layer; V's as many.
    layer_bytes: usize,
    /// Of K and V that must be read.
    bytes: f64,
    table: DeviceMemory,
    lengths: DeviceMemory,
    q: DeviceMemory,
    out: DeviceMemory,
    partial: DeviceMemory,
    statistic: DeviceMemory,
}

impl<'a> Point<'a> {
    fn new(card: &'a Card, cache: &'a DeviceMemory, sizes: [u32; 3], lengths: &[i32]) -> Result<Self, Failure> {
        let [heads, kv_heads, hd] = sizes.map(|n| n as usize);
        let (sequences, longest) = (lengths.len(), lengths.iter().copied().max().unwrap_or(1) as usize);
        let max_blocks = longest.div_ceil(16);
        let tokens: i32 = lengths.iter().sum();
        let rows = sequences * heads;
        let splits = if sequences > 64 { 8 } else { SPLITS_MAX };
        Ok(Self {
            card,
            cache,
            sizes,
            sequences,
            max_blocks,
            layer_bytes: sequences * max_blocks * kv_heads * 16 * hd * 2,
            bytes: f64::from(tokens) * (kv_heads * hd * 4) as f64,
            table: scattered(card, sequences * max_blocks)?,
            lengths: card.upload(lengths)?,
            q: card.random(sequences * (heads + 2 * kv_heads) * hd * 2)?,
            out: card.random(rows * hd * 2)?,
            partial: card.poisoned(rows * splits * hd * 4)?,
            statistic: card.poisoned(rows * splits * 8)?,
        })
    }

    fn ways(&self) -> Vec<Way> {
        let [heads, kv_heads, head_dim] = self.sizes;
        let sequences = self.sequences as u32;
        let standard = kernels::splits(sequences, kv_heads, head_dim, MAX_MODEL_LEN);
        let mut ways = vec![Way::Registers { splits: standard }];
        let few = |splits: u32| sequences * kv_heads * splits <= 1056;
        ways.extend([1, 2, 4, 8].into_iter().filter(|&s| s != standard && few(s)).map(|splits| Way::Registers { splits }));
        if self.card.device.compute_capability.0 != 9 {
            return ways;
        }
        let pairs = sequences * kv_heads * (heads / kv_heads).div_ceil(8);
        for ring in DECODE_RINGS.into_iter().filter(|r| r.takes(head_dim)) {
            // Half of a multiprocessor for four warps; and of the lesser shapes the plain rings say enough.
            let plain = ring.entry.ends_with(|c: char| c.is_ascii_digit());
            if head_dim == 128 && (ring.entry.contains("w4s4") || !plain && heads != 32) {
                continue;
            }
            for (blocks, clusters) in [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 4), (4, 4), (8, 8)] {
                let shares = Shares { blocks, clusters };
                let geometry = ring.geometry(sequences, self.sizes, shares);
                let warps = geometry.grid.iter().product::<u32>() * geometry.block / 32;
                let several = clusters > 1 && (self.max_blocks < 512 && pairs > 8 || pairs * blocks * clusters > 264);
                if (blocks * clusters == 1 && pairs > 4) || (blocks * clusters > 1 && warps <= 132 * 32 && !several) {
                    ways.push(Way::Ring { ring, shares });
                }
            }
        }
        ways
    }

    fn launch(&self, way: &Way, layer: usize) -> Outcome {
        let [heads, kv_heads, head_dim] = self.sizes;
        let sequences = self.sequences as u32;
        let args = [
            pointer(&self.q),
            int(((heads + 2 * kv_heads) * head_dim) as usize),
            pointer_at(self.cache, layer * 2 * self.layer_bytes),
            pointer_at(self.cache, layer * 2 * self.layer_bytes + self.layer_bytes),
            pointer(&self.table),
            pointer(&self.lengths),
            pointer(&self.out),
            pointer(&self.partial),
            pointer(&self.statistic),
            int(self.max_blocks),
            int(heads as usize),
            int(kv_heads as usize),
            Arg::Float(0.1),
            Arg::Float(0.0),
            int(0),
        ];
        let (entry, geometry, splits) = match way {
            Way::Registers { splits } => {
                let geometry = kernels::attn_decode(sequences, heads, kv_heads, *splits);
                let early = kernels::attn_decode_is_early(&geometry, head_dim);
                (if early { "attn_decode_early" } else { "attn_decode" }, geometry, *splits)
            }
            Way::Ring { ring, shares } => (ring.entry, ring.geometry(sequences, self.sizes, *shares), 1),
        };
        self.card.run(entry, head_dim, geometry, &args)?;
        if splits == 1 {
            return Ok(());
        }
        let args = [
            pointer(&self.partial),
            pointer(&self.statistic),
            pointer(&self.lengths),
            pointer(&self.out),
            int(splits as usize),
            int(0),
        ];
        self.card.run("attn_combine", head_dim, kernels::attn_combine(sequences, heads), &args)
    }

    /// Stands for what a step has between two attentions: reads the result, writes the query.
    fn norm(&self) -> Outcome {
        let (rows, width) = (self.sequences, (self.sizes[0] * self.sizes[2]) as usize);
        let geometry: Geometry = kernels::rms_norm(rows as u32, width as u32).ok_or("too wide")?;
        let (x, weight, to) = (pointer(&self.out), pointer_at(self.cache, 0), pointer(&self.q));
        let args = [x, weight, to, int(rows), int(width), Arg::Float(1e-5), Arg::Float(0.0)];
        self.card.run("rms_norm", 0, geometry, &args)
    }

    /// Microseconds that the attention adds to a chain of norms.
    fn time(&self, way: &Way, norm_us: f64) -> Result<f64, Failure> {
        let both = 2 * self.layer_bytes;
        let layers = (COLD_BYTES / both).clamp(8, 512).min(CACHE_BYTES / both).max(1);
        let us = self.card.time(layers, |layer| {
            self.launch(way, layer)?;
            self.norm()
        })?;
        Ok(us - norm_us)
    }

    fn print(&self, name: &str, what: &str) -> Outcome {
        let norm_us = self.card.time(64, |_| self.norm())?;
        let mut figures = vec![];
        for way in self.ways() {
            figures.push((self.time(&way, norm_us)?, way.name()));
        }
        let (now, _) = figures[0];
        figures.sort_by(|a, b| a.0.total_cmp(&b.0));
        let bound = self.bytes / BYTES_PER_US;
        let all: Vec<String> = figures.iter().map(|(us, way)| format!("{way} {us:.1}")).collect();
        let (least, best) = &figures[0];
        println!(
            "{name} {what}: bound {bound:.1}, now {now:.1}, best {best} {least:.1} us, {:.2} TB/s [{}]",
            self.bytes / least / 1e6,
            all[1..].join(", ")
        );
        Ok(())
    }
}
