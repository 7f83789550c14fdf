//! Random inputs and the comparison with float64.

use super::card::{Failure, Outcome};
use half::bf16;

pub struct Random(fastrand::Rng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    pub fn bf16s(&mut self, count: usize, scale: f32) -> Vec<bf16> {
        (0..count).map(|_| bf16::from_f32((self.0.f32() * 2.0 - 1.0) * scale)).collect()
    }

    pub fn floats(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| (self.0.f32() * 2.0 - 1.0) * scale).collect()
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.0.usize(..end)
    }

    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        self.0.shuffle(values);
    }
}

pub fn wide(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|v| v.to_f64()).collect()
}

/// Rounding to bf16 alone gives about 1.4e-6.
pub const BF16_BOUND: f64 = 1e-5;

/// Normalised mean square error within `bound`; a NaN, which an element nobody wrote is, fails.
pub fn close(what: &str, got: &[f64], want: &[f64], bound: f64) -> Outcome {
    if got.len() != want.len() {
        return Err(Failure::from(format!("{what}: {} values, expected {}", got.len(), want.len())));
    }
    let nmse = nmse(got, want);
    println!("{what}: NMSE {nmse:.1e}");
    if nmse <= bound { Ok(()) } else { Err(format!("{what}: NMSE {nmse:e}, at most {bound:e} is right").into()) }
}

pub fn nmse(got: &[f64], want: &[f64]) -> f64 {
    let error: f64 = got.iter().zip(want).map(|(g, w)| (g - w) * (g - w)).sum();
    let signal: f64 = want.iter().map(|w| w * w).sum();
    error / signal.max(1e-30)
}
