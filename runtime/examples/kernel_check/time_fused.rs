//! Rates of the products with norm, gate and rotation around them: every entry that takes a shape, best first.

use super::card::{Card, Outcome, int, pointer, pointer_at};
use super::time::{BYTES_PER_US, SHAPES};
use mserve_runtime::cuda::kernels::{After, FUSED, FusedShape};
use mserve_runtime::cuda::module::Arg;

const POOL_BYTES: usize = 2 << 30;

pub fn all(card: &Card) -> Outcome {
    let weights = card.random(POOL_BYTES)?;
    let x = card.random(256 * 32_768 * 2)?;
    let (y, caches) = (card.poisoned(256 * 160_000 * 4)?, card.poisoned(64 << 20)?);
    let norms = card.random(65_536)?;
    let zeros = card.upload(&vec![0_i32; 1 << 16])?;
    for shape in &SHAPES {
        let heads = shape.heads + 2 * shape.kv_heads;
        let products = [
            ("norm+qkv+rope", After::Rotated, heads * shape.head_dim, shape.hidden, true),
            ("o", After::Plain, shape.hidden, shape.heads * shape.head_dim, false),
            ("norm+gate_up+silu", After::Gated, shape.intermediate, shape.hidden, true),
            ("down", After::Plain, shape.hidden, shape.intermediate, false),
            ("norm+head", After::Plain, shape.vocab, shape.hidden, true),
        ];
        for (name, after, n, k, norm) in products {
            let weight_rows = if after == After::Gated { 2 * n } else { n };
            let bytes = weight_rows * k * 2;
            let copies = (POOL_BYTES / bytes).min(32);
            for rows in [1, 8, 16, 32, 64, 128, 256] {
                let (rows32, n32, k32) = (rows as u32, n as u32, k as u32);
                let wanted = FusedShape { after, rows: rows32, n: n32, k: k32, norm, head_dim: shape.head_dim as u32 };
                let mut figures = vec![];
                for kernel in FUSED.iter().filter(|f| f.rows_max as usize <= rows.max(8) * 2) {
                    for clusters in [1, 2, 4, 8] {
                        if !kernel.takes(&wanted, clusters) {
                            continue;
                        }
                        let us = card.time(copies, |i| {
                            let at = |memory| pointer_at(memory, 0);
                            let args = [
                                pointer_at(&weights, i * bytes),
                                pointer(&x),
                                if norm { at(&norms) } else { Arg::Pointer(0) },
                                Arg::Pointer(0),
                                if norm { Arg::Pointer(0) } else { at(&y) },
                                pointer(&y),
                                int(rows),
                                int(n),
                                int(k),
                                Arg::Float(1e-5),
                                int(usize::from(name == "norm+head")),
                                at(&zeros),
                                at(&zeros),
                                at(&zeros),
                                at(&zeros),
                                at(&caches),
                                at(&caches),
                                int(shape.heads),
                                int(shape.kv_heads),
                                int(shape.head_dim),
                            ];
                            card.run(kernel.entry, 0, kernel.geometry(rows32, n32, clusters), &args)
                        })?;
                        figures.push((us, format!("{} c{clusters}", kernel.entry)));
                    }
                }
                figures.sort_by(|a, b| a.0.total_cmp(&b.0));
                let listed: Vec<String> = figures.iter().map(|(us, name)| format!("{name} {us:.1}")).collect();
                let bound = bytes as f64 / BYTES_PER_US;
                println!("{} {name} {n}x{k} rows {rows}: bound {bound:.2} us | {}", shape.name, listed.join(", "));
            }
        }
    }
    Ok(())
}
