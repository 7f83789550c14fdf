//! One row's sampling parameters in the layout that `sample.cu` reads.

/// 32-bit words of a [`SampleRow`].
pub const SAMPLE_ROW_WORDS: usize = 16;

/// Mirrors `SampleRow` of `logits.cuh`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleRow {
    /// Below 1e-5 (or not a number): greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Slot of the token state, for penalties and bias; `None` when the row has neither.
    pub state_slot: Option<u32>,
    pub seed: u64,
    /// Tokens generated so far.
    pub step: u64,
    /// The row's part of the packed bias lists; forbidden tokens are there with minus infinity.
    pub bias_begin: u32,
    pub bias_count: u32,
    /// `Some(n)`: logprob and rank of the chosen token and the n likeliest.
    pub logprobs: Option<u32>,
}

impl SampleRow {
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        state_slot: None,
        seed: 0,
        step: 0,
        bias_begin: 0,
        bias_count: 0,
        logprobs: None,
    };

    /// What a padding row looks like: the kernel leaves it alone.
    pub const PADDING: [i32; SAMPLE_ROW_WORDS] = [0; SAMPLE_ROW_WORDS];

    /// As the kernel reads it.
    pub fn words(&self) -> [i32; SAMPLE_ROW_WORDS] {
        let float = |x: f32| x.to_bits().cast_signed();
        let optional = |x: Option<u32>| x.map_or(-1, |v| i32::try_from(v).unwrap_or(i32::MAX));
        let whole = |x: u32| i32::try_from(x).unwrap_or(i32::MAX);
        let (low, high) = (|x: u64| (x as u32).cast_signed(), |x: u64| ((x >> 32) as u32).cast_signed());
        [
            float(self.temperature),
            whole(self.top_k),
            float(self.top_p),
            float(self.min_p),
            float(self.repetition_penalty),
            float(self.presence_penalty),
            float(self.frequency_penalty),
            optional(self.state_slot),
            low(self.seed),
            high(self.seed),
            low(self.step),
            high(self.step),
            whole(self.bias_begin),
            whole(self.bias_count),
            optional(self.logprobs),
            1,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stand_where_the_kernel_reads_them() {
        let row = SampleRow {
            temperature: 1.0,
            top_k: u32::MAX,
            seed: 0x1_0000_0002,
            step: 3,
            logprobs: Some(5),
            ..SampleRow::GREEDY
        };
        let words = row.words();
        assert_eq!(words[0], 0x3f80_0000);
        assert_eq!((words[1], words[7], words[14], words[15]), (i32::MAX, -1, 5, 1));
        assert_eq!((words[8], words[9], words[10], words[11]), (2, 1, 3, 0));
        assert_eq!(SampleRow::PADDING[15], 0);
    }
}
