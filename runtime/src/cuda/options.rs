use super::cubin_cache::DiskCache;
use std::path::PathBuf;
use std::time::Duration;

/// How a CUDA backend is set up.
#[derive(Debug, Clone, PartialEq)]
pub struct CudaOptions {
    /// Among the cards that CUDA_VISIBLE_DEVICES shows.
    pub ordinal: usize,
    /// Share of the card's total memory that this replica may use.
    pub gpu_memory_utilization: f64,
    /// Longest sequence; the model's own limit when `None`.
    pub max_model_len: Option<usize>,
    pub max_num_seqs: usize,
    /// Most tokens of one step: the size of the activation arena.
    pub max_num_batched_tokens: usize,
    /// Memory for keys and values; what the budget leaves when `None`.
    pub kv_cache_bytes: Option<u64>,
    pub graphs: GraphCapture,
    /// Longest that measuring matrix products may delay a start. What is left is measured in idle times.
    pub tuning_budget: Duration,
    /// Where compiled kernels and measurements are kept; nowhere when `None`.
    pub cache_dir: Option<PathBuf>,
}

/// When decode steps are captured as graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GraphCapture {
    /// All batch sizes before the first request, and all products measured: for measuring speed.
    AtStart,
    /// Each when it is first needed, or before that in idle times.
    WhenNeeded,
    /// Every step launches its kernels one by one: to tell a kernel's fault from a graph's.
    Never,
}

/// 64 rows for each of the 132 multiprocessors of an H100 or H200: tiles of 128 rows then fill the card without a rest,
/// where 8,192 rows leave 3 % of it idle.
pub const DEFAULT_MAX_NUM_BATCHED_TOKENS: usize = 132 * 64;

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            ordinal: 0,
            gpu_memory_utilization: 0.9,
            max_model_len: None,
            max_num_seqs: 256,
            max_num_batched_tokens: DEFAULT_MAX_NUM_BATCHED_TOKENS,
            kv_cache_bytes: None,
            graphs: GraphCapture::AtStart,
            tuning_budget: Duration::from_millis(300),
            cache_dir: DiskCache::directory_of_user(),
        }
    }
}
