//! A boot log of vLLM or SGLang, read for what it says of memory, and what that calibrates.
//!
//! Only plain text is searched, line by line; numbers are bounded, lines and files too.

use super::{Engine, Version};
use crate::units::GIB;
use serde::Serialize;

/// Longest log that is read.
pub const MAX_LOG_BYTES: usize = 16 << 20;
/// Nothing of interest stands behind this in a line.
const MAX_LINE_BYTES: usize = 4096;

/// What a log said; the last mention counts.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct BootLog {
    pub engine: Option<Engine>,
    pub version: Option<Version>,
    pub tensor_parallel_size: Option<u64>,
    pub gpu_memory_utilization: Option<f64>,
    pub memory_total_gib: Option<f64>,
    pub weights_gib: Option<f64>,
    pub non_torch_gib: Option<f64>,
    pub peak_activations_gib: Option<f64>,
    pub graphs_gib: Option<f64>,
    pub kv_gib: Option<f64>,
    pub kv_tokens: Option<u64>,
    pub gpu_blocks: Option<u64>,
    pub cpu_blocks: Option<u64>,
    pub block_size_tokens: Option<u64>,
    pub max_model_len: Option<u64>,
    pub max_concurrency: Option<f64>,
    /// Start-up failed: what a request of `max_model_len` would need.
    pub needed_gib: Option<f64>,
    pub longest_that_fits: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    #[error("the log has {size_bytes} bytes; at most {MAX_LOG_BYTES} are read")]
    TooLarge { size_bytes: usize },
    #[error("no line of the log tells about memory; expected vLLM's or SGLang's start-up output")]
    NothingFound,
}

/// What a log teaches a budget of the same model, card and flags.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Calibration {
    pub weights_bytes: Option<u64>,
    pub kv_bytes: Option<u64>,
    /// What the engine may take, less weights and KV.
    pub overhead_bytes: Option<u64>,
    /// Bytes of a token in a pool of one kind of layers; misleading for hybrids.
    pub bytes_per_token: Option<f64>,
}

/// Read a log.
///
/// # Errors
/// [`LogError`]: too large, or about something else.
pub fn parse_boot_log(log: &[u8]) -> Result<BootLog, LogError> {
    if log.len() > MAX_LOG_BYTES {
        return Err(LogError::TooLarge { size_bytes: log.len() });
    }
    let mut found = BootLog::default();
    for line in log.split(|&b| b == b'\n') {
        let line = &line[..line.len().min(MAX_LINE_BYTES)];
        found.read(&String::from_utf8_lossy(line));
    }
    let told = BootLog { engine: None, version: None, tensor_parallel_size: None, ..found } != BootLog::default();
    if told { Ok(found) } else { Err(LogError::NothingFound) }
}

impl BootLog {
    fn read(&mut self, line: &str) {
        self.vllm(line);
        self.sglang(line);
    }

    fn vllm(&mut self, line: &str) {
        for marker in ["LLM engine (v", "vLLM API server version ", "vLLM version "] {
            if let Some(version) = after(line, marker).and_then(|rest| rest.parse().ok()) {
                (self.engine, self.version) = (Some(Engine::Vllm), Some(version));
            }
        }
        set(&mut self.gpu_memory_utilization, fraction(line, "gpu_memory_utilization (", 1.0));
        set(&mut self.gpu_memory_utilization, fraction(line, "gpu_memory_utilization=", 1.0));
        set(&mut self.tensor_parallel_size, count(line, "tensor_parallel_size=").filter(|tp| *tp > 0));
        set(&mut self.memory_total_gib, gib(line, "total_gpu_memory ("));
        for marker in ["Model loading took ", "Loading model weights took ", "model weights take "] {
            set(&mut self.weights_gib, gib(line, marker));
        }
        set(&mut self.non_torch_gib, gib(line, "non_torch_memory takes "));
        set(&mut self.peak_activations_gib, gib(line, "activation peak memory takes "));
        for marker in ["Available KV cache memory: ", "reserved for KV Cache is ", "available KV cache memory ("] {
            set(&mut self.kv_gib, gib(line, marker));
        }
        if line.contains("Graph capturing finished") {
            set(&mut self.graphs_gib, gib(line, "took "));
        }
        set(&mut self.kv_tokens, count(line, "GPU KV cache size: "));
        set(&mut self.gpu_blocks, count(line, "# GPU blocks: "));
        set(&mut self.cpu_blocks, count(line, "# CPU blocks: "));
        set(&mut self.block_size_tokens, count(line, "Setting attention block size to "));
        if let Some(rest) = after(line, "Maximum concurrency for ") {
            set(&mut self.max_model_len, count(rest, ""));
            set(&mut self.max_concurrency, fraction(rest, "per request: ", 1e9));
        }
        set(&mut self.longest_that_fits, count(line, "estimated maximum model length is "));
        if let Some(at) = line.find(" GiB KV cache is needed") {
            let before = &line[..at];
            let number = before.rsplit(|c: char| !c.is_ascii_digit() && c != '.').next().unwrap_or("");
            set(&mut self.needed_gib, bounded(number, 1e6));
        }
        if line.contains("KV cache") && self.engine.is_none() && !line.contains("KV Cache is allocated") {
            self.engine = Some(Engine::Vllm);
        }
    }

    fn sglang(&mut self, line: &str) {
        if line.contains("Load weight end") {
            self.engine = Some(Engine::Sglang);
            set(&mut self.weights_gib, gib(line, "mem usage="));
        }
        if line.contains("KV Cache is allocated") {
            self.engine = Some(Engine::Sglang);
            set(&mut self.kv_tokens, count(line, "#tokens: "));
            let halves = gib(line, "K size: ").zip(gib(line, "V size: ")).map(|(k, v)| k + v);
            set(&mut self.kv_gib, halves.or_else(|| gib(line, "KV size: ")));
        }
        set(&mut self.kv_tokens, count(line, "max_total_num_tokens="));
        set(&mut self.gpu_memory_utilization, fraction(line, "mem_fraction_static=", 1.0));
        set(&mut self.tensor_parallel_size, count(line, "tp_size=").filter(|tp| *tp > 0));
        set(&mut self.max_model_len, count(line, "context_len="));
    }

    /// What the log teaches. `memory_total_bytes` and `fraction` stand in where it is silent.
    pub fn calibration(&self, memory_total_bytes: Option<u64>, fraction: Option<f64>) -> Calibration {
        let bytes = |gib: f64| (gib * GIB as f64) as u64;
        let (weights_bytes, kv_bytes) = (self.weights_gib.map(bytes), self.kv_gib.map(bytes));
        let total = self.memory_total_gib.map(bytes).or(memory_total_bytes);
        let requested = total.zip(self.gpu_memory_utilization.or(fraction)).map(|(t, f)| (t as f64 * f) as u64);
        let overhead_bytes = match (requested, weights_bytes, kv_bytes) {
            (Some(requested), Some(weights), Some(kv)) => requested.checked_sub(weights.saturating_add(kv)),
            _ => None,
        };
        let tokens = self.kv_tokens.or_else(|| Some(self.gpu_blocks? * self.block_size_tokens.unwrap_or(16)));
        let bytes_per_token = kv_bytes.zip(tokens.filter(|&t| t > 0)).map(|(kv, tokens)| kv as f64 / tokens as f64);
        Calibration { weights_bytes, kv_bytes, overhead_bytes, bytes_per_token }
    }
}

fn set<T>(slot: &mut Option<T>, value: Option<T>) {
    if value.is_some() {
        *slot = value;
    }
}

fn after<'a>(line: &'a str, marker: &str) -> Option<&'a str> {
    line.find(marker).map(|at| &line[at + marker.len()..])
}

fn fraction(line: &str, marker: &str, most: f64) -> Option<f64> {
    let rest = after(line, marker)?;
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    bounded(&rest[..end], most)
}

fn bounded(text: &str, most: f64) -> Option<f64> {
    text.trim_end_matches('.').parse::<f64>().ok().filter(|x| (0.0..=most).contains(x))
}

/// A size in GiB; both engines write GB for it now and then.
fn gib(line: &str, marker: &str) -> Option<f64> {
    let rest = after(line, marker)?;
    let number = fraction(rest, "", 1e6)?;
    let unit = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').trim_start();
    (unit.starts_with("GiB") || unit.starts_with("GB")).then_some(number)
}

/// A whole number with or without commas.
fn count(line: &str, marker: &str) -> Option<u64> {
    let rest = after(line, marker)?;
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != ',').unwrap_or(rest.len());
    let digits: String = rest[..end].chars().filter(char::is_ascii_digit).take(16).collect();
    digits.parse().ok().filter(|&n| n <= 1 << 50)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_log_of_vllm_v1_is_read() {
        let log =
            b"INFO 10-01 Initializing a V1 LLM engine (v0.11.0) with config: model='x', tensor_parallel_size=1, gpu_memory_utilization=0.9\n\
            INFO Model loading took 14.9889 GiB and 4.5 seconds\n\
            INFO Available KV cache memory: 51.04 GiB\n\
            INFO GPU KV cache size: 418,112 tokens\n\
            INFO Maximum concurrency for 131,072 tokens per request: 3.19x\n\
            INFO Graph capturing finished in 21 secs, took 0.58 GiB\n";
        let found = parse_boot_log(log).unwrap();
        assert_eq!((found.engine, found.version), (Some(Engine::Vllm), Some(Version::new(0, 11, 0))));
        assert_eq!(found.tensor_parallel_size, Some(1));
        assert_eq!((found.weights_gib, found.kv_gib), (Some(14.9889), Some(51.04)));
        assert_eq!((found.kv_tokens, found.max_model_len), (Some(418_112), Some(131_072)));
        assert_eq!((found.max_concurrency, found.graphs_gib), (Some(3.19), Some(0.58)));
        let calibration = found.calibration(Some(80 * GIB), None);
        // 72 GiB - 14.99 - 51.04.
        assert!((calibration.overhead_bytes.unwrap() as f64 / GIB as f64 - 5.97).abs() < 0.01);
        assert!((calibration.bytes_per_token.unwrap() - 131_072.0).abs() < 20.0);
    }

    #[test]
    fn a_log_of_vllm_v0_and_one_of_a_failed_start_are_read() {
        let log = b"the current vLLM instance can use total_gpu_memory (23.58GiB) x gpu_memory_utilization (0.90) = 21.22GiB\n\
            model weights take 14.99GiB; non_torch_memory takes 0.09GiB; PyTorch activation peak memory takes 1.20GiB; \
            the rest of the memory reserved for KV Cache is 2.89GiB.\n# GPU blocks: 1478, # CPU blocks: 2048\n";
        let found = parse_boot_log(log).unwrap();
        assert_eq!((found.memory_total_gib, found.gpu_memory_utilization), (Some(23.58), Some(0.9)));
        assert_eq!((found.gpu_blocks, found.cpu_blocks), (Some(1478), Some(2048)));
        assert_eq!((found.non_torch_gib, found.peak_activations_gib), (Some(0.09), Some(1.2)));
        let failed =
            b"ValueError: To serve at least one request with the models's max seq len (8192), (2.63 GiB KV cache is \
            needed, which is larger than the available KV cache memory (1.64 GiB). Based on the available memory, the \
            estimated maximum model length is 5088.";
        let found = parse_boot_log(failed).unwrap();
        assert_eq!((found.needed_gib, found.kv_gib, found.longest_that_fits), (Some(2.63), Some(1.64), Some(5088)));
    }

    #[test]
    fn a_log_of_sglang_is_read() {
        let log = b"Load weight end. type=KimiK25, dtype=torch.bfloat16, avail mem=212.10 GB, mem usage=73.58 GB.\n\
            KV Cache is allocated. #tokens: 2454421, KV size: 160.63 GB\n\
            max_total_num_tokens=2454421, chunked_prefill_size=16384, context_len=262144\n";
        let found = parse_boot_log(log).unwrap();
        assert_eq!(found.engine, Some(Engine::Sglang));
        assert_eq!((found.kv_tokens, found.kv_gib, found.weights_gib), (Some(2_454_421), Some(160.63), Some(73.58)));
    }

    #[test]
    fn other_text_is_refused_and_hostile_numbers_are_left() {
        assert_eq!(parse_boot_log(b"hello\nworld"), Err(LogError::NothingFound));
        assert_eq!(parse_boot_log(b"\xff\xfe\x00"), Err(LogError::NothingFound));
        let huge = format!("GPU KV cache size: {} tokens", "9".repeat(400));
        assert_eq!(parse_boot_log(huge.as_bytes()).map(|log| log.kv_tokens), Err(LogError::NothingFound));
        assert!(matches!(parse_boot_log(&vec![b'x'; MAX_LOG_BYTES + 1]), Err(LogError::TooLarge { .. })));
        let odd = "Available KV cache memory: nan GiB\nAvailable KV cache memory: 1e999 GiB\n";
        assert_eq!(parse_boot_log(odd.as_bytes()), Err(LogError::NothingFound));
    }
}
