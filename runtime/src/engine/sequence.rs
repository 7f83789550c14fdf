//! One sequence as the scheduler sees it: tokens, how many of them are computed, and the blocks they are in.

use super::block_manager::BlockHash;

/// Grows by one with every request, so it also says who came first.
pub type SequenceId = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SequenceKind {
    /// Token by token; its prompt may be computed in chunks.
    Generate,
    /// One vector for the whole prompt, which is computed in one step and leaves nothing in the prefix cache.
    Encode,
}

#[derive(Debug)]
pub struct Sequence {
    pub id: SequenceId,
    pub kind: SequenceKind,
    /// Prompt, then output. The last `num_pending` are not known yet: `!row`, as in `StepBatch::token_ids`.
    pub token_ids: Vec<u32>,
    pub num_pending: usize,
    /// No token is chosen after one that makes the sequence this long.
    pub max_len: usize,
    /// Steps under way that it has rows in: its blocks are in use until they are over.
    pub steps_in_flight: usize,
    /// Tokens whose K and V are in the cache once the steps under way are over.
    pub num_computed_tokens: usize,
    pub block_table: Vec<u32>,
    /// Of every full block of `token_ids`; empty without prefix caching.
    pub block_hashes: Vec<BlockHash>,
    /// Blocks that others may find by their hash.
    pub num_published_blocks: usize,
    /// Tokens found in the prefix cache when it was first let in.
    pub num_cached_tokens: Option<usize>,
}

impl Sequence {
    pub fn new(id: SequenceId, kind: SequenceKind, prompt_token_ids: Vec<u32>) -> Self {
        Self {
            id,
            kind,
            token_ids: prompt_token_ids,
            num_pending: 0,
            max_len: usize::MAX,
            steps_in_flight: 0,
            num_computed_tokens: 0,
            block_table: Vec::new(),
            block_hashes: Vec::new(),
            num_published_blocks: 0,
            num_cached_tokens: None,
        }
    }

    /// Tokens that must be computed before the next one can be chosen.
    pub fn num_uncomputed_tokens(&self) -> usize {
        self.token_ids.len() - self.num_computed_tokens
    }

    /// A running sequence with one token to go is decoding; any other is in prefill.
    pub fn is_decoding(&self) -> bool {
        self.num_uncomputed_tokens() == 1
    }

    /// Output row `row` of a step that is now under way chooses its next token. Nothing follows a last token, so that
    /// one needs no place.
    pub fn expect_token(&mut self, row: usize) {
        if self.kind == SequenceKind::Generate && self.token_ids.len() + 1 < self.max_len {
            self.token_ids.push(!(row as u32));
            self.num_pending += 1;
        }
    }

    /// The next token is known.
    pub fn append_token(&mut self, token_id: u32) {
        if self.num_pending == 0 {
            return self.token_ids.push(token_id);
        }
        let at = self.token_ids.len() - self.num_pending;
        self.token_ids[at] = token_id;
        self.num_pending -= 1;
    }

    /// Forget what was computed; the blocks must have been released.
    pub fn reset(&mut self) {
        debug_assert!(self.block_table.is_empty() && self.num_pending == 0 && self.steps_in_flight == 0);
        self.num_computed_tokens = 0;
        self.num_published_blocks = 0;
    }
}
