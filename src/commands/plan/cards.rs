//! Which cards a plan is for: the ones named, the ones in this machine, or the default.

use crate::exit::Failure;
use mserve_planner::gpus::{self, DEFAULT_GPU, GPUS, GpuModel};
use mserve_planner::hardware::GpuDevice;
use mserve_planner::plan::Card;
use mserve_planner::units::format_bytes;
use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum CardSource {
    /// `--gpu`
    Flag,
    /// NVML
    Driver,
    /// Neither: the default card.
    Default,
}

#[derive(Debug)]
pub(super) struct ChosenCards {
    pub(super) card: Card,
    pub(super) gpus: u64,
    pub(super) source: CardSource,
    /// First line of the output: what the plan is for, and why.
    pub(super) headline: String,
    pub(super) notes: Vec<String>,
    /// Of this machine, where it has cards.
    pub(super) largest_free: Option<FreeCard>,
}

/// The card with the most memory free now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct FreeCard {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) memory_free_bytes: u64,
    pub(super) memory_total_bytes: u64,
}

impl ChosenCards {
    /// Targets were given and no number of cards.
    pub(super) fn need(&mut self, gpus: u64) {
        let cards = if gpus == 1 { "1 card is".to_owned() } else { format!("{gpus} cards are") };
        self.headline = format!("{cards} needed to meet the targets, of {}.", self.card.name);
        self.gpus = gpus;
    }
}

/// Cards that get a row of their own when the plan is for the default card.
pub(super) fn common() -> impl Iterator<Item = &'static GpuModel> {
    GPUS.iter().filter(|gpu| gpu.common)
}

pub(super) fn choose(name: Option<&str>, count: Option<u64>, ratio: f64) -> anyhow::Result<ChosenCards> {
    if let Some(name) = name {
        let gpu = gpus::find(name).map_err(|error| Failure::usage(error.to_string()))?;
        return Ok(named(gpu, count.unwrap_or(1)));
    }
    let installed = crate::hardware::probe()?.gpus;
    match installed.is_empty() {
        true => Ok(default_card(gpus::find(DEFAULT_GPU)?, count.unwrap_or(1))),
        false => Ok(from_driver(&installed, count, ratio)),
    }
}

fn named(gpu: &GpuModel, count: u64) -> ChosenCards {
    let headline = format!("Planned for {count} x {}, as named by --gpu.", gpu.full_name);
    ChosenCards {
        card: gpu.into(),
        gpus: count,
        source: CardSource::Flag,
        headline,
        notes: Vec::new(),
        largest_free: None,
    }
}

fn default_card(gpu: &GpuModel, count: u64) -> ChosenCards {
    let headline = format!(
        "No NVIDIA driver here: planned for {count} x {}, the default card (--gpu NAME chooses another).",
        gpu.full_name
    );
    ChosenCards {
        card: gpu.into(),
        gpus: count,
        source: CardSource::Default,
        headline,
        notes: Vec::new(),
        largest_free: None,
    }
}

/// The kind with the most memory together. Cards that others fill do not count while free ones are left.
fn from_driver(installed: &[GpuDevice], count: Option<u64>, ratio: f64) -> ChosenCards {
    let kinds = installed.iter().map(|gpu| (&gpu.name, gpu.memory_total_bytes));
    let together = |kind: (&String, u64)| kind.1 * of_kind(installed, kind).count() as u64;
    let best = kinds.max_by_key(|&kind| together(kind)).unwrap_or((&installed[0].name, 0));
    let (free, busy): (Vec<_>, Vec<_>) = of_kind(installed, best).partition(|gpu| is_free(gpu, ratio));
    let others = installed.len() - free.len() - busy.len();
    let mut notes: Vec<String> = busy.iter().map(|gpu| busy_note(gpu)).collect();
    if others > 0 {
        notes.push(format!("GPUs of other kinds are left out: {others}."));
    }
    let present = if free.is_empty() { busy.len() } else { free.len() } as u64;
    let gpus = count.unwrap_or(present);
    if gpus > free.len() as u64 {
        notes.push(format!("Planned for {gpus} GPUs; {} are free here.", free.len()));
    }
    let card = Card { name: best.0.clone(), memory_total_bytes: best.1 };
    let headline = format!("Planned for {gpus} x {} of this machine.", card.name);
    let largest_free = installed.iter().max_by_key(|gpu| gpu.memory_free_bytes).map(|gpu| FreeCard {
        index: gpu.index,
        name: gpu.name.clone(),
        memory_free_bytes: gpu.memory_free_bytes,
        memory_total_bytes: gpu.memory_total_bytes,
    });
    ChosenCards { card, gpus, source: CardSource::Driver, headline, notes, largest_free }
}

fn of_kind<'a>(installed: &'a [GpuDevice], kind: (&String, u64)) -> impl Iterator<Item = &'a GpuDevice> {
    installed.iter().filter(move |gpu| (&gpu.name, gpu.memory_total_bytes) == kind)
}

fn is_free(gpu: &GpuDevice, ratio: f64) -> bool {
    gpu.memory_free_bytes as f64 >= gpu.memory_total_bytes as f64 * ratio
}

fn busy_note(gpu: &GpuDevice) -> String {
    let pids: Vec<String> = gpu.processes.iter().map(|process| process.pid.to_string()).collect();
    let holders = if pids.is_empty() { String::new() } else { format!(" (pid {})", pids.join(", ")) };
    let used = format_bytes(gpu.memory_total_bytes.saturating_sub(gpu.memory_free_bytes));
    format!("GPU {} is in use: {used}{holders}.", gpu.index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mserve_planner::hardware::GpuProcess;
    use mserve_planner::units::GIB;

    fn gpu(index: u32, name: &str, total_gib: u64, free_gib: u64) -> GpuDevice {
        GpuDevice {
            index,
            uuid: format!("GPU-{index}"),
            name: name.to_owned(),
            memory_total_bytes: total_gib * GIB,
            memory_free_bytes: free_gib * GIB,
            compute_capability: None,
            processes: vec![GpuProcess { pid: 8123, used_bytes: None }],
        }
    }

    #[test]
    fn free_cards_of_the_larger_kind_are_planned_for() {
        let installed = [
            gpu(0, "NVIDIA L4", 22, 22),
            gpu(1, "NVIDIA H200", 140, 139),
            gpu(2, "NVIDIA H200", 140, 69),
            gpu(3, "NVIDIA H200", 140, 139),
        ];
        let chosen = from_driver(&installed, None, 0.9);
        assert_eq!((chosen.card.name.as_str(), chosen.gpus), ("NVIDIA H200", 2));
        assert_eq!(chosen.headline, "Planned for 2 x NVIDIA H200 of this machine.");
        assert_eq!(chosen.notes, ["GPU 2 is in use: 71.00 GiB (pid 8123).", "GPUs of other kinds are left out: 1."]);
        let more = from_driver(&installed, Some(8), 0.9);
        assert_eq!(more.gpus, 8);
        assert!(more.notes.contains(&"Planned for 8 GPUs; 2 are free here.".to_owned()));
    }

    #[test]
    fn a_full_machine_is_planned_as_if_it_were_free() {
        let chosen = from_driver(&[gpu(0, "NVIDIA H100", 80, 1), gpu(1, "NVIDIA H100", 80, 2)], None, 0.9);
        assert_eq!((chosen.gpus, chosen.notes.len()), (2, 3), "{:?}", chosen.notes);
    }
}
