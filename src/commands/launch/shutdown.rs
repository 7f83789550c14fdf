//! Why and how a deployment ends.

use super::deployment::Deployment;
use super::progress::say;
use crate::exit;
use crate::supervisor::ReplicaView;
use mserve_runtime::worker::FailureKind;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// A worker that has no requests left ends in milliseconds; one that hangs is killed after this.
const WORKER_GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stop {
    /// Ctrl-C.
    Interrupted,
    /// SIGTERM, or the terminal is gone.
    Terminated,
    /// `mserve stop`, or the dashboard.
    Asked { timeout: Option<Duration> },
    /// All replicas have been given up.
    AllFailed { code: u8, why: String },
}

/// Signals as stops, from now on. Each one is told: a second means "now".
pub(super) fn listen(stops: &mpsc::Sender<Stop>) -> anyhow::Result<()> {
    for (kind, stop) in [
        (SignalKind::interrupt(), Stop::Interrupted),
        (SignalKind::terminate(), Stop::Terminated),
        (SignalKind::hangup(), Stop::Terminated),
    ] {
        let (mut signals, stops) = (signal(kind)?, stops.clone());
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                let _ = stops.send(stop.clone()).await;
            }
        });
    }
    Ok(())
}

impl Stop {
    /// Exit code of a launch that was up. `some_failed`: replicas had been given up when it was stopped.
    pub fn exit_code(&self, some_failed: bool) -> u8 {
        match self {
            Self::Interrupted => 128 + 2,
            Self::AllFailed { code, .. } => *code,
            Self::Terminated | Self::Asked { .. } if some_failed => exit::PARTLY_UP,
            Self::Terminated | Self::Asked { .. } => exit::OK,
        }
    }

    /// The stop that is due when nothing can serve any more.
    pub fn when_all_failed(views: &[ReplicaView]) -> Option<Self> {
        if views.is_empty() || !views.iter().all(ReplicaView::is_given_up) {
            return None;
        }
        let first = views.iter().find(|view| view.permanent.is_some()).or(views.first())?;
        let why = first.last_exit.clone().unwrap_or_default();
        Some(Self::AllFailed { code: failure_code(first.permanent), why })
    }
}

/// The launcher's own code for what its workers met.
pub(super) fn failure_code(permanent: Option<FailureKind>) -> u8 {
    permanent.map_or(exit::FAILURE, exit::code_of)
}

/// Let running requests finish, then end the workers. Another stop on the way ends it all at once.
pub(super) async fn wind_down(deployment: &Deployment, grace: Duration, stops: &mut mpsc::Receiver<Stop>) {
    deployment.router.drain();
    let orderly = async {
        let deadline = Instant::now() + grace;
        let running = deployment.router.status().in_flight;
        if running > 0 {
            say(&format!("stopping: {running} running requests have {} s to finish", grace.as_secs()));
        }
        while deployment.router.status().in_flight > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        deployment.supervisor.stop(WORKER_GRACE).await;
    };
    let again = tokio::select! {
        () = orderly => false,
        _ = stops.recv() => true,
    };
    if again {
        deployment.supervisor.kill();
        deployment.supervisor.stop(Duration::ZERO).await;
    }
}
