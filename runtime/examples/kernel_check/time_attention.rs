//! Rates of the prefill attention.

use super::card::{Caches, Card, Failure, Outcome, int, launch, pointer, pointer_at, prefill_launch};
use super::numbers::Random;
use super::time::{BYTES_PER_US, FLOPS_PER_US, SHAPES, Shape};
use mserve_runtime::cuda::kernels::Prefill;
use mserve_runtime::cuda::memory::DeviceMemory;
use mserve_runtime::cuda::module::Arg;

pub fn scattered(card: &Card, blocks: usize) -> Result<DeviceMemory, Failure> {
    let mut table: Vec<i32> = (0..blocks as i32).collect();
    Random::new(11).shuffle(&mut table);
    card.upload(&table)
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
