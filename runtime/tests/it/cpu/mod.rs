//! The CPU backend on whole models.

mod batching;
mod demo_model;
mod goldens;
pub mod steps;
