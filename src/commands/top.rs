use crate::control::{Client, LogsQuery};
use crate::status::{LogLine, SCHEMA, Status};
use crate::tui::{self, Action, Charset, Outcome, Palette, Plain, Replay, Source, Theme, TuiOptions};
use anyhow::Context;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Columns of the plain table where neither terminal nor `$COLUMNS` says.
const PLAIN_WIDTH: u16 = 120;
/// Log lines asked for at once; what a second brings beyond this is counted as missed.
const LOG_LINES: usize = 2_000;

#[derive(Debug, Args)]
pub struct TopArgs {
    /// Port of the deployment, where several run.
    #[arg(short, long)]
    port: Option<u16>,
    /// Print one table (or with --json one object) and end.
    #[arg(long)]
    once: bool,
    /// Snapshots as JSON, one object a line.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    screen: ScreenArgs,
    /// Show a recording that `--json` made.
    #[arg(long, value_name = "FILE", hide = true)]
    replay: Option<PathBuf>,
}

/// How the dashboard looks and what it may do; also flags of `launch --tui`.
#[derive(Debug, Clone, Args)]
pub struct ScreenArgs {
    /// Seconds between snapshots, 0.1 to 3600.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = refresh)]
    refresh: Duration,
    /// Look, never restart or stop.
    #[arg(long)]
    read_only: bool,
    /// Draw with ASCII characters only.
    #[arg(long)]
    ascii: bool,
    /// Colours; `auto` honours NO_COLOR.
    #[arg(long, value_enum, default_value = "auto")]
    color: ColorWhen,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ColorWhen {
    Auto,
    Always,
    Never,
}

/// A deployment over its launcher's control socket. When that launcher is gone and another serves on the same port,
/// the dashboard goes on with the new one.
#[derive(Debug)]
pub struct Live {
    client: Mutex<Client>,
}

impl Live {
    pub fn new(client: Client) -> Self {
        Self { client: Mutex::new(client) }
    }

    fn client(&self) -> Client {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn client_of_living(&self) -> anyhow::Result<Client> {
        let client = self.client();
        if client.deployment().is_alive() {
            return Ok(client);
        }
        let successor = Client::discover(Some(client.deployment().port))?;
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = successor.clone();
        Ok(successor)
    }
}

impl Source for Live {
    async fn status(&self) -> anyhow::Result<Option<Status>> {
        let status = self.client_of_living()?.status().await?;
        if status.schema != SCHEMA {
            let (theirs, version) = (status.schema, status.version);
            anyhow::bail!("the launcher (mserve {version}) speaks schema {theirs}, this mserve {SCHEMA}");
        }
        Ok(Some(status))
    }

    async fn logs(&self, after: Option<u64>) -> anyhow::Result<Vec<LogLine>> {
        self.client().logs(&LogsQuery { replica: None, after, lines: Some(LOG_LINES) }).await
    }

    async fn act(&self, action: Action) -> anyhow::Result<String> {
        match action {
            Action::RestartReplica { id } => {
                self.client().restart(&id).await?;
                Ok(format!("{id} restarts"))
            }
            Action::StopDeployment => {
                self.client().stop(None).await?;
                Ok("the deployment stops once running requests are done".to_owned())
            }
        }
    }
}

pub fn run(args: TopArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    match &args.replay {
        Some(path) => runtime.block_on(show(Replay::open(path)?, args)),
        None => {
            let client = Client::discover(args.port)?;
            runtime.block_on(show(Live::new(client), args))
        }
    }
}

async fn show<S: Source>(source: S, args: TopArgs) -> anyhow::Result<ExitCode> {
    let Some(plain) = plain_face(&args, tui::has_screen()) else {
        let outcome = tui::run(source, args.screen.options()).await?;
        return Ok(exit_code(outcome));
    };
    tui::run_plain(&source, plain, args.screen.refresh, &mut std::io::stdout()).await?;
    Ok(ExitCode::SUCCESS)
}

/// `None` is the full screen.
fn plain_face(args: &TopArgs, has_screen: bool) -> Option<Plain> {
    match (args.json, args.once) {
        (true, true) => Some(Plain::JsonOnce),
        (true, false) => Some(Plain::Json),
        (false, true) => Some(Plain::Table { width: plain_width() }),
        (false, false) => (!has_screen).then_some(Plain::Lines),
    }
}

fn plain_width() -> u16 {
    use std::io::IsTerminal;
    let of_env = || std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
    let of_terminal = || crossterm::terminal::size().ok().map(|(width, _)| width);
    let width = if std::io::stdout().is_terminal() { of_terminal() } else { of_env() };
    width.filter(|&width| width > 0).unwrap_or(PLAIN_WIDTH)
}

fn exit_code(outcome: Outcome) -> ExitCode {
    match outcome {
        Outcome::Quit | Outcome::Stopped => ExitCode::SUCCESS,
        Outcome::Signalled(number) => ExitCode::from(128_u8.saturating_add(u8::try_from(number).unwrap_or(0))),
    }
}

impl ScreenArgs {
    pub fn options(&self) -> TuiOptions {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let palette = match self.color {
            ColorWhen::Never => Palette::Mono,
            ColorWhen::Auto if no_color => Palette::Mono,
            ColorWhen::Auto | ColorWhen::Always => Palette::Ansi,
        };
        let charset = if self.ascii { Charset::Ascii } else { Charset::Unicode };
        TuiOptions { refresh: self.refresh, read_only: self.read_only, theme: Theme::new(palette, charset) }
    }
}

fn refresh(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("`{text}` is not a number of seconds"))?;
    if (0.1..=3_600.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("must be between 0.1 and 3600 seconds".to_owned())
    }
}
