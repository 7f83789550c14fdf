//! mserve: plan, launch and watch LLM serving. See ARCHITECTURE.md for the map.

pub mod status;
