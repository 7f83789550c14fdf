//! How large a KV cache is when nobody said so.

use mserve_planner::model::Program;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sequences_or_a_quarter_of_memory() {
        assert_eq!(default_kv_cache_bytes(10, 4, 100, Some(1 << 20)), 4000);
        assert_eq!(default_kv_cache_bytes(10, 4, 100, Some(8000)), 2000);
    }
}
