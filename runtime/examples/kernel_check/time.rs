//! Rates of the row-wise kernels and of sampling, beside what the bytes alone would take.

use super::card::{Card, NULL, Outcome, int, pointer, pointer_at};
use super::numbers::Random;
use mserve_runtime::cuda::kernels::{self, SampleRow};
use mserve_runtime::cuda::module::Arg;

/// Measured on an H200: what a copy, and the best read, reach.
pub const BYTES_PER_US: f64 = 4.36e6;
pub const FLOPS_PER_US: f64 = 812e6;

pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    pub vocab: usize,
}

pub const SHAPES: [Shape; 2] = [
    Shape { name: "8B", hidden: 4096, heads: 32, kv_heads: 8, head_dim: 128, intermediate: 14_336, vocab: 128_256 },
    Shape { name: "0.5B", hidden: 896, heads: 14, kv_heads: 2, head_dim: 64, intermediate: 4864, vocab: 151_936 },
];

pub fn line(what: &str, us: f64, bytes: f64) {
    let (rate, bound) = (bytes / us / 1e6, bytes / BYTES_PER_US);
    println!("{what}: {us:.2} us, {rate:.2} TB/s, bound {bound:.2} us");
}

/// Buffers rotate over this much, so that nothing stays in a 60 MB L2.
const SPREAD_BYTES: usize = 1 << 30;
const ROUNDS: usize = 32;

pub fn rows(card: &Card) -> Outcome {
    let pool = card.random(SPREAD_BYTES)?;
    let tables = card.random(8192 * 64 * 4)?;
    for shape in &SHAPES {
        for rows in [1, 64, 256, 8192] {
            let at = |round: usize, bytes: usize| pointer_at(&pool, round * bytes % (SPREAD_BYTES - bytes) / 256 * 256);
            let (h, bytes) = (shape.hidden, rows * shape.hidden * 2);
            let geometry = kernels::rms_norm(rows as u32, h as u32).ok_or("too wide")?;
            let us = card.time(ROUNDS, |i| {
                let args = [
                    at(2 * i, bytes),
                    pointer(&pool),
                    at(2 * i + 1, bytes),
                    int(rows),
                    int(h),
                    Arg::Float(1e-5),
                    Arg::Float(0.0),
                ];
                card.run("rms_norm", 0, geometry, &args)
            })?;
            line(&format!("{} rms_norm rows {rows}", shape.name), us, 2.0 * bytes as f64);
            let (w, bytes) = (shape.intermediate, rows * shape.intermediate * 6);
            let us = card.time(ROUNDS, |i| {
                let args = [at(2 * i, bytes), at(2 * i + 1, bytes), int(w)];
                card.run("silu_mul", 0, kernels::gated_act(rows as u32, w as u32), &args)
            })?;
            line(&format!("{} silu_mul rows {rows}", shape.name), us, bytes as f64);
            let all = shape.heads + 2 * shape.kv_heads;
            let positions = card.upload(&(0..rows as i32).collect::<Vec<_>>())?;
            let bytes = rows * all * shape.head_dim * 2;
            let us = card.time(ROUNDS, |i| {
                let args = [
                    at(3 * i, bytes),
                    pointer(&positions),
                    pointer(&positions),
                    pointer(&tables),
                    pointer(&tables),
                    NULL,
                    NULL,
                    at(3 * i + 1, bytes),
                    at(3 * i + 2, bytes),
                    int(rows),
                    int(shape.heads),
                    int(shape.kv_heads),
                    int(shape.head_dim),
                    Arg::Float(0.0),
                    Arg::Float(0.0),
                ];
                let geometry = kernels::rope(rows as u32, shape.heads as u32, shape.kv_heads as u32);
                card.run("qk_norm_rope_kv_write", shape.head_dim as u32, geometry, &args)
            })?;
            line(&format!("{} rope rows {rows}", shape.name), us, 2.0 * bytes as f64);
        }
    }
    Ok(())
}

pub fn sample(card: &Card) -> Outcome {
    let base = SampleRow { temperature: 0.8, ..SampleRow::GREEDY };
    let kinds = [
        ("greedy", SampleRow::GREEDY, 1.0),
        ("greedy, 5 logprobs", SampleRow { logprobs: Some(5), ..SampleRow::GREEDY }, 3.0),
        ("temperature", base, 2.0),
        ("top_k 20 top_p 0.8", SampleRow { top_k: 20, top_p: 0.8, ..base }, 2.0),
        ("top_p 0.9", SampleRow { top_p: 0.9, ..base }, 3.0),
    ];
    for shape in &SHAPES {
        // Like a language model's: a few tokens stand out.
        let mut random = Random::new(9);
        let mut logits = random.floats(256 * shape.vocab, 4.0);
        for row in logits.chunks_mut(shape.vocab) {
            for place in 0..50 {
                row[random.below(shape.vocab)] = 14.0 - place as f32 * 0.2;
            }
        }
        let on = card.upload(&logits)?;
        let bests = card.poisoned(kernels::SCAN_BLOCKS as usize * 8)?;
        let out = card.poisoned(256 * 20 * 4 * 5)?;
        for (name, row, passes) in kinds {
            for rows in [1, 32, 256] {
                let words: Vec<i32> = (0..rows).flat_map(|r| SampleRow { seed: r as u64, ..row }.words()).collect();
                let params = card.upload(&words)?;
                let outputs = (0..5).map(|i| pointer_at(&out, i * 256 * 20 * 4));
                let vocab = int(shape.vocab);
                let us = card.time(4, |_| {
                    let parts = kernels::sample_parts(rows as u32) as usize;
                    let scan = [pointer(&on), pointer(&params), NULL, NULL, NULL, pointer(&bests), vocab, vocab, vocab];
                    card.run("sample_scan", 0, kernels::sample_scan(rows as u32), &scan)?;
                    let args = [&on, &params].map(pointer).into_iter().chain([NULL, NULL, NULL]).chain(outputs.clone());
                    let args: Vec<Arg> =
                        args.chain([pointer(&bests), vocab, vocab, vocab, int(20), int(parts), int(0)]).collect();
                    card.run("sample", 0, kernels::sample(rows as u32), &args)
                })?;
                let bytes = f64::from(rows) * shape.vocab as f64 * 4.0 * passes;
                line(&format!("{} sample {name} rows {rows}", shape.name), us, bytes);
            }
        }
    }
    Ok(())
}
