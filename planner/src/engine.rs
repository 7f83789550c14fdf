//! How other engines account for memory: vLLM and SGLang, by version, down to the lines that they print.
//!
//! Pure data and arithmetic. Upstream files are named beside each rule.

pub mod budget;
pub mod from_log;
pub mod sglang;
mod version;
pub mod vllm;

pub use budget::{EngineBudget, EngineSettings, Unknown};
pub use from_log::{BootLog, Calibration, LogError, parse_boot_log};
pub use version::{NotAVersion, Version};

use serde::{Deserialize, Serialize};

/// `--engine`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    Vllm,
    Sglang,
}
