//! Rotary position embeddings: inverse frequencies of each scaling, cosines and sines of each position.
//!
//! Angles are formed in f32 (position times inverse frequency), as the reference implementation does: at position
//! 30,000 an exact angle would differ from what the model was trained with.

use mserve_planner::model::{RopeScaling, RopeSpec};

/// A rope's frequencies, fixed when the model is loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// One per pair of rotating dimensions.
    inverse_frequencies: Vec<f32>,
    /// Factor on cosine and sine (YaRN and LongRoPE).
    amplitude: f32,
}

impl Rope {
    /// `max_model_len` decides for LongRoPE which of its two lists holds, once for all sequences: rotated keys in the
    /// cache could not change theirs when a sequence outgrows the short list.
    pub fn new(spec: &RopeSpec, max_model_len: usize) -> Self {
        let base = |theta: f64| move |i: u64| theta.powf(-(2.0 * i as f64) / spec.rotary_dim as f64);
        let pairs = 0..spec.rotary_dim / 2;
        let plain = base(spec.theta);
        let (frequencies, amplitude): (Vec<f64>, f64) = match &spec.scaling {
            RopeScaling::None => (pairs.map(plain).collect(), 1.0),
            RopeScaling::Linear { factor } => (pairs.map(|i| plain(i) / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let scale = |f| llama3(f, *factor, *low_freq_factor, *high_freq_factor, *original_max_position as f64);
                (pairs.map(plain).map(scale).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, original_max_position } => {
                let ramp = yarn_ramp(spec, *beta_fast, *beta_slow, *original_max_position as f64);
                let mix = |i: u64| {
                    let interpolated = ramp(i as f64);
                    plain(i) / factor * interpolated + plain(i) * (1.0 - interpolated)
                };
                (pairs.map(mix).collect(), *attention_factor)
            }
            RopeScaling::Dynamic { factor, original_max_position } => {
                // The base for the longest sequence, for all of them: a base that grew with each sequence would not
                // fit the keys already in the cache. vLLM does the same.
                let ratio = (max_model_len as f64 / *original_max_position as f64).max(1.0);
                let dim = spec.rotary_dim as f64;
                let theta = spec.theta * (factor * ratio - (factor - 1.0)).powf(dim / (dim - 2.0));
                (pairs.map(base(theta)).collect(), 1.0)
            }
            RopeScaling::LongRope { short, long, attention_factor, original_max_position } => {
                let factors = if max_model_len as u64 > *original_max_position { long } else { short };
                (pairs.zip(factors).map(|(i, f)| plain(i) / f).collect(), *attention_factor)
            }
        };
        Self { inverse_frequencies: frequencies.into_iter().map(|f| f as f32).collect(), amplitude: amplitude as f32 }
    }

    /// Values of one row of [`Self::fill_row`]: a cosine and a sine for each pair.
    pub fn row_len(&self) -> usize {
        2 * self.inverse_frequencies.len()
    }

    /// Cosines, then sines, of one position.
    pub fn fill_row(&self, position: u32, row: &mut [f32]) {
        let (cos, sin) = row.split_at_mut(self.inverse_frequencies.len());
        for ((c, s), f) in cos.iter_mut().zip(sin).zip(&self.inverse_frequencies) {
            let (sine, cosine) = f64::from(position as f32 * f).sin_cos();
            *c = cosine as f32 * self.amplitude;
            *s = sine as f32 * self.amplitude;
        }
    }
}

/// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended.
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, original_max_position: f64) -> f64 {
    let wavelength = 2.0 * std::f64::consts::PI / frequency;
    if wavelength < original_max_position / high {
        frequency
    } else if wavelength > original_max_position / low {
        frequency / factor
    } else {
        let smooth = (original_max_position / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// YaRN (arXiv 2309.00071): how far pair `i` is interpolated, 0 for pairs that turn more than `beta_fast` times within
/// the original context, 1 for those that turn less than `beta_slow` times.
fn yarn_ramp(spec: &RopeSpec, beta_fast: f64, beta_slow: f64, original_max_position: f64) -> impl Fn(f64) -> f64 {
    let dim = spec.rotary_dim as f64;
    let pair_with_turns = |turns: f64| {
        dim * (original_max_position / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * spec.theta.ln())
    };
    let low = pair_with_turns(beta_fast).floor().max(0.0);
    let high = pair_with_turns(beta_slow).ceil().min(dim - 1.0);
    let high = if high == low { high + 0.001 } else { high };
    move |i| ((i - low) / (high - low)).clamp(0.0, 1.0)
}
