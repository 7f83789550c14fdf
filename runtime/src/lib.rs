//! The bundled inference engine: weights in, tokens out, over an OpenAI-compatible server.
//!
//! Layers, outermost first: [`server`] (HTTP) -> [`engine`] (schedule, run, postprocess) -> a backend behind
//! [`engine::Backend`] ([`cpu`], [`cuda`]). Nothing in this crate knows of terminals, routers or supervisors.

mod backend;
pub mod cpu;
pub mod cuda;
pub mod engine;
pub mod server;
pub mod tokenizer;
pub mod weights;
pub mod worker;
