//! Keeps requests from a replica that fails them. Pure: the caller passes the time.

use std::time::{Duration, Instant};

/// Failures in a row that open the breaker. Only what the replica is to blame for counts: connection errors,
/// time-outs and 5xx; never a 4xx.
const FAILURES_TO_OPEN: u32 = 5;
const OPEN_FOR: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breaker {
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed {
        failures: u32,
    },
    Open {
        until: Instant,
    },
    /// One request is out to see whether the replica has recovered.
    HalfOpen,
}

impl Default for Breaker {
    fn default() -> Self {
        Self { state: State::Closed { failures: 0 } }
    }
}

impl Breaker {
    /// A request may be sent.
    pub fn allows(&self, now: Instant) -> bool {
        match self.state {
            State::Closed { .. } => true,
            State::Open { until } => now >= until,
            State::HalfOpen => false,
        }
    }

    pub fn is_open(&self) -> bool {
        !matches!(self.state, State::Closed { .. })
    }

    /// A request is sent. True when it is the probe that decides.
    pub fn on_send(&mut self, now: Instant) -> bool {
        let probes = matches!(self.state, State::Open { until } if now >= until);
        if probes {
            self.state = State::HalfOpen;
        }
        probes
    }

    pub fn on_success(&mut self) {
        self.state = State::Closed { failures: 0 };
    }

    pub fn on_failure(&mut self, now: Instant) {
        let open = State::Open { until: now + OPEN_FOR };
        self.state = match self.state {
            State::Closed { failures } if failures + 1 < FAILURES_TO_OPEN => State::Closed { failures: failures + 1 },
            State::Closed { .. } | State::HalfOpen => open,
            // A straggler from before, or one sent because all breakers were open: the clock runs on.
            State::Open { until } => State::Open { until },
        };
    }

    /// The probe ended without a verdict (its client went away): the next request probes.
    pub fn on_probe_abandoned(&mut self, now: Instant) {
        if self.state == State::HalfOpen {
            self.state = State::Open { until: now };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::default();
        (0..FAILURES_TO_OPEN).for_each(|_| breaker.on_failure(now));
        breaker
    }

    #[test]
    fn opens_after_five_failures_in_a_row() {
        let (now, mut breaker) = (Instant::now(), Breaker::default());
        (0..4).for_each(|_| breaker.on_failure(now));
        breaker.on_success();
        (0..4).for_each(|_| breaker.on_failure(now));
        assert!(breaker.allows(now), "a success in between starts the count again");
        breaker.on_failure(now);
        assert!(!breaker.allows(now));
    }

    #[test]
    fn one_probe_decides() {
        let now = Instant::now();
        let later = now + OPEN_FOR;
        let mut breaker = opened(now);
        assert!(!breaker.on_send(now), "a request that goes out all the same is no probe");
        assert!(breaker.allows(later) && breaker.on_send(later));
        assert!(!breaker.allows(later), "only one probe at a time");
        let mut failed = breaker;
        failed.on_failure(later);
        assert!(!failed.allows(later) && failed.allows(later + OPEN_FOR));
        breaker.on_success();
        assert_eq!(breaker, Breaker::default());
    }

    #[test]
    fn an_abandoned_probe_does_not_block_the_next() {
        let now = Instant::now();
        let later = now + OPEN_FOR;
        let mut breaker = opened(now);
        assert!(breaker.on_send(later));
        breaker.on_probe_abandoned(later);
        assert!(breaker.allows(later));
    }

    #[test]
    fn stragglers_do_not_prolong() {
        let now = Instant::now();
        let mut breaker = opened(now);
        breaker.on_failure(now + OPEN_FOR / 2);
        assert!(breaker.allows(now + OPEN_FOR));
    }
}
