//! One test binary for the crate.

mod bad_configs;
mod beyond;
mod config_fuzz;
mod engine_logs;
mod engines;
mod families;
mod fixtures;
mod golden;
mod planning;
mod sharing;
mod speed;
mod tail;
