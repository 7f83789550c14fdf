//! One step: the ops of a loaded model, in order, over the arena.

use super::arena::Arena;
use super::attention::{AttentionContext, AttentionScratch, StepBlocks};
use super::kernels::elementwise::{self, NormRows, rms_norm_in_place};
use super::kernels::rope::rotate;
use super::kernels::{LANES, PARALLEL_ELEMENTS};
use super::kv_cache::{LayerCache, PackedRows};
use super::linear::{LinearScratch, Residual};
use super::load::LoadedModel;
use super::loaded::{Embed, LoadedOp, PrepareQkv};
use crate::backend::rope::Rope;
use crate::engine::{StepBatch, StepSequence};
use mserve_planner::model::{BufferId, Pooling};
use pulp::Arch;
use rayon::prelude::*;

/// Everything that a step writes.
#[derive(Debug)]
pub struct StepState {
    pub arch: Arch,
    pub arena: Arena,
    pub caches: Vec<LayerCache>,
    pub linear: LinearScratch,
    pub attention: AttentionScratch,
    pub step_blocks: StepBlocks,
    /// Cosines and sines of the step's positions, one table for each rope.
    pub rope_tables: Vec<Vec<f32>>,
}

impl StepState {
    /// Runs all ops over a valid batch.
    ///
    /// # Errors
    /// When candle's quantised product fails.
    pub fn run(&mut self, model: &LoadedModel, batch: &StepBatch) -> Result<(), candle_core::Error> {
        let outputs = batch.sequences.iter().filter(|s| s.wants_output).count();
        self.arena.begin(batch.token_ids.len(), outputs);
        self.step_blocks.fill(batch);
        self.rope_tables.resize(model.ropes.len(), Vec::new());
        for (table, rope) in self.rope_tables.iter_mut().zip(&model.ropes) {
            fill_rope_table(rope, &batch.positions, table);
        }
        for op in &model.ops {
            self.op(op, batch)?;
        }
        Ok(())
    }

    fn op(&mut self, op: &LoadedOp, batch: &StepBatch) -> Result<(), candle_core::Error> {
        let arch = self.arch;
        match op {
            LoadedOp::Embed(embed) => self.arena.write(embed.out, |_, out| embed.run(batch, out)),
            LoadedOp::Norm { x, norm, weight, bias, add, out } => {
                let rows = NormRows { norm: *norm, weight, bias: bias.as_deref() };
                self.arena.write(*out, |arena, out| rows.run(arch, arena.get(*x), add.map(|a| arena.get(a)), out));
            }
            LoadedOp::Linear { x, linear, add, out } => {
                let scratch = &mut self.linear;
                self.arena.write(*out, |arena, rows| {
                    let residual = match add {
                        None => Residual::None,
                        Some(add) if add == out => Residual::InPlace,
                        Some(add) => Residual::Rows(arena.get(*add)),
                    };
                    linear.forward(arch, arena.get(*x), residual, scratch, rows)
                })?;
            }
            LoadedOp::PrepareQkv { qkv, prepare } => {
                let table = prepare.rope.map(|rope| &*self.rope_tables[rope]);
                prepare.rotate_rows(arch, table, self.arena.get_mut(*qkv));
                if let Some(layer) = prepare.cache {
                    let (width, key_column) = (prepare.heads.width(), prepare.heads.key_column());
                    let rows = PackedRows { rows: self.arena.get(*qkv), width, key_column };
                    self.caches[layer].write(rows, &batch.slot_mapping);
                }
            }
            LoadedOp::Attention { qkv, attention, out } => {
                let step_blocks = &self.step_blocks;
                let context = AttentionContext { arch, batch, caches: &self.caches, step_blocks };
                let scratch = &mut self.attention;
                self.arena.write(*out, |arena, out| attention.run(context, scratch, arena.get(*qkv), out));
            }
            LoadedOp::GatedAct { gate_up, activation, out } => {
                let width = self.arena.width(*out);
                self.arena.write(*out, |arena, out| {
                    elementwise::gated(arch, *activation, arena.get(*gate_up), width, out);
                });
            }
            LoadedOp::Act { x, activation, out } => {
                self.arena.write(*out, |arena, out| elementwise::act(arch, *activation, arena.get(*x), out));
            }
            LoadedOp::GatherLast { x, out } => self.per_sequence(*x, *out, batch, |sequence, rows, width, out| {
                let last = sequence.query_start + sequence.query_len - 1;
                out.copy_from_slice(&rows[last * width..(last + 1) * width]);
            }),
            LoadedOp::Pool { x, pooling, out } => {
                self.per_sequence(*x, *out, batch, |sequence, rows, width, out| {
                    let first = sequence.query_start * width;
                    pool(*pooling, &rows[first..first + sequence.query_len * width], out);
                });
            }
            LoadedOp::L2Normalize { x, out } => {
                let width = self.arena.width(*x);
                self.arena.write(*out, |arena, out| elementwise::l2_normalize(arena.get(*x), width, out));
            }
            LoadedOp::SoftCap { x, cap } => elementwise::soft_cap(arch, *cap, self.arena.get_mut(*x)),
        }
        Ok(())
    }

    /// Fills `out`'s rows, one for each sequence that wants output, from the token rows of `x`.
    fn per_sequence(
        &mut self,
        x: BufferId,
        out: BufferId,
        batch: &StepBatch,
        fill: impl Fn(&StepSequence, &[f32], usize, &mut [f32]),
    ) {
        let width = self.arena.width(x);
        self.arena.write(out, |arena, out| {
            let sequences = batch.sequences.iter().filter(|s| s.wants_output);
            for (sequence, out) in sequences.zip(out.chunks_exact_mut(width)) {
                fill(sequence, arena.get(x), width, out);
            }
        });
    }
}

impl Embed {
    pub fn run(&self, batch: &StepBatch, out: &mut [f32]) {
        let width = out.len() / batch.token_ids.len();
        let mut extra = vec![0.0; width];
        for ((out, &token), &position) in out.chunks_exact_mut(width).zip(&batch.token_ids).zip(&batch.positions) {
            self.table.row_into(token as usize, out);
            if let Some(scale) = self.scale {
                out.iter_mut().for_each(|v| *v *= scale);
            }
            if let Some(table) = &self.positions {
                table.row_into(position as usize + self.position_offset, &mut extra);
                add(out, &extra);
            }
            if let Some(row) = &self.token_type {
                add(out, row);
            }
        }
    }
}

fn add(out: &mut [f32], row: &[f32]) {
    for (o, &v) in out.iter_mut().zip(row) {
        *o += v;
    }
}

impl PrepareQkv {
    /// Norms and rotates the q and k heads of every row, in place.
    pub fn rotate_rows(&self, arch: Arch, rope_table: Option<&[f32]>, qkv: &mut [f32]) {
        let width = self.heads.width();
        let cos_sin_len = rope_table.map_or(0, |t| t.len() / (qkv.len() / width));
        let row = |(i, row): (usize, &mut [f32])| {
            let cos_sin = rope_table.map(|t| &t[i * cos_sin_len..(i + 1) * cos_sin_len]);
            arch.dispatch(
                #[inline(always)]
                || self.rotate_row(cos_sin, row),
            );
        };
        if qkv.len() >= PARALLEL_ELEMENTS {
            qkv.par_chunks_exact_mut(width).enumerate().for_each(row);
        } else {
            qkv.chunks_exact_mut(width).enumerate().for_each(row);
        }
    }

    #[inline(always)]
    fn rotate_row(&self, cos_sin: Option<&[f32]>, row: &mut [f32]) {
        let (queries, rest) = row.split_at_mut(self.heads.key_column());
        let keys = &mut rest[..self.heads.num_kv_heads * self.heads.head_dim];
        for (heads, norm) in [(queries, &self.q_norm), (keys, &self.k_norm)] {
            for head in heads.chunks_exact_mut(self.heads.head_dim) {
                if let Some(weight) = norm {
                    rms_norm_in_place(head, weight, self.eps);
                }
                if let Some(cos_sin) = cos_sin {
                    rotate(head, cos_sin);
                }
            }
        }
    }
}

fn fill_rope_table(rope: &Rope, positions: &[u32], table: &mut Vec<f32>) {
    let row_len = rope.row_len();
    table.resize(positions.len() * row_len, 0.0);
    if row_len > 0 {
        table
            .par_chunks_exact_mut(row_len)
            .zip(positions)
            .with_min_len(LANES)
            .for_each(|(row, &p)| rope.fill_row(p, row));
    }
}

/// One vector out of the rows of one sequence.
pub fn pool(pooling: Pooling, rows: &[f32], out: &mut [f32]) {
    let width = out.len();
    match pooling {
        Pooling::Cls => out.copy_from_slice(&rows[..width]),
        Pooling::LastToken => out.copy_from_slice(&rows[rows.len() - width..]),
        Pooling::Mean => {
            out.fill(0.0);
            rows.chunks_exact(width).for_each(|row| add(out, row));
            let count = (rows.len() / width) as f32;
            out.iter_mut().for_each(|v| *v /= count);
        }
    }
}
