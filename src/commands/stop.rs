//! `mserve stop`: end a deployment and see it gone.

use crate::control::{Client, Deployment};
use crate::exit::{FAILURE, Failure};
use anyhow::Context;
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::ExitCode;
use std::time::Duration;
use tokio::time::Instant;

/// Beyond what running requests get: for workers to end.
const MARGIN: Duration = Duration::from_secs(15);
/// The launcher's own, when none is given: it decides, this only waits.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy, Args)]
pub struct StopArgs {
    /// The deployment on this port, where several run
    #[arg(short, long)]
    port: Option<u16>,
    /// Seconds that running requests get [default: the deployment's shutdown_timeout]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=86_400))]
    timeout: Option<u64>,
}

pub fn run(args: StopArgs) -> anyhow::Result<ExitCode> {
    let client = Client::discover(args.port)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(stop(&client, args.timeout.map(Duration::from_secs)))
}

async fn stop(client: &Client, timeout: Option<Duration>) -> anyhow::Result<ExitCode> {
    let deployment = client.deployment();
    if let Err(error) = client.stop(timeout).await {
        // It may have ended meanwhile, or hang; a signal needs no answer.
        if deployment.is_alive() {
            eprintln!("warning: {error:#}; sending SIGTERM");
            signal(deployment, Signal::SIGTERM)?;
        }
    }
    let deadline = Instant::now() + timeout.unwrap_or(LONGEST_TIMEOUT) + MARGIN;
    while deployment.is_alive() {
        if Instant::now() >= deadline {
            let message = format!("the launcher (pid {}) is still there", deployment.pid);
            let failure = Failure { code: FAILURE, ..Failure::usage(message) };
            return Err(failure.hint(format!("kill -9 {} ends it and its replicas", deployment.pid)).into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("stopped {} (pid {})", deployment.endpoint, deployment.pid);
    Ok(ExitCode::SUCCESS)
}

/// Only a process that is still the launcher.
fn signal(deployment: &Deployment, signal: Signal) -> anyhow::Result<()> {
    let pid = i32::try_from(deployment.pid).context("a pid out of range")?;
    anyhow::ensure!(deployment.is_alive(), "the launcher is gone");
    kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot signal pid {pid}"))
}
