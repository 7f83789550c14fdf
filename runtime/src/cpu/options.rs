/// How a CPU backend is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that compute. They belong to this backend alone.
    pub threads: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// Memory for keys and values. Not used by models that keep none.
    pub kv_cache_bytes: u64,
    /// Longest sequence; the model's own limit when `None`.
    pub max_model_len: Option<usize>,
    /// Most tokens of one step: the size of the activation arena.
    pub max_num_batched_tokens: usize,
    pub weights: WeightFormat,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            block_size: 16,
            kv_cache_bytes: 1 << 30,
            max_model_len: None,
            max_num_batched_tokens: 2048,
            weights: WeightFormat::Auto,
        }
    }
}

/// What the weights of matrix products are kept as. Norms, biases and lookup tables stay as they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightFormat {
    /// As stored: nothing is lost, nothing is widened in memory.
    #[default]
    Auto,
    F32,
    /// Rounds f32 and f16 weights.
    Bf16,
    /// Eight bits and a scale for every 32 weights (GGUF's Q8_0), through candle's kernels. Narrow matrices, which
    /// those kernels would have to pad much, stay as stored.
    Q8_0,
}
