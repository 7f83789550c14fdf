//! When to start a replica again. Pure: time and randomness come in as numbers.

use std::time::Duration;

#[derive(Debug, Clone, PartialEq)]
pub struct RestartPolicy {
    /// The first crash after a healthy spell is most likely a one-off.
    pub first: Duration,
    /// From the second crash on: doubled each time, up to `max`.
    pub base: Duration,
    pub max: Duration,
    /// Ready for this long forgives earlier crashes.
    pub healthy_after: Duration,
    /// Crashes in a row after which the replica is given up.
    pub max_crashes: u32,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(500),
            base: Duration::from_secs(1),
            max: Duration::from_secs(60),
            healthy_after: Duration::from_secs(60),
            max_crashes: 8,
        }
    }
}

/// What the policy needs to know of a process that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crash {
    /// A new process could do better: false for a configuration error or too little memory.
    pub restart_can_help: bool,
    /// How long it had been ready; `None` when it never was.
    pub ready_for: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Restart { after: Duration },
    GiveUp { crashes: u32 },
}

/// Crashes in a row of one replica.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CrashCount(u32);

impl CrashCount {
    /// Count a crash and decide. `jitter` in 0..1 spreads replicas that died together: the delay is 75 % to 125 %.
    pub fn on_crash(&mut self, policy: &RestartPolicy, crash: Crash, jitter: f64) -> Decision {
        if crash.ready_for.is_some_and(|ready_for| ready_for >= policy.healthy_after) {
            self.0 = 0;
        }
        self.0 = self.0.saturating_add(1);
        if !crash.restart_can_help || self.0 >= policy.max_crashes {
            return Decision::GiveUp { crashes: self.0 };
        }
        let delay = match self.0 {
            1 => policy.first,
            n => policy.base.saturating_mul(2u32.saturating_pow(n - 2)).min(policy.max),
        };
        Decision::Restart { after: delay.mul_f64(0.75 + 0.5 * jitter.clamp(0.0, 1.0)).min(policy.max) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CRASH: Crash = Crash { restart_can_help: true, ready_for: None };

    fn delays(count: usize) -> Vec<Decision> {
        let (policy, mut crashes) =
            (RestartPolicy { max_crashes: 100, ..RestartPolicy::default() }, CrashCount::default());
        (0..count).map(|_| crashes.on_crash(&policy, CRASH, 0.5)).collect()
    }

    #[test]
    fn doubles_from_one_second_to_a_minute() {
        let seconds = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0];
        let expected = seconds.map(|s| Decision::Restart { after: Duration::from_secs_f64(s) });
        assert_eq!(delays(9), expected);
    }

    #[test]
    fn jitter_stays_within_a_quarter_and_under_the_maximum() {
        let policy = RestartPolicy::default();
        let after = |jitter| CrashCount(3).on_crash(&policy, CRASH, jitter);
        assert_eq!(after(0.0), Decision::Restart { after: Duration::from_secs(3) });
        assert_eq!(after(1.0), Decision::Restart { after: Duration::from_secs(5) });
        let patient = RestartPolicy { max_crashes: u32::MAX, ..policy };
        let last = CrashCount(50).on_crash(&patient, CRASH, 1.0);
        assert_eq!(last, Decision::Restart { after: Duration::from_secs(60) });
    }

    #[test]
    fn a_minute_of_health_forgives() {
        let (policy, mut crashes) = (RestartPolicy::default(), CrashCount(6));
        let healthy = Crash { ready_for: Some(Duration::from_secs(61)), ..CRASH };
        assert_eq!(crashes.on_crash(&policy, healthy, 0.5), Decision::Restart { after: policy.first });
        let brief = Crash { ready_for: Some(Duration::from_secs(59)), ..CRASH };
        assert_eq!(crashes.on_crash(&policy, brief, 0.5), Decision::Restart { after: policy.base });
    }

    #[test]
    fn gives_up_on_a_crash_loop_and_on_what_a_restart_cannot_cure() {
        let policy = RestartPolicy::default();
        assert_eq!(CrashCount(7).on_crash(&policy, CRASH, 0.5), Decision::GiveUp { crashes: 8 });
        let config = Crash { restart_can_help: false, ready_for: None };
        assert_eq!(CrashCount(0).on_crash(&policy, config, 0.5), Decision::GiveUp { crashes: 1 });
    }

    #[test]
    fn counts_do_not_overflow() {
        let policy = RestartPolicy { max_crashes: u32::MAX, ..RestartPolicy::default() };
        let mut crashes = CrashCount(u32::MAX - 1);
        assert_eq!(crashes.on_crash(&policy, CRASH, 0.5), Decision::GiveUp { crashes: u32::MAX });
    }
}
