//! One test binary for the crate.

mod config_fuzz;
mod dump;
mod fixtures;
mod golden;
mod planning;
mod sharing;
mod speed;
