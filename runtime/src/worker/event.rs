use crate::engine::FailureKind;
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
    /// From the start of the process.
    pub load_ms: u64,
    pub weight_bytes: u64,
    pub kv_cache_bytes: u64,
    pub num_blocks: u64,
    pub block_size: u64,
    pub max_model_len: u64,
    pub max_num_seqs: u64,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn exit_codes_tell_all_kinds_apart() {
        let mut codes = FailureKind::ALL.map(FailureKind::exit_code).to_vec();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), FailureKind::ALL.len());
        let words = FailureKind::ALL.map(|kind| serde_json::to_string(&kind).unwrap());
        assert_eq!((words[0].as_str(), words[11].as_str()), ("\"config\"", "\"context_lost\""));
    }
}
