//! What the routes share: who this replica is, how far it is, and the model once it is loaded.

use super::error::ApiError;
use crate::engine::EngineHandle;
use crate::tokenizer::{ChatTemplate, GenerationDefaults, Tokenizer};
use axum::http::{HeaderValue, StatusCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Semaphore, watch};

const MAX_HEADER_CHARS: usize = 128;

#[derive(Debug)]
pub struct ServerConfig {
    /// Names that requests may use; the first stands in answers.
    pub served_model_names: Vec<String>,
    /// When set, every route but `/health` and `/ready` wants it in `x-mserve-token`.
    pub token: Option<String>,
    pub telemetry: Option<Telemetry>,
    pub max_body_bytes: usize,
    /// Work may wait this long without a step before `/health` says so.
    pub stall_limit: Duration,
}

/// Headers that name the replica on every response.
#[derive(Debug, Clone)]
pub struct Telemetry {
    pub instance_id: HeaderValue,
    pub model_id: HeaderValue,
    pub replica: HeaderValue,
}

impl Telemetry {
    /// `None` when a value is empty, longer than 128 characters, or not of `A-Z a-z 0-9 . _ : / -`.
    pub fn new(instance_id: &str, model_id: &str, replica: &str) -> Option<Self> {
        let value = |text: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "._:/-".contains(c);
            let fits = (1..=MAX_HEADER_CHARS).contains(&text.len()) && text.chars().all(plain);
            HeaderValue::from_str(text).ok().filter(|_| fits)
        };
        Some(Self { instance_id: value(instance_id)?, model_id: value(model_id)?, replica: value(replica)? })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServedKind {
    Chat,
    Embedding { width: usize },
}

#[derive(Debug)]
pub struct ServedModel {
    pub engine: EngineHandle,
    pub tokenizer: Arc<Tokenizer>,
    /// `None`: chat/completions answers that it needs one.
    pub chat_template: Option<Arc<ChatTemplate>>,
    pub eos_token_ids: Arc<[u32]>,
    pub generation_defaults: GenerationDefaults,
    pub kind: ServedKind,
    pub max_model_len: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Loading,
    Ready,
    /// Running requests are finished, new ones refused.
    Draining,
}

#[derive(Debug)]
pub struct ServerState {
    pub config: ServerConfig,
    /// Seconds since the Unix epoch at start, for `created` in the model list.
    pub started_unix_s: u64,
    model: OnceLock<ServedModel>,
    draining: AtomicBool,
    /// Requests between their arrival and the last byte of their answer.
    in_flight: watch::Sender<usize>,
    /// Tokenizing and rendering run beside the async threads, this many at a time.
    pub(super) text_work: Arc<Semaphore>,
}

impl ServerState {
    pub fn new(config: ServerConfig) -> Arc<Self> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            config,
            started_unix_s: unix_seconds(),
            model: OnceLock::new(),
            draining: AtomicBool::new(false),
            in_flight: watch::Sender::new(0),
            text_work: Arc::new(Semaphore::new(threads)),
        })
    }

    /// The model is loaded: routes answer from here on. A second call is ignored.
    pub fn set_model(&self, model: ServedModel) {
        drop(self.model.set(model));
    }

    pub fn start_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    pub fn phase(&self) -> Phase {
        match (self.draining.load(Ordering::Acquire), self.model.get()) {
            (true, _) => Phase::Draining,
            (false, Some(_)) => Phase::Ready,
            (false, None) => Phase::Loading,
        }
    }

    /// # Errors
    /// 503 while loading.
    pub fn model(&self) -> Result<&ServedModel, ApiError> {
        self.model
            .get()
            .ok_or_else(|| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the model is still loading").code("loading"))
    }

    /// Requests that have not been answered in full.
    pub async fn wait_until_idle(&self) {
        let mut in_flight = self.in_flight.subscribe();
        // The sender lives in self, so waiting cannot fail.
        drop(in_flight.wait_for(|&n| n == 0).await);
    }

    /// Count a request as running until the guard goes.
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.send_modify(|n| *n += 1);
        InFlight(Arc::clone(self))
    }

    pub fn model_name(&self) -> &str {
        self.config.served_model_names.first().map_or("model", String::as_str)
    }
}

#[derive(Debug)]
pub struct InFlight(Arc<ServerState>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.send_modify(|n| *n -= 1);
    }
}

pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
