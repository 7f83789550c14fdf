//! What reaches the dashboard, and what it asks for in return.

use super::Outcome;
use super::source::Action;
use crate::status::{LogLine, Status};
use crossterm::event::KeyEvent;
use ratatui::layout::Size;

#[derive(Debug)]
pub enum Message {
    Key(KeyEvent),
    Resize(Size),
    /// A second has passed.
    Tick,
    Snapshot(Box<Status>),
    Logs(Vec<LogLine>),
    /// Snapshots come, log lines do not.
    LogsFailed(String),
    /// A poll failed.
    Lost(String),
    /// The source has no more to give.
    Ended,
    ActionDone {
        action: Action,
        result: Result<String, String>,
    },
}

#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    Act(Action),
    Repaint,
    Quit(Outcome),
}
