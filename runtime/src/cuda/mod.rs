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
mod clock;
pub mod compile;
pub mod cubin;
mod cubin_cache;
pub mod device;
mod error;
mod executor;
mod fusion;
pub mod gemm;
mod gemm_tuning;
pub mod graph;
mod kernel_set;
pub mod kernels;
pub mod libraries;
mod library_search;
pub mod linear;
mod load;
pub mod memory;
mod metadata;
pub mod module;
mod options;
mod plan;
mod prepare;
mod profile;
mod random_weights;
mod step_slots;
pub mod tensor_map;
#[cfg(test)]
mod testing;
mod token_state;
mod upload;
mod weights;

pub use backend::{CudaBackend, WeightOrigin};
pub use error::{CardHolder, CudaError, MemoryTerm};
pub use libraries::{Library, LibraryReport, Missing, driver_speaks, report};
pub use load::check_model;
pub use options::{CudaOptions, GraphCapture};
pub use profile::{OpTime, StepTimes};
