//! What the engine says of its steps over a run.

use mserve_runtime::engine::{EngineLoad, StepTotals};
use serde::Serialize;
use std::fmt;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EngineShare {
    /// Share of the run in which the device ran no step.
    pub device_idle: f64,
    /// Milliseconds a step that the engine's thread worked rather than waited for the device.
    pub host_ms_per_step: f64,
    pub preemptions: u64,
    pub decode: StepShare,
    pub mixed: StepShare,
    pub prefill: StepShare,
}

/// Steps of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepShare {
    pub steps: u64,
    pub tokens_per_step: f64,
    /// Of the device.
    pub ms_per_step: f64,
    pub device_share: f64,
}

impl EngineShare {
    pub fn new(before: &EngineLoad, after: &EngineLoad, wall: Duration) -> Self {
        let wall_ms = wall.as_secs_f64() * 1e3;
        let share = |before: StepTotals, after: StepTotals| StepShare::new(before, after, wall_ms);
        let decode = share(before.decode_steps, after.decode_steps);
        let mixed = share(before.mixed_steps, after.mixed_steps);
        let prefill = share(before.prefill_steps, after.prefill_steps);
        let steps = decode.steps + mixed.steps + prefill.steps;
        Self {
            device_idle: 1.0 - decode.device_share - mixed.device_share - prefill.device_share,
            host_ms_per_step: (after.engine_host_ms - before.engine_host_ms) / steps.max(1) as f64,
            preemptions: after.preemptions_total - before.preemptions_total,
            decode,
            mixed,
            prefill,
        }
    }
}

impl StepShare {
    fn new(before: StepTotals, after: StepTotals, wall_ms: f64) -> Self {
        let steps = after.steps - before.steps;
        let (device_ms, tokens) = (after.device_ms - before.device_ms, after.tokens - before.tokens);
        let each = 1.0 / steps.max(1) as f64;
        Self {
            steps,
            tokens_per_step: tokens as f64 * each,
            ms_per_step: device_ms * each,
            device_share: device_ms / wall_ms,
        }
    }
}

impl fmt::Display for EngineShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |share: f64| 100.0 * share;
        writeln!(
            f,
            "device idle {:.1} %, host {:.3} ms a step, {} preemptions",
            percent(self.device_idle),
            self.host_ms_per_step,
            self.preemptions
        )?;
        for (name, kind) in [("decode", self.decode), ("mixed", self.mixed), ("prefill", self.prefill)] {
            writeln!(
                f,
                "{name:<7} {:>6} steps of {:>7.1} tokens, {:>8.3} ms each, {:>5.1} % of the time",
                kind.steps,
                kind.tokens_per_step,
                kind.ms_per_step,
                percent(kind.device_share)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_of_the_time_is_idle() {
        let totals = |steps, tokens, device_ms| StepTotals { steps, tokens, device_ms };
        let before = EngineLoad { decode_steps: totals(10, 10, 100.0), engine_host_ms: 5.0, ..EngineLoad::default() };
        let after = EngineLoad {
            decode_steps: totals(30, 2570, 300.0),
            mixed_steps: totals(5, 5000, 250.0),
            engine_host_ms: 10.0,
            preemptions_total: 2,
            ..EngineLoad::default()
        };
        let share = EngineShare::new(&before, &after, Duration::from_millis(500));
        assert!((share.device_idle - 0.1).abs() < 1e-9, "{share:?}");
        assert_eq!((share.host_ms_per_step, share.preemptions, share.prefill.steps), (0.2, 2, 0));
        assert_eq!((share.decode.steps, share.decode.tokens_per_step, share.decode.ms_per_step), (20, 128.0, 10.0));
    }
}
