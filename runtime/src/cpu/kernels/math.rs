//! exp, tanh and erf of f32 without branches, so that a loop over them becomes vector code.

/// e^x to about 1 ulp for x in [-87, 88]; below it flushes to (nearly) zero, above it saturates near 3e38.
/// Cody-Waite reduction and the polynomial of Cephes' `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Adding and taking away 1.5 * 2^23 rounds to the nearest integer, and leaves it in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // NaN must come out as NaN, which min and max would hide.
    let clamped = if x < -87.3 { -87.3 } else { x };
    let clamped = if clamped > 88.7 { 88.7 } else { clamped };
    let shifted = clamped * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let mantissa = p * r * r + r + 1.0;
    // 2^n in two factors: n may be 128, one more than an exponent holds.
    let n = shifted.to_bits() as i32 - ROUND.to_bits() as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    mantissa * power(half) * power(n - half)
}

/// tanh(x), absolute error below 2e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // Beyond 10 the result is 1 in f32; the clamp keeps exp finite and its quotient exact.
    let clamped = if x > 10.0 { 10.0 } else { x };
    let clamped = if clamped < -10.0 { -10.0 } else { clamped };
    1.0 - 2.0 / (exp(2.0 * clamped) + 1.0)
}

/// erf(x), absolute error below 4e-7: the rational approximation on [-4, 4] that Eigen and XLA use for f32.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let x = if x > 4.0 { 4.0 } else { x };
    let x = if x < -4.0 { -4.0 } else { x };
    let x2 = x * x;
    let mut p = -2.726_142_4e-10;
    p = p * x2 + 2.770_681_5e-8;
    p = p * x2 - 2.101_024e-6;
    p = p * x2 - 5.692_506_2e-5;
    p = p * x2 - 7.349_906_4e-4;
    p = p * x2 - 2.954_6e-3;
    p = p * x2 - 1.609_603_3e-2;
    let mut q = -1.456_607_2e-5;
    q = q * x2 - 2.133_740_6e-4;
    q = q * x2 - 1.682_826_9e-3;
    q = q * x2 - 7.373_329e-3;
    q = q * x2 - 1.426_473_9e-2;
    x * p / q
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(low: f32, high: f32) -> impl Iterator<Item = f32> {
        (0..=20_000).map(move |i| low + (high - low) * (i as f32 / 20_000.0))
    }

    #[test]
    fn exp_is_accurate_to_about_an_ulp() {
        for x in samples(-87.0, 88.5) {
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours / exact - 1.0).abs() < 2e-7, "exp({x}) = {ours}, not {exact}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1.3e-38);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn tanh_and_erf_are_accurate() {
        for x in samples(-12.0, 12.0) {
            let exact = f64::from(x).tanh();
            assert!((f64::from(tanh(x)) - exact).abs() < 2e-7, "tanh({x})");
            let exact = candle_core::cpu::erf::erf_f64(f64::from(x));
            assert!((f64::from(erf(x)) - exact).abs() < 4e-7, "erf({x}) = {}, not {exact}", erf(x));
        }
        assert!(tanh(f32::NAN).is_nan() && erf(f32::NAN).is_nan());
    }
}
