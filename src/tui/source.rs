//! Where the dashboard's data comes from: a running launcher, a replay, or a test.

use crate::status::{LogLine, Status};
use std::future::Future;

/// What an operator can ask of a deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    RestartReplica { id: String },
    StopDeployment,
}

/// Snapshots of a deployment, its replicas' output, and a hand on it.
///
/// The dashboard calls these from its own tasks, actions beside the polls, never while drawing; it bounds each with
/// a deadline, so an implementation must survive being dropped at any await.
pub trait Source: Send + Sync + 'static {
    /// The newest snapshot; `None` when there will be no more (the end of a replay).
    fn status(&self) -> impl Future<Output = anyhow::Result<Option<Status>>> + Send;

    /// Lines after `after`, oldest first; with `None` a recent tail.
    fn logs(&self, after: Option<u64>) -> impl Future<Output = anyhow::Result<Vec<LogLine>>> + Send;

    /// Ask for it, and say in a few words what was begun.
    fn act(&self, action: Action) -> impl Future<Output = anyhow::Result<String>> + Send;
}
