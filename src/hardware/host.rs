use anyhow::Context;
use mserve_planner::hardware::Host;
use std::fs::read_to_string;

/// Processors and memory that this process may use.
///
/// # Errors
/// When /proc/meminfo cannot be read or understood.
pub fn probe_host() -> anyhow::Result<Host> {
    // Counts the affinity mask and the control group's quota.
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let meminfo = read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let (total, available) = parse_meminfo(&meminfo).context("cannot understand /proc/meminfo")?;
    let limit = cgroup_limit();
    let memory_total_bytes = limit.map_or(total, |(max, _)| total.min(max));
    let memory_available_bytes = limit.map_or(available, |(max, used)| available.min(max.saturating_sub(used)));
    Ok(Host { cpus: u32::try_from(cpus).unwrap_or(u32::MAX), memory_total_bytes, memory_available_bytes })
}

/// (MemTotal, MemAvailable) in bytes.
fn parse_meminfo(text: &str) -> Option<(u64, u64)> {
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some((field("MemTotal")?, field("MemAvailable")?))
}

/// (limit, used) of the control group, version 2 then 1; `None` when there is no limit.
fn cgroup_limit() -> Option<(u64, u64)> {
    let read = |directory: &str, limit: &str, used: &str| {
        let file = |name: &str| read_to_string(format!("/sys/fs/cgroup/{directory}{name}")).ok();
        let cache = file("memory.stat").and_then(|stat| reclaimable(&stat)).unwrap_or(0);
        Some((parse_limit(&file(limit)?)?, file(used)?.trim().parse::<u64>().ok()?.saturating_sub(cache)))
    };
    read("", "memory.max", "memory.current")
        .or_else(|| read("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes"))
}

/// Version 2 says `max` for none, version 1 a number near 2^63.
fn parse_limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|limit| *limit < 1 << 60)
}

/// File cache that the kernel gives up when asked.
fn reclaimable(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn reads_meminfo() {
        let text = "MemTotal:       24605368 kB\nMemFree:  1 kB\nMemAvailable:   21000000 kB\n";
        assert_eq!(parse_meminfo(text), Some((24_605_368 << 10, 21_000_000 << 10)));
        assert_eq!(parse_meminfo("MemTotal: 1 kB\n"), None);
        assert_eq!(parse_meminfo("MemTotal: x kB\nMemAvailable: 1 kB"), None);
    }

    #[test]
    fn reads_limits_of_both_versions() {
        for (text, limit) in
            [("max\n", None), ("9223372036854771712\n", None), ("1073741824\n", Some(1 << 30)), ("", None)]
        {
            assert_eq!(parse_limit(text), limit, "{text:?}");
        }
        assert_eq!(reclaimable("anon 5\ninactive_file 4096\nactive_file 9\n"), Some(4096));
    }

    #[test]
    fn this_machine_has_something() {
        let host = probe_host().unwrap();
        assert!(host.cpus > 0 && host.memory_available_bytes > 0);
        assert!(host.memory_available_bytes <= host.memory_total_bytes);
    }
}
