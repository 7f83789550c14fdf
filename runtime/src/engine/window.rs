//! Sums and latencies over the last seconds, in fixed memory whatever the rate: one slot per second.

use std::array;

/// Seconds that latency windows cover.
const WINDOW_S: usize = 60;
/// Whole seconds that rates cover, besides the one that runs.
const RATE_S: u64 = 5;

/// Latency bounds grow by this from one to the next, so a quantile is right within 6 %.
const GROWTH: f64 = 1.13;
const LEAST_MS: f64 = 0.05;
/// 0.05 ms * 1.13^150 is more than an hour.
const BOUNDS: usize = 150;

/// A histogram of the last [`WINDOW_S`] seconds.
#[derive(Debug)]
pub struct LatencyWindow {
    slots: [Slot; WINDOW_S],
}

#[derive(Debug, Clone)]
struct Slot {
    second: u64,
    counts: [u32; BOUNDS],
}

impl LatencyWindow {
    pub fn new() -> Self {
        Self { slots: array::from_fn(|_| Slot { second: 0, counts: [0; BOUNDS] }) }
    }

    /// `second`: any clock that does not go back.
    pub fn record(&mut self, second: u64, latency_ms: f64) {
        let slot = &mut self.slots[second as usize % WINDOW_S];
        if slot.second != second {
            *slot = Slot { second, counts: [0; BOUNDS] };
        }
        slot.counts[bound_of(latency_ms)] += 1;
    }

    /// The latencies below which the given shares lie; `None` when nothing was recorded.
    pub fn quantiles_ms<const N: usize>(&self, second: u64, shares: [f64; N]) -> Option<[f64; N]> {
        let mut counts = [0_u64; BOUNDS];
        for slot in self.slots.iter().filter(|slot| slot.second + WINDOW_S as u64 > second) {
            for (sum, count) in counts.iter_mut().zip(slot.counts) {
                *sum += u64::from(count);
            }
        }
        let total: u64 = counts.iter().sum();
        (total > 0).then(|| shares.map(|share| quantile(&counts, (share * total as f64).ceil().max(1.0) as u64)))
    }
}

fn bound_of(latency_ms: f64) -> usize {
    // A float that does not fit saturates, and NaN becomes 0.
    ((latency_ms / LEAST_MS).ln() / GROWTH.ln()).floor().max(0.0).min((BOUNDS - 1) as f64) as usize
}

/// The middle of the bound in which the `rank`th value lies.
fn quantile(counts: &[u64; BOUNDS], rank: u64) -> f64 {
    let mut seen = 0;
    let bound = counts.iter().position(|count| {
        seen += count;
        seen >= rank
    });
    LEAST_MS * GROWTH.powf(bound.unwrap_or(BOUNDS - 1) as f64 + 0.5)
}

/// Events per second over the last few seconds.
#[derive(Debug, Default)]
pub struct RateWindow {
    slots: [(u64, u64); RATE_S as usize + 1],
}

impl RateWindow {
    pub fn record(&mut self, second: u64, count: u64) {
        let slot = &mut self.slots[second as usize % (RATE_S as usize + 1)];
        if slot.0 != second {
            *slot = (second, 0);
        }
        slot.1 += count;
    }

    /// `now_s`: the clock of `record` with its fraction, since the start of the engine.
    pub fn per_second(&self, now_s: f64) -> f64 {
        let second = now_s as u64;
        let sum: u64 = self.slots.iter().filter(|slot| slot.0 + RATE_S >= second).map(|slot| slot.1).sum();
        let covered = now_s - second.saturating_sub(RATE_S) as f64;
        // A just-started engine has covered next to nothing; a second is the least that a rate is taken over.
        sum as f64 / covered.max(1.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn quantiles_are_near_and_old_values_leave() {
        let mut window = LatencyWindow::new();
        assert_eq!(window.quantiles_ms(0, [0.5]), None);
        for latency in 1..=100 {
            window.record(10, f64::from(latency));
        }
        let [p50, p95] = window.quantiles_ms(69, [0.5, 0.95]).unwrap();
        assert!((p50 / 50.0 - 1.0).abs() < 0.07, "{p50}");
        assert!((p95 / 95.0 - 1.0).abs() < 0.07, "{p95}");
        assert_eq!(window.quantiles_ms(70, [0.5]), None);
        window.record(70, 3.0);
        let [p50] = window.quantiles_ms(70, [0.5]).unwrap();
        assert!((p50 / 3.0 - 1.0).abs() < 0.07, "{p50}");
    }

    #[test]
    fn absurd_latencies_are_counted_at_the_ends() {
        let mut window = LatencyWindow::new();
        for latency in [f64::NAN, -1.0, 0.0, f64::INFINITY] {
            window.record(1, latency);
        }
        assert!(window.quantiles_ms(1, [1.0]).unwrap()[0] > 3_600_000.0);
    }

    #[test]
    fn rate_forgets_after_its_window() {
        let mut rate = RateWindow::default();
        for second in 0..10 {
            rate.record(second, 100);
        }
        assert!((rate.per_second(10.0) - 100.0).abs() < 1e-9);
        assert_eq!(rate.per_second(20.0), 0.0);
    }
}
