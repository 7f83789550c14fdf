use serde::{Deserialize, Serialize};

/// What a worker tells its supervisor: one JSON object a line on standard output. Standard error is its log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum WorkerEvent {
    /// Work before readiness goes on: `tokenizer`, `weights` (bytes), `warmup`. A supervisor's start deadline counts
    /// from the last of these, so a slow disk is not taken for a hang.
    Phase {
        phase: String,
        done: u64,
        total: u64,
    },
    /// The socket is bound; `/health` answers from here on, `/ready` after `Ready`.
    Listening {
        port: u16,
    },
    Ready(ReadyInfo),
    /// The process is about to end by itself.
    Failed {
        kind: FailureKind,
        message: String,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReadyInfo {
    pub device: String,
    pub load_ms: u64,
    pub weight_bytes: u64,
    pub kv_cache_bytes: u64,
    pub num_blocks: u64,
    pub block_size: u64,
    pub max_model_len: u64,
    pub max_num_seqs: u64,
}

/// Decides the exit code and whether a restart can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// Bad model files or settings: exit 2, never restarted.
    Config,
    /// Not enough memory for weights or cache: exit 3, never restarted.
    DoesNotFit,
    /// The device failed and a new process may work: exit 4.
    Device,
    /// Anything else: exit 1.
    Internal,
}

impl FailureKind {
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Internal => 1,
            Self::Config => 2,
            Self::DoesNotFit => 3,
            Self::Device => 4,
        }
    }
}
