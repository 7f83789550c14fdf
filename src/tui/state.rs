//! All that the dashboard knows. Changed only by [`super::update`], read by the views.

use super::health::{self, Concern};
use super::history::History;
use super::logs::{LogStore, LogView};
use super::theme::Level;
use crate::status::{ReplicaStatus, Status};
use chrono::FixedOffset;
use ratatui::layout::Size;

#[derive(Debug)]
pub struct State {
    pub read_only: bool,
    /// Seconds between polls: what is much older is called stale.
    pub refresh_s: f64,
    pub utc_offset: FixedOffset,
    pub size: Size,
    pub now_unix_s: f64,
    pub link: Link,
    /// The snapshot on screen.
    pub status: Option<Status>,
    /// The screen keeps its snapshot while newer ones are only recorded.
    pub frozen: bool,
    pub history: History,
    pub logs: LogStore,
    pub log_view: LogView,
    pub log_zoom: Zoom,
    pub focus: Focus,
    /// By name, so that the selection stays with its replica when rows come and go.
    pub selected: Option<String>,
    pub mode: Mode,
    pub notice: Option<Notice>,
    /// The operator asked for the end of the deployment and it was begun.
    pub stopping: bool,
}

/// The line to the launcher.
#[derive(Debug, Clone, PartialEq)]
pub enum Link {
    Connecting,
    Live {
        received_unix_s: f64,
    },
    Lost {
        since_unix_s: f64,
        error: String,
    },
    /// A replay is over; its last snapshot stays.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Focus {
    Replicas,
    Logs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zoom {
    Pane,
    Screen,
}

/// Who gets the keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    Normal,
    Help {
        scroll: u16,
    },
    /// The filter is being typed; `before` comes back on Esc.
    Filter {
        before: String,
    },
    ConfirmRestart {
        id: String,
    },
    ConfirmStop {
        typed: String,
    },
}

/// One line in answer to what the operator did.
#[derive(Debug, Clone, PartialEq)]
pub struct Notice {
    pub level: Level,
    pub text: String,
    pub until_unix_s: f64,
}

/// Typed to confirm the end of the deployment.
pub const STOP_WORD: &str = "stop";

impl State {
    pub fn new(read_only: bool, refresh_s: f64, utc_offset: FixedOffset) -> Self {
        Self {
            read_only,
            refresh_s,
            utc_offset,
            size: Size::new(80, 24),
            now_unix_s: 0.0,
            link: Link::Connecting,
            status: None,
            frozen: false,
            history: History::default(),
            logs: LogStore::default(),
            log_view: LogView::default(),
            log_zoom: Zoom::Pane,
            focus: Focus::Replicas,
            selected: None,
            mode: Mode::Normal,
            notice: None,
            stopping: false,
        }
    }

    pub fn replicas(&self) -> &[ReplicaStatus] {
        self.status.as_ref().map_or(&[], |status| &status.replicas)
    }

    pub fn selected_index(&self) -> Option<usize> {
        let id = self.selected.as_ref()?;
        self.replicas().iter().position(|replica| replica.id == *id)
    }

    pub fn selected_replica(&self) -> Option<&ReplicaStatus> {
        self.selected_index().and_then(|i| self.replicas().get(i))
    }

    /// Seconds since the last word from the launcher, once that is longer than a few polls.
    pub fn silence_s(&self) -> Option<f64> {
        let since = match &self.link {
            Link::Live { received_unix_s } => *received_unix_s,
            Link::Lost { since_unix_s, .. } => return Some((self.now_unix_s - since_unix_s).max(0.0)),
            Link::Connecting | Link::Ended => return None,
        };
        let silence = self.now_unix_s - since;
        (silence > (3.0 * self.refresh_s).max(3.0)).then_some(silence)
    }

    /// What deserves a look, worst first.
    pub fn concerns(&self) -> Vec<Concern> {
        let mut concerns = Vec::new();
        if let Link::Lost { error, .. } = &self.link {
            concerns.push(Concern { level: Level::Bad, text: format!("no word from the launcher: {error}") });
        }
        if let Some(status) = &self.status {
            let now = self.now_unix_s;
            let preempting = |id: &str| self.history.is_preempting(id, now);
            concerns.extend(health::concerns(status, preempting, |id| self.history.stuck_s(id, now)));
        }
        concerns
    }

    pub fn notice(&self) -> Option<&Notice> {
        self.notice.as_ref().filter(|notice| self.now_unix_s < notice.until_unix_s)
    }
}
