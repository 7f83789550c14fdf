//! Rates of the attention kernels.

use super::card::{Caches, Card, Failure, Outcome, int, launch, pointer, pointer_at, prefill_launch};
use super::numbers::Random;
use super::time::{BYTES_PER_US, FLOPS_PER_US, SHAPES, Shape, line};
use mserve_runtime::cuda::kernels::{self, Prefill};
use mserve_runtime::cuda::memory::DeviceMemory;
use mserve_runtime::cuda::module::Arg;

const CACHE_BYTES: usize = 4 << 30;

fn scattered(card: &Card, blocks: usize) -> Result<DeviceMemory, Failure> {
    let mut table: Vec<i32> = (0..blocks as i32).collect();
    Random::new(11).shuffle(&mut table);
    card.upload(&table)
}

pub fn decode(card: &Card) -> Outcome {
    let cache = card.random(CACHE_BYTES)?;
    for shape in &SHAPES {
        for context in [1024, 8192] {
            for sequences in [1, 8, 32, 64, 128, 256, 512] {
                if context == 8192 && sequences > 32 {
                    continue;
                }
                one_decode(card, &cache, shape, sequences, context)?;
            }
        }
    }
    Ok(())
}

fn one_decode(card: &Card, cache: &DeviceMemory, shape: &Shape, sequences: usize, context: usize) -> Outcome {
    let hd = shape.head_dim;
    let blocks = sequences * context.div_ceil(16);
    let layer = blocks * shape.kv_heads * 16 * hd * 2;
    // K and V of as many layers as the pool holds, 32 at most, 2 at least for what does not fit L2.
    let layers = (CACHE_BYTES / 2 / layer).min(32);
    if layers == 0 {
        return Ok(());
    }
    let stride = (shape.heads + 2 * shape.kv_heads) * hd;
    let table = scattered(card, blocks)?;
    let lengths = card.upload(&vec![context as i32; sequences])?;
    let q = card.random(sequences * stride * 2)?;
    let out = card.poisoned(sequences * shape.heads * hd * 2)?;
    let standard = kernels::splits(sequences as u32, shape.kv_heads as u32, hd as u32, 131_072) as usize;
    let mut tried = vec![standard];
    tried.extend(
        [1, 2, 3, 4, 5, 6, 8, 16].into_iter().filter(|&s| s != standard && sequences * shape.kv_heads * s <= 2048),
    );
    let mut figures = vec![];
    for splits in tried {
        let partial = card.poisoned(sequences * shape.heads * splits * hd * 4)?;
        let statistic = card.poisoned(sequences * shape.heads * splits * 8)?;
        let us = card.time(layers, |i| {
            let args = [
                pointer(&q),
                int(stride),
                pointer_at(cache, i * 2 * layer),
                pointer_at(cache, i * 2 * layer + layer),
                pointer(&table),
                pointer(&lengths),
                pointer(&out),
                pointer(&partial),
                pointer(&statistic),
                int(context.div_ceil(16)),
                int(shape.heads),
                int(shape.kv_heads),
                Arg::Float(0.1),
                Arg::Float(0.0),
                int(0),
            ];
            let (s, h, kv) = (sequences as u32, shape.heads as u32, shape.kv_heads as u32);
            let geometry = kernels::attn_decode(s, h, kv, splits as u32);
            card.run("attn_decode", hd as u32, geometry, &args)?;
            if splits == 1 {
                return Ok(());
            }
            let args = [pointer(&partial), pointer(&statistic), pointer(&lengths), pointer(&out), int(splits), int(0)];
            card.run("attn_combine", hd as u32, kernels::attn_combine(s, h), &args)
        })?;
        figures.push((splits, us));
    }
    let others: Vec<String> = figures[1..].iter().map(|(s, us)| format!("{s}: {us:.1}")).collect();
    let what = format!(
        "{} decode sequences {sequences} context {context} splits {standard} (others {})",
        shape.name,
        others.join(", ")
    );
    line(&what, figures[0].1, 2.0 * layer as f64);
    Ok(())
}

pub fn prefill(card: &Card) -> Outcome {
    let cache = card.random(1 << 30)?;
    for shape in &SHAPES {
        for (sequences, length) in
            [(1, 128), (1, 512), (1, 1024), (1, 2048), (1, 4096), (1, 8192), (8, 1024), (32, 1024)]
        {
            one_prefill(card, &cache, shape, sequences, length)?;
        }
    }
    Ok(())
}

fn one_prefill(card: &Card, cache: &DeviceMemory, shape: &Shape, sequences: usize, length: usize) -> Outcome {
    let (hd, compute_capability) = (shape.head_dim, card.device.compute_capability);
    let stride = (shape.heads + 2 * shape.kv_heads) * hd;
    let blocks = sequences * length.div_ceil(16);
    let layer = blocks * shape.kv_heads * 16 * hd * 2;
    let table = scattered(card, blocks)?;
    let start = card.upload(&(0..=sequences).map(|s| (s * length) as i32).collect::<Vec<_>>())?;
    let lengths = card.upload(&vec![length as i32; sequences])?;
    let q = card.random(sequences * length * stride * 2)?;
    let out = card.poisoned(sequences * length * shape.heads * hd * 2)?;
    let args = |tiles: u32| {
        [
            pointer(&q),
            int(stride),
            pointer(cache),
            pointer_at(cache, layer),
            pointer(&start),
            pointer(&lengths),
            pointer(&table),
            pointer(&out),
            int(length.div_ceil(16)),
            int(0),
            int(sequences),
            int(shape.kv_heads),
            Arg::Float(1.0 / (hd as f32).sqrt()),
            Arg::Float(0.0),
            int(0),
            int(shape.heads),
            int(tiles as usize),
        ]
    };
    let fastest = Prefill::new(hd as u32, compute_capability, card.device.multiprocessors);
    let mut figures = vec![];
    for prefill in [Prefill::WarpProducts { compute_capability }, fastest] {
        let (tiles, geometry) =
            prefill_launch(prefill, &vec![length as u32; sequences], 0, shape.heads as u32, hd as u32);
        let entry = prefill.entry();
        if std::env::var_os("WGMMA_ONLY").is_some() && prefill != fastest {
            continue;
        }
        let at = [cache.pointer(), cache.pointer() + layer as u64];
        let caches = Caches::new(card, at, layer, hd, prefill)?;
        let args = caches.within(args(tiles).to_vec());
        let us = card.time(4, |_| launch(card.kernel(entry, hd as u32)?, geometry, &args))?;
        figures.push((entry, us));
    }
    let pairs = sequences as f64 * (length as f64 * (length as f64 + 1.0) / 2.0);
    let flops = 4.0 * hd as f64 * shape.heads as f64 * pairs;
    let bytes = (2.0 * sequences as f64 * length as f64 * (shape.heads * hd) as f64 + layer as f64) * 2.0;
    let bound = (flops / FLOPS_PER_US).max(bytes / BYTES_PER_US);
    let rates: Vec<String> =
        figures.iter().map(|(entry, us)| format!("{entry} {us:.1} us {:.0} TFLOP/s", flops / us / 1e6)).collect();
    println!("{} prefill {sequences} x {length}: {}, bound {bound:.1} us", shape.name, rates.join(", "));
    Ok(())
}
