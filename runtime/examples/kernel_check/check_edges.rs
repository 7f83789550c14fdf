//! Row-wise kernels over random and awkward shapes, and what the other checks leave out: every head size with part of
//! it rotating or nowhere to write K to, the norm with an addition behind it, the other activations, rows picked out and
//! rows that are not there, a sequence's token counts.

use super::card::{Card, NULL, Outcome, int, pointer};
use super::numbers::{BF16_BOUND, Random, close, wide};
use mserve_runtime::cuda::kernels::{self, HEAD_DIMS};
use mserve_runtime::cuda::module::Arg;

pub fn all(card: &Card) -> Outcome {
    let mut random = Random::new(21);
    for _ in 0..12 {
        let (rows, width) = (1 + random.below(400), 8 * (1 + random.below(700)));
        norms(card, &mut random, rows, width)?;
        gated(card, &mut random, rows, width)?;
    }
    for (rows, width) in [(1, 8), (2, 32_768), (257, 2048), (256, 2056), (1501, 896), (1026, 1024)] {
        norms(card, &mut random, rows, width)?;
    }
    for head_dim in HEAD_DIMS {
        for rotary in [head_dim as usize, head_dim as usize / 2, 0] {
            for norm in [false, true] {
                for cached in [false, true] {
                    rope(card, &mut random, &Case { head_dim: head_dim as usize, rotary, norm, cached })?;
                }
            }
        }
    }
    picked(card, &mut random)?;
    token_state(card, &mut random)
}

fn norms(card: &Card, random: &mut Random, rows: usize, width: usize) -> Outcome {
    let (x, weight, add) = (random.bf16s(rows * width, 3.0), random.bf16s(width, 1.0), random.bf16s(rows * width, 1.0));
    let (x_on, w_on, add_on) = (card.upload(&x)?, card.upload(&weight)?, card.upload(&add)?);
    let geometry = kernels::rms_norm(rows as u32, width as u32).ok_or("too wide")?;
    for (offset, adds) in [(0.0, false), (1.0, false), (1.0, true)] {
        let y = card.poisoned(rows * width * 2)?;
        let mut args = vec![pointer(&x_on), pointer(&w_on)];
        args.extend(adds.then(|| pointer(&add_on)));
        args.extend([pointer(&y), int(rows), int(width), Arg::Float(1e-6), Arg::Float(offset)]);
        card.run(if adds { "rms_norm_add" } else { "rms_norm" }, 0, geometry, &args)?;
        let mut want = vec![];
        for (row, add) in wide(&x).chunks(width).zip(wide(&add).chunks(width)) {
            let mean = row.iter().map(|v| v * v).sum::<f64>() / width as f64;
            let factor = 1.0 / (mean + 1e-6).sqrt();
            let normed = row.iter().zip(&weight).map(|(v, w)| v * factor * (w.to_f64() + f64::from(offset)));
            want.extend(normed.zip(add).map(|(normed, add)| if adds { normed + add } else { normed }));
        }
        let what = format!("rms_norm {rows}x{width} offset {offset} add {adds}");
        close(&what, &card.bf16s(&y, rows * width)?, &want, BF16_BOUND)?;
    }
    Ok(())
}

fn gated(card: &Card, random: &mut Random, rows: usize, width: usize) -> Outcome {
    let gate_up = random.bf16s(rows * 2 * width, 6.0);
    let on = card.upload(&gate_up)?;
    let silu: fn(f64) -> f64 = |x| x / (1.0 + (-x).exp());
    let tanh: fn(f64) -> f64 = |x| 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x * x * x)).tanh());
    for (entry, activation) in [("silu_mul", silu), ("gelu_tanh_mul", tanh), ("gelu_mul", gelu)] {
        let out = card.poisoned(rows * width * 2)?;
        let args = [pointer(&on), pointer(&out), int(width)];
        card.run(entry, 0, kernels::gated_act(rows as u32, width as u32), &args)?;
        let values = wide(&gate_up);
        let row = |row: &[f64]| (0..width).map(|i| activation(row[i]) * row[width + i]).collect::<Vec<_>>();
        let want: Vec<f64> = values.chunks(2 * width).flat_map(row).collect();
        close(&format!("{entry} {rows}x{width}"), &card.bf16s(&out, rows * width)?, &want, BF16_BOUND)?;
    }
    Ok(())
}

/// x times the share of a normal distribution below x, by Simpson's rule.
fn gelu(x: f64) -> f64 {
    let (steps, end) = (200, x.clamp(-9.0, 9.0));
    let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let h = end / f64::from(steps);
    let weight = |i: i32| {
        if i == 0 || i == steps {
            1.0
        } else if i % 2 == 1 {
            4.0
        } else {
            2.0
        }
    };
    let area: f64 = (0..=steps).map(|i| weight(i) * density(h * f64::from(i))).sum::<f64>() * h / 3.0;
    x * (0.5 + area)
}

struct Case {
    head_dim: usize,
    rotary: usize,
    norm: bool,
    cached: bool,
}

fn rope(card: &Card, random: &mut Random, case: &Case) -> Outcome {
    let &Case { head_dim, rotary, norm, cached } = case;
    let (heads, kv_heads) = (1 + random.below(3) * 2, 1 + random.below(2));
    // From 1,024 tokens on a warp has all heads of one.
    let tokens = 1 + random.below(60) + if random.below(3) == 0 { 1023 } else { 0 };
    let (blocks, half, all) = (tokens as i32 / 16 + 2, rotary / 2, heads + 2 * kv_heads);
    let qkv = random.bf16s(tokens * all * head_dim, 1.0);
    let (qw, kw) = (random.bf16s(head_dim, 1.0), random.bf16s(head_dim, 1.0));
    let (cos, sin) = (random.floats(64 * half, 1.0), random.floats(64 * half, 1.0));
    let positions: Vec<i32> = (0..tokens).map(|_| random.below(64) as i32).collect();
    let mut slots: Vec<i32> = (0..blocks * 16).map(|s| if s % 7 == 3 { -1 } else { s }).collect();
    random.shuffle(&mut slots);
    let (qkv_on, qw_on, kw_on) = (card.upload(&qkv)?, card.upload(&qw)?, card.upload(&kw)?);
    let (cos_on, sin_on) = (card.upload(&cos)?, card.upload(&sin)?);
    let (positions_on, slots_on) = (card.upload(&positions)?, card.upload(&slots[..tokens])?);
    let cache = blocks as usize * kv_heads * 16 * head_dim;
    let (keys, values) = (card.poisoned(cache * 2)?, card.poisoned(cache * 2)?);
    let some = |there: bool, memory| if there { pointer(memory) } else { NULL };
    let args = [
        pointer(&qkv_on),
        pointer(&positions_on),
        pointer(&slots_on),
        pointer(&cos_on),
        pointer(&sin_on),
        some(norm, &qw_on),
        some(norm, &kw_on),
        some(cached, &keys),
        some(cached, &values),
        int(tokens),
        int(heads),
        int(kv_heads),
        int(rotary),
        Arg::Float(1e-6),
        Arg::Float(1.0),
    ];
    let geometry = kernels::rope(tokens as u32, heads as u32, kv_heads as u32);
    card.run("qk_norm_rope_kv_write", head_dim as u32, geometry, &args)?;
    let (rows, keys, values) =
        (card.bf16s(&qkv_on, qkv.len())?, card.bf16s(&keys, cache)?, card.bf16s(&values, cache)?);
    let (mut got, mut want, mut written) = (vec![], vec![], 0);
    for (job, x) in wide(&qkv).chunks(head_dim).enumerate() {
        let (token, head) = (job / all, job % all);
        let (is_query, is_value) = (head < heads, head >= heads + kv_heads);
        if is_query || !cached {
            got.extend_from_slice(&rows[job * head_dim..][..head_dim]);
        } else if let Ok(slot) = usize::try_from(slots[token]) {
            let at = ((slot / 16 * kv_heads + (head - heads) % kv_heads) * 16 + slot % 16) * head_dim;
            got.extend_from_slice(&if is_value { &values } else { &keys }[at..][..head_dim]);
            written += head_dim;
        } else {
            continue;
        }
        let mean = x.iter().map(|v| v * v).sum::<f64>() / head_dim as f64;
        let w = |i: usize| (if is_query { qw[i] } else { kw[i] }.to_f64() + 1.0) / (mean + 1e-6).sqrt();
        let y: Vec<f64> = (0..head_dim).map(|i| if norm && !is_value { x[i] * w(i) } else { x[i] }).collect();
        let angle = |i: usize| positions[token] as usize * half + i % half;
        want.extend((0..head_dim).map(|i| match i {
            _ if is_value || i >= rotary => y[i],
            _ if i < half => y[i] * f64::from(cos[angle(i)]) - y[i + half] * f64::from(sin[angle(i)]),
            _ => y[i] * f64::from(cos[angle(i)]) + y[i - half] * f64::from(sin[angle(i)]),
        }));
    }
    let touched = keys.iter().chain(&values).filter(|v| !v.is_nan()).count();
    if touched != written {
        return Err(
            format!("rope head_dim {head_dim}: {touched} elements of the cache were written, not {written}").into()
        );
    }
    let what = format!("rope head_dim {head_dim} rotary {rotary} norm {norm} cache {cached}, {tokens} tokens");
    close(&what, &got, &want, BF16_BOUND)
}

fn picked(card: &Card, random: &mut Random) -> Outcome {
    for width in [8, 64, 904, 4096, 12_288] {
        let (count, vocab) = (9, 50);
        let x = random.bf16s(vocab * width, 1.0);
        let x_on = card.upload(&x)?;
        let row = |r: i32| usize::try_from(r).map_or(vec![0.0; width], |r| wide(&x[r * width..][..width]));
        let rows = [49, -1, 0, 7, 7, -1, 3, 11, 20];
        let (rows_on, out) = (card.upload(&rows)?, card.poisoned(count * width * 2)?);
        let args = [pointer(&x_on), pointer(&rows_on), pointer(&out), int(width)];
        card.run("gather_rows", 0, kernels::gather(count as u32, width as u32), &args)?;
        let want: Vec<f64> = rows.iter().flat_map(|&r| row(r)).collect();
        close(&format!("gather_rows of {width}"), &card.bf16s(&out, count * width)?, &want, 0.0)?;
        // Known tokens, tokens of the step before, and ids that are none.
        let (ids, sampled) = ([4, -1, -3, 49, 50, -2, 0, 31, i32::MAX], [8, 60, 2]);
        let (ids_on, sampled_on) = (card.upload(&ids)?, card.upload(&sampled)?);
        for scale in [1.0_f32, 8.0] {
            let out = card.poisoned(count * width * 2)?;
            let args = [&ids_on, &sampled_on, &x_on, &out].map(pointer);
            let args = [&args[..], &[int(width), int(vocab), Arg::Float(scale)]].concat();
            card.run("embed", 0, kernels::embed(count as u32, width as u32), &args)?;
            let resolved = ids.map(|id| if id < 0 { sampled[(-1 - id) as usize] } else { id });
            let known = resolved.map(|id| if id < vocab as i32 { id } else { -1 });
            let want: Vec<f64> = known.iter().flat_map(|&r| row(r)).map(|v| v * f64::from(scale)).collect();
            close(&format!("embed of {width} times {scale}"), &card.bf16s(&out, count * width)?, &want, 0.0)?;
        }
    }
    Ok(())
}

fn token_state(card: &Card, random: &mut Random) -> Outcome {
    for vocab in [7, 1000, 32_003] {
        let stride = vocab + vocab % 2;
        let mut ids = |count: usize| (0..count).map(|_| random.below(vocab + 2) as i32).collect::<Vec<_>>();
        let lists = [ids(300), ids(5000), ids(40)];
        let on = [card.upload(&lists[0])?, card.upload(&lists[1])?, card.upload(&lists[2])?];
        let state = card.poisoned((stride + 8) * 2)?;
        let mut args = vec![pointer(&state), int(vocab), int(stride)];
        on.iter().zip(&lists).for_each(|(on, list)| args.extend([pointer(on), int(list.len())]));
        card.run("token_state_reset", 0, kernels::token_state_reset(), &args)?;
        let mut want = vec![0_u16; stride];
        for (list, mark) in lists.iter().zip([0x8000, 0, 0x4000]) {
            for &id in list.iter().filter(|id| (**id as usize) < vocab) {
                let word = &mut want[id as usize];
                *word = if mark > 0 { *word | mark } else { *word + 1 };
            }
        }
        let bytes = state.read(0, (stride + 8) * 2)?;
        let found: Vec<u16> = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        if found[..stride] != want || found[stride..].iter().any(|&w| w != 0xffff) {
            return Err(format!("token_state_reset of {vocab} tokens is not what the lists say").into());
        }
        println!("token_state_reset of {vocab}: exact");
    }
    Ok(())
}
