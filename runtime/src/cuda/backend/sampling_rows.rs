//! What sampling needs of a row: its parameters as the kernel reads them, its biases, and the state of its tokens.

use super::CudaBackend;
use crate::cuda::CudaError;
use crate::cuda::kernels::SampleRow;
use crate::engine::RowSampling;

impl CudaBackend {
    pub(super) fn sample_row(&mut self, sampling: &RowSampling, slot: usize) -> Result<SampleRow, CudaError> {
        let params = &*sampling.params;
        let begin = self.bias.len();
        self.bias.extend(&params.logit_bias);
        self.bias.extend(sampling.forbidden_token_ids.iter().map(|&id| (id, f32::NEG_INFINITY)));
        let most = self.model.sizes.bias_entries();
        if self.bias.len() > most {
            let (value, must) = (self.bias.len().to_string(), format!("at most {most} in a step"));
            return Err(CudaError::Option { option: "logit_bias", value, must });
        }
        let listed: Vec<u32> = self.bias[begin..].iter().map(|b| b.0).collect();
        let state = self.token_state.slot_for(sampling, &listed);
        if let Some(state) = state.filter(|s| s.reset) {
            self.reset_token_state(state.slot, sampling, &listed, slot)?;
        }
        Ok(SampleRow {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            state_slot: state.map(|s| s.slot),
            seed: sampling.seed,
            step: sampling.step,
            bias_begin: begin as u32,
            bias_count: (self.bias.len() - begin) as u32,
            logprobs: params.logprobs,
        })
    }

    /// When a sequence with penalties or a bias starts, or comes back after preemption. In the stream's order: the counts
    /// are written behind the steps under way.
    fn reset_token_state(
        &mut self,
        state: u32,
        sampling: &RowSampling,
        listed: &[u32],
        slot: usize,
    ) -> Result<(), CudaError> {
        let executor = &self.model.executor;
        let lists = [&*sampling.prompt_token_ids, &*sampling.output_token_ids, listed];
        let count: usize = lists.iter().map(|list| list.len()).sum();
        let host = &mut self.slots[slot];
        let bytes = host.lists.bytes();
        if count * 4 > bytes {
            let (value, must) = (count.to_string(), "no longer than two contexts".to_owned());
            return Err(CudaError::Option { option: "token lists", value, must });
        }
        if (host.lists_used + count) * 4 > bytes {
            // Many long prompts in one step: their lists must have been read before others take their place.
            executor.device.synchronize()?;
            host.lists_used = 0;
        }
        let (begin, end) = (host.lists_used * 4, (host.lists_used + count) * 4);
        let words = host.lists.as_mut_slice()[begin..end].as_chunks_mut::<4>().0.iter_mut();
        words.zip(lists.into_iter().flatten()).for_each(|(bytes, id)| *bytes = id.to_le_bytes());
        host.lists_used += count;
        let base = self.lists.pointer();
        let starts = [0, lists[0].len(), lists[0].len() + lists[1].len()].map(|at| base + 4 * at as u64);
        let placed = [0, 1, 2].map(|list| (starts[list], lists[list].len()));
        // SAFETY: this part of the host's list is written anew only when its step was collected, or behind the
        // synchronisation above; the device's list is as long as the host's, and is read by the launch before the next
        // copy into it, in stream order; the state is one of `max_num_seqs`.
        unsafe {
            self.slots[slot].lists.copy_part_to(begin..end, base, executor.device.stream())?;
            executor.reset_token_state(state, placed)
        }
    }

    /// For rows with a bias, or before `min_tokens`.
    pub(super) fn send_bias(&mut self, slot: usize) -> Result<(), CudaError> {
        let count = self.bias.len();
        if count == 0 {
            return Ok(());
        }
        let (stream, surfaces) = (self.model.executor.device.stream(), &self.model.executor.surfaces);
        let host = &mut self.slots[slot].bias;
        let (tokens, values) = host.as_mut_slice()[..count * 8].split_at_mut(count * 4);
        let places = tokens.as_chunks_mut::<4>().0.iter_mut().zip(values.as_chunks_mut::<4>().0);
        for ((token, value), bias) in places.zip(&self.bias) {
            *token = bias.0.to_le_bytes();
            *value = bias.1.to_le_bytes();
        }
        // SAFETY: either range has room for `bias_entries`, which `sample_row` keeps to; the slot's memory is not written
        // before its step was collected.
        unsafe {
            host.copy_part_to(0..count * 4, surfaces.bias_tokens, stream)?;
            host.copy_part_to(count * 4..count * 8, surfaces.bias_values, stream)
        }
    }
}
