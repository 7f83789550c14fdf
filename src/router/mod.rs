//! The front door: one OpenAI-compatible endpoint before all replicas.
//!
//! A request is read whole, sent to a replica of its model ([`policy`]), and as long as no byte of an answer has gone
//! to the client it can be sent again to another ([`forward`]). The answer is passed on as it comes ([`relay`]).
//! The router knows replicas only through its [`Registry`]; who fills that is not its business.

mod breaker;
mod error;
mod forward;
mod guard;
mod listener;
mod metrics;
pub mod policy;
mod registry;
mod relay;
mod request;
mod routes;

pub use listener::serve;
pub use registry::{Group, Registry, Replica};

use crate::status::RouterStatus;
use metrics::Metrics;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterLimits {
    pub max_body_bytes: usize,
    /// Beyond these 429.
    pub max_concurrent_requests: usize,
    /// Requests that may wait for a replica to become ready, and how long.
    pub max_waiting_requests: usize,
    pub ready_timeout: Duration,
    /// For a client to send its body.
    pub body_timeout: Duration,
    /// From sending a request to the first byte of its answer: queueing and, without streaming, all the generation.
    pub answer_timeout: Duration,
    /// Longest silence within a stream.
    pub idle_timeout: Duration,
    /// An answer that is not streamed is kept back up to this size, so that it can still be had from another replica.
    pub max_held_bytes: usize,
}

impl Default for RouterLimits {
    fn default() -> Self {
        Self {
            max_body_bytes: 8 << 20,
            max_concurrent_requests: 1024,
            max_waiting_requests: 512,
            ready_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(60),
            answer_timeout: Duration::from_secs(1800),
            idle_timeout: Duration::from_secs(300),
            max_held_bytes: 16 << 20,
        }
    }
}

/// Who may talk to the router.
#[derive(Clone, PartialEq, Eq)]
pub enum Access {
    /// Whoever knows the key, on every path but `/health` and `/ready`.
    Key(String),
    /// Programs of this machine, but not web pages open on it: `Host` and `Origin` must be local.
    Local,
    /// Everyone who can reach the port.
    Open,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Key(_) => "Key(..)",
            Self::Local => "Local",
            Self::Open => "Open",
        })
    }
}

#[derive(Debug, Clone)]
pub struct Router {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    registry: Arc<Registry>,
    limits: RouterLimits,
    access: Access,
    http: reqwest::Client,
    metrics: Metrics,
    admission: Arc<Semaphore>,
    draining: AtomicBool,
    started_unix_s: u64,
}

impl Router {
    pub fn new(registry: Arc<Registry>, limits: RouterLimits, access: Access) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .http1_only()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(Duration::from_secs(2))
            .pool_idle_timeout(Duration::from_secs(20))
            .tcp_nodelay(true)
            .build()?;
        let admission = Arc::new(Semaphore::new(limits.max_concurrent_requests.min(Semaphore::MAX_PERMITS)));
        let started_unix_s =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let draining = AtomicBool::new(false);
        let metrics = Metrics::new()?;
        Ok(Self {
            shared: Arc::new(Shared { registry, limits, access, http, metrics, admission, draining, started_unix_s }),
        })
    }

    /// The routes, for [`serve`].
    pub fn app(&self) -> axum::Router {
        routes::app(Arc::clone(&self.shared))
    }

    /// Refuse new requests; those that run go on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Relaxed);
    }

    pub fn status(&self) -> RouterStatus {
        self.shared.metrics.status()
    }
}
