//! One replica: load a model, start its engine, serve it. What `mserve worker` runs.

mod backend;
mod config;
mod device;
mod error;
mod event;
mod load;
mod memory;
mod pooling;
mod run;

pub use crate::engine::FailureKind;
pub use config::{Identity, WorkerConfig, WorkerKind};
pub use device::{CudaDevice, DeviceChoice, UnknownDevice};
pub use error::WorkerError;
pub use event::{ReadyInfo, WorkerEvent};
pub use memory::{default_kv_cache_bytes, kv_bytes_per_token};
pub use run::run;
