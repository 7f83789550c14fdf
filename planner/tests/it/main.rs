//! One test binary for the crate.

mod fixtures;
mod golden;
