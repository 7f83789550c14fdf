//! Keeps worker processes running: starts them, watches them, restarts them, stops them. Nothing outlives it.
//!
//! One task per replica owns one process at a time and publishes a [`ReplicaView`]; decisions are pure
//! ([`RestartPolicy`], [`HealthTracker`](health::HealthTracker), [`ExitEvidence`](exit_cause::ExitEvidence)).

pub mod exit_cause;
pub mod health;
mod lines;
mod log_book;
mod process;
mod replica;
mod restart;
mod spawner;

pub use health::HealthLimits;
pub use log_book::LogBook;
pub use restart::{Crash, CrashCount, Decision, RestartPolicy};
pub use spawner::WorkerCommand;

use crate::status::{ModelKind, ReplicaState};
use health::Prober;
use mserve_runtime::engine::EngineLoad;
use mserve_runtime::worker::{FailureKind, ReadyInfo};
use replica::{Command, ReplicaTask};
use spawner::Spawner;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// A replica as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaSpec {
    /// `demo-0`: group name and index.
    pub id: String,
    pub model: String,
    pub kind: ModelKind,
    /// `cpu`, or GPU UUIDs.
    pub devices: Vec<String>,
    pub command: WorkerCommand,
    /// What the worker wants to see in `x-mserve-token`.
    pub token: String,
}

/// A replica as it is.
#[derive(Debug, Clone)]
pub struct ReplicaView {
    pub state: ReplicaState,
    pub since: Instant,
    pub pid: Option<u32>,
    pub port: Option<u16>,
    pub restarts: u32,
    pub last_exit: Option<String>,
    pub load: Option<EngineLoad>,
    /// Of the running process, once it was ready.
    pub ready: Option<ReadyInfo>,
    /// With [`ReplicaState::Failed`]: what a restart cannot cure.
    pub permanent: Option<FailureKind>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct SupervisorLimits {
    /// Longest silence of a worker that is starting: counted from its last sign of progress.
    pub start_silence: Duration,
    pub health: HealthLimits,
    pub restart: RestartPolicy,
    /// How long a worker may take to finish its requests when one replica is drained or restarted.
    pub drain: Duration,
}

impl Default for SupervisorLimits {
    fn default() -> Self {
        Self {
            start_silence: Duration::from_secs(120),
            health: HealthLimits::default(),
            restart: RestartPolicy::default(),
            drain: Duration::from_secs(30),
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("no replica is called {id:?}; there are {}", .known.join(", "))]
pub struct UnknownReplica {
    pub id: String,
    pub known: Vec<String>,
}

#[derive(Debug)]
pub struct Supervisor {
    replicas: Vec<Handle>,
    log_book: Arc<LogBook>,
}

#[derive(Debug)]
struct Handle {
    spec: Arc<ReplicaSpec>,
    view: watch::Receiver<ReplicaView>,
    commands: mpsc::Sender<Command>,
    task: JoinHandle<()>,
}

impl Supervisor {
    /// Start all replicas. Must be called inside a tokio runtime.
    pub fn start(specs: Vec<ReplicaSpec>, limits: &SupervisorLimits, log_book: Arc<LogBook>) -> anyhow::Result<Self> {
        let spawner = Spawner::start()?;
        let prober = Prober::new(limits.health.timeout)?;
        let replicas = specs
            .into_iter()
            .map(|spec| {
                let spec = Arc::new(spec);
                let (publish, view) = watch::channel(ReplicaView::starting());
                let (commands, inbox) = mpsc::channel(16);
                let task = ReplicaTask {
                    spec: Arc::clone(&spec),
                    limits: limits.clone(),
                    spawner: spawner.clone(),
                    prober: prober.clone(),
                    log_book: Arc::clone(&log_book),
                    view: publish,
                    commands: inbox,
                    crashes: CrashCount::default(),
                };
                Handle { spec, view, commands, task: tokio::spawn(task.run()) }
            })
            .collect();
        Ok(Self { replicas, log_book })
    }

    pub fn log_book(&self) -> &Arc<LogBook> {
        &self.log_book
    }

    /// All replicas in the order of the specs.
    pub fn views(&self) -> Vec<(Arc<ReplicaSpec>, ReplicaView)> {
        self.replicas.iter().map(|replica| (Arc::clone(&replica.spec), replica.view.borrow().clone())).collect()
    }

    /// For whoever has to act on changes: one receiver per replica. Quick successions may be seen as one.
    pub fn watch(&self) -> Vec<(Arc<ReplicaSpec>, watch::Receiver<ReplicaView>)> {
        self.replicas.iter().map(|replica| (Arc::clone(&replica.spec), replica.view.clone())).collect()
    }

    /// Drain, end and start again; also a replica that had been given up or stopped.
    pub fn restart(&self, id: &str) -> Result<(), UnknownReplica> {
        self.command(id, Command::Restart)
    }

    /// Finish what is running, then stop until [`Supervisor::restart`].
    pub fn drain(&self, id: &str) -> Result<(), UnknownReplica> {
        self.command(id, Command::Drain)
    }

    /// End all workers: SIGTERM, after `grace` SIGKILL. Returns when all have been reaped.
    pub async fn stop(&self, grace: Duration) {
        self.broadcast(&Command::Stop { grace });
        for replica in &self.replicas {
            let mut view = replica.view.clone();
            // An error means that the task has ended, and its process with it.
            let _ = view.wait_for(|view| view.state == ReplicaState::Stopped).await;
        }
    }

    /// End all workers now, also during [`Supervisor::stop`].
    pub fn kill(&self) {
        self.broadcast(&Command::Stop { grace: Duration::ZERO });
    }

    fn broadcast(&self, command: &Command) {
        for replica in &self.replicas {
            // Full means that earlier commands are not even read: its process is killed with the task.
            if replica.commands.try_send(command.clone()).is_err() {
                replica.task.abort();
            }
        }
    }

    fn command(&self, id: &str, command: Command) -> Result<(), UnknownReplica> {
        let known = || self.replicas.iter().map(|replica| replica.spec.id.clone()).collect();
        let replica = self.replicas.iter().find(|replica| replica.spec.id == id);
        let replica = replica.ok_or_else(|| UnknownReplica { id: id.to_owned(), known: known() })?;
        // A full queue holds commands that do the same already.
        let _ = replica.commands.try_send(command);
        Ok(())
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // A task owns its process, whose drop kills the process group.
        self.replicas.iter().for_each(|replica| replica.task.abort());
    }
}

impl ReplicaView {
    fn starting() -> Self {
        Self {
            state: ReplicaState::Starting { phase: "starting".into(), done: 0, total: 0 },
            since: Instant::now(),
            pid: None,
            port: None,
            restarts: 0,
            last_exit: None,
            load: None,
            ready: None,
            permanent: None,
        }
    }

    pub fn is_ready(&self) -> bool {
        self.state == ReplicaState::Ready
    }

    /// It will not come up by itself any more.
    pub fn is_given_up(&self) -> bool {
        matches!(self.state, ReplicaState::Failed { .. })
    }
}
