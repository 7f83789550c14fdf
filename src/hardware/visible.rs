//! CUDA_VISIBLE_DEVICES, as CUDA reads it. Pure.

use mserve_planner::hardware::GpuDevice;

/// The cards that the variable leaves, in its order: indexes or UUIDs (or their beginnings), up to the first that is
/// none. Unset shows all, empty shows none.
pub fn visible_gpus(gpus: Vec<GpuDevice>, variable: Option<&str>) -> Vec<GpuDevice> {
    let Some(variable) = variable else { return gpus };
    let mut shown: Vec<GpuDevice> = Vec::new();
    for word in variable.split(',').map(str::trim) {
        let found = match word.parse::<u32>() {
            Ok(index) => gpus.iter().find(|gpu| gpu.index == index),
            Err(_) => gpus.iter().find(|gpu| word.len() > "GPU-".len() && gpu.uuid.starts_with(word)),
        };
        match found {
            Some(gpu) if !shown.contains(gpu) => shown.push(gpu.clone()),
            _ => break,
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(variable: Option<&str>) -> Vec<u32> {
        let gpu = |index: u32, uuid: &str| GpuDevice {
            index,
            uuid: uuid.to_owned(),
            name: "NVIDIA H200".to_owned(),
            memory_total_bytes: 1,
            memory_free_bytes: 1,
            compute_capability: None,
            processes: Vec::new(),
        };
        let gpus = vec![gpu(0, "GPU-aa11"), gpu(1, "GPU-bb22"), gpu(2, "GPU-cc33")];
        visible_gpus(gpus, variable).iter().map(|gpu| gpu.index).collect()
    }

    #[test]
    fn the_list_ends_at_the_first_that_is_no_card() {
        assert_eq!(shown(None), [0, 1, 2]);
        assert_eq!(shown(Some("2,0")), [2, 0]);
        assert_eq!(shown(Some("GPU-bb, 0")), [1, 0]);
        assert_eq!(shown(Some("1,-1,0")), [1]);
        assert_eq!(shown(Some("0,0,1")), [0], "CUDA shows none or the first here; twice it cannot be used");
        for nothing in ["", "-1", "7", "GPU-", "x"] {
            assert_eq!(shown(Some(nothing)), [] as [u32; 0], "{nothing:?}");
        }
    }
}
