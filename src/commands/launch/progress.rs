//! What a person sees while replicas start: bars on a terminal, else a line for every change of phase.

use super::deployment::Deployment;
use crate::status::ReplicaState;
use crate::supervisor::ReplicaView;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use tokio::sync::mpsc;

/// A line on standard output. A reader that has gone away is no reason to stop serving.
pub(super) fn say(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// Show the start until every replica is ready or given up.
pub(super) async fn follow(deployment: &Deployment, changes: &mut mpsc::Receiver<String>, quiet: bool) {
    let mut face = if quiet { Face::None } else { Face::new() };
    loop {
        let views = deployment.supervisor.views();
        for (spec, view) in &views {
            face.show(&spec.id, view);
        }
        if views.iter().all(|(_, view)| view.is_ready() || view.is_given_up()) || changes.recv().await.is_none() {
            return face.clear();
        }
    }
}

enum Face {
    None,
    Lines { last: BTreeMap<String, String> },
    Bars { all: MultiProgress, bars: BTreeMap<String, ProgressBar> },
}

impl Face {
    fn new() -> Self {
        if std::io::stderr().is_terminal() {
            return Self::Bars { all: MultiProgress::new(), bars: BTreeMap::new() };
        }
        Self::Lines { last: BTreeMap::new() }
    }

    fn show(&mut self, id: &str, view: &ReplicaView) {
        match self {
            Self::None => {}
            Self::Lines { last } => {
                let phase = phase(view);
                if last.get(id) != Some(&phase) {
                    say(&format!("{id}: {phase}"));
                    last.insert(id.to_owned(), phase);
                }
            }
            Self::Bars { all, bars } => {
                let bar = bars.entry(id.to_owned()).or_insert_with(|| all.add(new_bar(id)));
                update(bar, view);
            }
        }
    }

    fn clear(self) {
        if let Self::Bars { all, .. } = self {
            let _ = all.clear();
        }
    }
}

fn new_bar(id: &str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_prefix(id.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{prefix:20!} {bar:30} {wide_msg}") {
        bar.set_style(style);
    }
    bar
}

fn update(bar: &ProgressBar, view: &ReplicaView) {
    let (done, total) = match view.state {
        ReplicaState::Starting { done, total, .. } => (done, total),
        ReplicaState::Ready => (1, 1),
        _ => (0, 1),
    };
    bar.set_length(total.max(1));
    bar.set_position(done.min(total));
    bar.set_message(phase(view));
}

fn phase(view: &ReplicaView) -> String {
    match &view.state {
        ReplicaState::Starting { phase, .. } => phase.clone(),
        ReplicaState::Ready => match &view.ready {
            Some(info) => format!("ready on {}, loaded in {:.1} s", info.device, info.load_ms as f64 / 1000.0),
            None => "ready".into(),
        },
        ReplicaState::Unhealthy { why } => format!("unhealthy: {why}"),
        ReplicaState::Draining => "draining".into(),
        ReplicaState::Backoff { restart_in_s } => {
            let why = view.last_exit.as_deref().unwrap_or("it ended");
            format!("{why}; restarts in {restart_in_s:.1} s")
        }
        ReplicaState::Failed { why } => format!("failed: {why}"),
        ReplicaState::Stopped => "stopped".into(),
    }
}
