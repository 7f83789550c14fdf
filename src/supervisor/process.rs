//! One running worker: its pipes read, its events passed on, its end explained.

use super::ReplicaSpec;
use super::exit_cause::{ExitCause, ExitEvidence, oom_kills};
use super::lines::BoundedLines;
use super::log_book::LogBook;
use super::spawner::Spawner;
use mserve_runtime::worker::{FailureKind, WorkerEvent};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::sync::Arc;
use std::time::Duration;
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// A dead worker's pipes end at once, unless something it started keeps them open.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    pid: Pid,
    /// Never written to. See [`super::spawner`].
    _death_pipe: Option<ChildStdin>,
    events: mpsc::Receiver<WorkerEvent>,
    readers: Vec<JoinHandle<()>>,
    log_book: Arc<LogBook>,
    replica: String,
    reported: Option<(FailureKind, String)>,
    killed_because: Option<String>,
    oom_kills_before: u64,
}

#[derive(Debug)]
pub(super) enum Happened {
    Event(WorkerEvent),
    Ended(ExitCause),
}

impl Process {
    pub async fn start(spec: &ReplicaSpec, spawner: &Spawner, log_book: &Arc<LogBook>) -> std::io::Result<Self> {
        let oom_kills_before = oom_kills();
        let mut child = spawner.spawn(spec.command.clone()).await?;
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        let pid = Pid::from_raw(id.ok_or_else(|| std::io::Error::other("the worker ended before it was known"))?);
        let (sender, events) = mpsc::channel(64);
        let mut readers = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            readers.push(tokio::spawn(read_events(stdout, sender, spec.id.clone(), Arc::clone(log_book))));
        }
        if let Some(stderr) = child.stderr.take() {
            let (replica, book) = (spec.id.clone(), Arc::clone(log_book));
            readers.push(tokio::spawn(async move {
                let mut lines = BoundedLines::new(stderr);
                while let Some(line) = lines.next().await {
                    book.push(&replica, &line);
                }
            }));
        }
        Ok(Self {
            _death_pipe: child.stdin.take(),
            child,
            pid,
            events,
            readers,
            log_book: Arc::clone(log_book),
            replica: spec.id.clone(),
            reported: None,
            killed_because: None,
            oom_kills_before,
        })
    }

    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// The next event, or the end. Cancel safe.
    pub async fn next(&mut self) -> Happened {
        let status = tokio::select! {
            biased;
            Some(event) = self.events.recv() => {
                self.note(&event);
                return Happened::Event(event);
            }
            status = self.child.wait() => status,
        };
        let status = match status {
            Ok(status) => status,
            Err(error) => {
                let text = format!("cannot wait for process {}: {error}", self.pid);
                return Happened::Ended(ExitCause { text, permanent: None });
            }
        };
        // What it may have started itself.
        let _ = killpg(self.pid, Signal::SIGKILL);
        self.read_last_words().await;
        let evidence = ExitEvidence {
            status,
            reported: self.reported.take(),
            killed_because: self.killed_because.take(),
            oom_kill_seen: oom_kills() > self.oom_kills_before,
            last_log_line: self.log_book.last_line(&self.replica),
        };
        Happened::Ended(evidence.cause())
    }

    /// Ask it to finish its requests and end.
    pub fn terminate(&self) {
        self.signal(|pid| kill(pid, Signal::SIGTERM));
    }

    /// End it and all it started, now. `why` is kept for the exit cause; `None` when the user asked for it.
    pub fn kill(&mut self, why: Option<String>) {
        self.killed_because = self.killed_because.take().or(why);
        self.signal(|pid| killpg(pid, Signal::SIGKILL));
    }

    fn signal(&self, send: impl Fn(Pid) -> nix::Result<()>) {
        // `id` is none once the child has been waited for: from then on the number may be another process's.
        if self.child.id().is_some()
            && let Err(error) = send(self.pid)
        {
            tracing::warn!(replica = self.replica, pid = %self.pid, %error, "cannot signal the worker");
        }
    }

    async fn read_last_words(&mut self) {
        let deadline = tokio::time::Instant::now() + LAST_WORDS_TIMEOUT;
        // Events first: their channel is bounded, and its reader ends only when there is room.
        while let Ok(Some(event)) = tokio::time::timeout_at(deadline, self.events.recv()).await {
            self.note(&event);
        }
        for reader in &mut self.readers {
            if tokio::time::timeout_at(deadline, &mut *reader).await.is_err() {
                reader.abort();
            }
        }
        self.readers.clear();
    }

    fn note(&mut self, event: &WorkerEvent) {
        if let WorkerEvent::Failed { kind, message } = event {
            self.reported = Some((*kind, message.clone()));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.readers.iter().for_each(JoinHandle::abort);
        self.signal(|pid| killpg(pid, Signal::SIGKILL));
    }
}

/// A line that is no event is taken for log text: a library may have printed it.
async fn read_events(stdout: ChildStdout, sender: mpsc::Sender<WorkerEvent>, replica: String, book: Arc<LogBook>) {
    let mut lines = BoundedLines::new(stdout);
    while let Some(line) = lines.next().await {
        match serde_json::from_str(&line) {
            Ok(event) => {
                if sender.send(event).await.is_err() {
                    return;
                }
            }
            Err(_) => book.push(&replica, &line),
        }
    }
}
