use serde::{Deserialize, Serialize};

/// What a replica says about itself on `GET /load`: the supervisor's health check and the dashboard's row.
/// Latencies cover the last 60 seconds; `None` when nothing happened in them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineLoad {
    pub running: u64,
    pub waiting: u64,
    /// Share of KV blocks in use, 0..1.
    pub kv_cache_usage: f64,
    pub kv_blocks_total: u64,
    pub kv_block_size: u64,
    pub kv_cache_bytes: u64,
    pub max_model_len: u64,
    pub prompt_tokens_total: u64,
    pub generation_tokens_total: u64,
    /// Tokens per second over the last few seconds.
    pub prompt_tokens_per_s: f64,
    pub generation_tokens_per_s: f64,
    pub requests_total: u64,
    pub preemptions_total: u64,
    /// Prefix-cache hits over queries in tokens, since start.
    pub prefix_cache_hit_rate: Option<f64>,
    pub ttft_p50_ms: Option<f64>,
    pub ttft_p95_ms: Option<f64>,
    pub itl_p50_ms: Option<f64>,
    pub itl_p95_ms: Option<f64>,
    /// Steps run since start: health is this number moving, or nothing to do.
    pub steps_total: u64,
    /// Milliseconds since the last step ended while work is queued; 0 when idle.
    pub stalled_ms: u64,
    /// Steps since start by what was in them: one token of every sequence, prompts beside such, prompts alone.
    #[serde(default)]
    pub decode_steps: StepTotals,
    #[serde(default)]
    pub mixed_steps: StepTotals,
    #[serde(default)]
    pub prefill_steps: StepTotals,
    /// Milliseconds since start that the engine's thread had work and did not wait for the device.
    #[serde(default)]
    pub engine_host_ms: f64,
}

/// Sums over steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTotals {
    pub steps: u64,
    pub tokens: u64,
    /// That the device took.
    pub device_ms: f64,
}
