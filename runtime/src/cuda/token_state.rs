//! Which slot of the device's token counts belongs to which sequence.
//!
//! Penalties need the tokens of prompt and output so far; the device keeps their counts in a slot and raises them itself
//! when it chooses a token. A slot is written from scratch when a sequence starts (or comes back after preemption).

use crate::engine::{RowSampling, SamplingParams};
use std::sync::Arc;

/// What a slot holds the counts of.
#[derive(Debug)]
struct Owner {
    /// Names the sequence. Held, so that its address is not given to another while the slot is its own. Parameters and
    /// seed would not do: the prompts of one request share both.
    prompt_token_ids: Arc<[u32]>,
    /// Tokens counted: the step that comes next.
    next_step: u64,
    /// Tokens marked as biased or forbidden, in that order: what is still forbidden gets less.
    listed: Vec<u32>,
    last_used: u64,
}

#[derive(Debug)]
pub struct TokenStateSlots {
    owners: Vec<Option<Owner>>,
    clock: u64,
}

/// A row's slot, and whether its counts must be written first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotUse {
    pub slot: u32,
    pub reset: bool,
}

impl TokenStateSlots {
    /// As many as sequences may run.
    pub fn new(count: usize) -> Self {
        Self { owners: (0..count).map(|_| None).collect(), clock: 0 }
    }

    /// A step begins: slots used in it are not given to others.
    pub fn begin_step(&mut self) {
        self.clock += 1;
    }

    /// The slot for a row that chooses its token now; `listed` are its biased and forbidden tokens. `None` when the row
    /// needs none, or when all slots are taken in this very step.
    pub fn slot_for(&mut self, row: &RowSampling, listed: &[u32]) -> Option<SlotUse> {
        if !needs_state(&row.params) && listed.is_empty() {
            return None;
        }
        let same = |o: &Owner| Arc::ptr_eq(&o.prompt_token_ids, &row.prompt_token_ids);
        let known = self.owners.iter().position(|o| o.as_ref().is_some_and(same));
        let oldest = || (0..self.owners.len()).min_by_key(|&i| self.owners[i].as_ref().map_or(0, |o| o.last_used));
        let slot = known.or_else(oldest)?;
        let owner = &mut self.owners[slot];
        let taken = |o: &Owner| o.last_used == self.clock;
        if owner.as_ref().is_some_and(taken) {
            return None;
        }
        let goes_on = |o: &Owner| same(o) && o.next_step == row.step && o.listed.starts_with(listed);
        let reset = !owner.as_ref().is_some_and(goes_on);
        let listed = match owner.take() {
            Some(owner) if !reset => owner.listed,
            _ => listed.to_vec(),
        };
        let prompt_token_ids = row.prompt_token_ids.clone();
        *owner = Some(Owner { prompt_token_ids, next_step: row.step + 1, listed, last_used: self.clock });
        Some(SlotUse { slot: slot as u32, reset })
    }
}

fn needs_state(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sequence whose next choice is number `step`.
    fn row(params: &SamplingParams, sequence: &Arc<[u32]>, step: u64) -> RowSampling {
        RowSampling {
            params: Arc::new(params.clone()),
            seed: 7,
            step,
            prompt_token_ids: sequence.clone(),
            output_token_ids: Vec::new(),
            forbidden_token_ids: Vec::new(),
        }
    }

    fn penalised() -> SamplingParams {
        SamplingParams { presence_penalty: 0.5, ..SamplingParams::default() }
    }

    fn sequences<const N: usize>() -> [Arc<[u32]>; N] {
        std::array::from_fn(|_| Arc::from([]))
    }

    fn used(slots: &mut TokenStateSlots, row: &RowSampling, listed: &[u32]) -> Option<(u32, bool)> {
        slots.begin_step();
        slots.slot_for(row, listed).map(|s| (s.slot, s.reset))
    }

    #[test]
    fn a_sequence_is_written_once_and_then_goes_on() {
        let (mut slots, params, [a, b, c]) = (TokenStateSlots::new(2), penalised(), sequences());
        assert_eq!(used(&mut slots, &row(&params, &a, 0), &[]), Some((0, true)));
        assert_eq!(used(&mut slots, &row(&params, &a, 1), &[]), Some((0, false)));
        assert_eq!(used(&mut slots, &row(&params, &b, 0), &[]), Some((1, true)), "another sequence of the request");
        assert_eq!(used(&mut slots, &row(&params, &a, 2), &[]), Some((0, false)));
        assert_eq!(used(&mut slots, &row(&params, &a, 9), &[]), Some((0, true)), "steps were missed");
        assert_eq!(used(&mut slots, &row(&params, &c, 1), &[]), Some((1, true)), "the oldest makes room");
    }

    #[test]
    fn rows_without_penalties_need_no_slot_unless_tokens_are_biased() {
        let (mut slots, plain, [a]) = (TokenStateSlots::new(1), SamplingParams::default(), sequences());
        assert_eq!(used(&mut slots, &row(&plain, &a, 0), &[]), None);
        assert_eq!(used(&mut slots, &row(&plain, &a, 0), &[5]), Some((0, true)));
        assert_eq!(used(&mut slots, &row(&plain, &a, 1), &[5]), Some((0, false)));
        assert_eq!(used(&mut slots, &row(&plain, &a, 2), &[5, 6]), Some((0, true)), "a token was not marked yet");
    }

    /// Two prompts of one request have the same parameters and, when it names one, the same seed.
    #[test]
    fn sequences_that_share_everything_but_their_tokens_have_slots_of_their_own() {
        let (mut slots, [a, b]) = (TokenStateSlots::new(2), sequences());
        let params = Arc::new(penalised());
        for step in 0..3 {
            slots.begin_step();
            let mut slot_of = |sequence| {
                let row = RowSampling { params: params.clone(), ..row(&params, sequence, step) };
                slots.slot_for(&row, &[]).map(|s| (s.slot, s.reset))
            };
            assert_eq!((slot_of(&a), slot_of(&b)), (Some((0, step == 0)), Some((1, step == 0))));
        }
    }

    #[test]
    fn a_slot_is_not_given_twice_in_a_step() {
        let (mut slots, params, [a, b]) = (TokenStateSlots::new(1), penalised(), sequences());
        slots.begin_step();
        assert!(slots.slot_for(&row(&params, &a, 0), &[]).is_some());
        assert_eq!(slots.slot_for(&row(&params, &b, 0), &[]), None);
    }
}
