//! The decode attention's chosen launch and others beside the bound, as it stands in a step: between two other kernels.

use super::card::{Card, Failure, Outcome, int, pointer, pointer_at};
use super::numbers::Random;
use super::time::BYTES_PER_US;
use super::time_attention::scattered;
use mserve_runtime::cuda::kernels::{self, Decode, DecodeLaunch, Geometry, Shares};
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

/// As `w8/4x3`: 8 warps a block, 3 clusters of 4 blocks to a context.
fn named(launch: &DecodeLaunch) -> String {
    let DecodeLaunch { warps, shares: Shares { blocks, clusters }, .. } = launch;
    match clusters {
        1 => format!("w{warps}/{blocks}"),
        _ => format!("w{warps}/{blocks}x{clusters}"),
    }
}

/// Sequences of one shape, and everything a launch needs.
struct Point<'a> {
    card: &'a Card,
    cache: &'a DeviceMemory,
    sizes: [u32; 3],
    decode: Decode,
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
            decode: card.device.decode_attention(sizes[2]),
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

    /// The chosen launch first.
    fn launches(&self) -> Vec<DecodeLaunch> {
        let [heads, kv_heads, _] = self.sizes;
        let sequences = self.sequences as u32;
        let chosen = self.decode.launch(sequences, heads, kv_heads, MAX_MODEL_LEN);
        let mut launches = vec![chosen];
        for warps in Decode::WARPS.into_iter().filter(|&w| self.decode.takes(w)) {
            for (blocks, clusters) in
                [(1, 1), (2, 1), (4, 1), (8, 1), (1, 3), (2, 2), (2, 4), (4, 2), (4, 3), (8, 2), (8, 4), (8, 6)]
            {
                let launch = DecodeLaunch { warps, shares: Shares { blocks, clusters }, ..chosen };
                let grid = self.decode.geometry(sequences, heads, kv_heads, launch).grid;
                // No more than fills the card twice, nor clusters that would have less than 256 tokens.
                let few = grid.iter().product::<u32>() * warps <= 132 * 16 && clusters as usize * 16 <= self.max_blocks;
                let clustered = blocks == 1 || self.decode.compute_capability.0 >= 9;
                if launch != chosen && clustered && (blocks * clusters == 1 || few) {
                    launches.push(launch);
                }
            }
        }
        launches
    }

    fn launch(&self, launch: DecodeLaunch, layer: usize) -> Outcome {
        let [heads, kv_heads, head_dim] = self.sizes;
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
        let geometry = self.decode.geometry(self.sequences as u32, heads, kv_heads, launch);
        self.card.run(Decode::entry(launch.warps), head_dim, geometry, &args)
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
    fn time(&self, launch: DecodeLaunch, norm_us: f64) -> Result<f64, Failure> {
        let both = 2 * self.layer_bytes;
        let layers = (COLD_BYTES / both).clamp(8, 512).min(CACHE_BYTES / both).max(1);
        let us = self.card.time(layers, |layer| {
            self.launch(launch, layer)?;
            self.norm()
        })?;
        Ok(us - norm_us)
    }

    fn print(&self, name: &str, what: &str) -> Outcome {
        let norm_us = self.card.time(64, |_| self.norm())?;
        let mut figures = vec![];
        for launch in self.launches() {
            figures.push((self.time(launch, norm_us)?, named(&launch)));
        }
        let (us, chosen) = figures.remove(0);
        figures.sort_by(|a, b| a.0.total_cmp(&b.0));
        let bound = self.bytes / BYTES_PER_US;
        let others: Vec<String> = figures.iter().map(|(us, way)| format!("{way} {us:.1}")).collect();
        println!(
            "{name} {what}: bound {bound:.1}, chosen {chosen} {us:.1} us, {:.2} TB/s [{}]",
            self.bytes / us / 1e6,
            others.join(", ")
        );
        Ok(())
    }
}
