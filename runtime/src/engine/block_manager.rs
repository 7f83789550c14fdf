//! Paged KV blocks as integers: who holds which block, which blocks hold a known prefix, which goes next.
//!
//! Shape follows vLLM's `v1/core/block_pool.py`: one list of blocks nobody holds, least recently used first; a block
//! keeps its contents and its hash there until it is handed out again, so a later prompt can take it back.

use std::collections::HashMap;
use xxhash_rust::xxh3::Xxh3;

/// Names the tokens of a block and of all blocks before it.
pub type BlockHash = u128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefixCaching {
    Off,
    /// The seed keeps clients from preparing colliding prompts.
    On {
        hash_seed: u64,
    },
}

/// The pool has too few free blocks. Nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{needed} KV blocks are needed and {free} are free")]
pub struct OutOfBlocks {
    pub needed: usize,
    pub free: usize,
}

#[derive(Debug, Clone, Default)]
struct Block {
    /// Sequences that hold it. 0: it is in the free list.
    ref_count: u32,
    /// Set while its contents can be found through `cached`.
    hash: Option<BlockHash>,
}

#[derive(Debug)]
pub struct BlockManager {
    block_size: usize,
    caching: PrefixCaching,
    blocks: Vec<Block>,
    free: FreeList,
    cached: HashMap<BlockHash, u32>,
}

impl BlockManager {
    /// `num_blocks` 0 is a model without a cache: every table stays empty and everything fits.
    pub fn new(num_blocks: usize, block_size: usize, caching: PrefixCaching) -> Self {
        Self {
            block_size,
            caching,
            blocks: vec![Block::default(); num_blocks],
            free: FreeList::full(num_blocks),
            cached: HashMap::new(),
        }
    }

    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds, whether or not they keep a cached prefix.
    pub fn num_free(&self) -> usize {
        self.free.len
    }

    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks that `num_tokens` tokens of one sequence take.
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        if self.blocks.is_empty() { 0 } else { num_tokens.div_ceil(self.block_size) }
    }

    /// Extend `hashes` to all full blocks of `token_ids`. Does nothing without prefix caching.
    pub fn extend_hashes(&self, token_ids: &[u32], hashes: &mut Vec<BlockHash>) {
        let PrefixCaching::On { hash_seed } = self.caching else { return };
        if self.blocks.is_empty() {
            return;
        }
        for block in token_ids.chunks_exact(self.block_size).skip(hashes.len()) {
            let mut hasher = Xxh3::with_seed(hash_seed);
            hasher.update(&hashes.last().copied().unwrap_or(0).to_le_bytes());
            for token_id in block {
                hasher.update(&token_id.to_le_bytes());
            }
            hashes.push(hasher.digest128());
        }
    }

    /// Blocks that hold the longest cached prefix of `hashes`, in order.
    pub fn find_prefix<'a>(&'a self, hashes: &'a [BlockHash]) -> impl Iterator<Item = u32> + 'a {
        hashes.iter().map_while(|hash| self.cached.get(hash).copied())
    }

    /// Free blocks that remain for others when a table takes `prefix` from the cache and grows to `total` blocks.
    /// `None`: it does not fit.
    pub fn free_after(&self, prefix: impl Iterator<Item = u32>, total: usize) -> Option<usize> {
        let (mut hits, mut revived) = (0, 0);
        for block in prefix {
            hits += 1;
            revived += usize::from(self.blocks[block as usize].ref_count == 0);
        }
        self.num_free().checked_sub(revived + total.saturating_sub(hits))
    }

    /// Hold the longest cached prefix of `hashes`, putting its blocks at the start of the empty `table`.
    pub fn take_prefix(&mut self, hashes: &[BlockHash], table: &mut Vec<u32>) {
        debug_assert!(table.is_empty());
        for hash in hashes {
            let Some(&block) = self.cached.get(hash) else { break };
            let state = &mut self.blocks[block as usize];
            if state.ref_count == 0 {
                self.free.remove(block);
            }
            state.ref_count += 1;
            table.push(block);
        }
    }

    /// Let `table` have room for `num_tokens` tokens, taking the least recently used free blocks.
    ///
    /// # Errors
    /// Too few free blocks; the table is left as it was.
    pub fn grow(&mut self, table: &mut Vec<u32>, num_tokens: usize) -> Result<(), OutOfBlocks> {
        let needed = self.blocks_for(num_tokens).saturating_sub(table.len());
        if needed > self.num_free() {
            return Err(OutOfBlocks { needed, free: self.num_free() });
        }
        for _ in 0..needed {
            let Some(block) = self.free.pop_front() else { break };
            let state = &mut self.blocks[block as usize];
            if let Some(hash) = state.hash.take() {
                self.cached.remove(&hash);
            }
            state.ref_count = 1;
            table.push(block);
        }
        Ok(())
    }

    /// Say that a held block now contains the tokens named by `hash`. The first block of a hash keeps it.
    pub fn publish(&mut self, block: u32, hash: BlockHash) {
        let state = &mut self.blocks[block as usize];
        debug_assert!(state.ref_count > 0);
        if state.hash.is_none() && !self.cached.contains_key(&hash) {
            state.hash = Some(hash);
            self.cached.insert(hash, block);
        }
    }

    /// Let go of all blocks of a sequence. Cached ones stay findable until they are needed, the end of the sequence
    /// going first; blocks with nothing in them go before any cached one.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        for block in table.drain(..).rev() {
            let state = &mut self.blocks[block as usize];
            debug_assert!(state.ref_count > 0, "block {block} freed twice");
            state.ref_count -= 1;
            match (state.ref_count, state.hash) {
                (0, Some(_)) => self.free.push_back(block),
                (0, None) => self.free.push_front(block),
                _ => {}
            }
        }
    }
}

/// Doubly linked list over block numbers, so that a block can leave from the middle at once.
#[derive(Debug)]
struct FreeList {
    /// `[num_blocks + 1]`: (previous, next); the last entry is head and tail.
    links: Vec<(u32, u32)>,
    len: usize,
}

impl FreeList {
    fn full(num_blocks: usize) -> Self {
        let ends = u32::try_from(num_blocks).expect("a pool has fewer than 2^32 blocks");
        let mut list = Self { links: vec![(ends, ends); num_blocks + 1], len: 0 };
        for block in 0..ends {
            list.push_back(block);
        }
        list
    }

    fn ends(&self) -> usize {
        self.links.len() - 1
    }

    fn push_back(&mut self, block: u32) {
        self.insert_after(self.links[self.ends()].0, block);
    }

    fn push_front(&mut self, block: u32) {
        self.insert_after(self.ends() as u32, block);
    }

    fn insert_after(&mut self, previous: u32, block: u32) {
        let next = self.links[previous as usize].1;
        self.links[block as usize] = (previous, next);
        self.links[previous as usize].1 = block;
        self.links[next as usize].0 = block;
        self.len += 1;
    }

    fn remove(&mut self, block: u32) {
        let (previous, next) = self.links[block as usize];
        self.links[previous as usize].1 = next;
        self.links[next as usize].0 = previous;
        self.len -= 1;
    }

    fn pop_front(&mut self) -> Option<u32> {
        let first = self.links[self.ends()].1;
        (self.len > 0).then(|| {
            self.remove(first);
            first
        })
    }
}

#[cfg(test)]
mod tests;
