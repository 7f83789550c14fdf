//! How one `mserve` finds and talks to a running `mserve launch`: a state file says where, a unix socket answers.
//!
//! The socket lies in a directory that only its user may enter, so it needs no key; the data port has no admin route.

mod client;
mod paths;
mod state_file;

pub use client::{Client, LogsQuery};
pub use paths::runtime_dir;
pub use state_file::{Deployment, process_start_ticks};
