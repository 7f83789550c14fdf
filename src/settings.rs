//! What to launch, resolved in one place: flag > environment > `mserve.toml` > default.

mod file;
mod key;
mod resolve;
#[cfg(test)]
mod tests;
pub mod values;

pub use key::ApiKey;
pub use resolve::resolve;

use crate::status::ModelKind;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use values::{Devices, PoolingChoice, Share};

/// What the command line (and `MSERVE_*`, which clap reads) has to say. `None` is nothing.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    pub config: Option<PathBuf>,
    pub host: Option<String>,
    pub port: Option<u16>,
    /// `MSERVE_API_KEY`: never a flag, which every user of the machine could read.
    pub api_key: Option<String>,
    pub max_concurrent_requests: Option<u32>,
    pub shutdown_timeout_s: Option<u32>,
    pub model: Option<PathBuf>,
    /// For the model of `--model`, or for every model of the file.
    pub overrides: ModelOverrides,
}

#[derive(Debug, Clone, Default)]
pub struct ModelOverrides {
    pub served_model_names: Vec<String>,
    pub kind: Option<ModelKind>,
    pub replicas: Option<u32>,
    pub devices: Option<Devices>,
    pub max_model_len: Option<u64>,
    pub max_num_seqs: Option<u32>,
    pub max_num_batched_tokens: Option<u64>,
    pub threads: Option<u32>,
    pub kv_cache_memory_bytes: Option<u64>,
    pub gpu_memory_utilization: Option<Share>,
    pub chat_template: Option<PathBuf>,
    pub pooling: Option<PoolingChoice>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchSettings {
    pub server: ServerSettings,
    /// At least one; all names distinct.
    pub models: Vec<ModelSettings>,
    /// Where the models come from, for people: a file, `--model`, or the embedded demo.
    pub origin: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSettings {
    pub host: IpAddr,
    /// 0 takes a free one.
    pub port: u16,
    pub api_key: Option<ApiKey>,
    pub max_concurrent_requests: u32,
    pub shutdown_timeout: Duration,
}

/// One group of replicas. `None` leaves the choice to the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSettings {
    /// Names of the group and of its replicas (`NAME-0`).
    pub name: String,
    /// Further names that requests may use.
    pub aliases: Vec<String>,
    pub path: PathBuf,
    pub kind: Option<ModelKind>,
    pub replicas: u32,
    pub devices: Devices,
    pub max_model_len: Option<u64>,
    pub max_num_seqs: Option<u32>,
    pub max_num_batched_tokens: Option<u64>,
    pub block_size: Option<u32>,
    pub threads: Option<u32>,
    pub kv_cache_memory_bytes: Option<u64>,
    pub gpu_memory_utilization: Option<Share>,
    /// A file, or the name of a built-in template.
    pub chat_template: Option<PathBuf>,
    pub pooling: Option<PoolingChoice>,
}
