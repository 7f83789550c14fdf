//! Passes over a whole vocabulary, written so that the compiler turns them into vector code: these are what sampling
//! costs.

/// Partial results side by side, so that one addition need not wait for the one before it.
const LANES: usize = 16;

/// The greatest logit; -inf of none. No logit may be NaN.
pub fn greatest(logits: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, greater);
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*lane, logit);
        }
    }
    lanes.into_iter().fold(rest, greater)
}

pub fn sum(weights: &[f32]) -> f64 {
    let chunks = weights.chunks_exact(LANES);
    let rest: f64 = chunks.remainder().iter().copied().map(f64::from).sum();
    let mut lanes = [0.0_f64; LANES];
    for chunk in chunks {
        for (lane, &weight) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(weight);
        }
    }
    lanes.into_iter().sum::<f64>() + rest
}

/// Turns logits into unnormalised probabilities after temperature; the likeliest token weighs 1.
#[derive(Debug, Clone, Copy)]
pub struct Weigh {
    greatest: f32,
    inverse_temperature: f32,
}

impl Weigh {
    /// `greatest`: of all logits, finite.
    pub fn new(greatest: f32, temperature: f32) -> Self {
        Self { greatest, inverse_temperature: temperature.recip() }
    }

    pub fn of(self, logit: f32) -> f32 {
        exp((logit - self.greatest) * self.inverse_temperature)
    }

    pub fn all(self, logits: &mut [f32]) {
        for logit in logits {
            *logit = self.of(*logit);
        }
    }
}

/// e^x for x <= 0 within 2e-7 of its value; 0 below -87 and for what is not a number. Polynomial of Cephes (`expf`).
fn exp(x: f32) -> f32 {
    // Adding it rounds to a whole number, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let power_of_two = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    let value = (p * r * r + r + 1.0) * power_of_two;
    if x > -87.0 { value } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exp() {
        let mut worst = 0.0_f64;
        for step in 0..=870_000 {
            let x = -(step as f32) * 1e-4;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs() * f64::from(u8::from(x > -87.0)));
        }
        assert!(worst < 2e-7, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!([exp(-87.5), exp(-1e30), exp(f32::NEG_INFINITY), exp(f32::NAN)], [0.0; 4]);
    }

    #[test]
    fn lanes_and_rest_are_all_seen() {
        for len in [0, 1, 15, 16, 17, 40] {
            let weights: Vec<f32> = (0..len).map(|at| at as f32).collect();
            assert_eq!(sum(&weights), f64::from((0..len).sum::<i32>()));
            assert_eq!(greatest(&weights), if len == 0 { f32::NEG_INFINITY } else { (len - 1) as f32 });
            let reversed: Vec<f32> = weights.iter().rev().copied().collect();
            assert_eq!(greatest(&reversed), greatest(&weights));
        }
    }
}
