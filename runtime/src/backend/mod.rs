//! What backends have in common, whatever the device: neither of them imports the other.

pub mod rope;
pub mod step_check;
