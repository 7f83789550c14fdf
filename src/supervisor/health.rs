//! Health is forward progress: a replica answers `/load`, and while it has work its steps go on.

use mserve_runtime::engine::EngineLoad;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthLimits {
    pub interval: Duration,
    pub timeout: Duration,
    /// Unanswered checks in a row that make a replica unhealthy.
    pub max_misses: u32,
    /// Longest time without a finished step while requests wait.
    pub max_stall: Duration,
}

impl Default for HealthLimits {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(5),
            max_misses: 3,
            max_stall: Duration::from_secs(60),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// Answering; with its latest figures.
    Healthy(Box<EngineLoad>),
    /// Not answering, for now.
    Missed,
    Unhealthy(String),
}

/// Misses in a row of one process. Pure.
#[derive(Debug, Default)]
pub struct HealthTracker {
    misses: u32,
}

impl HealthTracker {
    pub fn observe(&mut self, limits: &HealthLimits, probe: Result<EngineLoad, String>) -> Verdict {
        match probe {
            Ok(load) => {
                self.misses = 0;
                if Duration::from_millis(load.stalled_ms) > limits.max_stall {
                    let seconds = load.stalled_ms / 1000;
                    return Verdict::Unhealthy(format!("no step finished for {seconds} s while requests wait"));
                }
                Verdict::Healthy(Box::new(load))
            }
            Err(why) => {
                self.misses += 1;
                if self.misses < limits.max_misses {
                    return Verdict::Missed;
                }
                Verdict::Unhealthy(format!("{} health checks in a row failed, the last one: {why}", self.misses))
            }
        }
    }
}

/// Asks replicas for their load, each time over a new connection: a kept one may have been closed meanwhile, and a
/// full accept queue must show.
#[derive(Debug, Clone)]
pub struct Prober {
    http: reqwest::Client,
}

impl Prober {
    pub fn new(timeout: Duration) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().no_proxy().timeout(timeout).pool_max_idle_per_host(0).build()?;
        Ok(Self { http })
    }

    /// # Errors
    /// One line for people.
    pub async fn load(&self, port: u16, token: &str) -> Result<EngineLoad, String> {
        let request = self.http.get(format!("http://127.0.0.1:{port}/load")).header("x-mserve-token", token);
        let response = request.send().await.map_err(|error| describe(&error))?;
        if !response.status().is_success() {
            return Err(format!("/load answered {}", response.status()));
        }
        response.json().await.map_err(|error| describe(&error))
    }
}

fn describe(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "/load did not answer in time".into();
    }
    if error.is_connect() {
        return "it does not accept connections".into();
    }
    format!("/load: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observe(tracker: &mut HealthTracker, probe: Result<EngineLoad, String>) -> Verdict {
        tracker.observe(&HealthLimits::default(), probe)
    }

    #[test]
    fn an_answer_between_misses_starts_the_count_again() {
        let mut tracker = HealthTracker::default();
        let healthy = Verdict::Healthy(Box::default());
        for _ in 0..3 {
            assert_eq!(observe(&mut tracker, Err("x".into())), Verdict::Missed);
            assert_eq!(observe(&mut tracker, Err("x".into())), Verdict::Missed);
            assert_eq!(observe(&mut tracker, Ok(EngineLoad::default())), healthy);
        }
    }

    #[test]
    fn three_misses_are_unhealthy() {
        let mut tracker = HealthTracker::default();
        let verdicts = [(); 3].map(|()| observe(&mut tracker, Err("it does not accept connections".into())));
        let why = "3 health checks in a row failed, the last one: it does not accept connections";
        assert_eq!(verdicts, [Verdict::Missed, Verdict::Missed, Verdict::Unhealthy(why.into())]);
    }

    #[test]
    fn busy_is_not_dead_but_a_stall_is() {
        let busy = EngineLoad { running: 8, waiting: 200, stalled_ms: 59_000, ..EngineLoad::default() };
        assert_eq!(observe(&mut HealthTracker::default(), Ok(busy.clone())), Verdict::Healthy(Box::new(busy.clone())));
        let hung = EngineLoad { stalled_ms: 61_000, ..busy };
        let why = "no step finished for 61 s while requests wait";
        assert_eq!(observe(&mut HealthTracker::default(), Ok(hung)), Verdict::Unhealthy(why.into()));
    }
}
