#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

const ON: PrefixCaching = PrefixCaching::On { hash_seed: 1 };

fn hashes(manager: &BlockManager, token_ids: &[u32]) -> Vec<BlockHash> {
    let mut hashes = Vec::new();
    manager.extend_hashes(token_ids, &mut hashes);
    hashes
}

/// Take blocks for `token_ids` as a scheduler does, compute them all, and let others find them.
fn fill(manager: &mut BlockManager, token_ids: &[u32]) -> (Vec<u32>, usize) {
    let hashes = hashes(manager, token_ids);
    let mut table = Vec::new();
    manager.take_prefix(&hashes, &mut table);
    let hits = table.len();
    manager.grow(&mut table, token_ids.len()).unwrap();
    for (block, hash) in table.iter().zip(&hashes) {
        manager.publish(*block, *hash);
    }
    (table, hits)
}

#[test]
fn a_prefix_is_found_again_block_by_block() {
    let mut manager = BlockManager::new(8, 2, ON);
    let (mut first, _) = fill(&mut manager, &[1, 2, 3, 4, 5]);
    assert_eq!((first.len(), manager.num_free()), (3, 5));
    let (mut second, hits) = fill(&mut manager, &[1, 2, 3, 9]);
    assert_eq!((hits, second[0] == first[0], second[1] == first[1]), (1, true, false));
    manager.release(&mut first);
    manager.release(&mut second);
    assert_eq!(manager.num_free(), 8);
    // Free, but still known.
    let (_, hits) = fill(&mut manager, &[1, 2, 3, 4, 5]);
    assert_eq!(hits, 2);
}

#[test]
fn the_same_tokens_after_another_start_are_another_block() {
    let mut manager = BlockManager::new(8, 2, ON);
    fill(&mut manager, &[1, 2, 7, 7]);
    assert_eq!(fill(&mut manager, &[3, 4, 7, 7]).1, 0);
    assert_ne!(hashes(&manager, &[7, 7])[0], hashes(&manager, &[1, 2, 7, 7])[1]);
    let other_seed = BlockManager::new(8, 2, PrefixCaching::On { hash_seed: 2 });
    assert_ne!(hashes(&manager, &[7, 7]), hashes(&other_seed, &[7, 7]));
}

#[test]
fn blocks_with_nothing_in_them_go_first_then_the_least_recently_used_from_the_end() {
    let mut manager = BlockManager::new(4, 2, ON);
    let (mut old, _) = fill(&mut manager, &[1, 2, 3, 4]);
    let (mut new, _) = fill(&mut manager, &[5, 6, 7]);
    manager.release(&mut old);
    manager.release(&mut new);
    let mut table = Vec::new();
    // The unfinished block of [7].
    manager.grow(&mut table, 2).unwrap();
    assert_eq!(manager.find_prefix(&hashes(&manager, &[1, 2, 3, 4])).count(), 2);
    // The end of the older sequence.
    manager.grow(&mut table, 4).unwrap();
    assert_eq!(manager.find_prefix(&hashes(&manager, &[1, 2, 3, 4])).count(), 1);
    manager.grow(&mut table, 6).unwrap();
    assert_eq!(manager.find_prefix(&hashes(&manager, &[1, 2, 3, 4])).count(), 0);
    assert_eq!(manager.find_prefix(&hashes(&manager, &[5, 6])).count(), 1);
}

#[test]
fn too_few_blocks_take_none() {
    let mut manager = BlockManager::new(2, 4, PrefixCaching::Off);
    let mut table = Vec::new();
    manager.grow(&mut table, 3).unwrap();
    assert_eq!(manager.grow(&mut table, 9), Err(OutOfBlocks { needed: 2, free: 1 }));
    assert_eq!((table.len(), manager.num_free()), (1, 1));
    assert!(hashes(&manager, &[1, 2, 3, 4]).is_empty());
}

#[test]
fn a_hit_on_a_free_block_counts_as_taken() {
    let mut manager = BlockManager::new(2, 2, ON);
    let (mut table, _) = fill(&mut manager, &[1, 2]);
    let known = hashes(&manager, &[1, 2]);
    // Held by another: one new block is all it costs.
    assert_eq!(manager.free_after(manager.find_prefix(&known), 2), Some(0));
    manager.release(&mut table);
    assert_eq!(manager.free_after(manager.find_prefix(&known), 2), Some(0));
    assert_eq!(manager.free_after(manager.find_prefix(&known), 3), None);
}

#[test]
fn a_model_without_a_cache_needs_no_blocks() {
    let mut manager = BlockManager::new(0, 0, ON);
    let mut table = Vec::new();
    manager.grow(&mut table, 1000).unwrap();
    assert!(table.is_empty() && hashes(&manager, &[1, 2, 3]).is_empty());
    assert_eq!(manager.free_after(std::iter::empty(), manager.blocks_for(1000)), Some(0));
}

#[derive(Debug, Clone)]
enum Op {
    /// A new sequence over a tiny alphabet, so that prefixes are shared.
    Start(Vec<u32>),
    /// One sequence gets more tokens.
    Grow(usize, Vec<u32>),
    /// Its full blocks are computed.
    Publish(usize),
    Release(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let tokens = |most| prop::collection::vec(0_u32..2, 1..most);
    let op = prop_oneof![
        3 => tokens(20).prop_map(Op::Start),
        2 => (any::<usize>(), tokens(6)).prop_map(|(at, tokens)| Op::Grow(at, tokens)),
        3 => any::<usize>().prop_map(Op::Publish),
        2 => any::<usize>().prop_map(Op::Release),
    ];
    prop::collection::vec(op, 1..80)
}

/// What a sequence holds, and how much of its table was computed by it or before it.
#[derive(Default)]
struct Holder {
    token_ids: Vec<u32>,
    table: Vec<u32>,
}

/// The manager beside a model that knows what every block contains.
struct World {
    manager: BlockManager,
    holders: Vec<Holder>,
    /// Per block: all tokens up to its end, when it was last published.
    contents: Vec<Option<Vec<u32>>>,
}

const BLOCK_SIZE: usize = 3;
const NUM_BLOCKS: usize = 12;

impl World {
    fn run(&mut self, op: Op) {
        let count = self.holders.len();
        match op {
            Op::Start(token_ids) => self.start(token_ids),
            Op::Grow(at, more) if count > 0 => {
                let holder = &mut self.holders[at % count];
                let wanted = holder.token_ids.len() + more.len();
                if self.manager.grow(&mut holder.table, wanted).is_ok() {
                    holder.token_ids.extend(more);
                }
            }
            Op::Publish(at) if count > 0 => self.publish(at % count),
            Op::Release(at) if count > 0 => {
                let mut holder = self.holders.swap_remove(at % count);
                self.manager.release(&mut holder.table);
                assert!(holder.table.is_empty());
            }
            _ => {}
        }
    }

    fn start(&mut self, token_ids: Vec<u32>) {
        let hashes = hashes(&self.manager, &token_ids);
        let total = self.manager.blocks_for(token_ids.len());
        let left = self.manager.free_after(self.manager.find_prefix(&hashes), total);
        let mut table = Vec::new();
        self.manager.take_prefix(&hashes, &mut table);
        for (at, block) in table.iter().enumerate() {
            let prefix = &token_ids[..(at + 1) * BLOCK_SIZE];
            assert_eq!(self.contents[*block as usize].as_deref(), Some(prefix), "a hit for other tokens");
        }
        let grown = self.manager.grow(&mut table, token_ids.len());
        assert_eq!(grown.is_ok(), left.is_some());
        match left {
            Some(left) => {
                assert_eq!(self.manager.num_free(), left);
                self.holders.push(Holder { token_ids, table });
            }
            None => self.manager.release(&mut table),
        }
    }

    fn publish(&mut self, at: usize) {
        let holder = &self.holders[at];
        let hashes = hashes(&self.manager, &holder.token_ids);
        for (index, (block, hash)) in holder.table.iter().zip(&hashes).enumerate() {
            self.manager.publish(*block, *hash);
            self.contents[*block as usize] = Some(holder.token_ids[..(index + 1) * BLOCK_SIZE].to_vec());
        }
    }

    fn check(&self) {
        let mut held = vec![0_u32; NUM_BLOCKS];
        for holder in &self.holders {
            assert_eq!(holder.table.len(), holder.token_ids.len().div_ceil(BLOCK_SIZE));
            let distinct: HashSet<_> = holder.table.iter().collect();
            assert_eq!(distinct.len(), holder.table.len(), "one block twice in a table");
            holder.table.iter().for_each(|block| held[*block as usize] += 1);
        }
        let counts: Vec<u32> = self.manager.blocks.iter().map(|block| block.ref_count).collect();
        assert_eq!(counts, held);
        let free = self.free_blocks();
        assert_eq!(free.len(), self.manager.num_free());
        assert_eq!(free.iter().collect::<HashSet<_>>().len(), free.len(), "a block twice in the free list");
        assert!(free.iter().all(|block| held[*block as usize] == 0));
        assert_eq!(free.len(), held.iter().filter(|count| **count == 0).count());
        for (hash, block) in &self.manager.cached {
            assert_eq!(self.manager.blocks[*block as usize].hash, Some(*hash));
        }
        let hashed = self.manager.blocks.iter().filter(|block| block.hash.is_some()).count();
        assert_eq!(hashed, self.manager.cached.len());
    }

    fn free_blocks(&self) -> Vec<u32> {
        let list = &self.manager.free;
        let mut blocks = Vec::new();
        let mut at = list.links[list.ends()].1;
        while at as usize != list.ends() && blocks.len() <= NUM_BLOCKS {
            blocks.push(at);
            at = list.links[at as usize].1;
        }
        blocks
    }
}

proptest! {
    #[test]
    fn counts_add_up_whatever_happens(ops in ops()) {
        let manager = BlockManager::new(NUM_BLOCKS, BLOCK_SIZE, ON);
        let mut world = World { manager, holders: Vec::new(), contents: vec![None; NUM_BLOCKS] };
        for op in ops {
            world.run(op);
            world.check();
        }
        for mut holder in std::mem::take(&mut world.holders) {
            world.manager.release(&mut holder.table);
        }
        world.check();
        prop_assert_eq!(world.manager.num_free(), NUM_BLOCKS);
    }
}
