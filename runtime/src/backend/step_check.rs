//! A step is checked before it runs: a scheduler's mistake becomes an error that names it, not a panic in a kernel.

use crate::engine::{BackendInfo, StepBatch, StepSequence};

/// Limits that a step must keep.
#[derive(Debug, Clone, Copy)]
pub struct StepLimits {
    pub max_num_batched_tokens: usize,
    /// The model keeps a cache: slots and block tables are used.
    pub cached: bool,
    /// Output rows of the step before whose tokens this one may name (see `StepBatch::token_ids`).
    pub previous_outputs: usize,
}

/// What is wrong with `batch`, if anything.
pub fn check(batch: &StepBatch, info: &BackendInfo, limits: StepLimits) -> Result<(), String> {
    let tokens = batch.token_ids.len();
    if tokens == 0 {
        return Err("the step has no tokens".into());
    }
    if tokens > limits.max_num_batched_tokens {
        return Err(format!("the step has {tokens} tokens, at most {} fit", limits.max_num_batched_tokens));
    }
    if batch.positions.len() != tokens {
        return Err(format!("{tokens} tokens and {} positions", batch.positions.len()));
    }
    let is_known = |id: u32| (id as usize) < info.vocab_size || (!id as usize) < limits.previous_outputs;
    if let Some(id) = batch.token_ids.iter().find(|&&id| !is_known(id)) {
        return Err(format!("token id {id} is outside the vocabulary of {}", info.vocab_size));
    }
    if let Some(position) = batch.positions.iter().find(|&&p| p as usize >= info.max_model_len) {
        return Err(format!("position {position} is outside the model's {} positions", info.max_model_len));
    }
    if limits.cached {
        check_slots(batch, info)?;
    }
    let mut next = 0;
    for sequence in &batch.sequences {
        if sequence.query_start != next || sequence.query_len == 0 {
            return Err(format!("sequence rows {}+{} do not follow {next}", sequence.query_start, sequence.query_len));
        }
        next += sequence.query_len;
        check_sequence(batch, info, limits, sequence)?;
    }
    if next == tokens { Ok(()) } else { Err(format!("sequences cover {next} of {tokens} tokens")) }
}

fn check_slots(batch: &StepBatch, info: &BackendInfo) -> Result<(), String> {
    let slots = info.num_blocks * info.block_size;
    if batch.slot_mapping.len() != batch.token_ids.len() {
        return Err(format!("{} tokens and {} slots", batch.token_ids.len(), batch.slot_mapping.len()));
    }
    match batch.slot_mapping.iter().find(|&&slot| slot as usize >= slots) {
        Some(slot) => Err(format!("slot {slot} is outside the pool of {slots}")),
        None => Ok(()),
    }
}

fn check_sequence(
    batch: &StepBatch,
    info: &BackendInfo,
    limits: StepLimits,
    sequence: &StepSequence,
) -> Result<(), String> {
    let (context_len, query_len) = (sequence.context_len, sequence.query_len);
    if context_len < query_len || context_len > info.max_model_len {
        return Err(format!("a context of {context_len} tokens with {query_len} in the step"));
    }
    if !limits.cached {
        return match context_len == query_len {
            true => Ok(()),
            false => Err("a model without a cache takes each text whole".into()),
        };
    }
    let Some(table) = batch.block_tables.get(sequence.block_table.clone()) else {
        return Err(format!("block table {:?} is outside the step's tables", sequence.block_table));
    };
    if table.len() * info.block_size < context_len {
        return Err(format!("{} blocks for a context of {context_len} tokens", table.len()));
    }
    if table.len() > info.max_model_len.div_ceil(info.block_size) {
        return Err(format!("a block table of {} blocks, longer than the longest sequence", table.len()));
    }
    match table.iter().find(|&&block| block as usize >= info.num_blocks) {
        Some(block) => Err(format!("block {block} is outside the pool of {}", info.num_blocks)),
        None => Ok(()),
    }
}
