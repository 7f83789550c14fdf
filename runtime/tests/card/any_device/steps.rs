//! Steps made by hand: what a scheduler would make of a few texts.

use super::{BLOCK_SIZE, Failure};
use mserve_runtime::engine::{RowOutput, RowSampling, SampledToken, SamplingParams, StepBatch, StepSequence};
use std::sync::Arc;

/// Sequences whose blocks lie scattered over the pool; no two share one.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    pub sequences: usize,
}

impl Places {
    /// Block `index` of a sequence. Not in order: a kernel that took blocks for contiguous would be seen.
    fn block(self, sequence: usize, index: usize) -> u32 {
        (index * self.sequences + (sequence + 3 * index) % self.sequences) as u32
    }

    /// Blocks that the pool must have for texts of this length.
    pub fn blocks(self, longest: usize) -> usize {
        longest.div_ceil(BLOCK_SIZE) * self.sequences
    }
}

/// `tokens[start..end]` of a text with everything before `start` already in the cache.
#[derive(Debug, Clone)]
pub struct Piece<'a> {
    pub sequence: usize,
    pub tokens: &'a [u32],
    pub start: usize,
    pub end: usize,
    /// `None`: nothing is wanted.
    pub sampling: Option<RowSampling>,
}

/// One step. Pieces of one token must come first.
pub fn batch(pieces: &[Piece<'_>], places: Places) -> StepBatch {
    let mut batch = StepBatch::default();
    for piece in pieces {
        let first_table = batch.block_tables.len();
        let block = |index| places.block(piece.sequence, index);
        batch.block_tables.extend((0..piece.end.div_ceil(BLOCK_SIZE)).map(block));
        batch.sequences.push(StepSequence {
            query_start: batch.token_ids.len(),
            query_len: piece.end - piece.start,
            context_len: piece.end,
            block_table: first_table..batch.block_tables.len(),
            wants_output: piece.sampling.is_some(),
            sampling: piece.sampling.clone(),
        });
        for position in piece.start..piece.end {
            batch.token_ids.push(piece.tokens[position]);
            batch.positions.push(position as u32);
            let slot = block(position / BLOCK_SIZE) as usize * BLOCK_SIZE + position % BLOCK_SIZE;
            batch.slot_mapping.push(slot as u32);
        }
    }
    batch
}

pub fn sampling(params: SamplingParams, seed: u64) -> RowSampling {
    RowSampling {
        params: Arc::new(params),
        seed,
        step: 0,
        prompt_token_ids: Arc::from([]),
        output_token_ids: Vec::new(),
        forbidden_token_ids: Vec::new(),
    }
}

/// With logprobs: of a row that wants nothing but its likeliest token a card may keep no logits, and checks look at them.
pub fn greedy() -> RowSampling {
    sampling(SamplingParams { temperature: 0.0, logprobs: Some(0), ..SamplingParams::default() }, 0)
}

pub fn random_tokens(seed: u64, len: usize, vocab: usize) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| random.u32(0..vocab as u32)).collect()
}

/// The tokens of a step's rows.
pub fn tokens(outputs: Vec<RowOutput>) -> Result<Vec<SampledToken>, Failure> {
    let token = |output| match output {
        RowOutput::Token(token) => Ok(token),
        RowOutput::Vector(_) => Err(Failure::from("a vector where a token was wanted")),
    };
    outputs.into_iter().map(token).collect()
}

/// By how much the likeliest token leads.
pub fn margin(token: &SampledToken) -> f32 {
    match token.top_logprobs.as_slice() {
        [first, second, ..] => first.logprob - second.logprob,
        _ => f32::INFINITY,
    }
}
