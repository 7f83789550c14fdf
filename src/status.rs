//! The state of a deployment as data: written by the launcher, read by `ps`, `top` and anyone with `--json`.

use mserve_runtime::engine::EngineLoad;
use serde::{Deserialize, Serialize};

/// Version of this shape; raised when a field changes meaning or goes.
pub const SCHEMA: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub schema: u32,
    pub version: String,
    pub pid: u32,
    /// `http://127.0.0.1:8000`
    pub endpoint: String,
    pub uptime_s: f64,
    pub replicas: Vec<ReplicaStatus>,
    pub router: RouterStatus,
    pub gpus: Vec<GpuStatus>,
    pub host: HostStatus,
    /// Newest last; bounded.
    pub events: Vec<Event>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// `demo-0`: group name and index.
    pub id: String,
    pub model: String,
    pub kind: ModelKind,
    /// `cpu`, or GPU UUIDs.
    pub devices: Vec<String>,
    pub pid: Option<u32>,
    pub port: Option<u16>,
    pub state: ReplicaState,
    /// Since the last change of state.
    pub state_age_s: f64,
    pub restarts: u32,
    /// Why the previous process ended, in words.
    pub last_exit: Option<String>,
    /// Requests the router has sent here and not finished.
    pub in_flight: u64,
    pub load: Option<EngineLoad>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelKind {
    Chat,
    Embedding,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum ReplicaState {
    /// `phase` is the worker's own word: starting, weights, warmup ...
    Starting {
        phase: String,
        done: u64,
        total: u64,
    },
    Ready,
    /// Answers health checks no more, or makes no progress.
    Unhealthy {
        why: String,
    },
    Draining,
    Backoff {
        restart_in_s: f64,
    },
    /// Will not be restarted: a configuration error, or too many crashes.
    Failed {
        why: String,
    },
    Stopped,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RouterStatus {
    pub requests_total: u64,
    pub errors_total: u64,
    pub retries_total: u64,
    pub in_flight: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuStatus {
    pub index: u32,
    pub uuid: String,
    pub name: String,
    pub memory_total_bytes: u64,
    pub memory_used_bytes: u64,
    pub utilization_percent: Option<u32>,
    pub temperature_c: Option<u32>,
    pub power_w: Option<f64>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HostStatus {
    pub cpu_percent: Option<f64>,
    pub cpus: u32,
    pub memory_total_bytes: u64,
    pub memory_available_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Seconds since the Unix epoch.
    pub at_unix_s: f64,
    pub replica: Option<String>,
    pub text: String,
}

/// One line of a replica's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    pub seq: u64,
    pub at_unix_ms: u64,
    pub replica: String,
    pub text: String,
}
