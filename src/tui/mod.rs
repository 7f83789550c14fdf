//! The dashboard: state, message, update (pure) and views; a collector task apart from drawing.
//!
//! It reads [`crate::status`] snapshots from a [`Source`] and knows neither router nor supervisor.

mod app;
#[cfg(test)]
mod fixtures;
mod format;
mod health;
mod history;
mod keymap;
mod logs;
mod message;
mod plain;
mod replay;
mod source;
mod state;
mod terminal;
mod theme;
mod update;
mod views;

pub use app::run;
pub use plain::{Plain, run_plain};
pub use replay::Replay;
pub use source::{Action, Source};
pub use terminal::{Screen, has_screen, size as terminal_size};
pub use theme::{Charset, Level, Palette, Theme};

use std::time::Duration;

#[derive(Debug, Clone, Copy)]
pub struct TuiOptions {
    /// Time between polls of the source.
    pub refresh: Duration,
    /// No restart, no stop.
    pub read_only: bool,
    pub theme: Theme,
}

/// Why the dashboard ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The operator left, or the terminal did; the deployment is as it was.
    Quit,
    /// The operator had the deployment stopped, and it is gone.
    Stopped,
    /// This process got the signal of that number.
    Signalled(i32),
}
