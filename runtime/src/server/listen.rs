//! Connections: HTTP/1.1 with limits on everything a client can hold.

use super::write_deadline::WriteDeadline;
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt as _;

/// Pause after a failed accept (out of file descriptors, most often), so that it does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    pub max_connections: usize,
    pub max_headers: usize,
    pub max_head_bytes: usize,
    /// From the first byte of a request to the end of its headers; an idle connection is closed after it too.
    pub header_timeout: Duration,
    /// For a client that has stopped reading its answer.
    pub write_timeout: Duration,
    /// For open connections to end once `until` is done.
    pub close_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            max_headers: 100,
            max_head_bytes: 128 << 10,
            header_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            close_timeout: Duration::from_secs(5),
        }
    }
}

/// Serve connections until `until` is done, then close idle ones and give the others `close_timeout`.
pub async fn serve(listener: TcpListener, router: Router, limits: ConnectionLimits, until: impl Future<Output = ()>) {
    let slots = Arc::new(Semaphore::new(limits.max_connections));
    let (closing, closed) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut until = std::pin::pin!(until);
    loop {
        let accept = async {
            // The semaphore is never closed.
            let slot = Arc::clone(&slots).acquire_owned().await.ok();
            (slot, listener.accept().await)
        };
        tokio::select! {
            () = &mut until => break,
            Some(_) = connections.join_next() => {}
            (slot, accepted) = accept => match accepted {
                Ok((stream, _)) => {
                    let (router, closed) = (router.clone(), closed.clone());
                    connections.spawn(async move {
                        serve_connection(stream, router, limits, closed).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            },
        }
    }
    drop(listener);
    closing.send_replace(true);
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(limits.close_timeout, all).await.is_err() {
        tracing::warn!("some connections did not end in time and are cut");
    }
}

async fn serve_connection(
    stream: TcpStream,
    router: Router,
    limits: ConnectionLimits,
    mut closed: watch::Receiver<bool>,
) {
    // Deltas are small and must not wait for each other.
    drop(stream.set_nodelay(true));
    let service = TowerToHyperService::new(router.map_request(|request: Request<Incoming>| request.map(Body::new)));
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(limits.max_headers)
        .max_buf_size(limits.max_head_bytes);
    let mut connection = std::pin::pin!(
        builder.serve_connection(TokioIo::new(WriteDeadline::new(stream, limits.write_timeout)), service)
    );
    tokio::select! {
        result = connection.as_mut() => return note(result),
        _ = closed.wait_for(|&closed| closed) => connection.as_mut().graceful_shutdown(),
    }
    note(connection.await);
}

fn note(result: hyper::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended early");
    }
}
