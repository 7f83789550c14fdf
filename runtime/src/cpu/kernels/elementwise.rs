//! Norms and activations over rows. Loops over fixed groups of sixteen, compiled for the machine's vectors by
//! [`pulp::Arch::dispatch`].

use super::math::{erf, exp, tanh};
use super::{LANES, PARALLEL_ELEMENTS};
use mserve_planner::model::{Activation, Norm, NormKind};
use pulp::Arch;
use rayon::prelude::*;

/// out = norm(x) * weight + bias, plus `add`, row by row. `unit_offset` is already in the weight.
#[derive(Debug, Clone, Copy)]
pub struct NormRows<'a> {
    pub norm: Norm,
    pub weight: &'a [f32],
    pub bias: Option<&'a [f32]>,
}

impl NormRows<'_> {
    pub fn run(&self, arch: Arch, x: &[f32], add: Option<&[f32]>, out: &mut [f32]) {
        let width = self.weight.len();
        let row = |i: usize, out: &mut [f32]| {
            let range = i * width..(i + 1) * width;
            arch.dispatch(|| self.row(&x[range.clone()], add.map(|a| &a[range.clone()]), out));
        };
        if out.len() >= PARALLEL_ELEMENTS {
            out.par_chunks_exact_mut(width).enumerate().for_each(|(i, out)| row(i, out));
        } else {
            out.chunks_exact_mut(width).enumerate().for_each(|(i, out)| row(i, out));
        }
    }

    #[inline(always)]
    fn row(&self, x: &[f32], add: Option<&[f32]>, out: &mut [f32]) {
        let width = x.len() as f32;
        let (mean, variance) = match self.norm.kind {
            NormKind::Rms => (0.0, sum(x, |v| v * v) / width),
            NormKind::Layer => {
                let mean = sum(x, |v| v) / width;
                (mean, sum(x, |v| (v - mean) * (v - mean)) / width)
            }
        };
        let factor = 1.0 / (variance + self.norm.eps as f32).sqrt();
        for ((o, &v), &w) in out.iter_mut().zip(x).zip(self.weight) {
            *o = (v - mean) * factor * w;
        }
        for rest in [self.bias, add].into_iter().flatten() {
            for (o, &v) in out.iter_mut().zip(rest) {
                *o += v;
            }
        }
    }
}

/// RMS norm of one head in place, as Qwen3 and Gemma 3 do to q and k.
#[inline(always)]
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let factor = 1.0 / (sum(x, |v| v * v) / x.len() as f32 + eps).sqrt();
    for (v, &w) in x.iter_mut().zip(weight) {
        *v = *v * factor * w;
    }
}

/// Sum of f(x) with sixteen running sums: one vector register, and more accurate than a single one.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (groups, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for group in groups {
        for (s, &v) in sums.iter_mut().zip(group) {
            *s += f(v);
        }
    }
    let tail: f32 = rest.iter().map(|&v| f(v)).sum();
    sums.iter().sum::<f32>() + tail
}

/// Divides each row by its Euclidean norm. A row of zeros stays zero.
pub fn l2_normalize(x: &[f32], width: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let norm = sum(x, |v| v * v).sqrt().max(1e-12);
        for (o, &v) in out.iter_mut().zip(x) {
            *o = v / norm;
        }
    }
}

/// out = activation(gate) * up for rows `[gate | up]`, each half as wide as `out`'s rows.
pub fn gated(arch: Arch, activation: Activation, gate_up: &[f32], width: usize, out: &mut [f32]) {
    let row = |gate_up: &[f32], out: &mut [f32]| {
        let (gate, up) = gate_up.split_at(width);
        activate(arch, activation, gate, out);
        for (o, &u) in out.iter_mut().zip(up) {
            *o *= u;
        }
    };
    if out.len() >= PARALLEL_ELEMENTS {
        out.par_chunks_exact_mut(width).zip(gate_up.par_chunks_exact(2 * width)).for_each(|(o, g)| row(g, o));
    } else {
        out.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)).for_each(|(o, g)| row(g, o));
    }
}

/// out = activation(x), element by element.
pub fn act(arch: Arch, activation: Activation, x: &[f32], out: &mut [f32]) {
    const CHUNK: usize = PARALLEL_ELEMENTS / 4;
    if out.len() >= PARALLEL_ELEMENTS {
        out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(o, x)| activate(arch, activation, x, o));
    } else {
        activate(arch, activation, x, out);
    }
}

fn activate(arch: Arch, activation: Activation, x: &[f32], out: &mut [f32]) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    match activation {
        Activation::Silu => map(arch, x, out, |v| v / (1.0 + exp(-v))),
        Activation::Gelu => map(arch, x, out, |v| 0.5 * v * (1.0 + erf(v * std::f32::consts::FRAC_1_SQRT_2))),
        Activation::GeluTanh => {
            map(arch, x, out, |v| 0.5 * v * (1.0 + tanh(SQRT_2_OVER_PI * (v + 0.044_715 * v * v * v))));
        }
        Activation::Relu => map(arch, x, out, |v| v.max(0.0)),
        Activation::Tanh => map(arch, x, out, tanh),
        Activation::ReluSquared => map(arch, x, out, |v| v.max(0.0) * v.max(0.0)),
        // Programs with it are refused when they are loaded.
        Activation::Special => out.copy_from_slice(x),
    }
}

/// x = cap * tanh(x / cap), in place.
pub fn soft_cap(arch: Arch, cap: f32, x: &mut [f32]) {
    x.par_chunks_mut(PARALLEL_ELEMENTS).for_each(|x| {
        arch.dispatch(
            #[inline(always)]
            || {
                for v in x {
                    *v = cap * tanh(*v / cap);
                }
            },
        );
    });
}

fn map(arch: Arch, x: &[f32], out: &mut [f32], f: impl Fn(f32) -> f32) {
    arch.dispatch(
        #[inline(always)]
        || {
            for (o, &v) in out.iter_mut().zip(x) {
                *o = f(v);
            }
        },
    );
}
