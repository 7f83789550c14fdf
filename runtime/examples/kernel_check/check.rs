//! Row-wise kernels, products and sampling against float64.

use super::card::{Card, NULL, Outcome, int, pointer};
use super::numbers::{BF16_BOUND, Random, close, wide};
use mserve_runtime::cuda::kernels::{self, Products, SampleRow};
use mserve_runtime::cuda::module::Arg;

pub fn rows(card: &Card) -> Outcome {
    norms(card)?;
    rope(card)?;
    gated(card)?;
    embed(card)
}

fn norms(card: &Card) -> Outcome {
    let mut random = Random::new(1);
    for (rows, width) in [(3, 4096), (300, 4096), (2, 896), (1, 8), (1501, 896)] {
        let (x, weight, residual) =
            (random.bf16s(rows * width, 3.0), random.bf16s(width, 1.0), random.bf16s(rows * width, 1.0));
        let (x_on, w_on, r_on) = (card.upload(&x)?, card.upload(&weight)?, card.upload(&residual)?);
        let y = card.poisoned(rows * width * 2)?;
        let geometry = kernels::rms_norm(rows as u32, width as u32).ok_or("too wide")?;
        let tail = [int(rows), int(width), Arg::Float(1e-5), Arg::Float(0.0)];
        card.run("rms_norm", 0, geometry, &[&[pointer(&x_on), pointer(&w_on), pointer(&y)], &tail[..]].concat())?;
        let norm = |row: &[f64]| -> Vec<f64> {
            let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
            row.iter().zip(&weight).map(|(v, w)| v / (mean + 1e-5).sqrt() * w.to_f64()).collect()
        };
        let want: Vec<f64> = wide(&x).chunks(width).flat_map(norm).collect();
        close(&format!("rms_norm {rows}x{width}"), &card.bf16s(&y, rows * width)?, &want, BF16_BOUND)?;
        let args = [&[pointer(&x_on), pointer(&r_on), pointer(&w_on), pointer(&y)], &tail[..]].concat();
        card.run("add_rms_norm", 0, geometry, &args)?;
        let sum: Vec<f64> = x.iter().zip(&residual).map(|(a, b)| a.to_f64() + b.to_f64()).collect();
        let rounded = card.bf16s(&r_on, rows * width)?;
        close("residual", &rounded, &sum, BF16_BOUND)?;
        let want: Vec<f64> = rounded.chunks(width).flat_map(norm).collect();
        close(&format!("add_rms_norm {rows}x{width}"), &card.bf16s(&y, rows * width)?, &want, BF16_BOUND)?;
    }
    Ok(())
}

fn rope(card: &Card) -> Outcome {
    let mut random = Random::new(2);
    for (head_dim, heads, kv_heads, norm, tokens) in [
        (128, 32, 8, false, 37),
        (64, 14, 2, false, 37),
        (128, 16, 8, true, 37),
        (80, 4, 4, true, 37),
        (128, 32, 8, false, 1025),
        (64, 14, 2, false, 1025),
        (128, 4, 2, true, 1025),
        (96, 4, 4, true, 1025),
    ] {
        let (blocks, half) = (tokens as i32 / 16 + 4, head_dim / 2);
        let all = heads + 2 * kv_heads;
        let qkv = random.bf16s(tokens * all * head_dim, 1.0);
        let (qw, kw) = (random.bf16s(head_dim, 1.0), random.bf16s(head_dim, 1.0));
        let (cos, sin) = (random.floats(64 * half, 1.0), random.floats(64 * half, 1.0));
        let positions: Vec<i32> = (0..tokens).map(|_| random.below(64) as i32).collect();
        let mut slots: Vec<i32> = (0..blocks * 16).collect();
        random.shuffle(&mut slots);
        slots[5] = -1;
        let (qkv_on, qw_on, kw_on) = (card.upload(&qkv)?, card.upload(&qw)?, card.upload(&kw)?);
        let (cos_on, sin_on) = (card.upload(&cos)?, card.upload(&sin)?);
        let (positions_on, slots_on) = (card.upload(&positions)?, card.upload(&slots[..tokens])?);
        let cache = blocks as usize * kv_heads * 16 * head_dim;
        let (keys, values) = (card.poisoned(cache * 2)?, card.poisoned(cache * 2)?);
        let weight = |w| if norm { pointer(w) } else { NULL };
        card.run(
            "qk_norm_rope_kv_write",
            head_dim as u32,
            kernels::rope(tokens as u32, heads as u32, kv_heads as u32),
            &[
                pointer(&qkv_on),
                pointer(&positions_on),
                pointer(&slots_on),
                pointer(&cos_on),
                pointer(&sin_on),
                weight(&qw_on),
                weight(&kw_on),
                pointer(&keys),
                pointer(&values),
                int(tokens),
                int(heads),
                int(kv_heads),
                int(head_dim),
                Arg::Float(1e-6),
                Arg::Float(0.0),
            ],
        )?;
        let (rows, keys, values) =
            (card.bf16s(&qkv_on, qkv.len())?, card.bf16s(&keys, cache)?, card.bf16s(&values, cache)?);
        let (mut got, mut want) = (vec![], vec![]);
        for (job, x) in wide(&qkv).chunks(head_dim).enumerate() {
            let (token, head) = (job / all, job % all);
            let (is_query, is_value) = (head < heads, head >= heads + kv_heads);
            if is_query {
                got.extend_from_slice(&rows[job * head_dim..][..head_dim]);
            } else if slots[token] < 0 {
                continue;
            } else {
                let slot = slots[token] as usize;
                let at = ((slot / 16 * kv_heads + (head - heads) % kv_heads) * 16 + slot % 16) * head_dim;
                got.extend_from_slice(&if is_value { &values } else { &keys }[at..][..head_dim]);
            }
            let mean = x.iter().map(|v| v * v).sum::<f64>() / head_dim as f64;
            let w = |i: usize| if is_query { qw[i] } else { kw[i] }.to_f64() / (mean + 1e-6).sqrt();
            let y: Vec<f64> = (0..head_dim).map(|i| if norm && !is_value { x[i] * w(i) } else { x[i] }).collect();
            let angle = |i: usize| positions[token] as usize * half + i % half;
            want.extend((0..head_dim).map(|i| match (is_value, i < half) {
                (true, _) => y[i],
                (_, true) => y[i] * f64::from(cos[angle(i)]) - y[i + half] * f64::from(sin[angle(i)]),
                _ => y[i] * f64::from(cos[angle(i)]) + y[i - half] * f64::from(sin[angle(i)]),
            }));
        }
        close(&format!("rope head_dim {head_dim} norm {norm}"), &got, &want, BF16_BOUND)?;
    }
    Ok(())
}

fn gated(card: &Card) -> Outcome {
    let (rows, width) = (5, 14_336);
    let gate_up = Random::new(3).bf16s(rows * 2 * width, 6.0);
    let (on, out) = (card.upload(&gate_up)?, card.poisoned(rows * width * 2)?);
    card.run("silu_mul", 0, kernels::gated_act(rows as u32, width as u32), &[pointer(&on), pointer(&out), int(width)])?;
    let want: Vec<f64> = wide(&gate_up)
        .chunks(2 * width)
        .flat_map(|row| (0..width).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[width + i]).collect::<Vec<_>>())
        .collect();
    close("silu_mul", &card.bf16s(&out, rows * width)?, &want, BF16_BOUND)
}

fn embed(card: &Card) -> Outcome {
    let (vocab, width) = (1000, 896);
    let table = Random::new(4).bf16s(vocab * width, 1.0);
    let ids = [5, -2, 999, 1000];
    let (on, ids_on, sampled) = (card.upload(&table)?, card.upload(&ids)?, card.upload(&[0, 77])?);
    let out = card.poisoned(ids.len() * width * 2)?;
    let args =
        [pointer(&ids_on), pointer(&sampled), pointer(&on), pointer(&out), int(width), int(vocab), Arg::Float(1.0)];
    card.run("embed", 0, kernels::embed(ids.len() as u32, width as u32), &args)?;
    let row = |id: usize| wide(&table[id * width..][..width]);
    let want = [row(5), row(77), row(999), vec![0.0; width]].concat();
    close("embed", &card.bf16s(&out, want.len())?, &want, 0.0)
}

pub fn products(card: &Card) -> Outcome {
    let mut random = Random::new(5);
    for (n, k) in [(4096, 4096), (896, 4864), (1152, 896)] {
        let weights = random.bf16s(n * k, 1.0);
        let x = random.bf16s(8 * k, 1.0);
        let add = random.bf16s(8 * n, 1.0);
        let (w_on, x_on, add_on) = (card.upload(&weights)?, card.upload(&x)?, card.upload(&add)?);
        let (w, x) = (wide(&weights), wide(&x));
        let dot = |row: usize, m: usize| -> f64 { (0..k).map(|i| w[row * k + i] * x[m * k + i]).sum() };
        let plain: Vec<Vec<f64>> = (0..8).map(|m| (0..n).map(|row| dot(row, m)).collect()).collect();
        for kernel in Products::ALL {
            for rows in [1, kernel.rows_max as usize] {
                if !kernel.takes(rows as u32, n as u32, k as u32) {
                    continue;
                }
                let y = card.poisoned(rows * n * 4)?;
                let args = [
                    pointer(&w_on),
                    pointer(&x_on),
                    NULL,
                    pointer(&add_on),
                    pointer(&y),
                    int(rows),
                    int(n),
                    int(k),
                    int(1),
                ];
                card.run(kernel.entry, 0, kernels::product(&kernel, n as u32), &args)?;
                let want: Vec<f64> = (0..rows * n).map(|i| plain[i / n][i % n] + add[i].to_f64()).collect();
                close(&format!("{} {rows}x{n}x{k}", kernel.entry), &card.floats(&y, rows * n)?, &want, 1e-9)?;
            }
        }
    }
    Ok(())
}

pub fn sample(card: &Card) -> Outcome {
    let (vocab, rows) = (128_256, 64);
    let logits = Random::new(6).floats(vocab * rows, 10.0);
    let on = card.upload(&logits)?;
    let base = SampleRow { temperature: 0.7, ..SampleRow::GREEDY };
    let kinds: [(&str, SampleRow); 6] = [
        ("greedy", SampleRow::GREEDY),
        ("greedy with logprobs", SampleRow { logprobs: Some(5), ..SampleRow::GREEDY }),
        ("plain", base),
        ("top_k 20 top_p 0.8", SampleRow { top_k: 20, top_p: 0.8, ..base }),
        ("top_p 0.05", SampleRow { top_p: 0.05, ..base }),
        ("top_p 0.9, wide", SampleRow { top_p: 0.9, temperature: 5.0, ..base }),
    ];
    for (name, row) in kinds {
        let words: Vec<i32> = (0..rows).flat_map(|r| SampleRow { seed: r as u64, ..row }.words()).collect();
        let params = card.upload(&words)?;
        let (ids, logprobs, ranks) = (card.poisoned(rows * 4)?, card.poisoned(rows * 4)?, card.poisoned(rows * 4)?);
        let (top_ids, top_logprobs) = (card.poisoned(rows * 20 * 4)?, card.poisoned(rows * 20 * 4)?);
        let args = [&on, &params].map(pointer).into_iter().chain([NULL, NULL, NULL]);
        let outputs = [&ids, &logprobs, &ranks, &top_ids, &top_logprobs].map(pointer);
        let bests = card.poisoned(kernels::SCAN_BLOCKS as usize * 8)?;
        let scan =
            [pointer(&on), pointer(&params), NULL, NULL, NULL, pointer(&bests), int(vocab), int(vocab), int(vocab)];
        card.run("sample_scan", 0, kernels::sample_scan(rows as u32), &scan)?;
        let parts = kernels::sample_parts(rows as u32) as usize;
        let tail = [pointer(&bests), int(vocab), int(vocab), int(vocab), int(20), int(parts), int(0)];
        let args: Vec<Arg> = args.chain(outputs).chain(tail).collect();
        card.run("sample", 0, kernels::sample(rows as u32), &args)?;
        let ids = card.ints(&ids, rows)?;
        let mut mass = 0.0;
        for (r, x) in logits.chunks(vocab).enumerate() {
            let id = usize::try_from(ids[r])?;
            let max = f64::from(x.iter().copied().fold(f32::MIN, f32::max));
            let weight = |t: f64, v: f32| ((f64::from(v) - max) / t).exp();
            if row.temperature == 0.0 {
                if row.logprobs.is_none() {
                    if f64::from(x[id]) != max {
                        return Err(format!("greedy row {r}: id {id} is not the likeliest").into());
                    }
                    continue;
                }
                let sum: f64 = x.iter().map(|&v| weight(1.0, v)).sum();
                let got = card.floats(&logprobs, rows)?[r];
                if f64::from(x[id]) != max || (got + sum.ln()).abs() > 1e-3 || card.ints(&ranks, rows)?[r] != 1 {
                    return Err(format!("greedy row {r}: id {id} logprob {got}, expected {}", -sum.ln()).into());
                }
                continue;
            }
            // Share of the likelier tokens: must be below top_p of what top_k leaves.
            let t = f64::from(row.temperature);
            let mut order: Vec<f64> = x.iter().map(|&v| weight(t, v)).collect();
            order.sort_unstable_by(|a, b| b.total_cmp(a));
            order.truncate(if row.top_k > 0 { row.top_k as usize } else { vocab });
            let total: f64 = order.iter().sum();
            let mine = weight(t, x[id]);
            let ahead: f64 = order.iter().take_while(|&&w| w > mine * (1.0 + 1e-6)).sum();
            if ahead > total * (f64::from(row.top_p) + 1e-4) || mine < order[order.len() - 1] * (1.0 - 1e-6) {
                return Err(format!("{name}: row {r} chose a token behind {} of the mass", ahead / total).into());
            }
            mass += (ahead + mine / 2.0) / total / rows as f64;
        }
        println!("sample {name}: ok, mean place in the distribution {mass:.2} (about top_p / 2)");
    }
    Ok(())
}
