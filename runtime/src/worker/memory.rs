//! How large a KV cache is when nobody said so.

use mserve_planner::model::Program;
use std::fs;

/// A cache takes at most this share of the memory that is free.
const FREE_SHARE: u64 = 4;

/// Bytes of K and V of one token, as the CPU backend keeps them: f32, heads padded to 16. 0 for models without cache.
pub fn kv_bytes_per_token(program: &Program) -> u64 {
    let heads = |id| {
        let attention = program.attention(id);
        attention.num_kv_heads.saturating_mul(attention.head_dim.next_multiple_of(16))
    };
    program.cached_attentions().map(|id| heads(id).saturating_mul(2 * 4)).fold(0, u64::saturating_add)
}

/// Enough for every sequence at full length, where memory allows it.
pub fn default_kv_cache_bytes(
    bytes_per_token: u64,
    max_num_seqs: usize,
    max_model_len: usize,
    free_bytes: Option<u64>,
) -> u64 {
    let wanted = bytes_per_token.saturating_mul(max_num_seqs as u64).saturating_mul(max_model_len as u64);
    free_bytes.map_or(wanted.min(1 << 30), |free| wanted.min(free / FREE_SHARE))
}

/// Memory that this process may still take: what the kernel calls available, or less under a cgroup's limit.
pub fn free_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_bytes(&text));
    let cgroup = cgroup_free_bytes();
    machine.into_iter().chain(cgroup).min()
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn cgroup_free_bytes() -> Option<u64> {
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok();
    // `max` does not parse: no limit.
    Some(read("memory.max")?.saturating_sub(read("memory.current")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kib() {
        assert_eq!(available_bytes("MemTotal: 10 kB\nMemAvailable:    3 kB\n"), Some(3072));
        assert_eq!(available_bytes("MemTotal: 10 kB\n"), None);
    }

    #[test]
    fn all_sequences_or_a_quarter_of_memory() {
        assert_eq!(default_kv_cache_bytes(10, 4, 100, Some(1 << 20)), 4000);
        assert_eq!(default_kv_cache_bytes(10, 4, 100, Some(8000)), 2000);
    }
}
