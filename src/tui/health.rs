//! Judgements over a snapshot: how each state is rated, the badge of the whole, and what deserves a look.

use super::format;
use super::theme::Level;
use crate::status::{GpuStatus, ReplicaState, ReplicaStatus, Status};

/// Shares of the KV cache that are coloured (vLLM's dashboards use the same two).
pub const KV_WARN: f64 = 0.90;
pub const KV_BAD: f64 = 0.98;
/// Start-up without any progress for this long is called out.
pub const NO_PROGRESS_S: f64 = 60.0;
/// An engine with work that ends no step for this long is called out.
pub const STALLED_MS: u64 = 5_000;
/// Degrees Celsius; data-centre cards throttle a little above the second.
pub const GPU_WARN_C: u32 = 80;
pub const GPU_BAD_C: u32 = 87;

/// The state of the deployment in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overall {
    Empty,
    Up,
    Starting,
    Draining,
    Degraded,
    Down,
    Stopped,
}

impl Overall {
    pub fn of(status: &Status) -> Self {
        let count = |wanted: fn(&ReplicaState) -> bool| status.replicas.iter().filter(|r| wanted(&r.state)).count();
        let all = status.replicas.len();
        let ready = count(|s| matches!(s, ReplicaState::Ready));
        let broken = count(|s| level(s) >= Level::Warn);
        if all == 0 {
            Self::Empty
        } else if ready == all {
            Self::Up
        } else if broken > 0 {
            if ready == 0 { Self::Down } else { Self::Degraded }
        } else if count(|s| matches!(s, ReplicaState::Starting { .. })) > 0 {
            Self::Starting
        } else if count(|s| matches!(s, ReplicaState::Draining)) > 0 {
            Self::Draining
        } else if ready > 0 {
            Self::Degraded
        } else {
            Self::Stopped
        }
    }

    pub const fn word(self) -> &'static str {
        match self {
            Self::Empty => "NO REPLICAS",
            Self::Up => "UP",
            Self::Starting => "STARTING",
            Self::Draining => "DRAINING",
            Self::Degraded => "DEGRADED",
            Self::Down => "DOWN",
            Self::Stopped => "STOPPED",
        }
    }

    pub const fn level(self) -> Level {
        match self {
            Self::Up => Level::Good,
            Self::Starting | Self::Draining => Level::Busy,
            Self::Degraded => Level::Warn,
            Self::Down => Level::Bad,
            Self::Empty | Self::Stopped => Level::Off,
        }
    }
}

pub const fn level(state: &ReplicaState) -> Level {
    match state {
        ReplicaState::Starting { .. } | ReplicaState::Draining => Level::Busy,
        ReplicaState::Ready => Level::Good,
        ReplicaState::Unhealthy { .. } | ReplicaState::Backoff { .. } => Level::Warn,
        ReplicaState::Failed { .. } => Level::Bad,
        ReplicaState::Stopped => Level::Off,
    }
}

/// A state in at most a dozen characters: `ready`, `weights 36%`, `backoff 18s`.
pub fn state_text(state: &ReplicaState) -> String {
    match state {
        ReplicaState::Starting { phase, done, total } => match progress(*done, *total) {
            Some(share) => format!("{phase} {}", format::percent(share)),
            None => phase.clone(),
        },
        ReplicaState::Ready => "ready".to_owned(),
        ReplicaState::Unhealthy { .. } => "unhealthy".to_owned(),
        ReplicaState::Draining => "draining".to_owned(),
        ReplicaState::Backoff { restart_in_s } => format!("backoff {}", format::span(restart_in_s.ceil())),
        ReplicaState::Failed { .. } => "failed".to_owned(),
        ReplicaState::Stopped => "stopped".to_owned(),
    }
}

/// Share of a phase that is done; `None` where the phase does not count.
pub fn progress(done: u64, total: u64) -> Option<f64> {
    (total > 0).then(|| (done as f64 / total as f64).min(1.0))
}

/// Why a replica that serves nothing is in that state.
pub fn reason(replica: &ReplicaStatus) -> Option<&str> {
    match &replica.state {
        ReplicaState::Unhealthy { why } | ReplicaState::Failed { why } => Some(why),
        ReplicaState::Backoff { .. } => replica.last_exit.as_deref(),
        _ => None,
    }
}

pub fn kv_level(share: f64) -> Level {
    match share {
        s if s >= KV_BAD => Level::Bad,
        s if s >= KV_WARN => Level::Warn,
        _ => Level::Good,
    }
}

pub const fn temperature_level(celsius: u32) -> Level {
    match celsius {
        GPU_BAD_C.. => Level::Bad,
        GPU_WARN_C.. => Level::Warn,
        _ => Level::Good,
    }
}

/// Something an operator should look at, worst first in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Concern {
    pub level: Level,
    pub text: String,
}

/// What is wrong in this snapshot. `preempting` and `stuck_s` need history, so the caller answers them.
pub fn concerns(
    status: &Status,
    preempting: impl Fn(&str) -> bool,
    stuck_s: impl Fn(&str) -> Option<f64>,
) -> Vec<Concern> {
    let mut found: Vec<Concern> = Vec::new();
    for replica in &status.replicas {
        found.extend(state_concern(replica, &stuck_s));
        found.extend(load_concern(replica, preempting(&replica.id)));
    }
    found.extend(status.gpus.iter().filter_map(gpu_concern));
    found.sort_by_key(|concern| std::cmp::Reverse(concern.level));
    found
}

fn state_concern(replica: &ReplicaStatus, stuck_s: &impl Fn(&str) -> Option<f64>) -> Option<Concern> {
    let id = &replica.id;
    if let ReplicaState::Starting { phase, .. } = &replica.state {
        let stuck = stuck_s(id).filter(|&s| s >= NO_PROGRESS_S)?;
        return Some(Concern {
            level: Level::Warn,
            text: format!("{id}: no progress in {phase} for {}", format::span(stuck)),
        });
    }
    let level = level(&replica.state);
    (level >= Level::Warn).then(|| {
        let why = reason(replica).map(|why| format!(": {why}")).unwrap_or_default();
        Concern { level, text: format!("{id} {}{why}", state_text(&replica.state)) }
    })
}

/// A full cache is normal under load; a full cache that makes requests wait and start over is not.
fn load_concern(replica: &ReplicaStatus, preempting: bool) -> Option<Concern> {
    let load = replica.load.as_ref()?;
    let id = &replica.id;
    if load.stalled_ms >= STALLED_MS {
        let stalled = format::span(load.stalled_ms as f64 / 1e3);
        return Some(Concern {
            level: Level::Bad,
            text: format!("{id}: no engine step for {stalled} with work queued"),
        });
    }
    (load.waiting > 0 && preempting)
        .then(|| Concern { level: Level::Warn, text: format!("{id}: {} waiting while preempting", load.waiting) })
}

fn gpu_concern(gpu: &GpuStatus) -> Option<Concern> {
    let celsius = gpu.temperature_c?;
    let level = temperature_level(celsius);
    (level >= Level::Warn).then(|| Concern { level, text: format!("gpu {} at {celsius} C", gpu.index) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::tui::fixtures;

    fn overall(states: Vec<ReplicaState>) -> Overall {
        let mut status = fixtures::empty();
        status.replicas = states
            .into_iter()
            .enumerate()
            .map(|(i, state)| ReplicaStatus { state, ..fixtures::replica(&format!("m-{i}")) })
            .collect();
        Overall::of(&status)
    }

    #[test]
    fn the_badge_is_the_worst_that_still_serves() {
        let starting = || ReplicaState::Starting { phase: "weights".into(), done: 0, total: 0 };
        let failed = || ReplicaState::Failed { why: "bad config".into() };
        assert_eq!(overall(vec![]), Overall::Empty);
        assert_eq!(overall(vec![ReplicaState::Ready, ReplicaState::Ready]), Overall::Up);
        assert_eq!(overall(vec![ReplicaState::Ready, starting()]), Overall::Starting);
        assert_eq!(overall(vec![ReplicaState::Ready, failed()]), Overall::Degraded);
        assert_eq!(overall(vec![starting(), ReplicaState::Backoff { restart_in_s: 1.0 }]), Overall::Down);
        assert_eq!(overall(vec![ReplicaState::Draining, ReplicaState::Stopped]), Overall::Draining);
        assert_eq!(overall(vec![ReplicaState::Stopped]), Overall::Stopped);
        assert_eq!(overall(vec![ReplicaState::Ready, ReplicaState::Stopped]), Overall::Degraded);
    }

    #[test]
    fn concerns_name_the_replica_and_come_worst_first() {
        let mut status = fixtures::under_load();
        status.replicas[0].load.as_mut().unwrap().waiting = 3;
        status.replicas[1].state = ReplicaState::Failed { why: "tokenizer has 10 entries, vocabulary 12".into() };
        let found = concerns(&status, |id| id == "demo-0", |_| None);
        let texts: Vec<&str> = found.iter().map(|c| c.text.as_str()).collect();
        assert_eq!(
            texts,
            ["demo-1 failed: tokenizer has 10 entries, vocabulary 12", "demo-0: 3 waiting while preempting"]
        );
    }

    #[test]
    fn a_start_without_progress_is_named_only_after_a_minute() {
        let status = fixtures::starting();
        assert!(concerns(&status, |_| false, |_| Some(59.0)).is_empty());
        let found = concerns(&status, |_| false, |id| (id == "demo-1").then_some(71.0));
        assert_eq!(found[0].text, "demo-1: no progress in weights for 1m11s");
    }
}
