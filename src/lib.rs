//! mserve: plan, launch and watch LLM serving. See ARCHITECTURE.md for the map.

pub mod cli;
pub mod commands;
pub mod control;
pub mod exit;
pub mod router;
pub mod status;
pub mod supervisor;
pub mod tui;
