//! The task that keeps one replica running.

use super::exit_cause::ExitCause;
use super::health::{HealthTracker, Prober, Verdict};
use super::process::{Happened, Process};
use super::spawner::Spawner;
use super::{Crash, CrashCount, Decision, LogBook, ReplicaSpec, ReplicaView, SupervisorLimits};
use crate::status::ReplicaState;
use mserve_runtime::engine::EngineLoad;
use mserve_runtime::worker::WorkerEvent;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    Restart,
    Drain,
    Stop { grace: Duration },
}

pub(super) struct ReplicaTask {
    pub spec: Arc<ReplicaSpec>,
    pub limits: SupervisorLimits,
    pub spawner: Spawner,
    pub prober: Prober,
    pub log_book: Arc<LogBook>,
    pub view: watch::Sender<ReplicaView>,
    pub commands: mpsc::Receiver<Command>,
    pub crashes: CrashCount,
}

/// How a process's life ended, for [`ReplicaTask::run`].
enum End {
    Crashed {
        cause: ExitCause,
        ready_for: Option<Duration>,
    },
    /// Ended on a command, which says what comes next.
    Asked(Command),
}

/// What goes on until a process ends.
struct Life {
    process: Process,
    ready_at: Option<Instant>,
    /// A starting worker must give a sign of life before this.
    start_deadline: Instant,
    health: HealthTracker,
    probes: mpsc::Receiver<Result<EngineLoad, String>>,
    probe_sender: mpsc::Sender<Result<EngineLoad, String>>,
    probing: Option<AbortHandle>,
}

impl ReplicaTask {
    /// Runs until told to stop.
    pub async fn run(mut self) {
        loop {
            let next = match self.run_process().await {
                End::Asked(command) => Some(command),
                End::Crashed { cause, ready_for } => self.after_crash(&cause, ready_for).await,
            };
            match next {
                None | Some(Command::Restart) => {}
                Some(Command::Drain) => {
                    self.set_state(ReplicaState::Stopped);
                    if let Command::Stop { .. } = self.wait_for_revival().await {
                        break;
                    }
                }
                Some(Command::Stop { .. }) => break,
            }
            self.view.send_modify(|view| view.restarts += 1);
        }
        self.set_state(ReplicaState::Stopped);
    }

    async fn run_process(&mut self) -> End {
        self.view.send_modify(|view| {
            let fresh = ReplicaView::starting();
            *view = ReplicaView { restarts: view.restarts, last_exit: view.last_exit.take(), ..fresh };
        });
        let process = match Process::start(&self.spec, &self.spawner, &self.log_book).await {
            Ok(process) => process,
            Err(error) => {
                let text = format!("cannot start {}: {error}", self.spec.command.program.display());
                return End::Crashed { cause: ExitCause { text, permanent: None }, ready_for: None };
            }
        };
        self.view.send_modify(|view| view.pid = Some(process.pid()));
        self.event(format!("started, pid {}", process.pid()));
        let (probe_sender, probes) = mpsc::channel(1);
        let life = Life {
            process,
            ready_at: None,
            start_deadline: Instant::now() + self.limits.start_silence,
            health: HealthTracker::default(),
            probes,
            probe_sender,
            probing: None,
        };
        self.live(life).await
    }

    async fn live(&mut self, mut life: Life) -> End {
        loop {
            tokio::select! {
                happened = life.process.next() => match happened {
                    Happened::Event(event) => self.on_event(&mut life, event),
                    Happened::Ended(cause) => {
                        let ready_for = life.ready_at.map(|at| at.elapsed());
                        return End::Crashed { cause, ready_for };
                    }
                },
                Some(probe) = life.probes.recv() => self.on_probe(&mut life, probe),
                () = tokio::time::sleep_until(life.start_deadline), if life.ready_at.is_none() => {
                    let seconds = self.limits.start_silence.as_secs();
                    self.give_up_on(&mut life, format!("no progress for {seconds} s while starting"));
                    // It dies of that; do not come back here before it has.
                    life.start_deadline = Instant::now() + self.limits.start_silence;
                }
                command = self.commands.recv() => {
                    // The sender lives as long as the supervisor.
                    let command = command.unwrap_or(Command::Stop { grace: Duration::ZERO });
                    return End::Asked(self.wind_down(&mut life.process, command).await);
                }
            }
        }
    }

    fn on_event(&mut self, life: &mut Life, event: WorkerEvent) {
        life.start_deadline = Instant::now() + self.limits.start_silence;
        match event {
            WorkerEvent::Phase { phase, done, total } => {
                if life.ready_at.is_none() {
                    self.set_state(ReplicaState::Starting { phase, done, total });
                }
            }
            WorkerEvent::Listening { port } => self.view.send_modify(|view| view.port = Some(port)),
            WorkerEvent::Ready(info) => {
                let Some(port) = self.view.borrow().port else {
                    return self.give_up_on(life, "it said ready without having told its port".into());
                };
                life.ready_at = Some(Instant::now());
                life.probing = Some(self.start_probing(port, life.probe_sender.clone()));
                self.event(format!("ready on {} after {:.1} s of loading", info.device, ms(info.load_ms)));
                self.view.send_modify(|view| view.ready = Some(info));
                self.set_state(ReplicaState::Ready);
            }
            // Kept by the process for its exit cause.
            WorkerEvent::Failed { .. } => {}
        }
    }

    fn on_probe(&mut self, life: &mut Life, probe: Result<EngineLoad, String>) {
        match life.health.observe(&self.limits.health, probe) {
            Verdict::Healthy(load) => self.view.send_modify(|view| view.load = Some(*load)),
            Verdict::Missed => {}
            Verdict::Unhealthy(why) => self.give_up_on(life, why),
        }
    }

    /// Kill a process that cannot be helped; its end comes in as a crash.
    fn give_up_on(&mut self, life: &mut Life, why: String) {
        self.event(format!("unhealthy: {why}"));
        self.set_state(ReplicaState::Unhealthy { why: why.clone() });
        if let Some(probing) = life.probing.take() {
            probing.abort();
        }
        life.process.kill(Some(why));
    }

    fn start_probing(&self, port: u16, results: mpsc::Sender<Result<EngineLoad, String>>) -> AbortHandle {
        let (prober, token, interval) = (self.prober.clone(), self.spec.token.clone(), self.limits.health.interval);
        let task = async move {
            // Ends with the life of the process: then nobody receives.
            while results.send(prober.load(port, &token).await).await.is_ok() {
                tokio::time::sleep(interval).await;
            }
        };
        tokio::spawn(task).abort_handle()
    }

    /// Let the process finish and end; kill it when its time is over. Returns the command to go on with: a later
    /// one counts more than an earlier one.
    async fn wind_down(&mut self, process: &mut Process, mut command: Command) -> Command {
        self.set_state(ReplicaState::Draining);
        process.terminate();
        let mut deadline = Instant::now() + self.grace_of(&command);
        loop {
            tokio::select! {
                happened = process.next() => if let Happened::Ended(_) = happened {
                    self.view.send_modify(|view| {
                        view.last_exit = Some("asked to stop".into());
                        (view.pid, view.port, view.load, view.ready) = (None, None, None, None);
                    });
                    self.event("stopped".into());
                    return command;
                },
                () = tokio::time::sleep_until(deadline) => {
                    self.event("did not end in time and is killed".into());
                    process.kill(None);
                    deadline = Instant::now() + self.limits.drain.max(Duration::from_secs(1));
                }
                Some(next) = self.commands.recv() => {
                    deadline = deadline.min(Instant::now() + self.grace_of(&next));
                    command = next;
                }
            }
        }
    }

    fn grace_of(&self, command: &Command) -> Duration {
        match command {
            Command::Stop { grace } => *grace,
            Command::Restart | Command::Drain => self.limits.drain,
        }
    }

    /// Decide on a restart and sit out its delay. A command cuts the wait short and is returned.
    async fn after_crash(&mut self, cause: &ExitCause, ready_for: Option<Duration>) -> Option<Command> {
        let crash = Crash { restart_can_help: cause.permanent.is_none(), ready_for };
        let decision = self.crashes.on_crash(&self.limits.restart, crash, fastrand::f64());
        self.event(format!("ended: {}", cause.text));
        self.view.send_modify(|view| {
            view.last_exit = Some(cause.text.clone());
            (view.pid, view.port, view.load, view.ready) = (None, None, None, None);
        });
        match decision {
            Decision::GiveUp { crashes } => {
                let why = match cause.permanent {
                    Some(_) => cause.text.clone(),
                    None => format!("{crashes} crashes in a row; the last one: {}", cause.text),
                };
                self.view.send_modify(|view| view.permanent = cause.permanent);
                self.set_state(ReplicaState::Failed { why });
                let command = self.wait_for_revival().await;
                self.crashes = CrashCount::default();
                Some(command)
            }
            Decision::Restart { after } => {
                let until = Instant::now() + after;
                self.set_state(ReplicaState::Backoff { restart_in_s: after.as_secs_f64() });
                tokio::select! {
                    () = tokio::time::sleep_until(until) => None,
                    command = self.commands.recv() => command,
                }
            }
        }
    }

    /// Nothing runs: only a restart or the end of it all makes a difference.
    async fn wait_for_revival(&mut self) -> Command {
        loop {
            match self.commands.recv().await {
                Some(Command::Drain) => self.set_state(ReplicaState::Stopped),
                Some(command) => return command,
                None => return Command::Stop { grace: Duration::ZERO },
            }
        }
    }

    fn set_state(&self, state: ReplicaState) {
        self.view.send_modify(|view| {
            if std::mem::discriminant(&view.state) != std::mem::discriminant(&state) {
                view.since = std::time::Instant::now();
            }
            view.state = state;
        });
    }

    fn event(&self, text: String) {
        self.log_book.event(Some(&self.spec.id), text);
    }
}

fn ms(ms: u64) -> f64 {
    Duration::from_millis(ms).as_secs_f64()
}
