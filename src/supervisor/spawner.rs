//! The one thread that starts children.
//!
//! A worker asks the kernel to be killed when its parent dies (PR_SET_PDEATHSIG), and the kernel takes the *thread*
//! that started it for the parent. So children are started from a thread that never ends before the process does.

use anyhow::Context;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};

/// How to start a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerCommand {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// Set on top of the launcher's environment.
    pub env: Vec<(String, String)>,
    /// Taken out of it: keys that a worker has no use for.
    pub env_remove: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Spawner {
    jobs: mpsc::Sender<Job>,
}

#[derive(Debug)]
struct Job {
    command: WorkerCommand,
    reply: oneshot::Sender<std::io::Result<Child>>,
}

impl Spawner {
    /// Start the thread. Must be called inside a tokio runtime, which will watch the children.
    pub fn start() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        let (jobs, mut queue) = mpsc::channel::<Job>(64);
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                let _inside = runtime.enter();
                while let Some(job) = queue.blocking_recv() {
                    // A replica that no longer wants its child drops it, which kills it.
                    let _ = job.reply.send(start(&job.command));
                }
                // No more jobs, but children may live on for a moment: see above.
                loop {
                    std::thread::park();
                }
            })
            .context("cannot start the thread that starts workers")?;
        Ok(Self { jobs })
    }

    pub async fn spawn(&self, command: WorkerCommand) -> std::io::Result<Child> {
        let (reply, answer) = oneshot::channel();
        let gone = |what| std::io::Error::other(format!("the spawner thread {what}"));
        self.jobs.send(Job { command, reply }).await.map_err(|_| gone("has ended"))?;
        answer.await.map_err(|_| gone("did not answer"))?
    }
}

fn start(command: &WorkerCommand) -> std::io::Result<Child> {
    let mut child = Command::new(&command.program);
    child
        .args(&command.args)
        .env("MSERVE_PARENT_PID", std::process::id().to_string())
        .envs(command.env.iter().map(|(name, value)| (name, value)))
        // The death pipe: it closes when this process ends, however it ends, and the worker then ends too.
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C in the terminal reaches the launcher only, which then stops its workers in order.
        .process_group(0)
        .kill_on_drop(true);
    for name in &command.env_remove {
        child.env_remove(name);
    }
    child.spawn()
}
