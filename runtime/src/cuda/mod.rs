//! The CUDA backend: compiles a [`Program`](mserve_planner::model::Program) once into launches at fixed addresses, then
//! replays them. Built without a CUDA toolkit: libraries are found and opened while running, kernels are compiled for
//! the card at hand and kept on disk.
//!
//! All `unsafe` of the workspace lives here, next to the call that needs it, with the reason why it holds.
#![allow(unsafe_code)]

mod arena;
mod backend;
mod buckets;
mod budget;
pub mod compile;
mod cubin_cache;
pub mod device;
mod error;
mod executor;
mod fusion;
mod gemm;
mod gemm_tuning;
pub mod graph;
mod kernel_set;
pub mod kernels;
pub mod libraries;
mod library_search;
mod linear;
mod load;
pub mod memory;
mod metadata;
pub mod module;
mod options;
mod plan;
mod profile;
mod random_weights;
mod step_slots;
#[cfg(test)]
mod testing;
mod token_state;
mod upload;
mod weights;

pub use backend::{CudaBackend, WeightOrigin};
pub use error::{CudaError, MemoryTerm};
pub use libraries::{Library, LibraryReport, Missing, report};
pub use load::check_model;
pub use options::{CudaOptions, GraphCapture};
pub use profile::{OpTime, StepTimes};
