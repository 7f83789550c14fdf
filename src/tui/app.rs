//! The loop around state and screen: input, data and clock in, at most one drawing per frame out.

use super::message::{Effect, Message};
use super::source::{Action, Source};
use super::state::State;
use super::terminal::{self, Screen};
use super::update::update;
use super::{Outcome, TuiOptions};
use anyhow::{Context, anyhow};
use chrono::{Local, Offset, Utc};
use crossterm::event::{Event, EventStream, KeyEventKind};
use futures::StreamExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

const MESSAGES_QUEUED: usize = 64;
const FRAME: Duration = Duration::from_millis(33);
/// Over SSH frames are fewer: a slow line would queue them.
const FRAME_SSH: Duration = Duration::from_millis(100);
const POLL_DEADLINE: Duration = Duration::from_secs(5);
const ACTION_DEADLINE: Duration = Duration::from_secs(120);

/// Show the dashboard on this terminal until the operator leaves it, a signal comes or the deployment was stopped.
///
/// # Errors
/// The terminal cannot be drawn on, or a task panicked.
pub async fn run<S: Source>(source: S, options: TuiOptions) -> anyhow::Result<Outcome> {
    let source = Arc::new(source);
    let signals = Signals::listen()?;
    let screen = Screen::take()?;
    let (sender, inbox) = mpsc::channel(MESSAGES_QUEUED);
    // The tasks stop when this set is dropped.
    let mut tasks = JoinSet::new();
    tasks.spawn(collect(source.clone(), options.refresh, sender.clone()));
    let utc_offset = Local::now().offset().fix();
    let mut state = State::new(options.read_only, options.refresh.as_secs_f64(), utc_offset);
    state.size = terminal::size();
    App { source, options, state, screen, tasks, sender, inbox, signals }.run().await
}

struct App<S> {
    source: Arc<S>,
    options: TuiOptions,
    state: State,
    screen: Screen,
    tasks: JoinSet<()>,
    sender: mpsc::Sender<Message>,
    inbox: mpsc::Receiver<Message>,
    signals: Signals,
}

enum Next {
    Message(Message),
    Redraw,
    Quit(Outcome),
}

impl<S: Source> App<S> {
    async fn run(mut self) -> anyhow::Result<Outcome> {
        let frame = if std::env::var_os("SSH_CONNECTION").is_some() { FRAME_SSH } else { FRAME };
        // After the terminal is set up: the stream would eat its answers.
        let mut input = EventStream::new();
        let mut tick = interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut drawn_at: Option<Instant> = None;
        let mut dirty = true;
        loop {
            let due = drawn_at.map_or_else(Instant::now, |at| at + frame);
            if dirty && Instant::now() >= due {
                self.screen.draw(&self.state, &self.options.theme)?;
                drawn_at = Some(Instant::now());
                dirty = false;
            }
            let next = tokio::select! {
                biased;
                number = self.signals.next() => Next::Quit(Outcome::Signalled(number)),
                event = input.next() => of_event(event)?,
                Some(ended) = self.tasks.join_next() => { ended.context("a task of the dashboard panicked")?; Next::Redraw }
                Some(message) = self.inbox.recv() => Next::Message(message),
                _ = tick.tick() => Next::Message(Message::Tick),
                () = sleep_until(due), if dirty => Next::Redraw,
            };
            let message = match next {
                Next::Message(message) => message,
                Next::Redraw => continue,
                Next::Quit(outcome) => return Ok(outcome),
            };
            match update(&mut self.state, unix_now_s(), message) {
                None => {}
                Some(Effect::Quit(outcome)) => return Ok(outcome),
                Some(Effect::Repaint) => self.screen.resize(self.state.size)?,
                Some(Effect::Act(action)) => self.act(action),
            }
            dirty = true;
        }
    }

    /// Beside the loop: an action can take as long as a drain.
    fn act(&mut self, action: Action) {
        let (source, sender) = (self.source.clone(), self.sender.clone());
        self.tasks.spawn(async move {
            let result =
                within(ACTION_DEADLINE, source.act(action.clone())).await.map_err(|error| format!("{error:#}"));
            // Closed only when the dashboard is gone, and then nobody waits for the answer.
            let _ = sender.send(Message::ActionDone { action, result }).await;
        });
    }
}

/// What the terminal said, as far as it matters. `None` from the stream means that the terminal is gone.
fn of_event(event: Option<std::io::Result<Event>>) -> anyhow::Result<Next> {
    Ok(match event {
        None => Next::Quit(Outcome::Quit),
        Some(event) => match event.context("cannot read the terminal")? {
            Event::Key(key) if key.kind == KeyEventKind::Press => Next::Message(Message::Key(key)),
            Event::Resize(width, height) => {
                let size = terminal::usable_size((width, height).into(), |name| std::env::var(name).ok());
                Next::Message(Message::Resize(size))
            }
            _ => Next::Redraw,
        },
    })
}

/// Poll the source and pass on what it says, until nobody listens or there is no more.
async fn collect<S: Source>(source: Arc<S>, refresh: Duration, sender: mpsc::Sender<Message>) {
    let mut tick = interval(refresh);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut launcher: Option<u32> = None;
    let mut after: Option<u64> = None;
    loop {
        tick.tick().await;
        let status = match within(POLL_DEADLINE, source.status()).await {
            Ok(status) => status,
            Err(error) => {
                if sender.send(Message::Lost(format!("{error:#}"))).await.is_err() {
                    return;
                }
                continue;
            }
        };
        let is_last = status.is_none();
        if let Some(status) = status {
            if launcher.replace(status.pid).is_some_and(|pid| pid != status.pid) {
                after = None;
            }
            if sender.send(Message::Snapshot(Box::new(status))).await.is_err() {
                return;
            }
        }
        let logs = match within(POLL_DEADLINE, source.logs(after)).await {
            Ok(lines) => {
                after = lines.last().map(|line| line.seq).or(after);
                Message::Logs(lines)
            }
            Err(error) => Message::LogsFailed(format!("{error:#}")),
        };
        if sender.send(logs).await.is_err() {
            return;
        }
        if is_last {
            let _ = sender.send(Message::Ended).await;
            return;
        }
    }
}

async fn within<T>(deadline: Duration, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    timeout(deadline, work).await.map_err(|_| anyhow!("no answer within {} s", deadline.as_secs()))?
}

fn unix_now_s() -> f64 {
    Utc::now().timestamp_micros() as f64 / 1e6
}

/// The signals that end a program, caught so that the terminal is given back first.
struct Signals {
    terminate: Signal,
    hangup: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate().as_raw_value(),
            _ = self.hangup.recv() => SignalKind::hangup().as_raw_value(),
            _ = self.interrupt.recv() => SignalKind::interrupt().as_raw_value(),
        }
    }
}
