//! Which sequences run in the next step, with how many tokens each. Integers only: no tensors, clocks or channels.
//!
//! Continuous batching as in vLLM's `v1/core/sched/scheduler.py`: one token budget per step, decodes first, the rest of
//! the budget for (chunks of) prompts. A prompt gets all its blocks when it is let in, so only decodes can run out of
//! them; then the youngest running sequence gives its blocks back and is computed again later.
//!
//! Steps may be under way while the next is planned. Their tokens count as computed, the one that they choose has a place
//! without a value, and no block that they use changes hands before they are over.

use super::block_manager::BlockManager;
use super::sequence::{Sequence, SequenceId, SequenceKind};
use std::collections::VecDeque;

#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScheduledRow {
    pub id: SequenceId,
    /// Tokens to compute now.
    pub query_len: usize,
    /// Its computed tokens when the step is over.
    pub context_len: usize,
}

/// The plan of one step. Kept between steps to reuse its memory.
#[derive(Debug, Default)]
pub struct ScheduledStep {
    /// Rows of one token first (decodes, and the odd last token of a prompt), then prefill chunks.
    pub rows: Vec<ScheduledRow>,
    num_single: usize,
    pub num_tokens: usize,
    /// Sequences that left the waiting queue.
    pub admitted: Vec<SequenceId>,
    /// Sequences that lost their blocks and went back to the queue.
    pub preempted: Vec<SequenceId>,
}

impl ScheduledStep {
    fn clear(&mut self) {
        self.rows.clear();
        self.num_single = 0;
        self.num_tokens = 0;
        self.admitted.clear();
        self.preempted.clear();
    }

    /// Rows of one token.
    pub fn num_single(&self) -> usize {
        self.num_single
    }

    fn push(&mut self, sequence: &Sequence, query_len: usize) {
        let context_len = sequence.num_computed_tokens + query_len;
        let row = ScheduledRow { id: sequence.id, query_len, context_len };
        if query_len == 1 {
            self.rows.insert(self.num_single, row);
            self.num_single += 1;
        } else {
            self.rows.push(row);
        }
        self.num_tokens += query_len;
    }
}

#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    blocks: BlockManager,
    /// Both in order of arrival. The youngest running one is preempted first, and then is older than all that wait.
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// Over, but with rows in steps under way.
    leaving: Vec<Sequence>,
    steps_in_flight: usize,
}

/// Nothing more can be planned before they are over.
struct StepsInFlight;

/// What to do with a waiting sequence.
enum Admission {
    Admit,
    /// A running sequence computes its next block right now: wait for that instead of computing it twice.
    Defer,
    /// No room. Later ones do not overtake.
    Stop,
}

impl Scheduler {
    pub fn new(limits: SchedulerLimits, blocks: BlockManager) -> Self {
        Self { limits, blocks, waiting: VecDeque::new(), running: Vec::new(), leaving: Vec::new(), steps_in_flight: 0 }
    }

    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    pub fn has_work(&self) -> bool {
        !self.running.is_empty() || !self.waiting.is_empty()
    }

    pub fn add(&mut self, mut sequence: Sequence) {
        if sequence.kind == SequenceKind::Generate {
            self.blocks.extend_hashes(&sequence.token_ids, &mut sequence.block_hashes);
        }
        self.enqueue(sequence);
    }

    /// A running sequence.
    pub fn sequence(&self, id: SequenceId) -> Option<&Sequence> {
        self.running.binary_search_by_key(&id, |sequence| sequence.id).ok().map(|at| &self.running[at])
    }

    /// Plan the next step. With work, and no step under way, there is always at least one row. No rows while steps are
    /// under way: what can come next is known only when the oldest of them is over.
    pub fn schedule(&mut self, step: &mut ScheduledStep) {
        step.clear();
        if self.schedule_decodes(step).is_err() {
            return step.clear();
        }
        self.schedule_running_prefills(step);
        self.admit_waiting(step);
    }

    /// The step is under way.
    pub fn begin(&mut self, step: &ScheduledStep) {
        self.steps_in_flight += 1;
        let mut output_row = 0;
        for row in &step.rows {
            let Some(sequence) = find(&mut self.running, row.id) else { continue };
            sequence.steps_in_flight += 1;
            sequence.num_computed_tokens = row.context_len;
            if sequence.num_uncomputed_tokens() == 0 {
                sequence.expect_token(output_row);
                output_row += 1;
            }
        }
    }

    /// The oldest step under way ran: its tokens are in the cache, and full blocks can be found by others.
    pub fn complete(&mut self, step: &ScheduledStep) {
        for row in &step.rows {
            let Some(sequence) = find(&mut self.running, row.id) else { continue };
            let full = row.context_len.checked_div(self.blocks.block_size()).unwrap_or(0);
            for index in sequence.num_published_blocks..full.min(sequence.block_hashes.len()) {
                self.blocks.publish(sequence.block_table[index], sequence.block_hashes[index]);
                sequence.num_published_blocks = index + 1;
            }
        }
        self.end(step);
    }

    /// The oldest step under way is over, well or not: the blocks of sequences that were waiting to leave are free.
    pub fn end(&mut self, step: &ScheduledStep) {
        self.steps_in_flight -= 1;
        for row in &step.rows {
            if let Some(sequence) = find(&mut self.running, row.id) {
                sequence.steps_in_flight -= 1;
            } else if let Some(at) = self.leaving.iter().position(|sequence| sequence.id == row.id) {
                self.leaving[at].steps_in_flight -= 1;
                if self.leaving[at].steps_in_flight == 0 {
                    let mut sequence = self.leaving.swap_remove(at);
                    self.blocks.release(&mut sequence.block_table);
                }
            }
        }
    }

    /// A running sequence got its next token.
    pub fn append_token(&mut self, id: SequenceId, token_id: u32) {
        if let Some(sequence) = find(&mut self.running, id) {
            sequence.append_token(token_id);
            let known = sequence.token_ids.len() - sequence.num_pending;
            self.blocks.extend_hashes(&sequence.token_ids[..known], &mut sequence.block_hashes);
        }
    }

    /// Forget a sequence, running or waiting, and free its blocks: at once, or when no step under way uses them.
    pub fn remove(&mut self, id: SequenceId) {
        if let Ok(at) = self.running.binary_search_by_key(&id, |sequence| sequence.id) {
            let mut sequence = self.running.remove(at);
            if sequence.steps_in_flight > 0 {
                return self.leaving.push(sequence);
            }
            self.blocks.release(&mut sequence.block_table);
        } else if let Ok(at) = self.waiting.binary_search_by_key(&id, |sequence| sequence.id) {
            self.waiting.remove(at);
        }
    }

    /// # Errors
    /// A sequence must be preempted, and steps are under way: they may end some and free blocks, and must be over first.
    fn schedule_decodes(&mut self, step: &mut ScheduledStep) -> Result<(), StepsInFlight> {
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            if !sequence.is_decoding() {
                at += 1;
                continue;
            }
            let num_tokens = sequence.token_ids.len();
            if self.blocks.grow(&mut sequence.block_table, num_tokens).is_ok() {
                step.push(sequence, 1);
                at += 1;
            } else if self.steps_in_flight > 0 {
                return Err(StepsInFlight);
            } else {
                self.preempt_youngest(step);
            }
        }
        Ok(())
    }

    fn preempt_youngest(&mut self, step: &mut ScheduledStep) {
        if let Some(mut sequence) = self.running.pop() {
            self.blocks.release(&mut sequence.block_table);
            sequence.reset();
            step.preempted.push(sequence.id);
            self.enqueue(sequence);
        }
    }

    fn enqueue(&mut self, sequence: Sequence) {
        let at = self.waiting.partition_point(|other| other.id < sequence.id);
        self.waiting.insert(at, sequence);
    }

    fn schedule_running_prefills(&self, step: &mut ScheduledStep) {
        for sequence in self.running.iter().filter(|sequence| !sequence.is_decoding()) {
            let query_len = sequence.num_uncomputed_tokens().min(self.budget_left(step));
            if query_len > 0 {
                step.push(sequence, query_len);
            }
        }
    }

    fn budget_left(&self, step: &ScheduledStep) -> usize {
        self.limits.max_num_batched_tokens.saturating_sub(step.num_tokens)
    }

    fn admit_waiting(&mut self, step: &mut ScheduledStep) {
        let mut at = 0;
        while at < self.waiting.len().min(self.limits.max_num_seqs) {
            if self.running.len() >= self.limits.max_num_seqs || self.budget_left(step) == 0 {
                return;
            }
            match self.admission(&self.waiting[at], self.budget_left(step)) {
                Admission::Admit => self.admit(at, step),
                Admission::Defer => at += 1,
                Admission::Stop => return,
            }
        }
    }

    fn admission(&self, sequence: &Sequence, budget: usize) -> Admission {
        if sequence.kind == SequenceKind::Encode && sequence.token_ids.len() > budget {
            return Admission::Stop;
        }
        let usable = &sequence.block_hashes[..usable_blocks(sequence, self.blocks.block_size())];
        let hits = self.blocks.find_prefix(usable).count();
        if usable.get(hits).is_some_and(|hash| self.is_being_computed(hits, *hash)) {
            return Admission::Defer;
        }
        let total = self.blocks.blocks_for(sequence.token_ids.len());
        match self.blocks.free_after(self.blocks.find_prefix(usable), total) {
            Some(left) if left >= self.watermark() || self.running.is_empty() => Admission::Admit,
            _ => Admission::Stop,
        }
    }

    fn is_being_computed(&self, index: usize, hash: u128) -> bool {
        self.running
            .iter()
            .any(|other| other.num_published_blocks <= index && other.block_hashes.get(index) == Some(&hash))
    }

    /// Blocks kept free when a sequence is let in, so that it does not push another out at once: 1 %.
    fn watermark(&self) -> usize {
        self.blocks.num_blocks() / 100
    }

    fn admit(&mut self, at: usize, step: &mut ScheduledStep) {
        let Some(mut sequence) = self.waiting.remove(at) else { return };
        let block_size = self.blocks.block_size();
        let usable = usable_blocks(&sequence, block_size);
        self.blocks.take_prefix(&sequence.block_hashes[..usable], &mut sequence.block_table);
        let cached_blocks = sequence.block_table.len();
        sequence.num_published_blocks = cached_blocks;
        sequence.num_computed_tokens = cached_blocks * block_size;
        sequence.num_cached_tokens.get_or_insert(sequence.num_computed_tokens);
        let grown = self.blocks.grow(&mut sequence.block_table, sequence.token_ids.len());
        debug_assert!(grown.is_ok(), "admission counted the blocks");
        step.push(&sequence, sequence.num_uncomputed_tokens().min(self.budget_left(step)));
        step.admitted.push(sequence.id);
        let place = self.running.partition_point(|other| other.id < sequence.id);
        self.running.insert(place, sequence);
    }
}

fn find(running: &mut [Sequence], id: SequenceId) -> Option<&mut Sequence> {
    running.binary_search_by_key(&id, |sequence| sequence.id).ok().map(|at| &mut running[at])
}

/// Blocks that may come from the cache: at least one token is left to compute, or there would be no output.
fn usable_blocks(sequence: &Sequence, block_size: usize) -> usize {
    let blocks = sequence.token_ids.len().saturating_sub(1).checked_div(block_size).unwrap_or(0);
    blocks.min(sequence.block_hashes.len())
}

#[cfg(test)]
mod tests;
