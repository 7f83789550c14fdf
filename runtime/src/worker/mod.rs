//! One replica: load a model, start its engine, serve it. What `mserve worker` runs.

mod event;

pub use event::{FailureKind, ReadyInfo, WorkerEvent};
