//! How many KV blocks a card has room for.

use super::error::{CudaError, MemoryTerm};

/// What the CUDA context, its lazily loaded library code and captured graphs take beyond what is measured when the
/// context is made. Seen on an H200: 0.5 GiB with the context, 0.15 GiB more when all is loaded and captured.
const LATER_BYTES: u64 = 256 << 20;
/// A context alone takes less than this; what is in use beyond it belongs to somebody else.
const CONTEXT_MOST_BYTES: u64 = 1 << 30;

/// All that the budget depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct Demand {
    pub device: String,
    pub uuid: String,
    pub total_bytes: u64,
    /// Free once the context is there and before anything else is allocated.
    pub free_bytes: u64,
    /// Share of the card's total memory that this replica may use.
    pub gpu_memory_utilization: f64,
    /// What is allocated besides the cache: weights, activations, workspace, step metadata.
    pub fixed: Vec<MemoryTerm>,
    /// Bytes of one block over all layers. 0 for models that keep no cache.
    pub block_bytes: u64,
    /// Tokens of one block.
    pub block_size: u64,
    /// Blocks of the longest sequence: fewer than that and a request could never finish.
    pub least_blocks: u64,
    /// More than this is of no use (every sequence at full length) and is not taken.
    pub most_blocks: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvBudget {
    pub num_blocks: u64,
    pub kv_cache_bytes: u64,
    /// Every term of the plan, the cache last.
    pub terms: Vec<MemoryTerm>,
}

/// gpu_memory_utilization of the card's total, less all that is not cache, in whole blocks.
///
/// # Errors
/// [`CudaError::CardTooSmall`] when the share is too small even for one sequence, [`CudaError::CardFull`] when the share
/// would do and others hold it.
pub fn kv_budget(demand: &Demand) -> Result<KvBudget, CudaError> {
    let used_bytes = demand.total_bytes.saturating_sub(demand.free_bytes);
    let mut terms = vec![
        MemoryTerm { name: "context", bytes: used_bytes.min(CONTEXT_MOST_BYTES) },
        MemoryTerm { name: "library code and graphs", bytes: LATER_BYTES },
    ];
    terms.extend(&demand.fixed);
    let budget_bytes = (demand.total_bytes as f64 * demand.gpu_memory_utilization.clamp(0.0, 1.0)) as u64;
    let fixed_bytes: u64 = terms.iter().map(|t| t.bytes).sum();
    let least_bytes = demand.least_blocks.saturating_mul(demand.block_bytes);
    let needed_bytes = fixed_bytes.saturating_add(least_bytes);
    if needed_bytes > budget_bytes {
        terms.push(MemoryTerm { name: "the KV cache of one sequence", bytes: least_bytes });
        let blocks = budget_bytes.saturating_sub(fixed_bytes).checked_div(demand.block_bytes).unwrap_or(0);
        return Err(CudaError::CardTooSmall {
            device: demand.device.clone(),
            needed_bytes,
            budget_bytes,
            total_bytes: demand.total_bytes,
            terms,
            fits_tokens: (blocks > 0).then(|| blocks * demand.block_size),
        });
    }
    let blocks = (budget_bytes - fixed_bytes).checked_div(demand.block_bytes).unwrap_or(0);
    let num_blocks = demand.most_blocks.map_or(blocks, |most| blocks.min(most.max(demand.least_blocks)));
    let kv_cache_bytes = num_blocks * demand.block_bytes;
    // The context is already part of what is not free.
    let still_needed = fixed_bytes - terms[0].bytes + kv_cache_bytes;
    if still_needed > demand.free_bytes {
        return Err(CudaError::CardFull {
            device: demand.device.clone(),
            uuid: demand.uuid.clone(),
            needed_bytes: still_needed,
            free_bytes: demand.free_bytes,
            total_bytes: demand.total_bytes,
            fitting_utilization: fitting_utilization(demand, fixed_bytes + least_bytes),
            holders: None,
        });
    }
    terms.push(MemoryTerm { name: "KV cache", bytes: kv_cache_bytes });
    Ok(KvBudget { num_blocks, kv_cache_bytes, terms })
}

/// The share that would do with what others leave, in whole percent. None when not even one sequence fits there.
fn fitting_utilization(demand: &Demand, least_bytes: u64) -> Option<f64> {
    let context_bytes = demand.total_bytes.saturating_sub(demand.free_bytes).min(CONTEXT_MOST_BYTES);
    let percent = (demand.free_bytes + context_bytes) as f64 / demand.total_bytes as f64 * 100.0;
    let share = percent.floor() / 100.0;
    (share * demand.total_bytes as f64 >= least_bytes as f64).then_some(share)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const GIB: u64 = 1 << 30;

    /// An H200 with Llama-3.1-8B in bf16: 128 KiB of keys and values a token.
    fn demand() -> Demand {
        Demand {
            device: "H200".to_owned(),
            uuid: "GPU-1".to_owned(),
            total_bytes: 140 * GIB,
            free_bytes: 139 * GIB + GIB / 2,
            gpu_memory_utilization: 0.9,
            fixed: vec![
                MemoryTerm { name: "weights", bytes: 15 * GIB },
                MemoryTerm { name: "activations", bytes: GIB },
            ],
            block_bytes: 16 * 128 * 1024,
            block_size: 16,
            least_blocks: 8192 / 16,
            most_blocks: None,
        }
    }

    #[test]
    fn the_cache_is_what_the_share_leaves() {
        let budget = kv_budget(&demand()).unwrap();
        let other = GIB / 2 + (256 << 20) + 16 * GIB;
        assert_eq!(budget.num_blocks, (126 * GIB - other) / (2 << 20));
        assert_eq!(budget.kv_cache_bytes, budget.num_blocks * (2 << 20));
        let sum: u64 = budget.terms.iter().map(|t| t.bytes).sum();
        assert!(sum <= 126 * GIB && sum > 126 * GIB - (2 << 20), "the terms add up to the share");
        let capped = kv_budget(&Demand { most_blocks: Some(1000), ..demand() }).unwrap();
        assert_eq!(capped.num_blocks, 1000);
    }

    #[test]
    fn too_small_and_full_are_told_apart() {
        let small = kv_budget(&Demand { gpu_memory_utilization: 0.12, ..demand() }).unwrap_err();
        assert!(matches!(&small, CudaError::CardTooSmall { .. }), "{small}");
        let CudaError::CardTooSmall { fits_tokens, .. } = &small else { panic!("{small}") };
        assert_eq!(*fits_tokens, Some(25 * 16), "0.05 GiB are left");
        let fits = Demand { least_blocks: 25, gpu_memory_utilization: 0.12, ..demand() };
        assert_eq!(kv_budget(&fits).unwrap().num_blocks, 25);
        let full = kv_budget(&Demand { free_bytes: 60 * GIB, ..demand() }).unwrap_err();
        let CudaError::CardFull { free_bytes, fitting_utilization, .. } = &full else { panic!("{full}") };
        assert_eq!((*free_bytes, *fitting_utilization), (60 * GIB, Some(0.43)));
        let hopeless = kv_budget(&Demand { free_bytes: 9 * GIB, ..demand() }).unwrap_err();
        assert!(matches!(hopeless, CudaError::CardFull { fitting_utilization: None, .. }), "{hopeless}");
    }

    #[test]
    fn a_model_without_a_cache_needs_no_blocks() {
        let budget = kv_budget(&Demand { block_bytes: 0, least_blocks: 0, ..demand() }).unwrap();
        assert_eq!((budget.num_blocks, budget.kv_cache_bytes), (0, 0));
    }
}
