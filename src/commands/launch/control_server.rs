//! The launcher's end of the control socket: see [`crate::control`].

use super::deployment::Deployment;
use super::shutdown::Stop;
use crate::control::{Deployment as StateFile, LogsQuery, StopRequest, runtime_dir, socket_path};
use crate::status::{LogLine, Status};
use anyhow::Context;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::mpsc;

const DEFAULT_LOG_LINES: usize = 200;
const MAX_LOG_LINES: usize = 10_000;

/// A bound socket and its state file. Both are removed when dropped.
#[derive(Debug)]
pub(super) struct Control {
    listener: Option<UnixListener>,
    socket: PathBuf,
    state_file: PathBuf,
    pub deployment: StateFile,
}

impl Control {
    /// Bind the socket, then tell where it is.
    pub fn open(endpoint: &str, port: u16) -> anyhow::Result<Self> {
        let directory = runtime_dir()?;
        let socket = socket_path(&directory)?;
        // Of a process with our pid that is gone.
        let _ = std::fs::remove_file(&socket);
        let listener =
            UnixListener::bind(&socket).with_context(|| format!("cannot open control socket {}", socket.display()))?;
        let deployment = StateFile::of_this_process(socket.clone(), endpoint.to_owned(), port)?;
        let state_file = deployment.write(&directory)?;
        Ok(Self { listener: Some(listener), socket, state_file, deployment })
    }

    /// Answer in the background, until the process ends.
    pub fn serve(&mut self, deployment: Arc<Deployment>, stop: mpsc::Sender<Stop>) {
        let app = app(Served { deployment, stop });
        if let Some(listener) = self.listener.take() {
            tokio::spawn(async move { axum::serve(listener, app).await });
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.state_file);
        let _ = std::fs::remove_file(&self.socket);
    }
}

#[derive(Debug, Clone)]
struct Served {
    deployment: Arc<Deployment>,
    stop: mpsc::Sender<Stop>,
}

type Refused = (StatusCode, String);

fn app(served: Served) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/logs", get(logs))
        .route("/stop", post(stop))
        .route("/replicas/{id}/restart", post(restart))
        .route("/replicas/{id}/drain", post(drain))
        .layer(DefaultBodyLimit::max(64 * 1024))
        .with_state(served)
}

async fn status(State(served): State<Served>) -> Json<Status> {
    Json(served.deployment.status())
}

async fn logs(State(served): State<Served>, Query(query): Query<LogsQuery>) -> Result<Json<Vec<LogLine>>, Refused> {
    let supervisor = &served.deployment.supervisor;
    if let Some(id) = &query.replica {
        supervisor.check_id(id).map_err(|error| (StatusCode::NOT_FOUND, error.to_string()))?;
    }
    let limit = query.lines.unwrap_or(DEFAULT_LOG_LINES).min(MAX_LOG_LINES);
    Ok(Json(supervisor.log_book().lines(query.replica.as_deref(), query.after.unwrap_or(0), limit)))
}

async fn stop(State(served): State<Served>, Json(request): Json<StopRequest>) -> StatusCode {
    // A full channel holds a stop already.
    let _ = served.stop.try_send(Stop::Asked { timeout: request.timeout_s.map(Duration::from_secs) });
    StatusCode::ACCEPTED
}

async fn restart(State(served): State<Served>, Path(id): Path<String>) -> Result<StatusCode, Refused> {
    let done = served.deployment.supervisor.restart(&id);
    done.map(|()| StatusCode::ACCEPTED).map_err(|error| (StatusCode::NOT_FOUND, error.to_string()))
}

async fn drain(State(served): State<Served>, Path(id): Path<String>) -> Result<StatusCode, Refused> {
    let done = served.deployment.supervisor.drain(&id);
    done.map(|()| StatusCode::ACCEPTED).map_err(|error| (StatusCode::NOT_FOUND, error.to_string()))
}
