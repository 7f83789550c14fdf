//! A model under plan, with what has been worked out for it: the same sizes are asked for on one card after another.

use super::PlanRequest;
use crate::memory::{KvLayout, SlidingLayers, Term, own_terms};
use crate::model::{DType, Program};
use std::cell::RefCell;

/// For requests that differ in cards, limits and cache, not in the model.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) program: Program,
    terms: RefCell<Vec<(TermsOf, Vec<Term>)>>,
    layouts: RefCell<Vec<(LayoutOf, KvLayout)>>,
}

/// TP size, tokens of a step, sequences of a step.
type TermsOf = (u64, u64, u64);
/// TP size, type of the cache, tokens of a block, what windows leave behind.
type LayoutOf = (u64, DType, u64, SlidingLayers);

impl Subject {
    pub(super) fn of(request: &PlanRequest<'_>) -> Self {
        let program = request.demand.engine.program(request.spec);
        Self { program, terms: RefCell::default(), layouts: RefCell::default() }
    }

    /// What the bundled runtime takes on a card beside its KV pool.
    pub(super) fn terms(&self, request: &PlanRequest<'_>, tensor_parallel_size: u64) -> Vec<Term> {
        let limits = &request.limits;
        let key = (tensor_parallel_size, limits.max_num_batched_tokens, limits.max_num_seqs);
        known(&self.terms, key, || {
            own_terms(&self.program, request.spec, request.weights, tensor_parallel_size, limits)
        })
    }

    pub(super) fn layout(&self, request: &PlanRequest<'_>, tensor_parallel_size: u64) -> KvLayout {
        let dtype = request.kv_cache_dtype.resolve(request.spec);
        let key = (tensor_parallel_size, dtype, request.limits.block_size_tokens, request.sliding);
        known(&self.layouts, key, || request.layout(tensor_parallel_size))
    }
}

/// A few sizes at most: they are looked through.
fn known<K: PartialEq, V: Clone>(known: &RefCell<Vec<(K, V)>>, key: K, work_out: impl FnOnce() -> V) -> V {
    if let Some((_, value)) = known.borrow().iter().find(|(other, _)| *other == key) {
        return value.clone();
    }
    let value = work_out();
    known.borrow_mut().push((key, value.clone()));
    value
}
