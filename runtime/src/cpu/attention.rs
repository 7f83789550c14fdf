//! The attention op: cuts a step's query rows into tasks and runs them on all threads.

use super::kernels::LANES;
use super::kernels::attention::{Attend, Rows, TILE_ROWS, Visible};
use super::kv_cache::{KvShape, LayerCache, PackedRows};
use super::loaded::{AttentionOp, Heads};
use crate::engine::StepBatch;
use mserve_planner::model::Mask;
use pulp::Arch;
use rayon::prelude::*;

/// Query rows of one task, about: enough that a group of keys and values, once in cache, serves many.
const TASK_ROWS: usize = 8 * TILE_ROWS;

/// Memory for attention, reused from op to op and step to step.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    rows: Vec<Rows>,
    /// Keys and values of the step itself, for models that keep none: one layer's worth for each shape in use.
    step_caches: Vec<LayerCache>,
}

/// Where each token of a step lies in a cache made for that step alone: each sequence begins a block.
#[derive(Debug, Default)]
pub struct StepBlocks {
    slots: Vec<u32>,
    tables: Vec<u32>,
    /// Range of `tables` of each sequence.
    ranges: Vec<std::ops::Range<usize>>,
}

impl StepBlocks {
    pub fn fill(&mut self, batch: &StepBatch) {
        self.slots.clear();
        self.tables.clear();
        self.ranges.clear();
        for sequence in &batch.sequences {
            let first = self.tables.len();
            let blocks = sequence.query_len.div_ceil(LANES);
            self.slots.extend((0..sequence.query_len).map(|i| (first * LANES + i) as u32));
            self.tables.extend((first..first + blocks).map(|b| b as u32));
            self.ranges.push(first..first + blocks);
        }
    }
}

/// What an attention reads besides its rows.
#[derive(Debug, Clone, Copy)]
pub struct AttentionContext<'a> {
    pub arch: Arch,
    pub batch: &'a StepBatch,
    pub caches: &'a [LayerCache],
    pub step_blocks: &'a StepBlocks,
}

/// Some query tokens of one sequence and one KV head.
#[derive(Debug)]
struct Task<'a> {
    /// Rows of the step.
    tokens: std::ops::Range<usize>,
    /// Position of the first of them in its sequence.
    position: usize,
    context_len: usize,
    block_table: &'a [u32],
    kv_head: usize,
}

impl AttentionOp {
    /// `qkv` are the step's packed rows, `out` its rows of all query heads.
    pub fn run(&self, context: AttentionContext<'_>, scratch: &mut AttentionScratch, qkv: &[f32], out: &mut [f32]) {
        let AttentionContext { arch, batch, caches, step_blocks: step } = context;
        let heads = self.heads;
        let AttentionScratch { rows, step_caches } = scratch;
        let (cache, tasks) = match self.cache {
            Some(layer) => {
                let table = |i: usize| &batch.block_tables[batch.sequences[i].block_table.clone()];
                (&caches[layer], tasks(batch, heads, table))
            }
            None => {
                let cache = step_cache(step_caches, heads.kv_shape(LANES), step.tables.len());
                let packed = PackedRows { rows: qkv, width: heads.width(), key_column: heads.key_column() };
                cache.write(packed, &step.slots);
                (&*cache, tasks(batch, heads, |i| &step.tables[step.ranges[i].clone()]))
            }
        };
        rows.resize_with(rows.len().max(tasks.len()), Rows::default);
        tasks.par_iter().zip(&mut *rows).with_max_len(1).for_each(|(task, rows)| {
            self.fill_rows(task, qkv, rows);
            let Task { kv_head, block_table, .. } = *task;
            arch.dispatch(Attend { rows, cache, kv_head, block_table, scores: self.scores });
        });
        for (task, rows) in tasks.iter().zip(rows) {
            self.read_rows(task, rows, out);
        }
    }

    fn fill_rows(&self, task: &Task<'_>, qkv: &[f32], rows: &mut Rows) {
        let (group, head_dim, width) = (self.heads.group(), self.heads.head_dim, self.heads.width());
        let queries = task.tokens.clone().enumerate().flat_map(|(i, token)| {
            let visible = self.visible(task.position + i, task.context_len);
            let row = &qkv[token * width..(token + 1) * width];
            let first = task.kv_head * group * head_dim;
            row[first..first + group * head_dim].chunks_exact(head_dim).map(move |query| (query, visible))
        });
        rows.fill(head_dim, queries);
    }

    fn visible(&self, position: usize, context_len: usize) -> Visible {
        match self.mask {
            Mask::Causal => Visible { first: 0, end: position + 1 },
            Mask::Sliding { window } => {
                let window = usize::try_from(window).unwrap_or(usize::MAX);
                Visible { first: (position + 1).saturating_sub(window), end: position + 1 }
            }
            Mask::Chunked { chunk } => {
                let chunk = usize::try_from(chunk).unwrap_or(usize::MAX).max(1);
                Visible { first: position / chunk * chunk, end: position + 1 }
            }
            Mask::Bidirectional => Visible { first: 0, end: context_len },
            Mask::BidirectionalSliding { window } => {
                // Half of the window on either side.
                let half = usize::try_from(window / 2).unwrap_or(usize::MAX);
                let end = position.saturating_add(half).saturating_add(1).min(context_len);
                Visible { first: position.saturating_sub(half), end }
            }
        }
    }

    fn read_rows(&self, task: &Task<'_>, rows: &Rows, out: &mut [f32]) {
        let (group, head_dim) = (self.heads.group(), self.heads.head_dim);
        let width = self.heads.num_heads * head_dim;
        for (i, token) in task.tokens.clone().enumerate() {
            let first = token * width + task.kv_head * group * head_dim;
            for (head, out) in out[first..first + group * head_dim].chunks_exact_mut(head_dim).enumerate() {
                rows.read(i * group + head, out);
            }
        }
    }
}

fn tasks<'a>(batch: &StepBatch, heads: Heads, table: impl Fn(usize) -> &'a [u32]) -> Vec<Task<'a>> {
    let tokens_per_task = (TASK_ROWS / heads.group()).max(1);
    let mut tasks = Vec::new();
    for (i, sequence) in batch.sequences.iter().enumerate() {
        let (start, end) = (sequence.query_start, sequence.query_start + sequence.query_len);
        for first in (start..end).step_by(tokens_per_task) {
            tasks.extend((0..heads.num_kv_heads).map(|kv_head| Task {
                tokens: first..(first + tokens_per_task).min(end),
                position: sequence.context_len - sequence.query_len + first - start,
                context_len: sequence.context_len,
                block_table: table(i),
                kv_head,
            }));
        }
    }
    tasks
}

fn step_cache(caches: &mut Vec<LayerCache>, shape: KvShape, blocks: usize) -> &mut LayerCache {
    let known = caches.iter().position(|c| c.shape() == shape);
    let index = known.unwrap_or_else(|| {
        caches.push(LayerCache::new(shape, blocks));
        caches.len() - 1
    });
    caches[index].reserve(blocks);
    &mut caches[index]
}
