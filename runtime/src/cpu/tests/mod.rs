//! Every op against plain loops in f64, on every instruction set of this machine, with outputs poisoned beforehand.
#![allow(clippy::unwrap_used)]

mod attention;
mod linear;
mod rows;
mod whole_model;

use crate::weights::{HostTensor, StoredType};
use pulp::Arch;

/// The instruction sets that kernels can be compiled for and that run here.
fn archs() -> Vec<Arch> {
    let mut archs = vec![Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    archs.extend(pulp::x86::V3::try_new().map(Arch::V3));
    #[cfg(target_arch = "x86_64")]
    archs.extend(pulp::x86::V4::try_new().map(Arch::V4));
    archs
}

fn random(rng: &mut fastrand::Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| 2.0 * rng.f32() - 1.0).collect()
}

/// Memory that a correct op overwrites.
fn poisoned(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}

fn tensor(stored: StoredType, shape: &[usize], values: &[f32]) -> HostTensor {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    HostTensor { stored: StoredType::F32, shape: shape.to_vec(), bytes }.convert(stored)
}

/// Mean squared error over mean square must stay below that of f32 sums. NaN fails.
fn assert_close(ours: &[f32], exact: &[f64], what: &str) {
    assert_eq!(ours.len(), exact.len(), "{what}");
    let square = |v: f64| v * v;
    let error: f64 = ours.iter().zip(exact).map(|(&a, &b)| square(f64::from(a) - b)).sum();
    let scale: f64 = exact.iter().map(|&v| square(v)).sum();
    assert!(error <= 1e-11 * scale, "{what}: normalised mean squared error {:e}", error / scale);
}
