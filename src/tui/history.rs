//! What a single snapshot cannot say: rates of counters, the last minutes of throughput, how long a start is stuck.

use crate::status::{ReplicaState, Status};
use std::collections::{HashMap, VecDeque};

/// Polls kept: four minutes at the default of one a second, more than the widest sparkline shows.
const POLLS_KEPT: usize = 240;
/// Counter rates are taken over this long.
const RATE_WINDOW_S: f64 = 10.0;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    pub at_unix_s: f64,
    /// `None`, here and below, when no replica told.
    pub generation_tokens_per_s: Option<f64>,
    pub prompt_tokens_per_s: Option<f64>,
    /// Running and waiting in the engines.
    pub in_flight: Option<u64>,
    pub requests_total: u64,
    pub errors_total: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Series {
    Generation,
    Prompt,
    InFlight,
}

#[derive(Debug, Default)]
pub struct History {
    /// One entry a poll, newest last; `None` where the poll brought nothing, so that a gap is drawn as a gap.
    polls: VecDeque<Option<Sample>>,
    peaks: HashMap<&'static str, f64>,
    preemptions: HashMap<String, Preemptions>,
    starts: HashMap<String, Start>,
}

#[derive(Debug)]
struct Preemptions {
    total: u64,
    last_rise_unix_s: Option<f64>,
}

#[derive(Debug)]
struct Start {
    phase: String,
    done: u64,
    since_unix_s: f64,
}

impl Series {
    const fn name(self) -> &'static str {
        match self {
            Self::Generation => "generation",
            Self::Prompt => "prompt",
            Self::InFlight => "in flight",
        }
    }

    fn of(self, sample: &Sample) -> Option<f64> {
        match self {
            Self::Generation => sample.generation_tokens_per_s,
            Self::Prompt => sample.prompt_tokens_per_s,
            Self::InFlight => sample.in_flight.map(|n| n as f64),
        }
    }
}

impl History {
    pub fn record(&mut self, status: &Status, now_unix_s: f64) {
        let sample = sample(status, now_unix_s);
        for series in [Series::Generation, Series::Prompt, Series::InFlight] {
            let peak = self.peaks.entry(series.name()).or_default();
            *peak = peak.max(series.of(&sample).unwrap_or_default());
        }
        self.push(Some(sample));
        self.record_preemptions(status, now_unix_s);
        self.record_starts(status, now_unix_s);
    }

    /// A poll that brought nothing.
    pub fn record_gap(&mut self) {
        self.push(None);
    }

    fn push(&mut self, poll: Option<Sample>) {
        if self.polls.len() == POLLS_KEPT {
            self.polls.pop_front();
        }
        self.polls.push_back(poll);
    }

    /// Newest first, as many as are kept.
    pub fn newest_first(&self, series: Series) -> impl Iterator<Item = Option<f64>> {
        self.polls.iter().rev().map(move |poll| poll.as_ref().and_then(|sample| series.of(sample)))
    }

    /// Top of the series' axis: the next of 1, 2, 5 x 10^n above the highest value seen. It never falls, so the same
    /// height always means the same rate.
    pub fn axis(&self, series: Series) -> f64 {
        let peak = self.peaks.get(series.name()).copied().unwrap_or_default();
        let mut decade = 10.0;
        loop {
            for step in [1.0, 2.0, 5.0] {
                if peak <= step * decade || decade >= 1e12 {
                    return step * decade;
                }
            }
            decade *= 10.0;
        }
    }

    /// Requests a second that the router took; `None` until two polls tell, or after its counter was reset.
    pub fn requests_per_s(&self) -> Option<f64> {
        let (old, new) = self.rate_window()?;
        let requests = new.requests_total.checked_sub(old.requests_total)?;
        Some(requests as f64 / (new.at_unix_s - old.at_unix_s))
    }

    /// Share of recent requests that ended in an error; `None` when there were none.
    pub fn error_share(&self) -> Option<f64> {
        let (old, new) = self.rate_window()?;
        let requests = new.requests_total.checked_sub(old.requests_total).filter(|&n| n > 0)?;
        let errors = new.errors_total.checked_sub(old.errors_total)?;
        Some(errors as f64 / requests as f64)
    }

    fn rate_window(&self) -> Option<(&Sample, &Sample)> {
        let mut samples = self.polls.iter().rev().flatten();
        let new = samples.next()?;
        let old = samples.take_while(|s| new.at_unix_s - s.at_unix_s <= RATE_WINDOW_S).last()?;
        (new.at_unix_s > old.at_unix_s).then_some((old, new))
    }

    /// Did this replica preempt within the rate window?
    pub fn is_preempting(&self, replica: &str, now_unix_s: f64) -> bool {
        let last = self.preemptions.get(replica).and_then(|p| p.last_rise_unix_s);
        last.is_some_and(|at| now_unix_s - at <= RATE_WINDOW_S)
    }

    /// Seconds since this starting replica last moved on.
    pub fn stuck_s(&self, replica: &str, now_unix_s: f64) -> Option<f64> {
        self.starts.get(replica).map(|start| now_unix_s - start.since_unix_s)
    }

    fn record_preemptions(&mut self, status: &Status, now_unix_s: f64) {
        self.preemptions.retain(|id, _| status.replicas.iter().any(|r| r.id == *id));
        for replica in &status.replicas {
            let Some(load) = &replica.load else { continue };
            let total = load.preemptions_total;
            let seen =
                self.preemptions.entry(replica.id.clone()).or_insert(Preemptions { total, last_rise_unix_s: None });
            if total > seen.total {
                seen.last_rise_unix_s = Some(now_unix_s);
            }
            seen.total = total;
        }
    }

    fn record_starts(&mut self, status: &Status, now_unix_s: f64) {
        let mut still = HashMap::new();
        for replica in &status.replicas {
            let ReplicaState::Starting { phase, done, .. } = &replica.state else { continue };
            let start = match self.starts.remove(&replica.id) {
                Some(start) if start.phase == *phase && start.done == *done => start,
                _ => Start { phase: phase.clone(), done: *done, since_unix_s: now_unix_s },
            };
            still.insert(replica.id.clone(), start);
        }
        self.starts = still;
    }
}

fn sample(status: &Status, now_unix_s: f64) -> Sample {
    let loads = || status.replicas.iter().filter_map(|r| r.load.as_ref());
    let finite = |v: &f64| v.is_finite() && *v >= 0.0;
    Sample {
        at_unix_s: now_unix_s,
        generation_tokens_per_s: loads().map(|l| l.generation_tokens_per_s).filter(finite).reduce(|a, b| a + b),
        prompt_tokens_per_s: loads().map(|l| l.prompt_tokens_per_s).filter(finite).reduce(|a, b| a + b),
        in_flight: loads().map(|l| l.running.saturating_add(l.waiting)).reduce(u64::saturating_add),
        requests_total: status.router.requests_total,
        errors_total: status.router.errors_total,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::tui::fixtures;

    fn with_totals(requests: u64, errors: u64) -> Status {
        let mut status = fixtures::under_load();
        status.router.requests_total = requests;
        status.router.errors_total = errors;
        status
    }

    #[test]
    fn rates_come_from_counter_differences() {
        let mut history = History::default();
        assert_eq!(history.requests_per_s(), None);
        history.record(&with_totals(100, 0), 1_000.0);
        assert_eq!(history.requests_per_s(), None);
        history.record(&with_totals(140, 1), 1_002.0);
        assert_eq!(history.requests_per_s(), Some(20.0));
        assert_eq!(history.error_share(), Some(0.025));
    }

    #[test]
    fn a_reset_counter_is_unknown_not_a_spike() {
        let mut history = History::default();
        history.record(&with_totals(100, 9), 1_000.0);
        history.record(&with_totals(3, 0), 1_001.0);
        assert_eq!(history.requests_per_s(), None);
        assert_eq!(history.error_share(), None);
    }

    #[test]
    fn the_axis_never_falls() {
        let mut history = History::default();
        assert_eq!(history.axis(Series::Generation), 10.0);
        let mut status = fixtures::under_load();
        for (rate, axis) in [(130.0, 200.0), (20.0, 200.0), (200.0, 200.0), (4_000.0, 5_000.0), (0.0, 5_000.0)] {
            for replica in &mut status.replicas {
                replica.load = None;
            }
            status.replicas[0].load = Some(fixtures::load(rate));
            history.record(&status, 0.0);
            assert_eq!(history.axis(Series::Generation), axis, "after {rate}");
        }
    }

    #[test]
    fn history_is_bounded_and_shows_gaps() {
        let mut history = History::default();
        for i in 0..1_000 {
            history.record(&fixtures::under_load(), f64::from(i));
        }
        history.record_gap();
        assert_eq!(history.newest_first(Series::Generation).count(), POLLS_KEPT);
        assert_eq!(history.newest_first(Series::Generation).next(), Some(None));
    }

    #[test]
    fn stuck_time_restarts_with_progress() {
        let mut history = History::default();
        let mut status = fixtures::starting();
        history.record(&status, 0.0);
        history.record(&status, 70.0);
        assert_eq!(history.stuck_s("demo-1", 70.0), Some(70.0));
        status.replicas[1].state = ReplicaState::Starting { phase: "weights".into(), done: 900, total: 1_000 };
        history.record(&status, 71.0);
        assert_eq!(history.stuck_s("demo-1", 75.0), Some(4.0));
    }

    #[test]
    fn preempting_needs_a_rise_of_the_counter() {
        let mut history = History::default();
        let mut status = fixtures::under_load();
        history.record(&status, 0.0);
        assert!(!history.is_preempting("demo-0", 0.0));
        status.replicas[0].load.as_mut().unwrap().preemptions_total += 1;
        history.record(&status, 1.0);
        assert!(history.is_preempting("demo-0", 5.0));
        assert!(!history.is_preempting("demo-0", 12.0));
    }
}
