//! The columns of the replicas table: what they say, how wide they are, and which go first when the screen is narrow.
//! The plain table of `--once` uses the same.

use super::super::format::{self, UNKNOWN};
use super::super::health;
use crate::status::{GpuStatus, ModelKind, ReplicaStatus};
use mserve_runtime::engine::EngineLoad;
use unicode_width::UnicodeWidthStr;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    Replica,
    Kind,
    Device,
    State,
    Age,
    Running,
    Waiting,
    KvGauge,
    Kv,
    PromptRate,
    GenerationRate,
    Ttft,
    Itl,
    PrefixHits,
    Preemptions,
    Restarts,
}

pub const KV_GAUGE_WIDTH: u16 = 10;
/// Columns of a row are parted by this many blanks.
pub const SPACING: u16 = 1;
const LONGEST_NAME: usize = 24;
const LONGEST_DEVICE: usize = 12;

const ALL: [Column; 15] = [
    Column::Replica,
    Column::Kind,
    Column::Device,
    Column::State,
    Column::Age,
    Column::Running,
    Column::Waiting,
    Column::KvGauge,
    Column::PromptRate,
    Column::GenerationRate,
    Column::Ttft,
    Column::Itl,
    Column::PrefixHits,
    Column::Preemptions,
    Column::Restarts,
];

/// First to go first. The gauge does not go, it gives way to the bare number.
const DROPPED_FIRST: [Column; 12] = [
    Column::Preemptions,
    Column::PrefixHits,
    Column::KvGauge,
    Column::Kind,
    Column::Restarts,
    Column::Device,
    Column::PromptRate,
    Column::Itl,
    Column::Age,
    Column::Ttft,
    Column::GenerationRate,
    Column::Kv,
];

/// Widths of the columns that depend on the data.
#[derive(Debug, Clone, Copy)]
pub struct Widths {
    name: u16,
    device: u16,
    state: u16,
}

impl Widths {
    /// Widths for a table in `width` cells; a long name leaves room for the columns that never go.
    pub fn of(replicas: &[ReplicaStatus], gpus: &[GpuStatus], width: u16) -> Self {
        let longest = |texts: &mut dyn Iterator<Item = usize>, least: usize, most: usize| {
            texts.max().unwrap_or(0).clamp(least, most) as u16
        };
        let state = longest(&mut replicas.iter().map(|r| health::state_text(&r.state).width() + 2), 13, 16);
        let name_room = usize::from(width.saturating_sub(state + 2 * (4 + SPACING) + SPACING));
        Self {
            state,
            name: longest(&mut replicas.iter().map(|r| r.id.width()), 7, LONGEST_NAME.min(name_room).max(7)),
            device: longest(&mut replicas.iter().map(|r| device(r, gpus).width()), 6, LONGEST_DEVICE),
        }
    }
}

impl Column {
    pub const fn title(self) -> &'static str {
        match self {
            Self::Replica => "replica",
            Self::Kind => "kind",
            Self::Device => "device",
            Self::State => "state",
            Self::Age => "for",
            Self::Running => "run",
            Self::Waiting => "wait",
            Self::KvGauge | Self::Kv => "KV",
            Self::PromptRate => "in t/s",
            Self::GenerationRate => "out t/s",
            Self::Ttft => "TTFT95",
            Self::Itl => "ITL95",
            Self::PrefixHits => "prefix",
            Self::Preemptions => "preempt",
            Self::Restarts => "restarts",
        }
    }

    pub const fn width(self, widths: Widths) -> u16 {
        match self {
            Self::Replica => widths.name,
            Self::Device => widths.device,
            Self::State => widths.state,
            Self::KvGauge => KV_GAUGE_WIDTH + 5,
            Self::Running | Self::Waiting => 4,
            Self::Kind | Self::Kv => 5,
            Self::Age | Self::PromptRate | Self::Ttft | Self::Itl | Self::PrefixHits => 6,
            Self::GenerationRate | Self::Preemptions => 7,
            Self::Restarts => 8,
        }
    }

    pub const fn is_text(self) -> bool {
        matches!(self, Self::Replica | Self::Kind | Self::Device | Self::State | Self::KvGauge)
    }

    /// Does the value come from the engine, so that a replica without one has nothing to put there?
    pub const fn needs_load(self) -> bool {
        !matches!(self, Self::Replica | Self::Kind | Self::Device | Self::State | Self::Age | Self::Restarts)
    }

    pub fn text(self, replica: &ReplicaStatus, gpus: &[GpuStatus]) -> String {
        let load = replica.load.as_ref();
        let of_load = |text: fn(&EngineLoad) -> String| format::or_unknown(load, text);
        match self {
            Self::Replica => replica.id.clone(),
            Self::Kind => kind(replica.kind).to_owned(),
            Self::Device => device(replica, gpus),
            Self::State => health::state_text(&replica.state),
            Self::Age => format::span(replica.state_age_s),
            Self::Running => of_load(|l| format::whole(l.running)),
            Self::Waiting => of_load(|l| format::whole(l.waiting)),
            Self::KvGauge | Self::Kv => format::or_unknown(load.and_then(kv_usage), format::percent),
            Self::PromptRate => of_load(|l| format::short(l.prompt_tokens_per_s)),
            Self::GenerationRate if replica.kind == ModelKind::Embedding => UNKNOWN.to_owned(),
            Self::GenerationRate => of_load(|l| format::short(l.generation_tokens_per_s)),
            Self::Ttft => format::or_unknown(load.and_then(|l| l.ttft_p95_ms), format::millis),
            Self::Itl => format::or_unknown(load.and_then(|l| l.itl_p95_ms), format::millis),
            Self::PrefixHits => format::or_unknown(load.and_then(|l| l.prefix_cache_hit_rate), format::percent),
            Self::Preemptions => of_load(|l| format::whole(l.preemptions_total)),
            Self::Restarts => replica.restarts.to_string(),
        }
    }
}

/// Share of the KV cache in use; `None` for a model that has none (an encoder).
pub fn kv_usage(load: &EngineLoad) -> Option<f64> {
    (load.kv_blocks_total > 0).then_some(load.kv_cache_usage)
}

/// The columns that fit, in the order of the screen.
pub fn fitting(width: u16, widths: Widths) -> Vec<Column> {
    let mut columns = ALL.to_vec();
    for dropped in DROPPED_FIRST {
        if total_width(&columns, widths) <= width {
            break;
        }
        match columns.iter().position(|&c| c == dropped) {
            Some(at) if dropped == Column::KvGauge => columns[at] = Column::Kv,
            Some(at) => {
                columns.remove(at);
            }
            None => {}
        }
    }
    columns
}

fn total_width(columns: &[Column], widths: Widths) -> u16 {
    let spacing = SPACING * (columns.len() as u16).saturating_sub(1);
    columns.iter().map(|c| c.width(widths)).sum::<u16>() + spacing
}

pub const fn kind(kind: ModelKind) -> &'static str {
    match kind {
        ModelKind::Chat => "chat",
        ModelKind::Embedding => "embed",
    }
}

/// `cpu`, `gpu0,1`, or the beginning of a UUID that no GPU of the snapshot has.
pub fn device(replica: &ReplicaStatus, gpus: &[GpuStatus]) -> String {
    let mut indices = Vec::new();
    let mut others = Vec::new();
    for device in &replica.devices {
        match gpus.iter().find(|gpu| gpu.uuid == *device) {
            Some(gpu) => indices.push(gpu.index.to_string()),
            None => others.push(device.chars().take(LONGEST_DEVICE).collect::<String>()),
        }
    }
    if !indices.is_empty() {
        others.insert(0, format!("gpu{}", indices.join(",")));
    }
    if others.is_empty() { UNKNOWN.to_owned() } else { others.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tui::fixtures;

    #[test]
    fn every_width_keeps_the_vital_columns() {
        let status = fixtures::under_load();
        let mut last = 0;
        for width in 38..200 {
            let widths = Widths::of(&status.replicas, &status.gpus, width);
            let columns = fitting(width, widths);
            assert!(columns.len() >= last, "{width} shows fewer columns than {}", width - 1);
            last = columns.len();
            assert!(total_width(&columns, widths) <= width, "{width}: {columns:?}");
            for vital in [Column::Replica, Column::State, Column::Running, Column::Waiting] {
                assert!(columns.contains(&vital), "{width}: {columns:?}");
            }
        }
        assert_eq!(last, ALL.len());
    }

    #[test]
    fn unknown_is_a_dash_and_never_zero() {
        let replica = ReplicaStatus { load: None, ..fixtures::replica("demo-0") };
        for column in ALL.iter().filter(|c| c.needs_load()) {
            assert_eq!(column.text(&replica, &[]), "-", "{column:?}");
        }
        let idle = ReplicaStatus { load: Some(EngineLoad::default()), ..fixtures::replica("demo-0") };
        for column in [Column::Ttft, Column::Itl, Column::Kv, Column::PrefixHits] {
            assert_eq!(column.text(&idle, &[]), "-", "{column:?}");
        }
        assert_eq!(Column::Running.text(&idle, &[]), "0");
    }

    #[test]
    fn devices_are_named_by_index() {
        let status = fixtures::with_gpus();
        let mut replica = fixtures::replica("a");
        replica.devices = vec!["GPU-1111".into(), "GPU-0000".into()];
        assert_eq!(device(&replica, &status.gpus), "gpu1,0");
        replica.devices = vec!["GPU-ffffffff-aaaa".into()];
        assert_eq!(device(&replica, &status.gpus), "GPU-ffffffff");
        replica.devices.clear();
        assert_eq!(device(&replica, &status.gpus), "-");
    }
}
