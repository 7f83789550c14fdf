//! One row for each GPU; on a machine without any, the CPU and its memory.

use super::super::format;
use super::super::health;
use super::super::logs::printable;
use super::super::state::State;
use super::super::theme::{Level, Theme};
use super::layout::gpu_columns;
use crate::status::{GpuStatus, HostStatus, ReplicaStatus};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::text::{Line, Span};
use unicode_width::UnicodeWidthStr;

const NAME_WIDTH: usize = 10;
/// Names of the replicas on a GPU get at most this much before the gauges do.
const USERS_WIDTH: usize = 28;

pub fn draw(state: &State, area: Rect, theme: &Theme, frame: &mut Frame<'_>) {
    let Some(status) = &state.status else {
        super::section(vec![Span::raw("host")], area, theme, frame);
        return;
    };
    if status.gpus.is_empty() {
        let inner = super::section(vec![Span::raw("host")], area, theme, frame);
        frame.render_widget(host(&status.host, inner.width, theme), inner);
        return;
    }
    let columns = gpu_columns(status.gpus.len(), state.size);
    let rows = status.gpus.len().div_ceil(columns);
    let shown_rows = rows.min(usize::from(area.height.saturating_sub(1)));
    let mut title = vec![Span::raw("GPUs")];
    let hidden = status.gpus.len().saturating_sub(shown_rows * columns);
    if hidden > 0 {
        title.push(Span::styled(format!(" {hidden} more below the edge"), theme.dim()));
    }
    let inner = super::section(title, area, theme, frame);
    let places = Layout::horizontal(vec![Constraint::Fill(1); columns]).spacing(2).split(inner);
    let longest = status.gpus.iter().map(|gpu| users(gpu, &status.replicas).width()).max().unwrap_or(0);
    let width = places[0].width.saturating_sub(longest.min(USERS_WIDTH) as u16);
    for (place, chunk) in places.iter().zip(status.gpus.chunks(rows.max(1))) {
        for (gpu, row) in chunk.iter().zip(place.rows()) {
            super::draw_cut(gpu_row(gpu, &users(gpu, &status.replicas), width, theme), row, theme, frame);
        }
    }
}

/// `0 H200  util  96% ####  mem 124/140 GiB ####  61C  612W  demo-0`
/// `width` is what is left without the replicas' names.
fn gpu_row<'a>(gpu: &GpuStatus, users: &str, width: u16, theme: &Theme) -> Line<'a> {
    let has_name = width >= 70;
    let gauge_width = gauge_width(width, if has_name { 60 } else { 49 });
    let mut spans = vec![Span::styled(format!("{:>2} ", gpu.index), theme.strong())];
    if has_name {
        spans.push(Span::raw(format!("{:<NAME_WIDTH$} ", short_name(&gpu.name))));
    }
    let share = gpu.utilization_percent.map(|percent| f64::from(percent) / 100.0);
    spans.extend(gauge("util", share, gauge_width, Level::Good, theme));
    let memory = share_of(gpu.memory_used_bytes, gpu.memory_total_bytes);
    spans.extend(gauge("mem", memory, gauge_width, memory_level(memory), theme));
    let total = if gpu.memory_total_bytes == 0 { "-".to_owned() } else { format::gib(gpu.memory_total_bytes) };
    spans.push(Span::raw(format!("{:>5}/{total} GiB ", format::gib(gpu.memory_used_bytes))));
    let heat = gpu.temperature_c.map_or(Level::Off, health::temperature_level);
    let degrees = format::or_unknown(gpu.temperature_c, |c| format!("{c}C"));
    spans.push(Span::styled(format!("{degrees:>4} "), theme.level(heat)));
    let watts = format::or_unknown(gpu.power_w.filter(|w| w.is_finite()), |w| format!("{w:.0}W"));
    spans.push(Span::raw(format!("{watts:>5} ")));
    spans.push(Span::styled(users.to_owned(), theme.dim()));
    Line::from(spans)
}

fn users(gpu: &GpuStatus, replicas: &[ReplicaStatus]) -> String {
    let users: Vec<&str> = replicas.iter().filter(|r| r.devices.contains(&gpu.uuid)).map(|r| r.id.as_str()).collect();
    printable(&users.join(" "))
}

fn host<'a>(host: &HostStatus, width: u16, theme: &Theme) -> Line<'a> {
    let cpu = host.cpu_percent.map(|percent| percent / 100.0);
    let used_bytes = host.memory_total_bytes.saturating_sub(host.memory_available_bytes);
    let memory = share_of(used_bytes, host.memory_total_bytes);
    let gauge_width = gauge_width(width, 50);
    let mut spans = gauge("cpu", cpu, gauge_width, Level::Good, theme);
    let cores = if host.cpus == 0 { "-".to_owned() } else { host.cpus.to_string() };
    spans.push(Span::styled(format!("of {cores} cores  "), theme.dim()));
    spans.extend(gauge("mem", memory, gauge_width, memory_level(memory), theme));
    if host.memory_total_bytes > 0 {
        let text = format!("{} of {} GiB", format::gib(used_bytes), format::gib(host.memory_total_bytes));
        spans.push(Span::raw(text));
    }
    Line::from(spans)
}

/// Two gauges share what the text of `text_width` leaves.
fn gauge_width(width: u16, text_width: u16) -> u16 {
    (width.saturating_sub(text_width) / 2).min(20)
}

fn gauge<'a>(name: &'a str, share: Option<f64>, width: u16, level: Level, theme: &Theme) -> Vec<Span<'a>> {
    let (filled, empty) = theme.gauge(share.unwrap_or(0.0), width);
    let percent = format::or_unknown(share, format::percent);
    let mut spans = vec![Span::styled(format!("{name} "), theme.dim()), Span::raw(format!("{percent:>4} "))];
    if width > 0 {
        spans.push(Span::styled(filled, theme.level(level)));
        spans.push(Span::styled(empty, theme.dim()));
        spans.push(Span::raw(" "));
    }
    spans
}

fn share_of(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn memory_level(share: Option<f64>) -> Level {
    match share {
        Some(share) if share >= 0.98 => Level::Warn,
        _ => Level::Good,
    }
}

fn short_name(name: &str) -> String {
    let name = name.strip_prefix("NVIDIA ").unwrap_or(name);
    name.strip_prefix("GeForce ").unwrap_or(name).chars().take(NAME_WIDTH).collect()
}
