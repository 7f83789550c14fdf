//! The dashboard without a screen: a table, a line per replica and interval, or JSON.

use super::format;
use super::health::{self, Overall};
use super::logs::printable;
use super::source::Source;
use super::views::{Column, Widths, fitting, kv_usage};
use crate::status::{ModelKind, ReplicaState, ReplicaStatus, Status};
use anyhow::Context;
use chrono::{FixedOffset, Local, Offset, Utc};
use std::fmt::Write as _;
use std::io::{ErrorKind, Write};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval, timeout};
use unicode_width::UnicodeWidthStr;

const POLL_DEADLINE: Duration = Duration::from_secs(5);
/// A launcher that was there may miss this many polls in a row before it is given up.
const POLLS_MISSED: u32 = 5;

/// Which of the plain faces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plain {
    /// One table of at most this many columns of text, then the end.
    Table { width: u16 },
    /// A line for each replica, again and again.
    Lines,
    /// A snapshot as one JSON object, then the end.
    JsonOnce,
    /// A snapshot as a JSON object a line, again and again.
    Json,
}

/// Write snapshots to `out` until the source ends or the reader goes away.
///
/// # Errors
/// The source does not answer, or `out` cannot be written.
pub async fn run_plain<S: Source>(
    source: &S,
    plain: Plain,
    refresh: Duration,
    out: &mut (impl Write + Send),
) -> anyhow::Result<()> {
    let utc_offset = Local::now().offset().fix();
    let mut tick = interval(refresh);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut missed = None;
    loop {
        tick.tick().await;
        let status = match timeout(POLL_DEADLINE, source.status()).await.context("no answer from the launcher") {
            Ok(Ok(Some(status))) => status,
            Ok(Ok(None)) => return Ok(()),
            Err(error) | Ok(Err(error)) => {
                // Before the first snapshot there is nothing worth waiting for.
                let so_far: u32 = missed.ok_or(()).or(Err(error))?;
                missed = Some(so_far + 1);
                if so_far + 1 >= POLLS_MISSED {
                    anyhow::bail!("the launcher answers no more");
                }
                continue;
            }
        };
        missed = Some(0);
        match write_snapshot(&status, plain, utc_offset, out) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            written => written.context("cannot write")?,
        }
        if matches!(plain, Plain::Table { .. } | Plain::JsonOnce) {
            return Ok(());
        }
    }
}

fn write_snapshot(status: &Status, plain: Plain, utc_offset: FixedOffset, out: &mut impl Write) -> std::io::Result<()> {
    let now_unix_s = Utc::now().timestamp() as f64;
    match plain {
        Plain::Table { width } => out.write_all(table(status, width, utc_offset).as_bytes())?,
        Plain::Lines => out.write_all(lines(status, now_unix_s, utc_offset).as_bytes())?,
        Plain::JsonOnce | Plain::Json => {
            serde_json::to_writer(&mut *out, status)?;
            out.write_all(b"\n")?;
        }
    }
    out.flush()
}

/// The whole snapshot for a reader: what the screen shows, without colour or bars.
fn table(status: &Status, width: u16, utc_offset: FixedOffset) -> String {
    let mut text = String::new();
    let router = &status.router;
    let _ = writeln!(text, "{}", headline(status));
    let _ = writeln!(
        text,
        "requests {}  in flight {}  errors {}  retries {}\n",
        format::count(router.requests_total),
        format::count(router.in_flight),
        format::count(router.errors_total),
        format::count(router.retries_total)
    );
    text.push_str(&replica_table(status, width));
    text.push('\n');
    text.push_str(&hardware(status));
    for event in status.events.iter().rev().take(5).rev() {
        let replica = event.replica.as_ref().map(|id| format!("{id} ")).unwrap_or_default();
        let _ = writeln!(text, "{}  {replica}{}", format::clock(event.at_unix_s, utc_offset), printable(&event.text));
    }
    text
}

fn headline(status: &Status) -> String {
    let ready = status.replicas.iter().filter(|r| matches!(r.state, ReplicaState::Ready)).count();
    format!(
        "{}  {ready}/{} ready  {}  up {}",
        Overall::of(status).word(),
        status.replicas.len(),
        status.endpoint,
        format::span(status.uptime_s)
    )
}

fn replica_table(status: &Status, width: u16) -> String {
    let columns: Vec<Column> = fitting(width, Widths::of(&status.replicas, &status.gpus, width))
        .into_iter()
        .map(|column| if column == Column::KvGauge { Column::Kv } else { column })
        .collect();
    let mut rows = vec![columns.iter().map(|c| c.title().to_owned()).collect::<Vec<_>>()];
    rows.extend(status.replicas.iter().map(|r| columns.iter().map(|c| c.text(r, &status.gpus)).collect()));
    let widths: Vec<usize> =
        (0..columns.len()).map(|i| rows.iter().map(|row| row[i].width()).max().unwrap_or(0)).collect();
    let reasons = std::iter::once(None).chain(status.replicas.iter().map(health::reason));
    let mut text = String::new();
    for (row, reason) in rows.iter().zip(reasons) {
        let mut line = String::new();
        for ((column, value), &wide) in columns.iter().zip(row).zip(&widths) {
            let blanks = " ".repeat(wide.saturating_sub(value.width()));
            let _ =
                if column.is_text() { write!(line, "{value}{blanks}  ") } else { write!(line, "{blanks}{value}  ") };
        }
        line.push_str(&reason.map(printable).unwrap_or_default());
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn hardware(status: &Status) -> String {
    let mut text = String::new();
    for gpu in &status.gpus {
        let _ = writeln!(
            text,
            "gpu{} {}  util {}  mem {} of {} GiB  {}  {}",
            gpu.index,
            gpu.name,
            format::or_unknown(gpu.utilization_percent, |p| format!("{p}%")),
            format::gib(gpu.memory_used_bytes),
            format::gib(gpu.memory_total_bytes),
            format::or_unknown(gpu.temperature_c, |c| format!("{c} C")),
            format::or_unknown(gpu.power_w.filter(|w| w.is_finite()), |w| format!("{w:.0} W")),
        );
    }
    if status.gpus.is_empty() {
        let host = &status.host;
        let used = host.memory_total_bytes.saturating_sub(host.memory_available_bytes);
        let memory = match host.memory_total_bytes {
            0 => format::UNKNOWN.to_owned(),
            total => format!("{} of {} GiB", format::gib(used), format::gib(total)),
        };
        let cpu = format::or_unknown(host.cpu_percent, |p| format::percent(p / 100.0));
        let _ = writeln!(text, "cpu {cpu} of {} cores  mem {memory}", host.cpus);
    }
    text
}

/// `14:01:07 demo-0 ready run=31 wait=0 kv=78% in=1.2k/s out=1.6k/s ttft_p95=280ms itl_p95=23ms restarts=0`
fn lines(status: &Status, now_unix_s: f64, utc_offset: FixedOffset) -> String {
    let at = format::clock(now_unix_s, utc_offset);
    if status.replicas.is_empty() {
        return format!("{at} {}\n", headline(status));
    }
    status.replicas.iter().map(|replica| format!("{at} {}\n", line(replica))).collect()
}

fn line(replica: &ReplicaStatus) -> String {
    let state = health::state_text(&replica.state);
    let mut line = format!("{} {state}", replica.id);
    if let Some(load) = &replica.load {
        let rate = |per_s: f64| match format::short(per_s) {
            unknown if unknown == format::UNKNOWN => unknown,
            known => format!("{known}/s"),
        };
        let _ = write!(
            line,
            " run={} wait={} kv={} in={}",
            load.running,
            load.waiting,
            format::or_unknown(kv_usage(load), format::percent),
            rate(load.prompt_tokens_per_s),
        );
        if replica.kind == ModelKind::Chat {
            let _ = write!(line, " out={}", rate(load.generation_tokens_per_s));
        }
        let _ = write!(line, " ttft_p95={}", format::or_unknown(load.ttft_p95_ms, format::millis));
        let _ = write!(line, " itl_p95={}", format::or_unknown(load.itl_p95_ms, format::millis));
    }
    let _ = write!(line, " restarts={}", replica.restarts);
    if let Some(reason) = health::reason(replica) {
        let _ = write!(line, " reason=\"{}\"", printable(reason).replace('"', "'"));
    }
    line
}

#[cfg(test)]
#[path = "plain_tests.rs"]
mod tests;
