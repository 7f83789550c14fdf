//! `mserve logs`: what the replicas have written.

use crate::control::{Client, LogsQuery};
use crate::status::LogLine;
use chrono::{Local, TimeZone};
use clap::Args;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

const POLL_EVERY: Duration = Duration::from_millis(300);
/// At most so many lines of one poll; the launcher keeps 5,000 of each replica.
const LINES_PER_POLL: usize = 10_000;

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on with new lines until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Only this replica's, such as demo-0
    #[arg(long, value_name = "ID")]
    replica: Option<String>,
    /// The newest so many
    #[arg(short = 'n', long, default_value_t = 200, value_name = "N")]
    lines: usize,
    /// The deployment on this port, where several run
    #[arg(short, long)]
    port: Option<u16>,
}

pub fn run(args: LogsArgs) -> anyhow::Result<ExitCode> {
    let client = Client::discover(args.port)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(show(&client, args))
}

async fn show(client: &Client, args: LogsArgs) -> anyhow::Result<ExitCode> {
    let mut query = LogsQuery { replica: args.replica, after: None, lines: Some(args.lines) };
    loop {
        let lines = match client.logs(&query).await {
            Ok(lines) => lines,
            // Its end is the end of its logs.
            Err(_) if args.follow && !client.deployment().is_alive() => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(error),
        };
        let mut out = std::io::stdout().lock();
        for line in &lines {
            if writeln!(out, "{}", format_line(line)).is_err() {
                return Ok(ExitCode::SUCCESS);
            }
        }
        drop(out);
        if !args.follow {
            return Ok(ExitCode::SUCCESS);
        }
        query.after = lines.last().map(|line| line.seq).or(query.after).or(Some(0));
        query.lines = Some(LINES_PER_POLL);
        tokio::time::sleep(POLL_EVERY).await;
    }
}

fn format_line(line: &LogLine) -> String {
    let at = i64::try_from(line.at_unix_ms).ok().and_then(|ms| Local.timestamp_millis_opt(ms).single());
    let at = at.map_or_else(|| "--:--:--".to_owned(), |at| at.format("%H:%M:%S").to_string());
    format!("{at} {} | {}", line.replica, line.text)
}
