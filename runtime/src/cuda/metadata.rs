//! What the kernels must know of a step, packed into one buffer of 32-bit words with a layout that depends only on the
//! step's padded sizes: a captured graph finds everything where it was when it was captured.

use super::buckets;
use crate::engine::StepBatch;

/// A slot that is not written: padding rows have it.
const NO_SLOT: i32 = -1;

/// Padded sizes of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StepShape {
    /// Rows of activations.
    pub tokens: usize,
    /// Sequences that the attention of decode rows covers: the first rows of the step, one each.
    pub decodes: usize,
    /// Sequences in all.
    pub sequences: usize,
    /// Rows of logits.
    pub outputs: usize,
}

/// Offsets in words of each array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetadataLayout {
    pub token_ids: usize,
    pub positions: usize,
    pub slot_mapping: usize,
    /// `[sequences + 1]`
    pub query_start: usize,
    pub context_len: usize,
    /// Row of the last token of each sequence that wants output.
    pub output_rows: usize,
    /// `[outputs]` of sampling parameters, see `sampling`.
    pub sample_rows: usize,
    /// Lists of biased tokens begin here; as long as they are in this step.
    pub words: usize,
}

/// Words of one row of sampling parameters (`SampleRow` in kernels/logits.cuh).
pub const SAMPLE_ROW_WORDS: usize = 16;
/// Arrays begin at multiples of 64 bytes.
const ALIGNMENT_WORDS: usize = 16;

impl MetadataLayout {
    pub fn new(shape: &StepShape) -> Self {
        let mut words = 0;
        let mut take = |count: usize| {
            let at = words;
            words += count.next_multiple_of(ALIGNMENT_WORDS);
            at
        };
        Self {
            token_ids: take(shape.tokens),
            positions: take(shape.tokens),
            slot_mapping: take(shape.tokens),
            query_start: take(shape.sequences + 1),
            context_len: take(shape.sequences),
            output_rows: take(shape.outputs),
            sample_rows: take(shape.outputs * SAMPLE_ROW_WORDS),
            words,
        }
    }
}

/// Whether a step is all decodes: one token of each sequence, each of which wants output.
pub fn is_pure_decode(batch: &StepBatch) -> bool {
    batch.sequences.iter().all(|s| s.query_len == 1 && s.wants_output)
}

/// Sequences at the front of the step that have one token each. Attention treats them as decodes, whatever they are.
pub fn leading_decodes(batch: &StepBatch) -> usize {
    batch.sequences.iter().take_while(|s| s.query_len == 1).count()
}

/// The padded sizes of a step that is not replayed.
pub fn eager_shape(batch: &StepBatch, most_tokens: usize, output_buckets: &[usize]) -> StepShape {
    let outputs = batch.sequences.iter().filter(|s| s.wants_output).count();
    StepShape {
        tokens: buckets::padded_tokens(batch.token_ids.len(), most_tokens),
        decodes: leading_decodes(batch),
        sequences: batch.sequences.len(),
        outputs: buckets::bucket_for(output_buckets, outputs.max(1)).unwrap_or(outputs),
    }
}

/// Writes all but the sampling parameters. `words` has the layout's length.
pub fn pack(batch: &StepBatch, shape: &StepShape, layout: &MetadataLayout, words: &mut [i32]) {
    copy(&mut words[layout.token_ids..], shape.tokens, batch.token_ids.iter().map(|&t| t as i32), 0);
    copy(&mut words[layout.positions..], shape.tokens, batch.positions.iter().map(|&p| p as i32), 0);
    copy(&mut words[layout.slot_mapping..], shape.tokens, batch.slot_mapping.iter().map(|&s| s as i32), NO_SLOT);
    let end = batch.token_ids.len() as i32;
    let starts = batch.sequences.iter().map(|s| s.query_start as i32);
    copy(&mut words[layout.query_start..], shape.sequences + 1, starts, end);
    let lengths = batch.sequences.iter().map(|s| s.context_len as i32);
    copy(&mut words[layout.context_len..], shape.sequences, lengths, 0);
    let outputs = batch.sequences.iter().filter(|s| s.wants_output);
    let rows = outputs.map(|s| (s.query_start + s.query_len) as i32 - 1);
    copy(&mut words[layout.output_rows..], shape.outputs, rows, -1);
}

fn copy(words: &mut [i32], count: usize, values: impl Iterator<Item = i32>, padding: i32) {
    let padded = values.chain(std::iter::repeat(padding));
    words[..count].iter_mut().zip(padded).for_each(|(word, value)| *word = value);
}

/// Block tables as rows of `width`, the longest of the step, ready for a copy by rows. Returns the width.
pub fn pack_block_tables(batch: &StepBatch, words: &mut Vec<i32>) -> usize {
    let width = batch.sequences.iter().map(|s| s.block_table.len()).max().unwrap_or(0);
    words.clear();
    for sequence in &batch.sequences {
        let table = &batch.block_tables[sequence.block_table.clone()];
        words.extend(table.iter().map(|&b| b as i32));
        words.extend(std::iter::repeat_n(0, width - table.len()));
    }
    width
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::engine::StepSequence;

    fn batch(lengths: &[(usize, usize, bool)]) -> StepBatch {
        let mut batch = StepBatch::default();
        for (i, &(query_len, context_len, wants_output)) in lengths.iter().enumerate() {
            let (query_start, table) = (batch.token_ids.len(), batch.block_tables.len());
            for position in context_len - query_len..context_len {
                batch.token_ids.push(100 * i as u32 + position as u32);
                batch.positions.push(position as u32);
                batch.slot_mapping.push(1000 + position as u32);
            }
            batch.block_tables.extend((0..context_len.div_ceil(16)).map(|b| (10 * i + b) as u32));
            let block_table = table..batch.block_tables.len();
            batch.sequences.push(StepSequence {
                query_start,
                query_len,
                context_len,
                block_table,
                wants_output,
                sampling: None,
            });
        }
        batch
    }

    fn packed(batch: &StepBatch, shape: &StepShape) -> (MetadataLayout, Vec<i32>) {
        let layout = MetadataLayout::new(shape);
        let mut words = vec![7777; layout.words];
        pack(batch, shape, &layout, &mut words);
        (layout, words)
    }

    #[test]
    fn a_decode_step_padded_to_its_bucket() {
        let step = batch(&[(1, 5, true), (1, 40, true), (1, 1, true)]);
        assert!(is_pure_decode(&step));
        let shape = StepShape { tokens: 4, decodes: 4, sequences: 4, outputs: 4 };
        let (at, words) = packed(&step, &shape);
        assert_eq!(words[at.token_ids..][..4], [4, 139, 200, 0]);
        assert_eq!(words[at.positions..][..4], [4, 39, 0, 0]);
        assert_eq!(words[at.slot_mapping..][..4], [1004, 1039, 1000, -1]);
        assert_eq!(words[at.query_start..][..5], [0, 1, 2, 3, 3]);
        assert_eq!(words[at.context_len..][..4], [5, 40, 1, 0], "a padding row has no context");
        assert_eq!(words[at.output_rows..][..4], [0, 1, 2, -1]);
    }

    #[test]
    fn a_mixed_step_has_decodes_first_and_skips_rows_without_output() {
        let step = batch(&[(1, 20, true), (7, 7, false), (3, 35, true)]);
        assert!(!is_pure_decode(&step));
        let shape = eager_shape(&step, 64, &[1, 2, 4]);
        assert_eq!(shape, StepShape { tokens: 16, decodes: 1, sequences: 3, outputs: 2 });
        let (at, words) = packed(&step, &shape);
        assert_eq!(words[at.query_start..][..4], [0, 1, 8, 11]);
        assert_eq!(words[at.output_rows..][..2], [0, 10]);
        assert_eq!(words[at.slot_mapping + 11..][..5], [-1; 5]);
    }

    #[test]
    fn a_step_without_outputs_has_an_empty_row_of_them() {
        let step = batch(&[(9, 9, false)]);
        let shape = eager_shape(&step, 64, &[1, 2, 4]);
        assert_eq!(shape.outputs, 1);
        let (at, words) = packed(&step, &shape);
        assert_eq!(words[at.output_rows], -1);
    }

    #[test]
    fn the_layout_depends_on_the_padded_shape_alone() {
        let shape = StepShape { tokens: 8, decodes: 8, sequences: 8, outputs: 8 };
        let layout = MetadataLayout::new(&shape);
        assert_eq!(layout, MetadataLayout::new(&shape));
        let starts = [layout.token_ids, layout.positions, layout.slot_mapping, layout.query_start, layout.context_len];
        assert!(starts.is_sorted() && starts.iter().all(|s| s % ALIGNMENT_WORDS == 0));
    }

    #[test]
    fn block_tables_are_rows_of_the_longest() {
        let step = batch(&[(1, 20, true), (1, 3, true), (1, 49, true)]);
        let mut words = Vec::new();
        assert_eq!(pack_block_tables(&step, &mut words), 4);
        assert_eq!(words, [0, 1, 0, 0, 10, 0, 0, 0, 20, 21, 22, 23]);
    }
}
