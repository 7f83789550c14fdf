//! The inner loops, in safe Rust. `pulp` picks the widest instruction set of the machine at run time (AVX-512, AVX2, or
//! none) and each loop is compiled once for each.

pub mod attention;
pub mod elementwise;
mod lines;
pub mod math;
pub mod panel;
pub mod rope;

pub use lines::{LANES, Line, Lines, prefetch};

/// Below this many elements an elementwise loop is not worth handing to other threads.
pub const PARALLEL_ELEMENTS: usize = 1 << 15;
