//! One replica: load a model, start its engine, serve it. What `mserve worker` runs.

mod config;
mod error;
mod event;
mod load;
mod memory;
mod pooling;
mod run;

pub use config::{Identity, WorkerConfig, WorkerKind};
pub use error::WorkerError;
pub use event::{FailureKind, ReadyInfo, WorkerEvent};
pub use run::run;
