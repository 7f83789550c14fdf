//! Rates of the products with few rows, alone and in a chain as a layer has them.

use super::card::{Card, NULL, Outcome, int, pointer, pointer_at};
use super::time::{BYTES_PER_US, SHAPES};
use mserve_runtime::cuda::kernels::{self, Geometry, Products};
use mserve_runtime::cuda::memory::DeviceMemory;

const POOL_BYTES: usize = 2 << 30;

struct Product {
    name: &'static str,
    n: usize,
    k: usize,
}

pub fn all(card: &Card) -> Outcome {
    let weights = card.random(POOL_BYTES)?;
    let x = card.random(8 * 32_768 * 2)?;
    let y = card.poisoned(8 * 160_000 * 4)?;
    for shape in &SHAPES {
        let qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let product = |name, n, k| Product { name, n, k };
        let products = [
            product("qkv", qkv, shape.hidden),
            product("o", shape.hidden, shape.heads * shape.head_dim),
            product("gate_up", 2 * shape.intermediate, shape.hidden),
            product("down", shape.hidden, shape.intermediate),
            product("head", shape.vocab, shape.hidden),
        ];
        for p in &products {
            for rows in [1, 2, 4, 8] {
                one(card, [&weights, &x, &y], shape.name, p, rows)?;
            }
        }
    }
    Ok(())
}

fn one(card: &Card, [weights, x, y]: [&DeviceMemory; 3], model: &str, p: &Product, rows: usize) -> Outcome {
    let bytes = p.n * p.k * 2;
    let copies = (POOL_BYTES / bytes).min(32);
    let mut figures = vec![];
    for kernel in Products::ALL {
        if !kernel.takes(rows as u32, p.n as u32, p.k as u32) {
            continue;
        }
        for overlap in [true, false] {
            if !overlap && rows > 1 {
                continue;
            }
            let geometry = Geometry { overlap, ..kernels::product(&kernel, p.n as u32) };
            let us = card.time(copies, |i| {
                let at = pointer_at(weights, i * bytes);
                let args = [
                    at,
                    pointer(x),
                    NULL,
                    NULL,
                    pointer(y),
                    int(rows),
                    int(p.n),
                    int(p.k),
                    int(usize::from(p.name == "head")),
                ];
                card.run(kernel.entry, 0, geometry, &args)
            })?;
            figures.push((us, format!("{}{}", kernel.entry, if overlap { "" } else { " alone" })));
        }
    }
    figures.sort_by(|a, b| a.0.total_cmp(&b.0));
    let listed: Vec<String> = figures.iter().map(|(us, name)| format!("{name} {us:.1}")).collect();
    let best = figures.first().map_or(f64::NAN, |f| f.0);
    println!(
        "{model} {} {}x{} rows {rows}: best {best:.2} us {:.2} TB/s, bound {:.2} | {}",
        p.name,
        p.n,
        p.k,
        bytes as f64 / best / 1e6,
        bytes as f64 / BYTES_PER_US,
        listed.join(", ")
    );
    Ok(())
}
