//! From the scheduler's integers to a [`StepBatch`], in buffers that live as long as the engine.

use super::sequence::Sequence;
use super::{RowSampling, StepBatch, StepSequence};

pub fn clear(batch: &mut StepBatch) {
    batch.token_ids.clear();
    batch.positions.clear();
    batch.slot_mapping.clear();
    batch.sequences.clear();
    batch.block_tables.clear();
}

/// Add the next `query_len` uncomputed tokens of a sequence.
pub fn push(
    batch: &mut StepBatch,
    sequence: &Sequence,
    query_len: usize,
    block_size: usize,
    sampling: Option<RowSampling>,
) {
    let query_start = batch.token_ids.len();
    let table_start = batch.block_tables.len();
    let positions = sequence.num_computed_tokens..sequence.num_computed_tokens + query_len;
    batch.token_ids.extend_from_slice(&sequence.token_ids[positions.clone()]);
    batch.positions.extend(positions.clone().map(|position| position as u32));
    if !sequence.block_table.is_empty() {
        batch.slot_mapping.extend(positions.clone().map(|position| {
            let block = sequence.block_table[position / block_size] as usize;
            (block * block_size + position % block_size) as u32
        }));
        batch.block_tables.extend_from_slice(&sequence.block_table);
    }
    batch.sequences.push(StepSequence {
        query_start,
        query_len,
        context_len: positions.end,
        block_table: table_start..batch.block_tables.len(),
        wants_output: positions.end == sequence.token_ids.len(),
        sampling,
    });
}

#[cfg(test)]
mod tests {
    use super::super::sequence::SequenceKind;
    use super::*;

    #[test]
    fn a_chunk_goes_to_the_slots_of_its_blocks() {
        let mut sequence = Sequence::new(0, SequenceKind::Generate, vec![10, 11, 12, 13, 14, 15]);
        sequence.block_table = vec![7, 2];
        sequence.num_computed_tokens = 2;
        let mut batch = StepBatch::default();
        push(&mut batch, &sequence, 3, 4, None);
        assert_eq!(batch.token_ids, [12, 13, 14]);
        assert_eq!(batch.positions, [2, 3, 4]);
        assert_eq!(batch.slot_mapping, [30, 31, 8]);
        assert_eq!(batch.block_tables, [7, 2]);
        assert_eq!((batch.sequences[0].context_len, batch.sequences[0].wants_output), (5, false));

        sequence.num_computed_tokens = 5;
        push(&mut batch, &sequence, 1, 4, None);
        assert_eq!(batch.slot_mapping, [30, 31, 8, 9]);
        let last = &batch.sequences[1];
        assert_eq!((last.query_start, last.context_len, last.wants_output), (3, 6, true));
        assert_eq!(last.block_table, 2..4);
    }

    #[test]
    fn a_model_without_a_cache_gets_no_slots() {
        let sequence = Sequence::new(0, SequenceKind::Encode, vec![1, 2, 3]);
        let mut batch = StepBatch::default();
        push(&mut batch, &sequence, 3, 0, None);
        assert!(batch.slot_mapping.is_empty() && batch.block_tables.is_empty());
        assert!(batch.sequences[0].wants_output);
    }
}
