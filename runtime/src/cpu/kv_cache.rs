//! Keys and values in blocks, laid out for the attention kernel to stream.
//!
//! A block is cut in groups of sixteen positions. A group's keys lie transposed, one line of sixteen positions per
//! dimension, so that sixteen scores grow at once without adding across a vector; its values lie in lines of sixteen
//! dimensions, position after position. Groups are contiguous: reading a context is reading whole 4 KiB runs
//! (head_dim 64) in block-table order, and nothing is ever copied together first.

use super::kernels::{LANES, Line, Lines, PARALLEL_ELEMENTS};
use rayon::prelude::*;

/// Shape of one attention's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Tokens per block.
    pub block_size: usize,
}

impl KvShape {
    /// Groups of sixteen positions in a block; the last is padded when `block_size` is no multiple of sixteen.
    pub fn groups_per_block(self) -> usize {
        self.block_size.div_ceil(LANES)
    }

    /// Lines of one group of keys.
    pub fn key_lines(self) -> usize {
        self.head_dim
    }

    /// Lines of sixteen dimensions in a head, the last padded.
    pub fn dim_lines(self) -> usize {
        self.head_dim.div_ceil(LANES)
    }

    /// Lines of one group of values.
    pub fn value_lines(self) -> usize {
        self.dim_lines() * LANES
    }

    /// Memory of one block, keys and values of all heads.
    pub fn block_bytes(self) -> u64 {
        let lines = self.num_kv_heads * self.groups_per_block() * (self.key_lines() + self.value_lines());
        (lines * size_of::<Line<f32>>()) as u64
    }
}

/// The cache of one KV head of one layer.
#[derive(Debug)]
struct HeadCache {
    keys: Lines<f32>,
    values: Lines<f32>,
}

/// The cache of one layer.
#[derive(Debug)]
pub struct LayerCache {
    shape: KvShape,
    heads: Vec<HeadCache>,
}

/// Keys and values of a step: packed rows `[q heads | k heads | v heads]`.
#[derive(Debug, Clone, Copy)]
pub struct PackedRows<'a> {
    pub rows: &'a [f32],
    pub width: usize,
    /// Column where the keys begin; the values follow them.
    pub key_column: usize,
}

impl LayerCache {
    /// Memory is taken as blocks are first written: zeroed pages cost nothing until then.
    pub fn new(shape: KvShape, num_blocks: usize) -> Self {
        let groups = num_blocks * shape.groups_per_block();
        let head = || HeadCache {
            keys: Lines::zeroed(groups * shape.key_lines()),
            values: Lines::zeroed(groups * shape.value_lines()),
        };
        Self { shape, heads: (0..shape.num_kv_heads).map(|_| head()).collect() }
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    pub fn num_blocks(&self) -> usize {
        self.heads.first().map_or(0, |h| h.keys.len() / (self.shape.key_lines() * self.shape.groups_per_block()).max(1))
    }

    /// Grows to `num_blocks` if there are fewer; contents are lost.
    pub fn reserve(&mut self, num_blocks: usize) {
        if self.num_blocks() < num_blocks {
            *self = Self::new(self.shape, num_blocks);
        }
    }

    /// Writes row i's keys and values at `slots[i]`.
    pub fn write(&mut self, rows: PackedRows<'_>, slots: &[u32]) {
        let shape = self.shape;
        let write_head = |(head, cache): (usize, &mut HeadCache)| {
            let key = rows.key_column + head * shape.head_dim;
            let value = key + shape.num_kv_heads * shape.head_dim;
            for (row, &slot) in rows.rows.chunks_exact(rows.width).zip(slots) {
                let slot = slot as usize;
                let (block, offset) = (slot / shape.block_size, slot % shape.block_size);
                let group = block * shape.groups_per_block() + offset / LANES;
                cache.write(
                    shape,
                    group,
                    offset % LANES,
                    &row[key..key + shape.head_dim],
                    &row[value..value + shape.head_dim],
                );
            }
        };
        if slots.len() * shape.num_kv_heads * shape.head_dim >= PARALLEL_ELEMENTS {
            self.heads.par_iter_mut().enumerate().for_each(write_head);
        } else {
            self.heads.iter_mut().enumerate().for_each(write_head);
        }
    }

    /// Keys and values of sixteen positions: group `group` of block `block`.
    #[inline(always)]
    pub fn group(&self, head: usize, block: usize, group: usize) -> (&[Line<f32>], &[Line<f32>]) {
        let at = block * self.shape.groups_per_block() + group;
        let (key, value) = (self.shape.key_lines(), self.shape.value_lines());
        let cache = &self.heads[head];
        (&cache.keys.as_slice()[at * key..(at + 1) * key], &cache.values.as_slice()[at * value..(at + 1) * value])
    }
}

impl HeadCache {
    fn write(&mut self, shape: KvShape, group: usize, lane: usize, key: &[f32], value: &[f32]) {
        let keys = &mut self.keys.as_mut_slice()[group * shape.key_lines()..(group + 1) * shape.key_lines()];
        for (line, &k) in keys.iter_mut().zip(key) {
            line[lane] = k;
        }
        let values = &mut self.values.as_mut_slice()[group * shape.value_lines()..(group + 1) * shape.value_lines()];
        for (lines, v) in values.chunks_exact_mut(LANES).zip(value.chunks(LANES)) {
            lines[lane][..v.len()].copy_from_slice(v);
        }
    }
}
