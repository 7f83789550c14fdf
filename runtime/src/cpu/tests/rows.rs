//! Ops that go row by row: norms, activations, rope, pooling, embeddings.

use super::{archs, assert_close, poisoned, random, tensor};
use crate::backend::rope::Rope;
use crate::cpu::interpret::pool;
use crate::cpu::kernels::elementwise::{self, NormRows};
use crate::cpu::loaded::{Embed, Heads, PrepareQkv, Table};
use crate::engine::StepBatch;
use crate::weights::StoredType;
use mserve_planner::model::{Activation, BufferId, Norm, NormKind, Pooling, RopeScaling, RopeSpec};

/// Row lengths around a vector's, and row counts on both sides of what is shared out to threads.
const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 15), (2, 16), (5, 47), (4, 896), (70, 600)];

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

#[test]
fn norms() {
    let mut rng = fastrand::Rng::with_seed(5);
    for (count, width) in SHAPES {
        for (kind, with_add) in [(NormKind::Rms, false), (NormKind::Layer, false), (NormKind::Rms, true)] {
            let norm = Norm { kind, eps: 1e-5, unit_offset: false };
            let (x, weight) = (random(&mut rng, count * width), random(&mut rng, width));
            let bias = (kind == NormKind::Layer).then(|| random(&mut rng, width));
            let add = with_add.then(|| random(&mut rng, count * width));
            let exact: Vec<f64> = (0..count * width)
                .map(|i| {
                    let row = wide(&x[i / width * width..(i / width + 1) * width]);
                    let mean = if kind == NormKind::Layer { row.iter().sum::<f64>() / width as f64 } else { 0.0 };
                    let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / width as f64;
                    let scaled = (row[i % width] - mean) / (variance + 1e-5).sqrt() * f64::from(weight[i % width]);
                    let bias = bias.as_ref().map_or(0.0, |b| b[i % width].into());
                    scaled + bias + add.as_ref().map_or(0.0, |a| f64::from(a[i]))
                })
                .collect();
            for arch in archs() {
                let mut out = poisoned(x.len());
                let rows = NormRows { norm, weight: &weight, bias: bias.as_deref() };
                rows.run(arch, &x, add.as_deref(), &mut out);
                assert_close(&out, &exact, &format!("{kind:?} {count}x{width}"));
            }
        }
    }
}

fn activation(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * (1.0 + candle_core::cpu::erf::erf_f64(x / 2.0_f64.sqrt())),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
        Activation::ReluSquared => x.max(0.0).powi(2),
        Activation::Special => x,
    }
}

#[test]
fn activations() {
    let mut rng = fastrand::Rng::with_seed(6);
    let all = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Tanh,
        Activation::ReluSquared,
    ];
    for (count, width) in SHAPES {
        let x: Vec<f32> = random(&mut rng, count * width * 2).iter().map(|v| v * 8.0).collect();
        for how in all {
            let plain: Vec<f64> = wide(&x).iter().map(|&v| activation(how, v)).collect();
            let gated: Vec<f64> = x
                .chunks_exact(2 * width)
                .flat_map(|row| (0..width).map(|i| activation(how, row[i].into()) * f64::from(row[width + i])))
                .collect();
            for arch in archs() {
                let mut out = poisoned(x.len());
                elementwise::act(arch, how, &x, &mut out);
                assert_close(&out, &plain, &format!("{how:?}"));
                let mut out = poisoned(count * width);
                elementwise::gated(arch, how, &x, width, &mut out);
                assert_close(&out, &gated, &format!("gated {how:?}"));
            }
        }
        for arch in archs() {
            let mut capped = x.clone();
            elementwise::soft_cap(arch, 3.0, &mut capped);
            let exact: Vec<f64> = wide(&x).iter().map(|v| 3.0 * (v / 3.0).tanh()).collect();
            assert_close(&capped, &exact, "soft cap");
        }
    }
}

#[test]
fn rows_are_divided_by_their_norm() {
    let x = random(&mut fastrand::Rng::with_seed(7), 5 * 47);
    let mut out = poisoned(x.len());
    elementwise::l2_normalize(&x, 47, &mut out);
    let norm = |row: &[f32]| wide(row).iter().map(|v| v * v).sum::<f64>().sqrt();
    let exact: Vec<f64> = x.chunks(47).flat_map(|r| wide(r).into_iter().map(move |v| v / norm(r))).collect();
    assert_close(&out, &exact, "l2");
    elementwise::l2_normalize(&[0.0; 3], 3, &mut out[..3]);
    assert_eq!(out[..3], [0.0; 3]);
}

#[test]
fn pooling() {
    let rows = [1.0, 2.0, 3.0, 5.0, 8.0, 2.0];
    let mut out = [f32::NAN; 2];
    for (pooling, expected) in
        [(Pooling::Cls, [1.0, 2.0]), (Pooling::LastToken, [8.0, 2.0]), (Pooling::Mean, [4.0, 3.0])]
    {
        pool(pooling, &rows, &mut out);
        assert_eq!(out, expected);
    }
}

#[test]
fn heads_are_normed_then_rotated_and_values_left_alone() {
    let mut rng = fastrand::Rng::with_seed(8);
    // (heads, kv heads, head_dim, rotating dimensions, QK norm): partial rotation is Phi's.
    for (num_heads, num_kv_heads, head_dim, rotary_dim, norm) in
        [(4, 2, 16, 16, false), (3, 3, 20, 10, true), (14, 2, 64, 64, true)]
    {
        let heads = Heads { num_heads, num_kv_heads, head_dim };
        let spec = RopeSpec { theta: 10_000.0, rotary_dim: rotary_dim as u64, scaling: RopeScaling::None };
        let rope = Rope::new(&spec, 4096);
        let positions = [0_u32, 1, 77, 4000];
        let mut table = poisoned(positions.len() * rope.row_len());
        for (row, &p) in table.chunks_exact_mut(rope.row_len()).zip(&positions) {
            rope.fill_row(p, row);
        }
        let weight = random(&mut rng, head_dim);
        let weights = || norm.then(|| weight.clone());
        let prepare = PrepareQkv { heads, q_norm: weights(), k_norm: weights(), eps: 1e-6, rope: Some(0), cache: None };
        let x = random(&mut rng, positions.len() * heads.width());
        let mut exact = wide(&x);
        for (row, &position) in exact.chunks_exact_mut(heads.width()).zip(&positions) {
            for head in row[..(num_heads + num_kv_heads) * head_dim].chunks_exact_mut(head_dim) {
                if norm {
                    let mean = head.iter().map(|v| v * v).sum::<f64>() / head_dim as f64;
                    head.iter_mut().zip(&weight).for_each(|(v, &w)| *v *= f64::from(w) / (mean + 1e-6).sqrt());
                }
                rotate_exactly(head, rotary_dim, position);
            }
        }
        for arch in archs() {
            let mut ours = x.clone();
            prepare.rotate_rows(arch, Some(&table), &mut ours);
            assert_close(&ours, &exact, &format!("{heads:?}"));
        }
    }
}

/// Angles in f32, as the models were trained.
fn rotate_exactly(head: &mut [f64], rotary_dim: usize, position: u32) {
    let half = rotary_dim / 2;
    for i in 0..half {
        let frequency = 10_000.0_f64.powf(-2.0 * i as f64 / rotary_dim as f64) as f32;
        let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}

#[test]
fn rope_scalings() {
    let rope = |scaling, max_model_len| {
        let rope = Rope::new(&RopeSpec { theta: 10_000.0, rotary_dim: 8, scaling }, max_model_len);
        let mut row = vec![0.0; rope.row_len()];
        rope.fill_row(1, &mut row);
        // At position 1 the angle is the frequency, and amplitude is the length of (cos, sin).
        (0..4).map(|i| (row[4 + i].atan2(row[i]), row[i].hypot(row[4 + i]))).collect::<Vec<_>>()
    };
    let close = |rows: Vec<(f32, f32)>, expected: [f32; 4], amplitude: f32| {
        for ((angle, length), expected) in rows.into_iter().zip(expected) {
            assert!((angle - expected).abs() < 1e-6, "{angle}, not {expected}");
            assert!((length - amplitude).abs() < 1e-6, "{length}, not {amplitude}");
        }
    };
    close(rope(RopeScaling::None, 64), [1.0, 0.1, 0.01, 0.001], 1.0);
    close(rope(RopeScaling::Linear { factor: 4.0 }, 64), [0.25, 0.025, 0.0025, 0.000_25], 1.0);
    // Wavelengths 6.3, 63, 628 and 6,283 of an original context of 100: kept, blended (100/62.8 lies 0.197 of the way
    // from 1 to 4), stretched, stretched.
    let llama3 =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 100 };
    close(rope(llama3, 64), [1.0, 0.029_753_5, 0.001_25, 0.000_125], 1.0);
    let long_rope = || RopeScaling::LongRope {
        short: vec![1.0, 1.0, 2.0, 2.0],
        long: vec![1.0, 4.0, 8.0, 16.0],
        attention_factor: 1.25,
        original_max_position: 64,
    };
    close(rope(long_rope(), 64), [1.0, 0.1, 0.005, 0.0005], 1.25);
    close(rope(long_rope(), 65), [1.0, 0.025, 0.001_25, 0.000_062_5], 1.25);
    // theta grows to 10,000 * (2 * 2 - 1)^(8/6).
    let theta = 10_000.0 * 3.0_f32.powf(8.0 / 6.0);
    let dynamic = RopeScaling::Dynamic { factor: 2.0, original_max_position: 32 };
    close(rope(dynamic, 64), [0, 1, 2, 3].map(|i| theta.powf(-(i as f32) / 4.0)), 1.0);
}

#[test]
fn embeddings_sum_their_tables() {
    let mut rng = fastrand::Rng::with_seed(9);
    let (vocab, width) = (11, 7);
    let values = random(&mut rng, vocab * width);
    let positions = random(&mut rng, 6 * width);
    let types = random(&mut rng, width);
    let embed = Embed {
        table: Table::Stored(tensor(StoredType::F32, &[vocab, width], &values)),
        scale: Some(2.0),
        positions: Some(tensor(StoredType::F32, &[6, width], &positions)),
        position_offset: 2,
        token_type: Some(types.clone()),
        out: BufferId(0),
    };
    let batch = StepBatch { token_ids: vec![10, 0, 4], positions: vec![0, 1, 3], ..StepBatch::default() };
    let mut out = poisoned(3 * width);
    embed.run(&batch, &mut out);
    let exact: Vec<f64> = [(10, 2), (0, 3), (4, 5)]
        .into_iter()
        .flat_map(|(token, position)| {
            let (values, positions, types) = (&values, &positions, &types);
            (0..width).map(move |i| {
                f64::from(values[token * width + i]) * 2.0
                    + f64::from(positions[position * width + i])
                    + f64::from(types[i])
            })
        })
        .collect();
    assert_close(&out, &exact, "embed");
}
