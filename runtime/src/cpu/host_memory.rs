//! How much memory this process may still take: the machine's, or its control group's where that is less.

use std::path::{Path, PathBuf};

/// Bytes that can be had without swapping; `None` where the system does not say.
pub fn free_bytes() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
    machine.into_iter().chain(group_free_bytes()).min()
}

fn group_free_bytes() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = Path::new("/sys/fs/cgroup").join(unified_group(&groups)?);
    // A limit may stand at any level above.
    own.ancestors().take_while(|dir| dir.starts_with("/sys/fs/cgroup")).filter_map(free_in_group).min()
}

fn free_in_group(dir: &Path) -> Option<u64> {
    let number = |file| std::fs::read_to_string(dir.join(file)).ok()?.trim().parse::<u64>().ok();
    Some(number("memory.max")?.saturating_sub(number("memory.current")?))
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The cgroup v2 path of `/proc/self/cgroup`, without its leading slash.
fn unified_group(groups: &str) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(PathBuf::from(path.trim_start_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let meminfo = "MemTotal:       24000000 kB\nMemFree:         100 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(available(meminfo), Some(2 << 20));
        assert_eq!(available("MemTotal: 5 kB\n"), None);
        assert_eq!(unified_group("0::/user.slice/x\n"), Some(PathBuf::from("user.slice/x")));
        assert_eq!(unified_group("1:memory:/a\n"), None);
    }
}
