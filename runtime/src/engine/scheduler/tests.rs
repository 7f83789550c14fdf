#![allow(clippy::unwrap_used)]
use super::super::block_manager::PrefixCaching;
use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const BLOCK_SIZE: usize = 4;

fn scheduler(num_blocks: usize, max_num_seqs: usize, max_num_batched_tokens: usize) -> Scheduler {
    let blocks = BlockManager::new(num_blocks, BLOCK_SIZE, PrefixCaching::On { hash_seed: 7 });
    Scheduler::new(SchedulerLimits { max_num_seqs, max_num_batched_tokens }, blocks)
}

fn generate(id: SequenceId, prompt: impl IntoIterator<Item = u32>) -> Sequence {
    Sequence::new(id, SequenceKind::Generate, prompt.into_iter().collect())
}

/// A prompt that no other id shares a block with.
fn own_prompt(id: SequenceId, len: u32) -> Sequence {
    generate(id, (0..len).map(|at| id as u32 * 1000 + at))
}

fn plan(scheduler: &mut Scheduler) -> ScheduledStep {
    let mut step = ScheduledStep::default();
    scheduler.schedule(&mut step);
    step
}

fn rows(step: &ScheduledStep) -> Vec<(SequenceId, usize)> {
    step.rows.iter().map(|row| (row.id, row.query_len)).collect()
}

/// Plan and run a step in which every finished prompt or decode gets token 0.
fn run(scheduler: &mut Scheduler) -> Vec<(SequenceId, usize)> {
    let step = plan(scheduler);
    scheduler.begin(&step);
    scheduler.complete(&step);
    for row in &step.rows {
        if scheduler.sequence(row.id).unwrap().num_pending > 0 {
            scheduler.append_token(row.id, 0);
        }
    }
    rows(&step)
}

#[test]
fn decodes_come_first_and_prompts_take_the_rest_in_chunks() {
    let mut scheduler = scheduler(100, 8, 10);
    scheduler.add(own_prompt(0, 4));
    assert_eq!(run(&mut scheduler), [(0, 4)]);
    scheduler.add(own_prompt(1, 15));
    scheduler.add(own_prompt(2, 6));
    assert_eq!(run(&mut scheduler), [(0, 1), (1, 9)]);
    assert_eq!(run(&mut scheduler), [(0, 1), (1, 6), (2, 3)]);
    assert_eq!(run(&mut scheduler), [(0, 1), (1, 1), (2, 3)]);
    assert_eq!(run(&mut scheduler), [(0, 1), (1, 1), (2, 1)]);
}

#[test]
fn no_more_sequences_than_allowed() {
    let mut scheduler = scheduler(100, 2, 100);
    (0..3).for_each(|id| scheduler.add(own_prompt(id, 5)));
    assert_eq!(run(&mut scheduler), [(0, 5), (1, 5)]);
    assert_eq!(scheduler.waiting.len(), 1);
    scheduler.remove(0);
    assert_eq!(run(&mut scheduler), [(1, 1), (2, 5)]);
}

#[test]
fn the_youngest_gives_way_and_comes_back_before_those_that_never_ran() {
    let mut scheduler = scheduler(4, 8, 100);
    scheduler.add(own_prompt(0, 8));
    scheduler.add(own_prompt(1, 8));
    scheduler.add(own_prompt(2, 8));
    assert_eq!(run(&mut scheduler), [(0, 8), (1, 8)]);
    // Both need a fifth block.
    let step = plan(&mut scheduler);
    assert_eq!((rows(&step), step.preempted.clone(), step.admitted.len()), (vec![(0, 1)], vec![1], 0));
    scheduler.begin(&step);
    scheduler.complete(&step);
    scheduler.append_token(0, 0);
    // One free block: neither fits.
    assert_eq!(run(&mut scheduler), [(0, 1)]);
    scheduler.remove(0);
    // Its own first block is still cached; the second went to sequence 0, and the output token comes with it.
    let step = plan(&mut scheduler);
    assert_eq!(rows(&step), [(1, 5)]);
    assert_eq!(scheduler.sequence(1).unwrap().num_computed_tokens, 4);
    assert_eq!(
        scheduler.sequence(1).unwrap().num_cached_tokens,
        Some(0),
        "the hit of a second run is not the request's"
    );
}

#[test]
fn equal_prompts_at_once_are_computed_once() {
    let mut scheduler = scheduler(100, 8, 6);
    (0..3).for_each(|id| scheduler.add(generate(id, 0..10)));
    scheduler.add(own_prompt(3, 3));
    // 1 and 2 wait for what 0 computes; 3 does not wait for them.
    assert_eq!(run(&mut scheduler), [(0, 6)]);
    assert_eq!(run(&mut scheduler), [(0, 4), (3, 2)]);
    assert_eq!(run(&mut scheduler), [(0, 1), (3, 1), (1, 2), (2, 2)]);
    assert_eq!(scheduler.sequence(2).unwrap().num_cached_tokens, Some(8));
}

#[test]
fn waiting_for_a_prefix_ends_when_its_owner_goes() {
    let mut scheduler = scheduler(100, 8, 6);
    (0..2).for_each(|id| scheduler.add(generate(id, 0..20)));
    assert_eq!(run(&mut scheduler), [(0, 6)]);
    scheduler.remove(0);
    assert_eq!(run(&mut scheduler), [(1, 6)]);
    assert_eq!(scheduler.sequence(1).unwrap().num_cached_tokens, Some(4));
}

#[test]
fn prompts_to_encode_are_never_cut() {
    let mut scheduler = scheduler(0, 8, 10);
    for (id, len) in [(0, 6), (1, 6), (2, 4)] {
        scheduler.add(Sequence::new(id, SequenceKind::Encode, vec![1; len]));
    }
    assert_eq!(rows(&plan(&mut scheduler)), [(0, 6)]);
    scheduler.remove(0);
    assert_eq!(rows(&plan(&mut scheduler)), [(1, 6), (2, 4)]);
}

#[test]
fn a_little_of_the_pool_is_kept_for_those_that_run() {
    let mut scheduler = scheduler(200, 8, 10_000);
    scheduler.add(own_prompt(0, 4));
    scheduler.add(own_prompt(1, 198 * 4));
    assert_eq!(run(&mut scheduler), [(0, 4)]);
    scheduler.remove(0);
    // Alone it needs no such care.
    assert_eq!(run(&mut scheduler), [(1, 198 * 4)]);
}

#[derive(Debug, Clone)]
struct Job {
    prompt: Vec<u32>,
    output_tokens: usize,
    arrives_at_step: usize,
    /// Steps after arrival at which it is cancelled.
    cancelled_after: Option<usize>,
}

const POOL_BLOCKS: usize = 6;

fn jobs() -> impl Strategy<Value = Vec<Job>> {
    let job =
        (prop::collection::vec(0_u32..2, 1..14), 1_usize..10, 0_usize..30, prop::option::weighted(0.2, 0_usize..20));
    let job = job.prop_map(|(prompt, output_tokens, arrives_at_step, cancelled_after)| Job {
        prompt,
        output_tokens,
        arrives_at_step,
        cancelled_after,
    });
    prop::collection::vec(job, 1..20)
}

/// What every plan must hold to.
fn check(scheduler: &Scheduler, step: &ScheduledStep, limits: SchedulerLimits) {
    assert!(step.rows.len() <= limits.max_num_seqs);
    assert_eq!(step.num_tokens, step.rows.iter().map(|row| row.query_len).sum::<usize>());
    assert!(step.num_tokens <= limits.max_num_batched_tokens);
    let singles = step.rows.iter().take_while(|row| row.query_len == 1).count();
    assert!(step.rows[singles..].iter().all(|row| row.query_len > 1), "rows of one token come first");
    let mut written = std::collections::HashSet::new();
    for row in &step.rows {
        let sequence = scheduler.sequence(row.id).unwrap();
        let tokens = sequence.num_computed_tokens..sequence.num_computed_tokens + row.query_len;
        assert!(!tokens.is_empty() && tokens.end <= sequence.token_ids.len());
        assert!(sequence.block_table.len() * BLOCK_SIZE >= tokens.end, "a token without a block");
        for position in tokens {
            assert!(written.insert((sequence.block_table[position / BLOCK_SIZE], position % BLOCK_SIZE)));
        }
    }
    let shared = |block: u32| scheduler.running.iter().filter(|other| other.block_table.contains(&block)).count() > 1;
    assert!(!written.iter().any(|(block, _)| shared(*block)), "a write to a block that two sequences hold");
}

proptest! {
    #[test]
    fn every_request_ends_and_gives_all_back(
        jobs in jobs(),
        max_num_seqs in 1_usize..6,
        budget_beyond in 0_usize..8,
        depth in 1_usize..=2,
    ) {
        let limits = SchedulerLimits { max_num_seqs, max_num_batched_tokens: max_num_seqs + budget_beyond };
        let mut scheduler = scheduler(POOL_BLOCKS, limits.max_num_seqs, limits.max_num_batched_tokens);
        let mut left: HashMap<SequenceId, usize> = HashMap::new();
        let mut in_flight: VecDeque<ScheduledStep> = VecDeque::new();
        for now in 0.. {
            // Far above what the work can take: one token of one sequence a step, each computed anew a few times.
            prop_assert!(now < 20_000, "no end in sight");
            for (id, job) in jobs.iter().enumerate() {
                let id = id as SequenceId;
                if job.arrives_at_step == now {
                    let max_len = job.prompt.len() + job.output_tokens;
                    scheduler.add(Sequence { max_len, ..generate(id, job.prompt.iter().copied()) });
                    left.insert(id, job.output_tokens);
                }
                if job.cancelled_after.is_some_and(|after| job.arrives_at_step + after == now) && left.remove(&id).is_some() {
                    scheduler.remove(id);
                }
            }
            prop_assert!(scheduler.steps_in_flight == in_flight.len());
            if left.is_empty() && in_flight.is_empty() && now > 30 {
                break;
            }
            let step = plan(&mut scheduler);
            if in_flight.is_empty() {
                prop_assert_eq!(step.rows.is_empty(), !scheduler.has_work(), "work, and nothing to do");
            }
            prop_assert!(in_flight.is_empty() || step.preempted.is_empty(), "blocks in use change hands");
            check(&scheduler, &step, limits);
            let planned = !step.rows.is_empty();
            if planned {
                scheduler.begin(&step);
                in_flight.push_back(step);
            }
            if planned && in_flight.len() < depth {
                continue;
            }
            let Some(step) = in_flight.pop_front() else { continue };
            scheduler.complete(&step);
            for row in &step.rows {
                let Some(sequence) = scheduler.sequence(row.id) else { continue };
                if row.context_len < sequence.token_ids.len() - sequence.num_pending {
                    continue;
                }
                let tokens_left = left.get_mut(&row.id).unwrap();
                *tokens_left -= 1;
                if *tokens_left == 0 {
                    left.remove(&row.id);
                    scheduler.remove(row.id);
                } else {
                    scheduler.append_token(row.id, (row.id % 2) as u32);
                }
            }
        }
        prop_assert!(!scheduler.has_work());
        prop_assert_eq!(scheduler.blocks().num_free(), POOL_BLOCKS);
    }
}
