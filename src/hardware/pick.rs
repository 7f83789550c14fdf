//! Which cards to use. Pure.

use mserve_planner::hardware::{GpuDevice, GpuProcess};
use mserve_planner::units::format_bytes;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{needed} GPU(s) with {} free are needed, and {} of {} would do{}",
    format_bytes(*.needed_bytes), .usable, .usable + .refused.len(), refusals(.refused))]
pub struct PickError {
    pub needed: usize,
    pub needed_bytes: u64,
    pub usable: usize,
    pub refused: Vec<Refusal>,
}

/// Why a card was passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub index: u32,
    pub free_bytes: u64,
    pub leased: bool,
    pub processes: Vec<GpuProcess>,
}

fn refusals(refused: &[Refusal]) -> String {
    refused.iter().map(|refusal| format!("; {refusal}")).collect()
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GPU {} has {} free", self.index, format_bytes(self.free_bytes))?;
        if self.leased {
            write!(f, " and is leased by another mserve")?;
        }
        for process in &self.processes {
            let used = process.used_bytes.map_or_else(|| "some memory".to_owned(), format_bytes);
            write!(f, ", process {} holds {used}", process.pid)?;
        }
        Ok(())
    }
}

/// Choose `count` cards with at least `needed_bytes` free each that no other mserve has leased.
///
/// Cards without processes come before others, and the last card first: people and desktops take the first ones.
///
/// # Errors
/// [`PickError`] says of every other card why it would not do.
pub fn pick_gpus<'a>(
    gpus: &'a [GpuDevice],
    count: usize,
    needed_bytes: u64,
    leased_uuids: &[String],
) -> Result<Vec<&'a GpuDevice>, PickError> {
    let leased = |gpu: &GpuDevice| leased_uuids.contains(&gpu.uuid);
    let (mut usable, refused): (Vec<_>, Vec<_>) =
        gpus.iter().partition(|gpu| gpu.memory_free_bytes >= needed_bytes && !leased(gpu));
    if usable.len() < count {
        let refused = refused
            .into_iter()
            .map(|gpu| Refusal {
                index: gpu.index,
                free_bytes: gpu.memory_free_bytes,
                leased: leased(gpu),
                processes: gpu.processes.clone(),
            })
            .collect();
        return Err(PickError { needed: count, needed_bytes, usable: usable.len(), refused });
    }
    usable.sort_by_key(|gpu| (!gpu.processes.is_empty(), std::cmp::Reverse(gpu.index)));
    usable.truncate(count);
    Ok(usable)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const GIB: u64 = 1 << 30;

    fn gpu(index: u32, free_gib: u64, pids: &[u32]) -> GpuDevice {
        GpuDevice {
            index,
            uuid: format!("GPU-{index}"),
            name: "NVIDIA H200".into(),
            memory_total_bytes: 140 * GIB,
            memory_free_bytes: free_gib * GIB,
            compute_capability: Some((9, 0)),
            processes: pids.iter().map(|&pid| GpuProcess { pid, used_bytes: Some(GIB) }).collect(),
        }
    }

    fn picked(gpus: &[GpuDevice], count: usize, leased: &[String]) -> Vec<u32> {
        pick_gpus(gpus, count, 20 * GIB, leased).unwrap().iter().map(|gpu| gpu.index).collect()
    }

    #[test]
    fn the_last_idle_card_first() {
        let gpus = [gpu(0, 140, &[]), gpu(1, 139, &[7]), gpu(2, 140, &[]), gpu(3, 10, &[8])];
        assert_eq!(picked(&gpus, 1, &[]), [2]);
        assert_eq!(picked(&gpus, 2, &[]), [2, 0]);
        assert_eq!(picked(&gpus, 3, &[]), [2, 0, 1], "a shared card with room is better than none");
        assert_eq!(picked(&gpus, 1, &["GPU-2".into()]), [0]);
    }

    #[test]
    fn a_refusal_names_every_card_and_its_holder() {
        let gpus = [gpu(0, 10, &[41]), gpu(1, 140, &[]), gpu(2, 140, &[])];
        let error = pick_gpus(&gpus, 2, 20 * GIB, &["GPU-2".into()]).unwrap_err();
        insta::assert_snapshot!(error, @"2 GPU(s) with 20.00 GiB free are needed, and 1 of 3 would do; GPU 0 has 10.00 GiB free, process 41 holds 1.00 GiB; GPU 2 has 140.00 GiB free and is leased by another mserve");
    }

    #[test]
    fn no_cards_is_an_answer_too() {
        let error = pick_gpus(&[], 1, GIB, &[]).unwrap_err();
        assert_eq!((error.usable, error.refused.len()), (0, 0));
    }
}
