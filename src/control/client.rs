use super::{Deployment, runtime_dir};
use crate::exit::Failure;
use crate::status::{LogLine, Status};
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;

/// The launcher answers from memory; a longer silence means that it hangs.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The far end of a launcher's control socket.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    deployment: Deployment,
}

/// Which log lines to return.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogsQuery {
    /// Only this replica's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica: Option<String>,
    /// Only lines with a greater [`LogLine::seq`]: pass the last one seen to follow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
    /// The newest so many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lines: Option<usize>,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct StopRequest {
    /// Seconds that running requests get; the launcher's own setting when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
}

impl Client {
    /// The running deployment of this user: the one on `port`, or the only one.
    ///
    /// # Errors
    /// [`Failure`] when none runs (there), or several do and no port was given.
    pub fn discover(port: Option<u16>) -> anyhow::Result<Self> {
        Self::discover_in(&runtime_dir()?, port)
    }

    /// [`Client::discover`] in a given runtime directory.
    pub fn discover_in(dir: &Path, port: Option<u16>) -> anyhow::Result<Self> {
        let mut found = Deployment::list(dir);
        if let Some(port) = port {
            found.retain(|deployment| deployment.port == port);
        }
        match found.len() {
            0 => {
                let on_port = port.map_or(String::new(), |port| format!(" on port {port}"));
                let failure = Failure {
                    code: crate::exit::FAILURE,
                    ..Failure::usage(format!("no deployment is running{on_port}"))
                };
                Err(failure.hint("start one with `mserve launch`; `mserve ps` lists them").into())
            }
            1 => Self::new(found.remove(0)),
            _ => {
                let ports: Vec<_> = found.iter().map(|deployment| deployment.port.to_string()).collect();
                let message = format!("{} deployments are running, on ports {}", found.len(), ports.join(", "));
                Err(Failure::usage(message).hint(format!("say which: --port {}", ports[0])).into())
            }
        }
    }

    pub fn new(deployment: Deployment) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .unix_socket(deployment.socket.as_path())
            .no_proxy()
            .timeout(REQUEST_TIMEOUT)
            .build()
            .context("cannot set up the control client")?;
        Ok(Self { http, deployment })
    }

    pub fn deployment(&self) -> &Deployment {
        &self.deployment
    }

    pub async fn status(&self) -> anyhow::Result<Status> {
        let response = self.send(self.http.get(url("/status"))).await?;
        response.json().await.context("the launcher's status cannot be read")
    }

    /// Lines of the replicas' output, oldest first.
    pub async fn logs(&self, query: &LogsQuery) -> anyhow::Result<Vec<LogLine>> {
        let mut params = Vec::new();
        params.extend(query.replica.as_ref().map(|replica| format!("replica={}", percent_encode(replica))));
        params.extend(query.after.map(|after| format!("after={after}")));
        params.extend(query.lines.map(|lines| format!("lines={lines}")));
        let response = self.send(self.http.get(url(&format!("/logs?{}", params.join("&"))))).await?;
        response.json().await.context("the launcher's logs cannot be read")
    }

    /// Ask for a graceful stop. Answers at once; the process ends when running requests have (or `timeout`).
    pub async fn stop(&self, timeout: Option<Duration>) -> anyhow::Result<()> {
        let body = StopRequest { timeout_s: timeout.map(|timeout| timeout.as_secs()) };
        self.send(self.http.post(url("/stop")).json(&body)).await.map(|_| ())
    }

    /// End a replica's process and start it again, also when it had been given up.
    pub async fn restart(&self, replica: &str) -> anyhow::Result<()> {
        self.replica_action(replica, "restart").await
    }

    /// Send a replica no more requests, let it finish what it has, then stop it.
    pub async fn drain(&self, replica: &str) -> anyhow::Result<()> {
        self.replica_action(replica, "drain").await
    }

    async fn replica_action(&self, replica: &str, action: &str) -> anyhow::Result<()> {
        let path = format!("/replicas/{}/{action}", percent_encode(replica));
        self.send(self.http.post(url(&path))).await.map(|_| ())
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> anyhow::Result<reqwest::Response> {
        let response = request.send().await.with_context(|| {
            format!(
                "the launcher (pid {}) does not answer on {}",
                self.deployment.pid,
                self.deployment.socket.display()
            )
        })?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let text = response.text().await.unwrap_or_default();
        anyhow::bail!("the launcher answered {status}: {}", text.trim())
    }
}

fn url(path: &str) -> String {
    // The host is not used on a unix socket, but HTTP wants one.
    format!("http://mserve{path}")
}

/// Replica ids hold letters, digits, `-`, `_` and `.`; anything else a user types must not change the path.
fn percent_encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}
