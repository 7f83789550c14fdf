//! Host memory for steps under way: what is sent with a step and what comes back, in a ring, so that one step can be
//! prepared while another runs.

use super::CudaError;
use super::device::Device;
use super::executor::OutputSurfaces;
use super::memory::{DevicePointer, Event, PinnedMemory};
use crate::engine::{RowOutput, SampledToken, TokenLogprob};
use cudarc::driver::sys;
use std::sync::Arc;

/// Steps that may be under way: one that runs, one that waits behind it, and room to prepare.
pub const SLOTS: usize = 3;
/// Most tokens of the distribution that are reported beside the chosen one: OpenAI's limit.
pub const TOP_LOGPROBS_MAX: u32 = 20;

/// Memory of one step.
#[derive(Debug)]
pub struct StepSlot {
    pub words: PinnedMemory,
    pub block_tables: PinnedMemory,
    /// Lists of tokens for token-state slots, end to end, and how many words of them are taken.
    pub lists: PinnedMemory,
    pub lists_used: usize,
    /// Biased tokens, then their values.
    pub bias: PinnedMemory,
    outputs: PinnedMemory,
    /// Passed when the step begins.
    pub begun: Event,
    /// Passed when the results are in `outputs`.
    pub done: Event,
}

/// What a slot has room for.
#[derive(Debug, Clone, Copy)]
pub struct SlotSizes {
    pub metadata_words: usize,
    pub table_words: usize,
    pub list_words: usize,
    pub bias_entries: usize,
    pub max_num_seqs: usize,
}

/// What an output row is to be turned into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WantedRow {
    /// `Some(n)`: the chosen token's logprob and those of the n likeliest.
    pub logprobs: Option<u32>,
}

/// Bytes of each output array for `rows` rows, in the order in which they lie.
fn output_bytes(rows: usize) -> [usize; 5] {
    let top = TOP_LOGPROBS_MAX as usize;
    [rows * 4, rows * 4, rows * 4, rows * top * 4, rows * top * 4]
}

/// Bytes of all output arrays on the device.
pub fn device_output_bytes(max_num_seqs: usize) -> u64 {
    output_bytes(max_num_seqs).iter().sum::<usize>() as u64
}

/// Where each output array lies.
pub fn output_surfaces(base: DevicePointer, max_num_seqs: usize) -> OutputSurfaces {
    let mut at = base;
    let mut next = |bytes: usize| {
        let here = at;
        at += bytes as u64;
        here
    };
    let [ids, logprobs, ranks, top_ids, top_logprobs] = output_bytes(max_num_seqs);
    OutputSurfaces {
        token_ids: next(ids),
        logprobs: next(logprobs),
        ranks: next(ranks),
        top_ids: next(top_ids),
        top_logprobs: next(top_logprobs),
        top_max: TOP_LOGPROBS_MAX,
    }
}

impl StepSlot {
    pub fn new(device: &Arc<Device>, sizes: SlotSizes) -> Result<Self, CudaError> {
        Ok(Self {
            words: PinnedMemory::new(device, sizes.metadata_words * 4, "step metadata")?,
            block_tables: PinnedMemory::new(device, sizes.table_words * 4, "block tables")?,
            lists: PinnedMemory::new(device, sizes.list_words * 4, "token lists")?,
            lists_used: 0,
            bias: PinnedMemory::new(device, sizes.bias_entries * 8, "bias lists")?,
            outputs: PinnedMemory::new(device, device_output_bytes(sizes.max_num_seqs) as usize, "step results")?,
            begun: Event::new(device, true)?,
            done: Event::new(device, true)?,
        })
    }

    /// Starts the copy of a step's results: ids alone, or everything when somebody asked for logprobs.
    ///
    /// # Safety
    /// `base` must be the outputs of `max_num_seqs` rows; the slot must not be read before `done` has passed.
    pub unsafe fn fetch(
        &mut self,
        base: DevicePointer,
        rows: usize,
        all: Option<usize>,
        stream: sys::CUstream,
    ) -> Result<(), CudaError> {
        let bytes = all.map_or(rows * 4, |max_num_seqs| device_output_bytes(max_num_seqs) as usize);
        // SAFETY: passed on from the caller.
        unsafe { self.outputs.copy_from(base, bytes, stream)? };
        self.done.record(stream)
    }

    /// The rows of a step whose `done` has passed.
    pub fn results(&self, wanted: &[WantedRow], max_num_seqs: usize) -> Vec<RowOutput> {
        let words = self.outputs.as_slice().as_chunks::<4>().0;
        let [ids, logprobs, ranks, top_ids, _] = output_bytes(max_num_seqs).map(|b| b / 4);
        let (logprobs_at, ranks_at, top_ids_at) = (ids, ids + logprobs, ids + logprobs + ranks);
        let top_logprobs_at = top_ids_at + top_ids;
        let (int, float) = (|at: usize| i32::from_le_bytes(words[at]), |at: usize| f32::from_le_bytes(words[at]));
        let token = |(row, want): (usize, &WantedRow)| {
            let token_id = int(row) as u32;
            let chosen =
                || TokenLogprob { token_id, logprob: float(logprobs_at + row), rank: int(ranks_at + row) as u32 };
            let top = |i: usize| {
                let at = row * TOP_LOGPROBS_MAX as usize + i;
                let (id, rank) = (int(top_ids_at + at), i as u32 + 1);
                let logprob = float(top_logprobs_at + at);
                u32::try_from(id).ok().map(|token_id| TokenLogprob { token_id, logprob, rank })
            };
            let count = want.logprobs.unwrap_or(0).min(TOP_LOGPROBS_MAX) as usize;
            RowOutput::Token(SampledToken {
                token_id,
                logprob: want.logprobs.map(|_| chosen()),
                top_logprobs: (0..count).filter_map(top).collect(),
            })
        };
        wanted.iter().enumerate().map(token).collect()
    }
}
