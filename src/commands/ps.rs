//! `mserve ps`: replicas of all deployments of this user.

use crate::control::{Client, Deployment, runtime_dir};
use crate::status::{ReplicaState, ReplicaStatus, Status};
use clap::Args;
use comfy_table::{Table, presets};
use futures::future::join_all;
use std::io::Write;
use std::process::ExitCode;

#[derive(Debug, Clone, Copy, Args)]
pub struct PsArgs {
    /// The whole status of every deployment, as a JSON array
    #[arg(long)]
    json: bool,
    /// Only the deployment on this port
    #[arg(short, long)]
    port: Option<u16>,
}

pub fn run(args: PsArgs) -> anyhow::Result<ExitCode> {
    let mut deployments = Deployment::list(&runtime_dir()?);
    deployments.retain(|deployment| args.port.is_none_or(|port| port == deployment.port));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let statuses: Vec<Status> = runtime.block_on(ask_all(deployments));
    let text = if args.json {
        serde_json::to_string_pretty(&statuses)? + "\n"
    } else if statuses.is_empty() {
        "no deployment is running; start one with `mserve launch`\n".to_owned()
    } else {
        statuses.iter().map(describe).collect::<Vec<_>>().join("\n")
    };
    // A reader that has seen enough is no error.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    Ok(ExitCode::SUCCESS)
}

/// Deployments that do not answer are told of on standard error and left out.
async fn ask_all(deployments: Vec<Deployment>) -> Vec<Status> {
    let answers = deployments.into_iter().map(|deployment| async move { Client::new(deployment)?.status().await });
    let warn = |answer: anyhow::Result<Status>| answer.inspect_err(|error| eprintln!("warning: {error:#}")).ok();
    join_all(answers).await.into_iter().filter_map(warn).collect()
}

fn describe(status: &Status) -> String {
    let router = &status.router;
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "REPLICA",
        "STATE",
        "PID",
        "DEVICE",
        "RUNNING",
        "WAITING",
        "KV",
        "TOKENS/S",
        "RESTARTS",
        "LAST EXIT",
    ]);
    for replica in &status.replicas {
        table.add_row(row(replica));
    }
    let table: String = table.lines().map(|line| format!("  {}\n", line.trim_end())).collect();
    format!(
        "{}  pid {}, up {}, {} requests ({} running, {} errors, {} retries)\n{table}",
        status.endpoint,
        status.pid,
        duration(status.uptime_s),
        router.requests_total,
        router.in_flight,
        router.errors_total,
        router.retries_total,
    )
}

fn row(replica: &ReplicaStatus) -> [String; 10] {
    let load = replica.load.as_ref();
    let figure = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        replica.id.clone(),
        state(replica),
        figure(replica.pid.map(|pid| pid.to_string())),
        replica.devices.join(","),
        figure(load.map(|load| load.running.to_string())),
        figure(load.map(|load| load.waiting.to_string())),
        figure(load.filter(|load| load.kv_blocks_total > 0).map(|load| format!("{:.0}%", load.kv_cache_usage * 100.0))),
        figure(load.map(|load| format!("{:.0}", load.generation_tokens_per_s))),
        replica.restarts.to_string(),
        figure(replica.last_exit.clone()),
    ]
}

fn state(replica: &ReplicaStatus) -> String {
    match &replica.state {
        ReplicaState::Starting { phase, total: 0, .. } => format!("starting ({phase})"),
        ReplicaState::Starting { phase, done, total } => {
            format!("starting ({phase} {:.0}%)", 100.0 * *done as f64 / *total as f64)
        }
        ReplicaState::Ready => "ready".into(),
        ReplicaState::Unhealthy { .. } => "unhealthy".into(),
        ReplicaState::Draining => "draining".into(),
        ReplicaState::Backoff { restart_in_s } => format!("restarts in {restart_in_s:.0} s"),
        ReplicaState::Failed { .. } => "failed".into(),
        ReplicaState::Stopped => "stopped".into(),
    }
}

/// `3 s`, `12 min`, `5 h`, `2 d`
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} d", s / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{HostStatus, ModelKind, RouterStatus, SCHEMA};
    use mserve_runtime::engine::EngineLoad;

    fn replica(id: &str, state: ReplicaState, load: Option<EngineLoad>) -> ReplicaStatus {
        ReplicaStatus {
            id: id.into(),
            model: "demo".into(),
            kind: ModelKind::Chat,
            devices: vec!["cpu".into()],
            pid: load.as_ref().map(|_| 41),
            port: None,
            state,
            state_age_s: 1.0,
            restarts: 0,
            last_exit: None,
            in_flight: 0,
            load,
        }
    }

    #[test]
    fn a_table_for_people() {
        let load = EngineLoad {
            running: 3,
            waiting: 12,
            kv_cache_usage: 0.42,
            kv_blocks_total: 100,
            generation_tokens_per_s: 1234.5,
            ..EngineLoad::default()
        };
        let loading = ReplicaState::Starting { phase: "weights".into(), done: 1, total: 4 };
        let crashed = ReplicaStatus {
            restarts: 2,
            last_exit: Some("killed by SIGKILL".into()),
            ..replica("demo-2", ReplicaState::Backoff { restart_in_s: 3.7 }, None)
        };
        let status = Status {
            schema: SCHEMA,
            version: "0".into(),
            pid: 7,
            endpoint: "http://127.0.0.1:8000".into(),
            uptime_s: 600.0,
            replicas: vec![
                replica("demo-0", ReplicaState::Ready, Some(load)),
                replica("demo-1", loading, None),
                crashed,
            ],
            router: RouterStatus { requests_total: 99, errors_total: 1, retries_total: 2, in_flight: 15 },
            gpus: Vec::new(),
            host: HostStatus::default(),
            events: Vec::new(),
        };
        insta::assert_snapshot!(describe(&status));
    }

    #[test]
    fn durations() {
        assert_eq!([1.0, 600.0, 36_000.0, 864_000.0].map(duration), ["1 s", "10 min", "10 h", "10 d"]);
    }
}
