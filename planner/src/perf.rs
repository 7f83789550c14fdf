//! How fast a model runs: a roofline over the ops of its Program, with what engines lose against it.
//!
//! A step's time is the sum over its ops of `latency + (bytes/bandwidth ^ p + flops/rate ^ p) ^ (1/p)`, plus what the
//! engine's host code adds. [`extract`] turns a Program into [`Work`] on one rank; [`step_time`] times a [`Step`] of
//! it; [`serving`] makes request rates of step times. The constants of an engine stand in one table, [`engines`],
//! fitted once to measurements that stand in [`measured`]; no constant is for one model.

mod basis;
pub mod engines;
mod extract;
pub mod measured;
pub mod serving;
mod step;
mod work;

pub use basis::Basis;
pub use engines::{Engine, EngineSpeed};
pub use extract::extract;
pub use step::{Machine, OpTime, Step, StepTime, step_time};
pub use work::{Counted, OpKind, Rate, Work};
