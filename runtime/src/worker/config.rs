use super::DeviceChoice;
use crate::cpu::WeightFormat;
use crate::cuda::CardHolder;
use mserve_planner::model::Pooling;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// All that one replica is started with. `None` means: what the model's files say, or what fits this machine.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    pub model_dir: PathBuf,
    /// Names that requests may use; the directory's name when empty.
    pub served_model_names: Vec<String>,
    /// Generation for decoders and embedding for encoders when `None`.
    pub kind: Option<WorkerKind>,
    /// Of embedding models; `1_Pooling/config.json`, then mean, when `None`.
    pub pooling: Option<Pooling>,
    pub host: IpAddr,
    /// 0 lets the system choose; the choice is told in `Listening`.
    pub port: u16,
    pub max_model_len: Option<usize>,
    pub device: DeviceChoice,
    /// Share of a card's total memory that this replica may use.
    pub gpu_memory_utilization: f64,
    /// 64 on the CPU and 256 on a card when `None`.
    pub max_num_seqs: Option<usize>,
    pub max_num_batched_tokens: Option<usize>,
    pub max_num_queued_reqs: usize,
    pub enable_prefix_caching: bool,
    pub block_size: usize,
    pub kv_cache_bytes: Option<u64>,
    /// Threads that compute; all cores when `None`.
    pub threads: Option<usize>,
    pub weights: WeightFormat,
    /// Name of a built-in template, of an entry of the model's list, or a file.
    pub chat_template: Option<String>,
    /// Wanted from every client in `x-mserve-token`.
    pub token: Option<String>,
    /// Set when responses should name the replica.
    pub identity: Option<Identity>,
    /// For running requests to finish once the worker is asked to end.
    pub shutdown_timeout: Duration,
    pub max_body_bytes: usize,
    /// Asks who has memory on the card with this UUID, for the message about a card that is full.
    pub card_holders: Option<fn(&str) -> Vec<CardHolder>>,
    /// When the process began: what the time to readiness is counted from.
    pub started: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerKind {
    Chat,
    Embedding,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub instance_id: String,
    pub replica: String,
}

impl WorkerConfig {
    /// A worker for this model with every setting at its default.
    pub fn new(model_dir: PathBuf) -> Self {
        Self {
            model_dir,
            served_model_names: Vec::new(),
            kind: None,
            pooling: None,
            host: IpAddr::from([127, 0, 0, 1]),
            port: 0,
            max_model_len: None,
            device: DeviceChoice::Auto,
            gpu_memory_utilization: 0.9,
            max_num_seqs: None,
            max_num_batched_tokens: None,
            max_num_queued_reqs: 512,
            enable_prefix_caching: true,
            block_size: 16,
            kv_cache_bytes: None,
            threads: None,
            weights: WeightFormat::Auto,
            chat_template: None,
            token: None,
            identity: None,
            shutdown_timeout: Duration::from_secs(30),
            max_body_bytes: 8 << 20,
            card_holders: None,
            started: Instant::now(),
        }
    }

    /// The names it answers to, at least one.
    pub fn names(&self) -> Vec<String> {
        if !self.served_model_names.is_empty() {
            return self.served_model_names.clone();
        }
        // `.` and `..` have a name only once they are resolved.
        let dir = self.model_dir.canonicalize().unwrap_or_else(|_| self.model_dir.clone());
        vec![dir.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())]
    }
}
