//! mserve: plan, launch and watch LLM serving. See ARCHITECTURE.md for the map.

pub mod cli;
pub mod commands;
pub mod exit;
pub mod status;
pub mod tui;
